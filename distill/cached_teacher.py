"""Cached teacher logits.

Shapes: B batch, C classes. A cached teacher reads the logits of a batch from a store. It computes
and writes those that are missing, if it has a network.
"""

import logging
from argparse import Namespace
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

import models
from base import distributed, flag_table, flags
from base.device import to_device
from base.distributed import Processes
from base.errors import UserError
from data import image_ops
from data.samplers import BatchKey
from data.transforms import InputConfig, is_mixing
from datasets import Loaders
from distill import cache_store
from distill.teacher import (
    LogitsOnly,
    Teacher,
    Teachers,
    build_identity,
    build_sources,
    build_teacher,
)

_logger = logging.getLogger(__name__)
VIEWS = "--teacher-cache-views"
TRANSFORM = flag_table.with_fact(flags.TRANSFORM)
MIXING = flag_table.with_fact(flags.MIXING)
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg")


class CachedTeacher:
    """A teacher's logits from a store; missing ones are computed by `network` and written.

    epoch_rows: rows of an epoch of the cycle; needed: how many of them whole batches take.
    The row of an image is its position in the common order of all processes, in its epoch of the
    cycle. New rows are read back after they are written, so that the run that writes and the runs
    that read train on the same numbers.
    """

    members: tuple[Teacher, ...] = ()  # features are not cached
    weights: tuple[float, ...] = ()

    def __init__(
        self,
        store: cache_store.Store,
        network: Teacher | Teachers | None,
        *,
        epoch_rows: int,
        needed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        verify: bool = False,
    ) -> None:
        self.store, self.network, self.verify = store, network, verify
        self.epoch_rows, self.needed, self.batch_size = epoch_rows, needed, batch_size
        self.rank, self.world_size = rank, world_size

    def __call__(self, images: Tensor, key: BatchKey | None = None) -> Tensor:
        """images: (B, 3, height, width); key: the batch, in an epoch of the cycle.

        Returns logits (B, C). Raises UserError for rows that are missing or, verifying, wrong.
        """
        if key is None:
            raise ValueError("cached logits belong to a batch of training: give its BatchKey")
        epoch, micro = key
        order = micro * self.batch_size + np.arange(len(images))
        rows = epoch * self.epoch_rows + order * self.world_size + self.rank
        done = self.store.done(rows)
        if not done.all():
            if self.network is None or self.verify:
                raise UserError(
                    f"--teacher-cache {self.store.folder}: {self.missing()} of {self.size} rows "
                    f"are missing, and {np.count_nonzero(~done)} missing or damaged in batch "
                    f"{micro} of epoch {epoch}; go on writing with --teacher-cache-mode write"
                )
            self.store.write(rows, self.network(images, key))
        logits = self.store.read(rows)
        if self.verify:
            same = self.store.agrees(rows, self.network(images, key))
            if not same.all():
                raise UserError(
                    f"--teacher-cache {self.store.folder}: {int((~same).sum())} of {len(rows)} "
                    f"rows in batch {micro} of epoch {epoch} are not what the teacher "
                    "says; delete it"
                )
        return to_device(logits, images.device, pin=True)

    @property
    def cycle_epochs(self) -> int:
        """After how many epochs augmentation and mixing repeat."""
        return self.store.rows // self.epoch_rows

    @property
    def size(self) -> int:
        """How many rows whole batches need in the whole cycle."""
        return self.cycle_epochs * self.needed

    def missing(self) -> int:
        """Return how many of the rows that whole batches need are not written."""
        return self.store.missing(self.cycle_epochs, self.needed)

    def logits_only(self) -> LogitsOnly | None:
        return self.network.logits_only() if self.network is not None else None

    def fill(self, query_epoch: Callable[[int], None]) -> None:
        """Write or verify the whole cycle. query_epoch: calls this teacher on all batches of an
        epoch, given its number."""
        for epoch in range(self.cycle_epochs):
            query_epoch(epoch)
        self.store.flush()
        distributed.barrier()

    def describe(self) -> str:
        missing = self.missing()
        state = f"{missing} of {self.size} still to write" if missing else f"complete ({self.size})"
        return (
            f"answers in {self.store.folder}, {self.cycle_epochs} epochs of views,"
            f" {self.store.keep}, {self.store.size() / 2**20:.1f} MiB, {state}; "
            + ("no network is loaded" if self.network is None else self.network.describe())
        )


