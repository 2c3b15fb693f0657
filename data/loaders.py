"""Loaders that leave out unreadable images, or finish batches on the device."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from data.device_augment import Recorded


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
