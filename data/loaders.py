"""The loader of a run: it leaves out unreadable images, and may leave work to the device."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from base.distributed import stop_signals_blocked
from data.byte_batches import DeferNormalize, PendingImages, collate_bytes


class ImageLoader(DataLoader):
    """Yields (images, labels (B,)); leaves out unreadable images (None), and batches of nothing.

    Workers start with the stop signals blocked; see `leave_signals_to_parent`.
    deferred: the transform of the data if it leaves the normalisation to the device. Images are
    then `PendingImages`, else tensors (B, 3, H, W) float32.
    """

    def __init__(
        self, dataset: Dataset, *, deferred: DeferNormalize | None = None, **options: Any
    ) -> None:
        collate = collate_present if deferred is None else collate_bytes
        super().__init__(dataset, collate_fn=collate, **options)
        self.deferred = deferred

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        with stop_signals_blocked():
            batches = super().__iter__()
        return (self._finished(batch) for batch in batches if batch is not None)

    def load(self, keys: Sequence[Any]) -> tuple[Any, Tensor] | None:
        """Return the batch of the samples with these keys; None if none can be read."""
        batch = self.collate_fn([self.dataset[key] for key in keys])
        return None if batch is None else self._finished(batch)

    def _finished(self, batch: Any) -> tuple[Any, Tensor]:
        if self.deferred is None:
            return batch
        return PendingImages(batch, self.deferred), batch.labels

    def subset(self, keys: Sequence[Any]) -> "ImageLoader":
        """Return a loader of these samples, in batches of the same size."""
        return ImageLoader(
            self.dataset,
            deferred=self.deferred,
            sampler=keys,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
        )


def collate_present(samples: list[Any]) -> Any:
    """Stack the samples that are not None; None if there is none."""
    present = [sample for sample in samples if sample is not None]
    return default_collate(present) if present else None
