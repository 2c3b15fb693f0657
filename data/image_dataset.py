"""Data sets of tensors: a source of images and a transform."""

import logging
import numbers
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from base.errors import UserError
from data.folders import some
from data.image_ops import UNREADABLE, to_rgb
from data.image_source import Shards, Source
from data.labels import ModelClasses, map_labels
from data.transforms import Transform
from losses import UNLABELLED

_logger = logging.getLogger(__name__)
UNREADABLE_IN_A_ROW = 100  # more is a lost disk, not a bad image


class ImageDataset(Dataset):
    """A source and a transform: index to (tensor (3, H, W) float32, label).

    With a `DeferNormalize` transform, to ((pixels, boxes, program), label).

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
        marks = len(source) if bad_images != "fail" else 0
        self._last: tuple[int, tuple[Any, int]] | None = None  # repeats of an image come in a row
        self._unreadable = torch.zeros(marks, dtype=torch.bool).share_memory_()

    @property
    def description(self) -> str:
        return f"{len(self)} {self.source.what}, {self.num_classes} classes"

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
            "check the disk"
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
                "repair or remove it, or use --on-bad-image skip"
            ) from error
        original = self.source.original(index)
        if not self._unreadable[original]:
            self._unreadable[original] = True
            _logger.warning("image %s cannot be read: %s; skipped", name, reason)


def output_of(label: Any, outputs: Sequence[int] | None, num_classes: int) -> int:
    """Return the model's output for the label of an image. outputs: of each class, or None.

    The label of an image without one, `UNLABELLED`, stays.
    """
    if label == UNLABELLED:
        return UNLABELLED
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
    leaves out bad images, with a warning, regardless of --on-bad-image.
    """

    def __init__(self, shards: Shards, transform: Transform, num_classes: int) -> None:
        self.source, self.dataset, self.classes = shards, shards.dataset, shards.classes
        self.transform, self.num_classes = transform, num_classes
        self.outputs: tuple[int, ...] | None = None

    @property
    def description(self) -> str:
        count = f"{len(self)} images streamed from {self.source.what}"
        return f"{count}, {self.num_classes} classes"

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for image, label in self.dataset:
            label = output_of(label, self.outputs, self.num_classes)
            yield self.transform(to_rgb(image)), label

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def set_workers(self, num_workers: int) -> None:
        """Set how many workers share the shards; the length depends on it."""
        self.dataset.set_loader_cfg(num_workers=num_workers)

    def skipped(self) -> int:
        """Return 0: timm's readers leave out bad images without counting them."""
        return 0


def number_labels(
    data: Sequence[ImageDataset | Stream], model: ModelClasses, nb_classes: int | None
) -> list[str]:
    """Make the labels of `data` number the outputs of `model`; return lines to print.

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
