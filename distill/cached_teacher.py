"""Cached teacher logits.

Shapes: B batch, C classes. A cached teacher reads the logits of a batch from a store. It computes
and writes missing rows with a network, if it has one.
"""

import contextlib
import logging
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
from distill.teacher_classes import classes_of_teacher, match_outputs

_logger = logging.getLogger(__name__)
CYCLE = "--teacher-cache-views"  # the manifest's key for the number of epochs in the cycle
TRANSFORM = flag_table.with_fact(flags.TRANSFORM)
MIXING = flag_table.with_fact(flags.MIXING)
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pillow", "simplejpeg")


class CachedTeacher:
    """A teacher's logits from a store; missing rows are computed by a network and written.

    network: computes missing rows, or None. build_network: builds it when the first damaged row of
        a complete cache is read; None makes such a row an error.
    epoch_rows: rows of an epoch of the cycle; needed: how many of them whole batches take.
    verify: compare every row with the network's logits instead of writing.
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
        build_network: Callable[[], Teacher | Teachers] | None = None,
    ) -> None:
        self.store, self.network, self.verify = store, network, verify
        self.build_network = build_network
        self.epoch_rows, self.needed, self.batch_size = epoch_rows, needed, batch_size
        self.rank, self.world_size = rank, world_size

    def __call__(self, images: Tensor, key: BatchKey | None = None) -> Tensor:
        """images: (B, 3, height, width); key: the batch, in an epoch of the cycle.

        Returns logits (B, C). Raises UserError for rows that are missing or, verifying, wrong.
        """
        if key is None:
            raise ValueError("cached logits belong to a batch of training: give its BatchKey")
        position = key.micro_step * self.batch_size + np.arange(len(images))
        rows = key.epoch * self.epoch_rows + position * self.world_size + self.rank
        if self.verify:
            self._check(rows, images, key)
        elif not (done := self.store.done(rows)).all():
            self._write(rows, images, key, done)
        return to_device(self.store.read(rows), images.device, pin=True)

    def _write(self, rows: np.ndarray, images: Tensor, key: BatchKey, done: np.ndarray) -> None:
        if self.network is None and self.build_network is not None:
            _logger.warning(
                "--teacher-cache %s: damaged rows in batch %d of epoch %d are recomputed",
                self.store.folder,
                key.micro_step,
                key.epoch,
            )
            self.network = self.build_network()
        if self.network is None:
            raise self._unusable(rows, key, done)
        self.store.write(rows, self.network(images, key))

    def _check(self, rows: np.ndarray, images: Tensor, key: BatchKey) -> None:
        if self.network is None:
            raise ValueError("verify needs the teacher's network")
        if not (done := self.store.done(rows)).all():
            raise self._unusable(rows, key, done)
        same = self.store.agrees(rows, self.network(images, key), self.network.precision)
        if not same.all():
            raise UserError(
                f"--teacher-cache {self.store.folder}: {int((~same).sum())} of {len(rows)} rows in "
                f"batch {key.micro_step} of epoch {key.epoch} differ from the teacher's logits "
                f"(written on {self.store.written_on}); delete the folder and write it again"
            )

    def _unusable(self, rows: np.ndarray, key: BatchKey, done: np.ndarray) -> UserError:
        """Return the error for rows of a batch that are missing or damaged."""
        damaged = int((self.store.marked(rows) & ~done).sum())
        parts = [f"{self.missing()} of {self.size} rows are missing"] * bool(self.missing())
        parts += [f"{damaged} damaged in batch {key.micro_step} of epoch {key.epoch}"] * bool(
            damaged
        )
        return UserError(
            f"--teacher-cache {self.store.folder}: {', '.join(parts)}; compute them with "
            "--teacher-cache-mode write"
        )

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

    def missing_shares(self) -> list[float]:
        rows = self.store.missing_by_epoch(self.cycle_epochs, self.needed)
        return [missing / self.needed for missing in rows]

    def logits_only(self) -> LogitsOnly | None:
        return self.network.logits_only() if self.network is not None else None

    def fill(self, query_epoch: Callable[[int], None]) -> None:
        """Write or verify the whole cycle.

        query_epoch: calls this teacher on all batches of the epoch with the given number.
        """
        for epoch in range(self.cycle_epochs):
            query_epoch(epoch)
        self.store.flush()
        distributed.barrier()

    def describe(self) -> str:
        missing = self.missing()
        state = f"{missing} of {self.size} still to write" if missing else f"complete ({self.size})"
        cycle = f"{self.cycle_epochs} epoch{'s' * (self.cycle_epochs != 1)}"
        return (
            f"cached logits in {self.store.folder}, a cycle of {cycle}, {self.store.keep}, "
            f"{self.store.size() / 2**20:.1f} MiB, {state}; "
            + ("no network is loaded" if self.network is None else self.network.describe())
        )


def build_cached_teacher(
    args: Namespace,
    data: Loaders,
    student_inputs: InputConfig,
    processes: Processes,
    amp_dtype: torch.dtype | None = None,
) -> CachedTeacher:
    """Return the teacher of the command line behind its cache; a complete one needs no network.

    Raises UserError for a cache that was written with other settings, naming those that differ.
    """
    sampler, mode = data.train_sampler, args.teacher_cache_mode
    if sampler is None:
        raise UserError(
            f"--teacher-cache: {args.data_set} is streamed data, which has no fixed order; leave "
            "out --teacher-cache"
        )
    sources = build_sources(args)
    if args.teacher_logits == "apart" and len(sources) > 1:
        raise UserError(
            "--teacher-cache stores the mean of several teachers; leave out --teacher-logits "
            "apart, or the cache"
        )
    cycle = args.teacher_cache_views or _cycle_epochs(args.teacher_cache, mode, args.epochs)
    store = cache_store.Store(
        args.teacher_cache,
        rows=cycle * sampler.kept,
        num_classes=data.num_classes,
        keep=cache_store.read_topk(args.teacher_cache_topk, data.num_classes),
        fingerprint={CYCLE: cycle}
        | build_cache_fingerprint(args, data, student_inputs, processes, amp_dtype),
        may_create=mode in ("auto", "write"),
        written_on=_device_and_dtype(processes.device, amp_dtype),
    )
    needed = len(data.train) * args.batch_size * processes.world_size
    build = partial(
        build_teacher,
        args,
        data.num_classes,
        student_inputs,
        processes.device,
        amp_dtype,
        classes=data.classes,
    )
    is_complete = not store.missing(cycle, needed)
    reads = mode == "read" or (mode == "auto" and is_complete)
    # One process alone may build the network later, unless that waits for the other processes.
    is_local = processes.world_size == 1 or all(Path(source.path).is_file() for source in sources)
    return CachedTeacher(
        store,
        None if reads else build(),
        epoch_rows=sampler.kept,
        needed=needed,
        batch_size=args.batch_size,
        rank=processes.rank,
        world_size=processes.world_size,
        verify=mode == "verify",
        build_network=build if mode == "auto" and is_local else None,
    )


def _cycle_epochs(folder: str, mode: str, epochs: int) -> int:
    """Return the length of the cycle without a flag: the cache's own, for a new one `epochs`.

    Raises UserError for a run with more epochs than the cycle: its augmentation would repeat, which
    a live teacher's does not. The modes read and verify accept it.
    """
    found = (cache_store.read_manifest(folder) or {}).get(CYCLE, epochs)
    if found >= epochs or mode == "verify":
        return found
    if mode != "read":
        raise UserError(
            f"--teacher-cache {folder}: holds {found} epochs, --epochs is {epochs}; repeat them "
            f"with {CYCLE} {found}, or give another folder"
        )
    _logger.info(
        "--teacher-cache holds %d epochs, which repeat in the %d epochs of this run", found, epochs
    )
    return found


def _device_and_dtype(device: torch.device, amp_dtype: torch.dtype | None) -> dict[str, str]:
    """Return what the manifest records of the machine that computes the logits."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "dtype": str(amp_dtype or torch.float32).removeprefix("torch.")}


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def build_cache_fingerprint(
    args: Namespace,
    data: Loaders,
    student_inputs: InputConfig,
    processes: Processes,
    amp_dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Return all that determines the teacher's logits of a batch, as plain values.

    Settings of the evaluation are not part of it. A new flag that changes training images belongs
    here; tests/test_cache.py lists every flag. The keys are part of the file format.
    """
    mixes = is_mixing(args.mixup, args.cutmix, args.cutmix_minmax)
    found: dict[str, Any] = {
        "teacher": [source.name for source in build_sources(args)],
        "teacher weights": build_identity(args),
        "teacher shares": args.teacher_weight or [],
        "teacher precision": f"{amp_dtype or 'float32'} on {processes.device.type}",
        "teacher compiled": args.torchcompile or "no",
        "data": data.fingerprint(of_train=True),
        "form of the data": data.form,
        "seed": args.seed,
        "views of a picture in an epoch": data.train_sampler.repeats,  # type: ignore[union-attr]
        "mirrored": data.mirrors,
        "input": _of_training(student_inputs),
        "mixing": {name: getattr(args, name) for name in MIXING} if mixes else "none",
    }
    if data.unlabelled:
        found["unlabelled data"] = data.unlabelled
    if mixes:  # an image is mixed with another one of its batch
        found["mixing"]["processes"] = processes.world_size
    if outputs := _build_reordered_outputs(args, data):
        found["teacher outputs"] = outputs
    found |= {name: getattr(args, name) for name in TRANSFORM}
    on_device = args.augment_on == "device"
    version = image_ops.DEVICE_VERSION if on_device else image_ops.VERSION
    found["version of our pixels"] = version
    return found | {f"version of {name}": _version(name) for name in LIBRARIES}


def _build_reordered_outputs(args: Namespace, data: Loaders) -> dict[str, list[int]]:
    """Return the outputs of each teacher that match the student's, if the order differs."""
    found = {}
    for index, source in enumerate(build_sources(args)):
        chosen = None
        with contextlib.suppress(UserError):  # raised where the network is built
            known = classes_of_teacher(source.name, source.path) if source.classifies else None
            chosen = match_outputs(source.name, known, data.num_classes, data.classes).chosen
        if chosen is not None:
            found[f"{index} {source.name}"] = list(chosen)
    return found


def _of_training(inputs: InputConfig) -> dict[str, Any]:
    """Return the settings of `inputs` that change a training image, as plain values."""
    found = {"size": list(inputs.input_size), "mean": list(inputs.mean), "std": list(inputs.std)}
    return found | ({"interpolation": inputs.interpolation} if inputs.is_small else {})
