"""Build the data sets and loaders of a run from its settings."""

import hashlib
import logging
import os
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset

from base.distributed import Processes, leave_signals_to_parent
from base.errors import UserError
from base.flag_table import has_teacher
from base.text import printable
from data.byte_batches import DeferNormalize
from data.folder_parts import find_validation
from data.image_dataset import (
    ImageDataset,
    Stream,
    missing_classes,
    number_labels,
    present_outputs,
)
from data.image_source import Shards, Source
from data.labels import ModelClasses
from data.loaders import ImageLoader
from data.samplers import EvalSampler, SeededViews, TrainSampler, derive_seed
from data.sources import Part, open_source
from data.transforms import InputConfig, build_transform

_logger = logging.getLogger(__name__)

REPEATS = 3  # views of an image in an epoch of repeated augmentation (DeiT)
# A core augments 500 to 1,300 images per second at 224 px (docs/performance.md). 32 workers feed a
# GPU that trains on 16,000 images per second; more only cost memory and start-up time.
MAX_WORKERS = 32


def build_dataset(
    is_train: bool, args: Namespace, inputs: InputConfig, val_fraction: float | None = None
) -> tuple[ImageDataset | Stream, int]:
    """Return the train or evaluation data of `args`, and how many classes the student needs.

    The data set returns (tensor (3, H, W) normalised, int label) by index. It has `classes` (list
    of names or None), `description` (one line) and `skipped()`. Shards (wds/, tfds/) give an
    iterable one instead. No image is decoded here.
    val_fraction: the held-out share without --val-fraction; see `folder_parts.open_part`.
    Raises UserError for what is not there, not complete, or does not fit --nb-classes.
    """
    part = Part(
        is_train=is_train,
        inat_category=args.inat_category,
        val_split=args.val_split,
        seed=derive_seed(args.seed, "reader") % 2**31,
        batch_size=args.batch_size,
        val_fraction=args.val_fraction if args.val_fraction is not None else val_fraction,
        val_labels=args.val_labels,
    )
    name, root = str(args.data_set), str(args.data_path)
    bad_images = "fail"
    if args.on_bad_image == "skip":
        bad_images = "replace" if is_train else "leave out"
    source = open_source(name, root, part)
    if is_train and (args.unlabelled_path or args.labels_per_class):
        source = build_unlabelled(args, source)
    hflip = 0.5 if source.mirrors else 0.0
    transform = build_transform(is_train, args, inputs, hflip=hflip)
    if is_train and args.augment_on == "device":
        transform = DeferNormalize(transform, augments=True)
    num_classes = count_classes(source.classes, args.nb_classes, source.what)
    if isinstance(source, Shards):
        return Stream(source, transform, num_classes), num_classes
    return ImageDataset(source, transform, num_classes, bad_images), num_classes


def build_unlabelled(args: Namespace, source: Source) -> Source:
    """Return the training images with the labels that are used, and the unlabelled ones.

    Without a teacher the images that lose their labels are left out.
    Raises UserError for streamed data, and for unlabelled data that cannot be read.
    """
    from data.unlabelled import WithUnlabelled, keep_labels, open_unlabelled  # few runs have them

    if isinstance(source, Shards):
        raise UserError(
            f"--data-set {args.data_set}: streamed data has no index, so it cannot be joined with "
            "unlabelled images; prepare it with tools/prepare_data.py"
        )
    others: list[Source] = []
    if args.labels_per_class:
        uses_others = has_teacher(args) and not args.cosub
        source, others = keep_labels(source, args.labels_per_class, keep_others=uses_others)
    others += [open_unlabelled(path) for path in args.unlabelled_path]
    return WithUnlabelled(source, others, args.unlabelled_ratio) if others else source


