"""Batches that are copied to the device as bytes, and augmented and normalised there.

A batch of float32 images is four times as large. Random erasing replaces pixels of the normalised
image by normal noise. These boxes are drawn in the workers and copied beside the bytes. So a run on
a GPU has the pixels of a run on a CPU, up to rounding.
Shapes: B batch, S steps of a program, K erased boxes, M values in all of them, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms

from base.device import to_device
from data import image_ops
from data.augment_program import COLUMNS, Recorder
from data.device_augment import augment, constant
from data.image_ops import ImageLike
from data.transforms import Normalize

Box = tuple[int, int, Tensor]  # top, left, values (3, height, width) float32


class ErasedBoxes:
    """Replaces a normalised image (3, H, W) in timm's RandomErasing; records erased boxes."""

    dtype = torch.float32

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.boxes: list[Box] = []

    def size(self) -> torch.Size:
        return self.shape

    def __setitem__(self, index: tuple[slice, slice, slice], values: Tensor) -> None:
        _, rows, columns = index
        size = (3, rows.stop - rows.start, columns.stop - columns.start)
        self.boxes.append((rows.start, columns.start, values.expand(size)))


class DeferNormalize:
    """A transform without its normalisation: image to (pixels (3, H, W) uint8, boxes, program).

    augments: the steps between crop and normalisation are left to the device too. The program
        (S, 8) has their random numbers; without it is empty.
    Raises ValueError for a transform that ends in anything but normalisation and erasing.
    """

    def __init__(self, transform: transforms.Compose, *, augments: bool = False) -> None:
        steps = list(transform.transforms)
        at = next(i for i, step in enumerate(steps) if isinstance(step, Normalize))
        self.before, self.erasing = steps[:at], steps[at + 1 :]
        if not all(isinstance(step, RandomErasing) for step in self.erasing):
            raise ValueError(f"after the normalisation come {self.erasing}, not erasing alone")
        self.mean, self.std = (tuple(x.flatten().tolist()) for x in (steps[at].mean, steps[at].std))
        self.recorder = Recorder(self.before) if augments else None

    def __call__(self, image: ImageLike) -> tuple[Tensor, list[Box], Tensor]:
        if self.recorder is not None:
            pixels, program = self.recorder(image)
        else:
            for step in self.before:
                image = step(image)
            pixels, program = image_ops.to_pixels(image), torch.empty(0, COLUMNS)
        erased = ErasedBoxes(pixels.shape)
        for step in self.erasing:
            step(erased)
        return pixels, erased.boxes, program

    def finish(self, batch: "ByteBatch", device: torch.device) -> Tensor:
        """Return the normalised images (B, 3, H, W) float32 on `device`.

        The host waits for nothing if the batch is in pinned memory.
        """
        if self.recorder is not None:
            images = augment(batch.images, batch.programs, self.recorder.fill, device)
        else:
            images = to_device(batch.images, device)
        mean, std = (constant(numbers, device) for numbers in (self.mean, self.std))
        images = image_ops.normalize(images, mean, std)
        values, start = to_device(batch.values, device), 0
        for number, top, left, height, width in batch.boxes.tolist():  # on the CPU
            size = 3 * height * width
            box = images[number, :, top : top + height, left : left + width]
            box.copy_(values[start : start + size].view(3, height, width))
            start += size
        return images


class ByteBatch(NamedTuple):
    """images: (B, 3, H, W) uint8. boxes: (K, 5) int64, each sample, top, left, height, width.
    values: (M,) float32, what is written into the boxes, one after another. programs: (B, S, 8),
    S may be 0. labels: (B,)."""

    images: Tensor
    boxes: Tensor
    values: Tensor
    programs: Tensor
    labels: Tensor


def collate_bytes(samples: Sequence[tuple[Any, int] | None]) -> ByteBatch | None:
    """Return the batch of the samples that are not None; None if there is none."""
    present = [sample for sample in samples if sample is not None]
    if not present:
        return None
    parts, labels = zip(*present)
    images, erased, programs = zip(*parts)
    boxes = [
        (number, top, left, *values.shape[1:], values)
        for number, boxes_here in enumerate(erased)
        for top, left, values in boxes_here
    ]
    values = [box[-1].flatten() for box in boxes]
    return ByteBatch(
        torch.stack(images),
        torch.tensor([box[:-1] for box in boxes], dtype=torch.int64).view(-1, 5),
        torch.cat(values) if values else torch.empty(0),
        torch.stack(programs),
        torch.tensor(labels),
    )


@dataclass(frozen=True)
class PendingImages:
    """Images (B, 3, H, W) that are augmented and normalised on the device they are copied to."""

    batch: ByteBatch
    deferred: DeferNormalize

    def to(self, device: torch.device, *, non_blocking: bool = True) -> Tensor:
        """Return the images on the device, float32."""
        return self.deferred.finish(self.batch, device)
