"""Labelled images as tensors, and the loaders that bring them in batches."""

import hashlib
import logging
import numbers
import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from base.distributed import Processes, leave_signals_to_parent
from base.errors import UserError
from base.text import printable
from data.byte_batches import ByteLoader, DeferNormalize
from data.device_augment import Recorded
from data.folders import some
from data.image_ops import UNREADABLE, to_rgb
from data.image_source import Shards, Source
from data.labels import ModelClasses, map_labels
from data.samplers import EvalSampler, SeededViews, TrainSampler, derive_seed
from data.sources import Part, open_source
from data.transforms import InputConfig, Transform, build_transform

_logger = logging.getLogger(__name__)

REPEATS = 3  # views of an image in an epoch of repeated augmentation (DeiT)
# A core augments 500 to 1,300 images per second at 224 px (docs/performance.md). 32 workers feed a
# GPU that trains on 16,000 images per second; more only cost memory and start-up time.
MAX_WORKERS = 32
UNREADABLE_IN_A_ROW = 100  # more is a lost disk, not a bad image


class ImageDataset(Dataset):
    """A source and a transform: index to (tensor (3, H, W) float32, label).

    With --augment-on device, to ((pixels (3, H, W) uint8, program (S, 8)), label).

    bad_images: "fail" raises UserError naming the file; "replace" takes the next readable
    image of the source instead; "leave out" returns None, so that evaluation counts no image
    twice. Every unreadable image is counted once, also when worker processes meet it.
    """

    def __init__(
        self, source: Source, transform: Transform, num_classes: int, bad_images: str = "fail"
    ) -> None:
        self.source, self.transform, self.bad_images = source, transform, bad_images
        self.num_classes, self.classes = num_classes, source.classes
        self.outputs: tuple[int, ...] | None = None  # of the model, for each class of the source
        self.description = f"{len(source)} {source.what}, {num_classes} classes"
        marks = len(source) if bad_images != "fail" else 0
        self._last: tuple[int, tuple[Any, int]] | None = None  # repeats of an image come in a row
        self._unreadable = torch.zeros(marks, dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | None:
        tries = min(len(self), UNREADABLE_IN_A_ROW)
        for step in range(tries):
            here = (index + step) % len(self)
            try:
                image, label = self._load(here)
            except UNREADABLE as error:
                self._report(here, error)
                if self.bad_images == "leave out":
                    return None
                continue
            return self.transform(image), output_of(label, self.outputs, self.num_classes)
        raise UserError(
            f"{tries} images in a row cannot be read, from {self.source.name(index)} on; "
            "is the disk still there?"
        )

    def _load(self, index: int) -> tuple[Any, int]:
        """Return an image and its label; the same one again is not decoded again."""
        if self._last is None or self._last[0] != index:
            self._last = index, self.source.load(index)
        return self._last[1]

    def skipped(self) -> int:
        """Return how many different images could not be read so far, in all workers."""
        return int(self._unreadable.sum())

    def _report(self, index: int, error: Exception) -> None:
        name, reason = self.source.name(index), " ".join(str(error).split())
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        if self.bad_images == "fail":
            raise UserError(
                f"image {name} cannot be read: {reason or type(error).__name__}; "
                "mend or remove it, or use --on-bad-image skip"
            ) from error
        if not self._unreadable[index]:
            self._unreadable[index] = True
            _logger.warning("image %s cannot be read: %s; skipped", name, reason)


def output_of(label: Any, outputs: Sequence[int] | None, num_classes: int) -> int:
    """Return the model's output for the label of an image. outputs: of each class, or None."""
    if outputs is None:
        return check_label(label, num_classes)
    return outputs[check_label(label, len(outputs))]


def check_label(label: Any, num_classes: int) -> int:
    """Return the label as an int. Raises UserError if it is none of the `num_classes` classes."""
    if not isinstance(label, numbers.Integral) or not 0 <= label < num_classes:
        raise UserError(
            f"label {label}: must be a class number from 0 to {num_classes - 1}; "
            "if there are more classes, give their number with --nb-classes"
        )
    return int(label)


class Stream(IterableDataset):
    """timm's reader of shards (wds, tfds): images in the order in which they come.

    There are no indices, so no repeated augmentation, no exact resume, no seed per image; in
    several processes the reader shares the shards, and evaluation counts what comes. The reader
    leaves out bad images, with a warning, whatever --on-bad-image says.
    """

    def __init__(self, shards: Shards, transform: Transform, num_classes: int) -> None:
        self.source, self.dataset, self.classes = shards, shards.dataset, shards.classes
        self.transform, self.num_classes = transform, num_classes
        self.outputs: tuple[int, ...] | None = None
        self.description = (
            f"{len(self.dataset)} images streamed from {shards.what}, {num_classes} classes"
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for image, label in self.dataset:
            label = output_of(label, self.outputs, self.num_classes)
            yield self.transform(to_rgb(image)), label

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def set_workers(self, num_workers: int) -> None:
        """Tell the reader how many workers share its shards; its length depends on it."""
        self.dataset.set_loader_cfg(num_workers=num_workers)

    def skipped(self) -> int:
        """Return 0: timm's readers leave out bad images without counting them."""
        return 0


def build_dataset(
    is_train: bool, args: Namespace, inputs: InputConfig
) -> tuple[ImageDataset | Stream, int]:
    """Return the train or evaluation data of `args`, and how many classes the student needs.

    The data set gives (tensor (3, H, W) normalised, int label) by index, and has `classes` (list
    of names or None), `description` (one line) and `skipped()`. Shards (wds/, tfds/) give an
    iterable one instead. No image is decoded here.
    Raises UserError for what is not there, not complete, or does not fit --nb-classes.
    """
    part = Part(
        is_train=is_train,
        inat_category=args.inat_category,
        val_split=args.val_split,
        seed=derive_seed(args.seed, "reader") % 2**31,
        batch_size=args.batch_size,
    )
    name, root = str(args.data_set), str(args.data_path)
    bad_images = "fail"
    if args.on_bad_image == "skip":
        bad_images = "replace" if is_train else "leave out"
    source = open_source(name, root, part)
    hflip = 0.5 if source.mirrors else 0.0
    transform = build_transform(is_train, args, inputs, hflip=hflip)
    if is_train and args.augment_on == "device":
        transform = Recorded(transform)
    if isinstance(source, Shards):
        num_classes = count_classes(source.classes, args.nb_classes, source.what)
        return Stream(source, transform, num_classes), num_classes
    num_classes = count_classes(source.classes, args.nb_classes, source.what)
    return ImageDataset(source, transform, num_classes, bad_images), num_classes


def count_classes(classes: list[str] | None, wanted: int | None, what: str) -> int:
    """Return how many classes the student needs: `wanted` (--nb-classes), else those found."""
    if classes is None and wanted is None:
        raise UserError(f"{what}: it does not tell its classes; give their number (--nb-classes)")
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
    model. num_classes: its outputs; classes: their names, in order. present: the outputs with
    evaluation images, or None if all have some. The train sampler is None for streamed data too.
    """

    train: DataLoader | None
    val: DataLoader
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
        """Return which images have which labels, in a few words, wherever the folders lie.

        of_train: those of training alone. How sure it is of the pixels, each source says.
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
    def mirrors(self) -> bool:
        """Whether training images may be mirrored."""
        return self.data[0].source.mirrors

    def skipped(self) -> int:
        """Return how many different images this process and its workers could not read."""
        return sum(data.skipped() for data in self.data)

    def describe(self) -> str:
        """Return one line: what there is, how much of it an epoch takes, who loads it."""
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


class EvalLoader(DataLoader):
    """A loader whose images may be left out (None), whole batches included."""

    def __init__(self, dataset: Dataset, **options: Any) -> None:
        super().__init__(dataset, collate_fn=collate_present, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return (batch for batch in super().__iter__() if batch is not None)


class DeviceLoader(DataLoader):
    """A loader whose workers crop and draw, and whose batches are augmented on `device`."""

    def __init__(
        self, dataset: Dataset, *, recorded: Recorded, device: torch.device, **options: Any
    ):
        super().__init__(dataset, **options)
        self.carry_out, self.device = recorded.carry_out, device

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return map(self.finish, super().__iter__())

    def finish(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the images (B, 3, H, W) and labels (B,) of a batch that workers have begun."""
        (images, programs), labels = batch
        return self.carry_out(images, programs, self.device), labels


def collate_present(samples: list[Any]) -> Any:
    """Stack the samples that are not None; None if there is none."""
    present = [sample for sample in samples if sample is not None]
    return default_collate(present) if present else None


def build_loaders(
    args: Namespace,
    inputs: InputConfig,
    processes: Processes,
    trained: ModelClasses | None = None,
) -> Loaders:
    """Return the loaders of a run; with args.eval the train data is not touched.

    trained: the outputs of the weights that the run starts from, if it keeps their head. The
    labels then number these outputs; without, the classes of the data in their reader's order.
    Training drops the last, smaller batch; evaluation is exact, with batches 1.5 times as large.
    Every image's randomness depends on (seed, view, index) alone, whatever the workers.
    Raises UserError, before any image is read, for missing or empty folders, class lists that
    differ, and a batch that an epoch cannot fill.
    """
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
    train_data = train = sampler = None
    if not args.eval:
        train_data, _ = build_dataset(True, args, inputs)
        check_has_classes(train_data)
    val_data, _ = build_dataset(False, args, inputs)
    if len(val_data) == 0:
        raise UserError(f"the evaluation data is empty: {val_data.description}")
    data = (train_data, val_data) if train_data is not None else (val_data,)
    notes = [note for part in data for note in part.source.notes()]
    if trained is not None:
        notes += number_labels(data, trained, args.nb_classes)
    elif train_data is not None and train_data.classes and val_data.classes:
        names, origin = tuple(train_data.classes), "the training data"
        own = ModelClasses(train_data.num_classes, names, origin)
        notes += number_labels([val_data], own, args.nb_classes)
    present = present_outputs(val_data)
    notes += missing_classes(val_data, present)
    if processes.rank == 0:
        for note in notes:
            _logger.warning("%s", note)
    if train_data is not None:
        if isinstance(train_data, ImageDataset):
            sampler = TrainSampler(
                len(train_data),
                num_replicas=processes.world_size,
                rank=processes.rank,
                seed=args.seed,
                repeats=REPEATS if args.repeated_aug else 1,
            )
        train = make(train_data, sampler, batch_size=args.batch_size, is_train=True)
        if len(train) == 0:
            each = len(sampler) if sampler is not None else len(train_data)
            raise UserError(
                f"--batch-size {args.batch_size}: larger than the {each} images that each of "
                f"{processes.world_size} processes sees in an epoch of {train_data.description}; "
                f"use --batch-size {each} or less"
            )
    if isinstance(val_data, Stream) and processes.world_size > 1 and processes.rank == 0:
        _logger.warning(
            "evaluation on shards in %d processes may count an image twice or not at all; "
            "for exact numbers use --eval in one process",
            processes.world_size,
        )
    shard = EvalSampler(len(val_data), processes.world_size, processes.rank)
    val = make(
        val_data,
        shard if isinstance(val_data, ImageDataset) else None,
        batch_size=int(1.5 * args.batch_size),
        is_train=False,
    )
    num_classes, classes = val_data.num_classes, val_data.classes
    return Loaders(train, val, num_classes, classes, sampler, data, present)


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
) -> DataLoader:
    dataset: Dataset = data
    if isinstance(data, Stream):
        data.set_workers(workers)
    else:
        dataset = SeededViews(data, seed)
        workers = min(workers, -(-len(sampler) // batch_size))  # type: ignore[arg-type]
    kind: Callable[..., DataLoader] = DataLoader if is_train else EvalLoader
    if isinstance(data.transform, Recorded):
        kind = partial(DeviceLoader, recorded=data.transform, device=device)
    elif is_train and device.type == "cuda":
        data.transform = DeferNormalize(data.transform)
        kind = partial(ByteLoader, deferred=data.transform, device=device)
    return kind(
        dataset,
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


def number_labels(
    data: Sequence[ImageDataset | Stream], model: ModelClasses, nb_classes: int | None
) -> list[str]:
    """Let the labels of `data` number the outputs of `model`; return what to print.

    Raises UserError for classes that the model does not have.
    """
    if nb_classes is not None and nb_classes != model.count:
        raise UserError(
            f"--nb-classes {nb_classes}: {model.origin} has {model.count} outputs; leave it out"
        )
    notes = []
    for part in data:
        names = part.source.classes
        count = len(names) if names else model.count
        found = map_labels(names, count, part.source.what, model, given=nb_classes)
        part.outputs, part.num_classes = found.outputs, model.count
        part.classes = list(found.names) if found.names else names
        notes += [found.note] if found.note and found.note not in notes else []
    return notes


def present_outputs(data: ImageDataset | Stream) -> list[int] | None:
    """Return the model's outputs that have images, or None if all have or it is not known."""
    used = data.source.used_classes()
    if used is None:
        used = None if data.source.classes is None else range(len(data.source.classes))
    if used is None:
        return None
    present = sorted(used if data.outputs is None else {data.outputs[label] for label in used})
    return present if len(present) < data.num_classes else None


def missing_classes(data: ImageDataset | Stream, present: Sequence[int] | None) -> list[str]:
    """Return the line that lists the classes without evaluation images, if there are any."""
    if present is None or data.classes is None:
        return []
    missing = [name for output, name in enumerate(data.classes) if output not in set(present)]
    if not missing:
        return []
    return [
        f"{data.source.what}: no images of {len(missing)} of the model's {data.num_classes} "
        f"classes ({some(missing)})"
    ]


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