def count_classes(classes: list[str] | None, wanted: int | None, what: str) -> int:
    """Return how many classes the student needs: `wanted` (--nb-classes), else those found."""
    if classes is None and wanted is None:
        raise UserError(f"{what}: its classes are unknown; give their number (--nb-classes)")
    if classes is not None and wanted is not None and wanted < len(classes):
        raise UserError(
            f"--nb-classes {wanted}: the {what} have {len(classes)} classes; "
            "leave it out, or give at least as many"
        )
    return wanted if wanted is not None else len(classes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Loaders:
    """The batches of a run. `train` and `train_sampler` are None if nothing trains.

    Batches are images (B, 3, H, W) float32 and labels (B,) int64, which number the outputs of the
    model. On a GPU, and with --augment-on device, the images are `byte_batches.PendingImages`.
    num_classes: the outputs of the model; classes: their names, in order. present: the outputs with
    evaluation images, or None if all have some. The train sampler is None for streamed data too.
    """

    train: ImageLoader | None
    val: ImageLoader
    num_classes: int
    classes: list[str] | None
    train_sampler: TrainSampler | None
    data: tuple[ImageDataset | Stream, ...]
    present: list[int] | None = None

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Choose the order and the views of the next pass over `train`, from batch `done` on."""
        if self.train_sampler is not None:
            self.train_sampler.set_epoch(epoch)
            self.train_sampler.set_start(done * self.train.batch_size)
        for data in self.data:
            if isinstance(data, Stream):
                data.set_epoch(epoch)

    def fingerprint(self, *, of_train: bool = False) -> str:
        """Return the number of images and a hash of images and labels, without folder names.

        of_train: of the training data alone. `Source.identity` describes what is hashed.
        """
        digest, parts = hashlib.sha256(), self.data[:1] if of_train else self.data
        for data in parts:
            digest.update(repr((len(data), data.num_classes, data.source.classes)).encode())
            digest.update(data.source.identity())
        counts = " + ".join(str(len(data)) for data in parts)
        return f"{counts} pictures, {digest.hexdigest()[:12]}"

    @property
    def form(self) -> str:
        """How the training images are stored."""
        return self.data[0].source.form

    @property
    def unlabelled(self) -> str:
        """The number of unlabelled training images and a hash of them, "" if there are none."""
        return self.data[0].source.identity_of_unlabelled()

    @property
    def mirrors(self) -> bool:
        """Whether training images may be mirrored."""
        return self.data[0].source.mirrors

    def skipped(self) -> int:
        """Return how many different images this process and its workers could not read."""
        return sum(data.skipped() for data in self.data)

    def describe(self) -> str:
        """Return the data, the size of an epoch and the number of workers in one line."""
        words = []
        if self.train is not None:
            words.append(f"train on {self.data[0].description}")
            sampler = self.train_sampler
            if sampler is not None and sampler.repeats > 1:
                epoch = len(sampler) * sampler.num_replicas
                words[0] += f" (an epoch: {epoch} views, {sampler.repeats} of an image)"
        words.append(f"evaluate on {self.data[-1].description}")
        workers = max(self.train.num_workers if self.train is not None else 0, self.val.num_workers)
        words.append(f"{workers or 'no'} worker{'s' * (workers != 1)}")
        return "; ".join(words)


def build_loaders(
    args: Namespace,
    inputs: InputConfig,
    processes: Processes,
    trained: ModelClasses | None = None,
    val_fraction: float | None = None,
) -> Loaders:
    """Return the loaders of a run; with args.eval the train data is not touched.

    trained: the outputs of the weights that the run starts from, if it keeps their head. The
    labels then number these outputs; without, the classes of the data in their reader's order.
    val_fraction: the held-out share without --val-fraction; None: `folder_parts.VAL_FRACTION`.
    Training drops the last, smaller batch; evaluation is exact, with batches 1.5 times as large.
    Every image's randomness depends on (seed, view, index) alone, whatever the workers.
    Raises UserError, before any image is read, for missing or empty folders, class lists that
    differ, and a batch that an epoch cannot fill.
    """
    data, notes = _build_data(args, inputs, trained, val_fraction)
    val_data, is_main = data[-1], processes.rank == 0
    if isinstance(val_data, Stream) and processes.world_size > 1:
        notes.append(
            f"evaluation on shards in {processes.world_size} processes may count an image twice or "
            "not at all; for exact numbers use --eval in one process"
        )
    for note in notes * is_main:
        _logger.warning("%s", note)
    workers = args.num_workers
    if workers is None:
        workers = auto_workers(processes.launcher, os.environ, cores_here())
    make = partial(
        _build_loader,
        seed=args.seed,
        workers=workers,
        timeout_min=args.loader_timeout,
        pin_memory=args.pin_mem and processes.device.type == "cuda",
        rank=processes.rank,
        device=processes.device,
    )
    train = sampler = None
    if not args.eval:
        sampler = _build_train_sampler(args, data[0], processes)
        train = make(data[0], sampler, batch_size=args.batch_size, is_train=True)
        check_batch_fits(args.batch_size, train, data[0].description, processes.world_size)
    shard = EvalSampler(len(val_data), processes.world_size, processes.rank)
    val = make(
        val_data,
        shard if isinstance(val_data, ImageDataset) else None,
        batch_size=int(1.5 * args.batch_size),
        is_train=False,
    )
    return Loaders(
        train=train,
        val=val,
        num_classes=val_data.num_classes,
        classes=val_data.classes,
        train_sampler=sampler,
        data=data,
        present=present_outputs(val_data),
    )


def _build_data(
    args: Namespace,
    inputs: InputConfig,
    trained: ModelClasses | None,
    val_fraction: float | None,
) -> tuple[tuple[ImageDataset | Stream, ...], list[str]]:
    """Return the training data, unless with --eval, and the evaluation data; and what to print."""
    check_val_fraction(args)
    data = [] if args.eval else [build_dataset(True, args, inputs)[0]]
    if data:
        check_has_classes(data[0])
    data.append(build_dataset(False, args, inputs, val_fraction)[0])
    train, val = data[0], data[-1]
    if len(val) == 0:
        raise UserError(f"the evaluation data is empty: {val.description}")
    notes = [note for part in data for note in part.source.notes()]
    if trained is not None:
        notes += number_labels(data, trained, args.nb_classes)
    elif train is not val and train.classes and val.classes:
        own = ModelClasses(train.num_classes, tuple(train.classes), "the training data")
        notes += number_labels([val], own, args.nb_classes)
    return tuple(data), notes + missing_classes(val, present_outputs(val))


def _build_train_sampler(
    args: Namespace, data: ImageDataset | Stream, processes: Processes
) -> TrainSampler | None:
    """Return the order of the training images, or None for streamed data."""
    if isinstance(data, Stream):
        return None
    return TrainSampler(
        len(data),
        num_replicas=processes.world_size,
        rank=processes.rank,
        seed=args.seed,
        repeats=REPEATS if args.repeated_aug else 1,
    )


def _build_loader(
    data: ImageDataset | Stream,
    sampler: TrainSampler | EvalSampler | None,
    *,
    batch_size: int,
    is_train: bool,
    seed: int,
    workers: int,
    timeout_min: float,
    pin_memory: bool,
    rank: int,
    device: torch.device,
) -> ImageLoader:
    dataset: Dataset = data
    if isinstance(data, Stream):
        data.set_workers(workers)
    else:
        dataset = SeededViews(data, seed)
        workers = min(workers, -(-len(sampler) // batch_size))  # type: ignore[arg-type]
    if device.type == "cuda" and not isinstance(data.transform, DeferNormalize):
        data.transform = DeferNormalize(data.transform)
    return ImageLoader(
        dataset,
        deferred=data.transform if isinstance(data.transform, DeferNormalize) else None,
        sampler=sampler,
        batch_size=batch_size,
        num_workers=workers,
        timeout=60 * timeout_min if workers else 0,
        pin_memory=pin_memory,
        drop_last=is_train,
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator().manual_seed(derive_seed(seed, "workers", rank)),
    )


def check_batch_fits(batch_size: int, train: DataLoader, what: str, world_size: int) -> None:
    """Raise UserError if an epoch has no whole batch."""
    if len(train) == 0:
        sampler = train.sampler
        each = len(sampler) if isinstance(sampler, TrainSampler) else len(train.dataset)
        raise UserError(
            f"--batch-size {batch_size}: larger than the {each} images that each of {world_size} "
            f"processes gets in an epoch of {what}; use --batch-size {each} or less"
        )


def check_has_classes(data: ImageDataset | Stream) -> None:
    """Raise UserError for training data of a single class, which any model gets right."""
    used = data.source.used_classes()
    used = range(data.num_classes) if used is None else used
    if len(used) < 2:
        name = data.classes[used[0]] if data.classes and used else "none"
        raise UserError(
            f"{data.source.what}: all images are of one class ({printable(name)}), so there is "
            "nothing to learn; add a folder of images for every other class"
        )


def check_val_fraction(args: Namespace) -> None:
    """Raise UserError if --val-fraction is given and nothing is held out, or everything."""
    if args.val_fraction is None or args.data_set != "IMNET":
        return
    if folder := find_validation(args.data_path):
        raise UserError(
            f"--val-fraction {args.val_fraction}: nothing is held out, because there is {folder}; "
            "leave out the flag, or move the folder away"
        )
    if args.val_fraction == 1 and not args.eval:
        raise UserError("--val-fraction 1: no image is left to train on; give a smaller share")


def cores_here() -> int:
    """Return the CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def auto_workers(launcher: str, environ: Mapping[str, str], cores: int) -> int:
    """Return the workers of one process: its share of the node's cores, at most `MAX_WORKERS`."""
    if launcher == "slurm" and "SLURM_CPUS_PER_TASK" in environ:
        return min(MAX_WORKERS, cores, int(environ["SLURM_CPUS_PER_TASK"]))
    tasks = {"torchrun": "LOCAL_WORLD_SIZE", "slurm": "SLURM_TASKS_PER_NODE"}.get(launcher, "")
    # Slurm writes "8(x2),4": the tasks of its nodes, the largest number first
    neighbours = int(re.split(r"\D", environ.get(tasks, "1"))[0])
    return min(MAX_WORKERS, cores // neighbours)
