"""Loaders that leave out unreadable images, or finish batches on the device."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from base.distributed import stop_signals_blocked


class Loader(DataLoader):
    """Starts its workers with the stop signals blocked; see `leave_signals_to_parent`."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        with stop_signals_blocked():
            return super().__iter__()


class EvalLoader(Loader):
    """Leaves out unreadable images (None), and batches without any other."""

    def __init__(self, dataset: Dataset, **options: Any) -> None:
        super().__init__(dataset, collate_fn=collate_present, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return (batch for batch in super().__iter__() if batch is not None)


@dataclass(frozen=True)
class PendingImages:
    """Images (B, 3, H, W) uint8 that are augmented on the device that they are copied to."""

    images: Tensor
    programs: Tensor
    augment: Callable[[Tensor, Tensor, torch.device], Tensor]

    def to(self, device: torch.device, *, non_blocking: bool = True) -> Tensor:
        """Return the augmented images (B, 3, H, W) on the device."""
        return self.augment(self.images, self.programs, device)


class DeviceLoader(Loader):
    """Workers crop images and draw the augmentation; batches are `PendingImages`."""

    def __init__(self, dataset: Dataset, *, augment: Callable[..., Tensor], **options: Any):
        super().__init__(dataset, **options)
        self.augment = augment

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return map(self.finish, super().__iter__())

    def finish(self, batch: Any) -> tuple[PendingImages, Tensor]:
        """Return the images and labels (B,) of a batch that workers have begun."""
        (images, programs), labels = batch
        return PendingImages(images, programs, self.augment), labels


def collate_present(samples: list[Any]) -> Any:
    """Stack the samples that are not None; None if there is none."""
    present = [sample for sample in samples if sample is not None]
    return default_collate(present) if present else None
