"""Updates whose loss or gradient is not finite.

A bad update is skipped in all processes. It changes no weights and no buffers. The device counts
bad updates, so that no step waits. After too many in a row the run ends, and a bad batch is saved.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from base import distributed
from base.errors import UserError

Kept = tuple[Mapping[str, Tensor], tuple[Any, ...]]  # the terms of a micro-step, and its batch


class BadUpdateCounter:
    """Decides with all processes whether an update is bad, and counts bad updates.

    counts: int64 (2,) on the device: bad updates in a row until now, and in this epoch.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(2, dtype=torch.long, device=device)
        self._bad_loss = torch.zeros((), dtype=torch.bool, device=device)

    def start_epoch(self) -> None:
        """Set the count of the epoch to 0. The count in a row continues over epochs."""
        in_a_row = self.counts[0]
        self.counts = torch.stack([in_a_row, torch.zeros_like(in_a_row)])

    def add_loss(self, loss: Tensor) -> None:
        """Record whether the loss of a micro-step of this update is not finite."""
        self._bad_loss |= ~torch.isfinite(loss.detach())

    def any_bad_loss(self) -> Tensor:
        """Return whether any process has had a bad loss in this update (bool)."""
        self._bad_loss = distributed.any_rank(self._bad_loss)
        return self._bad_loss

    def end_update(self, bad_gradient: Tensor) -> Tensor:
        """Count this update and return whether to skip it (bool, the same in every process).

        bad_gradient: whether this process's gradient is not finite (bool).
        """
        skip = distributed.any_rank(self._bad_loss | bad_gradient)
        in_a_row = (self.counts[0] + 1) * skip
        self.counts = torch.stack([in_a_row, self.counts[1] + skip])
        self._bad_loss = torch.zeros_like(self._bad_loss)
        return skip

    @property
    def in_a_row(self) -> int:
        return int(self.counts[0])

    @property
    def in_epoch(self) -> int:
        return int(self.counts[1])


class NormStatistics:
    """The running statistics of BatchNorm layers, which a skipped update must not change.

    The forward pass changes them before the loss is known. All processes use those of rank 0, as
    DDP does before the next forward pass. So evaluation, the moving average and a resumed run use
    the same values.
    """

    def __init__(self, network: nn.Module) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for module in network.modules():
            buffers = dict(module.named_buffers(recurse=False))
            if "running_mean" in buffers:
                for buffer in buffers.values():
                    by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._groups = list(by_dtype.values())
        self._good = [_flat(buffers) for buffers in self._groups]

    def end_update(self, skip: Tensor) -> None:
        """Keep the new statistics, or restore the old ones if `skip` (bool, on the device)."""
        for i, buffers in enumerate(self._groups):
            good = torch.where(skip, self._good[i], _flat(buffers))
            self._good[i] = distributed.broadcast(good)
            parts = self._good[i].split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [p.view_as(b) for p, b in zip(parts, buffers)])


def _flat(buffers: list[Tensor]) -> Tensor:
    return torch.cat([buffer.reshape(-1) for buffer in buffers])


class BadBatchFinder:
    """Ends a run after `limit` bad updates in a row, and saves a batch that causes them.

    While updates are good, only the last micro-step of an update is kept. After `limit` - 1 bad
    updates in a row all micro-steps of the next one are kept until it is done.

    replay: computes a micro-step again from the batch given to `add`; returns the loss and what
    reproduces it. save: writes that and returns the path.
    """

    def __init__(
        self,
        counter: BadUpdateCounter,
        network: nn.Module,
        limit: int,
        *,
        replay: Callable[..., tuple[Tensor, dict[str, Any]]],
        save: Callable[[dict[str, Any]], str] | None,
    ) -> None:
        self.counter, self.network, self.limit = counter, network, limit
        self.replay, self.save = replay, save
        self._keeps_all = limit <= 1
        self._batches: list[Kept] = []

    def add(self, terms: Mapping[str, Tensor], *batch: Any, is_last: bool) -> None:
        """Keep the batch of a micro-step if it is the last one of its update, or all are kept.

        terms: "loss" and its parts, detached scalars.
        """
        if is_last or self._keeps_all:
            self._batches.append((terms, batch))

    def end_update(self, where: Mapping[str, int], *, look: bool) -> None:
        """Raise UserError if the last `limit` updates were bad.

        where: epoch, update and updates_per_epoch, saved with the batch. look: read the count
        although the host then waits for a GPU.
        """
        batches, self._batches = self._batches, []
        had_all, suspects = self._keeps_all, self._keeps_all and self.limit > 1
        if self.counter.counts.is_cuda and not (look or suspects):
            return
        in_a_row = self.counter.in_a_row
        self._keeps_all = in_a_row + 1 >= self.limit
        if in_a_row < self.limit:
            return
        with unchanged_buffers(self.network):
            what, bad, has_one = self._find(batches)
            is_last = (where["update"] + 1) % where["updates_per_epoch"] == 0
            if not (has_one.any() or had_all or is_last):
                return  # an earlier micro-step is the cause: wait for the next bad update
            with torch.no_grad():  # in all processes: a loss may gather embeddings
                terms, batch = (bad or batches)[0]
                content = self.replay(*batch)[1] | {"terms": terms}
        self._stop(what, int(has_one.argmax()), content, where)

    def _find(self, batches: list[Kept]) -> tuple[str, list[Kept], Tensor]:
        """Return what is wrong, this process's bad batches, and which processes have one.

        All processes must call it.
        """
        bad = [kept for kept in batches if not torch.isfinite(kept[0]["loss"])]
        has_one = self._gather(bad)
        if has_one.any():
            return "the loss was not finite", bad, has_one
        bad = [kept for kept in batches if self._gradient_overflows(kept[1])]
        return "the loss was finite and its gradient was not,", bad, self._gather(bad)

    def _gather(self, bad: list[Any]) -> Tensor:
        """Return how many bad batches each process has, (processes,)."""
        count = torch.full((), len(bad), dtype=torch.long, device=self.counter.counts.device)
        return distributed.all_gather(count).clamp(max=1)

    def _gradient_overflows(self, batch: tuple[Any, ...]) -> bool:
        """Return whether a batch alone, in this process alone, has a non-finite gradient."""
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(self.replay(*batch)[0], parameters, allow_unused=True)
        return not all(g is None or bool(torch.isfinite(g).all()) for g in gradients)

    def _stop(
        self, what: str, culprit: int, content: dict[str, Any], where: Mapping[str, Any]
    ) -> None:
        """Save the batch in the process `culprit`; raise the same UserError in all processes."""
        text = ""
        if distributed.rank() == culprit:
            terms = ", ".join(f"{name} {float(v):.4g}" for name, v in content["terms"].items())
            saved = ""
            if self.save is not None:
                saved = f"; the batch is in {self.save({**content, **where, 'rank': culprit})}"
            text = (
                f"{what} in {self.counter.in_a_row} updates in a row (--max-bad-steps "
                f"{self.limit}), last in epoch {where['epoch']}, step {content['micro_step']}, "
                f"process {culprit}: {terms}{saved}; lower --lr, set --clip-grad 1, or use "
                "--amp bf16"
            )
        raise UserError(distributed.broadcast_object(text, culprit))


@contextlib.contextmanager
def unchanged_buffers(network: nn.Module) -> Iterator[None]:
    """Restore all buffers of `network` afterwards, such as BatchNorm's running statistics."""
    saved = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        for buffer, value in saved:
            buffer.copy_(value)
