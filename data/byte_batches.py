"""Training batches that are copied to a GPU as bytes and normalised there.

A batch of float32 images is four times as large. Random erasing replaces pixels of the normalised
image by normal noise. These boxes are drawn in the workers and copied beside the bytes. So a run on
a GPU has the pixels of a run on a CPU, up to rounding.
Shapes: B batch, K erased boxes, M values in all of them, H height, W width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms

from base.device import to_device
from data import image_ops
from data.image_ops import ImageLike
from data.loaders import Loader
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
    """A training transform without its normalisation: image to (pixels (3, H, W) uint8, boxes).

    mean, std: (3, 1, 1), of the normalisation that is left to the device.
    Raises ValueError for a transform that ends in anything but normalisation and erasing.
    """

    def __init__(self, transform: transforms.Compose) -> None:
        steps = list(transform.transforms)
        at = next(i for i, step in enumerate(steps) if isinstance(step, Normalize))
        self.before, rest = steps[:at], steps[at + 1 :]
        self.mean, self.std = steps[at].mean, steps[at].std
        if not all(isinstance(step, RandomErasing) for step in rest):
            raise ValueError(f"after the normalisation come {rest}, not random erasing alone")
        self.erasing = rest

    def __call__(self, image: ImageLike) -> tuple[Tensor, list[Box]]:
        for step in self.before:
            image = step(image)
        pixels = image_ops.to_pixels(image)
        erased = ErasedBoxes(pixels.shape)
        for step in self.erasing:
            step(erased)
        return pixels, erased.boxes


class ByteBatch(NamedTuple):
    """images: (B, 3, H, W) uint8. boxes: (K, 5) int64, each sample, top, left, height, width.
    values: (M,) float32, what is written into the boxes, one after another. labels: (B,)."""

    images: Tensor
    boxes: Tensor
    values: Tensor
    labels: Tensor


def collate_bytes(samples: Sequence[tuple[tuple[Tensor, list[Box]], int]]) -> ByteBatch:
    """Return the batch of samples ((pixels, boxes), label)."""
    boxes = [
        (number, top, left, *values.shape[1:], values)
        for number, ((_, erased), _) in enumerate(samples)
        for top, left, values in erased
    ]
    values = [box[-1].flatten() for box in boxes]
    return ByteBatch(
        torch.stack([pixels for (pixels, _), _ in samples]),
        torch.tensor([box[:-1] for box in boxes], dtype=torch.int64).view(-1, 5),
        torch.cat(values) if values else torch.empty(0),
        torch.tensor([label for _, label in samples]),
    )


def finish(batch: ByteBatch, mean: Tensor, std: Tensor, device: torch.device) -> Tensor:
    """Return the normalised images (B, 3, H, W) float32 on `device`. mean, std: there, (3, 1, 1).

    The host waits for nothing if the batch is in pinned memory.
    """
    images = image_ops.normalize(to_device(batch.images, device), mean, std)
    values, start = to_device(batch.values, device), 0
    for number, top, left, height, width in batch.boxes.tolist():  # on the CPU
        size = 3 * height * width
        box = images[number, :, top : top + height, left : left + width]
        box.copy_(values[start : start + size].view(3, height, width))
        start += size
    return images


class ByteLoader(Loader):
    """Copies batches as bytes; yields images (B, 3, H, W) float32 on `device`."""

    def __init__(
        self, dataset: Any, *, deferred: DeferNormalize, device: torch.device, **options: Any
    ) -> None:
        super().__init__(dataset, collate_fn=collate_bytes, **options)
        self.mean, self.std = (x.to(device) for x in (deferred.mean, deferred.std))
        self.device = device

    def __iter__(self) -> Any:
        return map(self.finish, super().__iter__())

    def finish(self, batch: ByteBatch) -> tuple[Tensor, Tensor]:
        """Return the images and labels of a batch of the workers."""
        return finish(batch, self.mean, self.std, self.device), batch.labels