def build_cached_teacher(
    args: Namespace,
    loaders: Loaders,
    student_inputs: InputConfig,
    processes: Processes,
    amp_dtype: torch.dtype | None = None,
) -> CachedTeacher:
    """Return the teacher of the command line behind its cache; a complete one needs no network.

    Raises UserError for a cache that was written under other settings, naming those that differ.
    """
    sampler, mode = loaders.train_sampler, args.teacher_cache_mode
    if sampler is None:
        raise UserError(f"--teacher-cache: {args.data_set} is a stream, whose order is not known")
    if args.teacher_logits == "apart" and len(build_sources(args)[0]) > 1:
        raise UserError(
            "--teacher-cache keeps the mean of several teachers, not --teacher-logits "
            "apart; leave out one of them"
        )
    epoch_rows = sampler.kept
    views = args.teacher_cache_views or _pick_views(args.teacher_cache, mode, args.epochs)
    store = cache_store.Store(
        args.teacher_cache,
        rows=views * epoch_rows,
        num_classes=loaders.num_classes,
        keep=cache_store.read_topk(args.teacher_cache_topk, loaders.num_classes),
        facts={VIEWS: views} | build_facts(args, loaders, student_inputs, processes, amp_dtype),
        may_create=mode in ("auto", "write"),
    )
    needed = len(loaders.train) * args.batch_size * processes.world_size
    reads = mode == "read" or (mode == "auto" and not store.missing(views, needed))
    network = None
    if not reads:
        network = build_teacher(
            args, loaders.num_classes, student_inputs, processes.device, amp_dtype
        )
    return CachedTeacher(
        store,
        network,
        epoch_rows=epoch_rows,
        needed=needed,
        batch_size=args.batch_size,
        rank=processes.rank,
        world_size=processes.world_size,
        verify=mode == "verify",
    )


def _pick_views(folder: str, mode: str, epochs: int) -> int:
    """Return the epochs of the cycle where no flag says: the cache's own, of a new one `epochs`.

    In a longer run than the cycle the views come again, so it is not the run with the live teacher.
    Raises UserError for that, unless the mode says to read what there is.
    """
    found = (cache_store.read_manifest(folder) or {}).get(VIEWS, epochs)
    if found >= epochs or mode == "verify":
        return found
    if mode != "read":
        raise UserError(
            f"--teacher-cache {folder}: has {found} epochs of views, --epochs is {epochs}; take "
            f"them in turn with {VIEWS} {found}, or give another folder"
        )
    _logger.info(
        "--teacher-cache has %d epochs of views, which come again in these %d epochs", found, epochs
    )
    return found


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def build_facts(
    args: Namespace,
    loaders: Loaders,
    student_inputs: InputConfig,
    processes: Processes,
    amp_dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Return all that determines a teacher's answer to the image at a place, as plain values.

    What evaluation alone sees is not among it. A new flag that reaches the pixels belongs here;
    tests/test_cache.py asks of every one where it belongs.
    """
    names, _ = build_sources(args)
    source = loaders.data[0].source
    mixes = is_mixing(args.mixup, args.cutmix, args.cutmix_minmax)
    where = processes.device.type
    if where == "cpu" and amp_dtype is None and models.fast.prefers_onednn():
        where = "cpu by oneDNN"  # whose last digits are others
    facts: dict[str, Any] = {
        "teacher": list(names),
        "teacher weights": build_identity(args),
        "teacher shares": args.teacher_weight or [],
        "teacher precision": f"{amp_dtype or 'float32'} on {where}",
        "teacher compiled": args.torchcompile or "no",
        "data": loaders.fingerprint(of_train=True),
        "form of the data": source.form,
        "seed": args.seed,
        "views of a picture in an epoch": loaders.train_sampler.repeats,
        "mirrored": source.mirrors,
        "input": _of_training(student_inputs),
        "mixing": {name: getattr(args, name) for name in MIXING} if mixes else "none",
    }
    if mixes:  # partners come from the batch
        facts["mixing"]["processes"] = processes.world_size
    facts |= {name: getattr(args, name) for name in TRANSFORM}
    facts["version of our pixels"] = image_ops.VERSION
    return facts | {f"version of {name}": _version(name) for name in LIBRARIES}


def _of_training(inputs: InputConfig) -> dict[str, Any]:
    """Return what of `inputs` reaches a training image, as plain values."""
    found = {"size": list(inputs.input_size), "mean": list(inputs.mean), "std": list(inputs.std)}
    return found | ({"interpolation": inputs.interpolation} if inputs.is_small else {})
