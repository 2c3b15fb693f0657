"""One pass over a loader: `train_one_epoch` and `evaluate`.

Shapes: B batch, C classes. The teacher is a function from pictures to logits; whether a network
or a file answers, this room cannot tell. All randomness of a step follows from
(seed, epoch, micro-step, rank), so a resumed run draws what the uninterrupted one drew.
"""

import contextlib
import logging
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distributed
from errors import UserError
from metrics import Meter, ProgressLogger, accuracy
from optim import Ema, Schedule
from samplers import derive_seed

_logger = logging.getLogger(__name__)


def seed_step(*parts: int | str) -> None:
    """Make every generator of this process a function of `parts`: no history, nothing to save."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Return torch's autocast of `dtype` on `device`, or nothing for None."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    data_loader: Iterable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    *,
    teacher: Callable[[Tensor], Tensor] | None = None,
    schedule: Schedule | None = None,
    loss_scaler: torch.amp.GradScaler | None = None,
    amp_dtype: torch.dtype | None = None,
    max_norm: float | None = None,
    accum_steps: int = 1,
    model_ema: Ema | None = None,
    mixup_fn: Callable | None = None,
    set_training_mode: bool = True,
    seed: int = 0,
    max_bad_steps: int = 10,
    log_interval: int = 10,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
    header: str | None = None,
) -> dict[str, float]:
    """Train `model` once over `data_loader`, whose batches are pictures (B,3,H,W), labels (B,).

    criterion: called as `criterion(images, outputs, labels, teacher_outputs=...)`; its `.terms`
        are the unweighted parts of the loss.
    teacher: pictures (B,3,H,W) to logits (B,C), or None.
    max_norm: largest gradient norm, None for no clipping. accum_steps: micro-steps per update.
    on_log: called at every printed line with the update's number in the epoch and the averages.
    Returns the averages of the epoch, and how many updates were skipped as non-finite.
    Raises UserError when `max_bad_steps` updates in a row had a non-finite loss or gradient.
    """
    model.train(set_training_mode)
    micro_steps = len(data_loader)  # type: ignore[arg-type]
    updates = -(-micro_steps // accum_steps)
    progress = ProgressLogger(micro_steps, header or f"Epoch: [{epoch}]", interval=log_interval)
    meters: dict[str, Meter] = {}
    bad = _BadSteps(device, max_bad_steps)
    network = getattr(model, "module", model)
    optimizer.zero_grad(set_to_none=True)

    for micro, (images, labels, *_) in enumerate(progress(data_loader)):
        update, last_of_update = micro // accum_steps, (micro + 1) % accum_steps == 0
        last_of_update |= micro + 1 == micro_steps
        in_update = min(accum_steps, micro_steps - update * accum_steps)
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        seed_step(seed, "step", epoch, micro, distributed.rank())
        if schedule is not None and micro % accum_steps == 0:
            schedule.step(epoch * updates + update, epoch)
        with torch.no_grad():
            if mixup_fn is not None:
                images, labels = mixup_fn(images, labels)
            teacher_outputs = teacher(images) if teacher is not None else None

        silent = not last_of_update and hasattr(model, "no_sync")
        with model.no_sync() if silent else contextlib.nullcontext():
            with autocast(device, amp_dtype):
                outputs = model(images)
            loss = criterion(images, outputs, labels, teacher_outputs=teacher_outputs)
            _backward(loss / in_update, loss_scaler)
        for name, value in {"loss": loss.detach(), **criterion.terms}.items():
            meters.setdefault(name, Meter(device)).update(value)
        bad.watch(loss)
        if not last_of_update:
            continue

        norm = _update(optimizer, network, loss_scaler, max_norm, bad)
        meters.setdefault("grad_norm", Meter(device)).update(norm)
        if model_ema is not None:
            model_ema.update(network.network, epoch * updates + update)
        if progress.due(micro):
            bad.check()
            shown = {name: meter.recent() for name, meter in meters.items()}
            shown["lr"] = max(group["lr"] for group in optimizer.param_groups)
            images_per_step = images.shape[0] * distributed.world_size()
            rates = progress.log(micro, shown, images_per_step=images_per_step)
            if on_log is not None:
                on_log(update, shown | rates)

    bad.check()
    stats = {name: meter.average() for name, meter in meters.items()}
    stats["lr"] = max(group["lr"] for group in optimizer.param_groups)
    return stats | {"skipped_updates": bad.total()}


def _backward(loss: Tensor, scaler: torch.amp.GradScaler | None) -> None:
    (scaler.scale(loss) if scaler is not None else loss).backward()


def _update(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    scaler: torch.amp.GradScaler | None,
    max_norm: float | None,
    bad: "_BadSteps",
) -> Tensor:
    """Clip, step unless the update is bad, clear the gradients. Returns the gradient norm."""
    if scaler is not None:
        scaler.unscale_(optimizer)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        parameters = [p for p in model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    skip = bad.decide(norm if scaler is None else None)
    if scaler is not None:  # skips by itself when a gradient is not finite
        scaler.step(optimizer)
        scaler.update()
    elif getattr(optimizer, "_step_supports_amp_scaling", False) and norm.is_cuda:
        optimizer.found_inf = skip.to(torch.float32)  # the fused kernel skips, without a sync
        optimizer.grad_scale = None
        optimizer.step()
    elif not skip.item():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


class _BadSteps:
    """Non-finite updates: all processes agree on each, and it is counted on the device."""

    def __init__(self, device: torch.device, limit: int) -> None:
        self.limit = limit
        self._now = torch.zeros((), dtype=torch.bool, device=device)
        self._streak = torch.zeros((), dtype=torch.long, device=device)
        self._longest = torch.zeros((), dtype=torch.long, device=device)
        self._total = torch.zeros((), dtype=torch.long, device=device)

    def watch(self, loss: Tensor) -> None:
        """Remember whether the loss of a micro-step was not finite."""
        self._now |= ~torch.isfinite(loss.detach())

    def decide(self, norm: Tensor | None) -> Tensor:
        """Return whether this update is to be skipped, the same (bool) in every process."""
        if norm is not None:
            self._now |= ~torch.isfinite(norm)
        skip = distributed.any_rank(self._now)
        self._streak = (self._streak + 1) * skip
        self._longest = torch.maximum(self._longest, self._streak)
        self._total = self._total + skip
        self._now = torch.zeros_like(self._now)
        return skip

    def check(self) -> None:
        """Raise UserError if too many updates in a row were bad (one read from the device)."""
        if int(self._longest) >= self.limit:
            raise UserError(
                f"the loss was not finite in {int(self._longest)} updates in a row "
                f"(--max-bad-steps {self.limit}); lower --lr, set --clip-grad 1, or use --amp bf16"
            )

    def total(self) -> int:
        return int(self._total)


@torch.no_grad()
def evaluate(
    data_loader: Iterable,
    model: nn.Module,
    device: torch.device,
    *,
    amp_dtype: torch.dtype | None = None,
    header: str = "Test:",
    log_interval: int = 50,
) -> dict[str, float]:
    """Return {"loss", "acc1", "acc5", "count"} of `model` over `data_loader`, in all processes.

    loss: mean cross entropy in nats per picture; acc1 and acc5 in percent (with fewer than five
    classes acc5 counts all of them). Each process may bring any number of pictures, none included:
    sums and counts are added up, so no picture is counted twice.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, count
    progress = ProgressLogger(len(data_loader), header, interval=log_interval)  # type: ignore[arg-type]
    for step, (images, labels, *_) in enumerate(progress(data_loader)):
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        with autocast(device, amp_dtype):
            logits = model(images)
        if isinstance(logits, tuple):
            logits = sum(logits) / len(logits)
        logits = logits.float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        top1, top5 = accuracy(logits, labels, topk=(1, 5))
        sums += torch.stack([loss, top1, top5, loss.new_tensor(labels.shape[0])]).double()
        if progress.due(step):
            progress.log(
                step, {"loss": float(sums[0] / sums[3]), "acc1": 100 * float(sums[1] / sums[3])}
            )
    model.train(was_training)
    loss, top1, top5, count = distributed.all_reduce_sum(sums).tolist()
    if count == 0:
        raise UserError("the evaluation set is empty: no picture reached the model")
    stats: dict[str, Any] = {
        "loss": loss / count,
        "acc1": 100 * top1 / count,
        "acc5": 100 * top5 / count,
        "count": int(count),
    }
    if distributed.is_main():
        print("* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}".format(**stats), flush=True)
    return stats
