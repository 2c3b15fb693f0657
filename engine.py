"""One pass over a loader: `train_one_epoch` and `evaluate`.

Shapes: B batch, C classes. The teacher is a function from images to logits; whether a network
or a file answers, this room cannot tell. All randomness of a step follows from
(seed, epoch, micro-step, rank), so a resumed run draws what the uninterrupted one drew.
"""

import contextlib
import logging
import random
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base import distributed
from base.errors import UserError
from base.transfer import send
from data.samplers import BatchKey, derive_seed
from training.metrics import Meter, ProgressLogger, accuracy
from training.optim import Ema, Schedule

_logger = logging.getLogger(__name__)


def seed_step(*parts: int | str) -> None:
    """Make every generator of this process a function of `parts`: no history, nothing to save."""
    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch.cuda.is_initialized():
        torch.manual_seed(seed)
    else:  # the same for CPUs, without a walk up the stack for a GPU that nobody has woken
        torch.default_generator.manual_seed(seed)


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Return torch's autocast of `dtype` on `device`, or nothing for None."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


class Interrupt(Protocol):
    """What a signal does to a run: `heard` its number, or 0; `stop` saves and raises Stopped."""

    heard: int

    def stop(self) -> None: ...


class EpochState:
    """How far an epoch has come: micro-steps done, the sums behind its means, its bad updates.

    With the weights it is all that a run stopped in the middle of an epoch needs to go on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bad = device, _BadSteps(device)
        self.reset()

    def reset(self) -> None:
        """Stand at the beginning of an epoch."""
        self.micro = 0
        self.meters: dict[str, Meter] = {}
        self.bad.start_epoch()

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.meters.setdefault(name, Meter(self.device)).update(value)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values, the sums of every process (axis 0); all must call it."""
        sums = [meter.sums for meter in self.meters.values()]
        return {
            "micro_steps": self.micro,
            "meters": list(self.meters),
            "sums": distributed.all_gather(torch.stack(sums)).cpu() if sums else None,
            "bad": self.bad.counts.cpu(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up this process's sums; from another number of processes the first takes all."""
        self.micro = state["micro_steps"]
        self.bad.counts.copy_(state["bad"])
        sums = state["sums"]  # (processes, meters, 2, 2)
        if sums is not None and len(sums) != distributed.world_size():
            sums = [sums.sum(0) * distributed.is_main()] * distributed.world_size()
        for i, name in enumerate(state["meters"]):
            self.meters[name] = Meter(self.device)
            self.meters[name].sums.copy_(sums[distributed.rank()][i])


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    data_loader: Iterable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    *,
    teacher: Callable[[Tensor, BatchKey], Any] | None = None,
    schedule: Schedule | None = None,
    loss_scaler: torch.amp.GradScaler | None = None,
    amp_dtype: torch.dtype | None = None,
    max_norm: float | None = None,
    accum_steps: int = 1,
    model_ema: Ema | None = None,
    mixup_fn: Callable | None = None,
    set_training_mode: bool = True,
    seed: int = 0,
    cycle_epochs: int = 0,
    max_bad_steps: int = 10,
    log_interval: int = 10,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
    on_update: Callable[[int], None] | None = None,
    on_bad_batch: Callable[[dict[str, Any]], str] | None = None,
    state: EpochState | None = None,
    header: str | None = None,
) -> dict[str, float]:
    """Train `model` once over `data_loader`, whose batches are images (B,3,H,W), labels (B,).

    criterion: called as `criterion(images, outputs, labels, teacher_outputs=...)`; its `.terms`
        are the unweighted parts of the loss.
    teacher: images (B,3,H,W) and their place to logits (B,C), or None.
    cycle_epochs: after how many epochs augmentation and mixing repeat, 0 for never.
    max_norm: largest gradient norm, None for no clipping. accum_steps: micro-steps per update.
    on_log: called at every printed line with the update's number in the epoch and the averages.
    on_update: called after every update with the number of updates since the run began; what it
        raises ends the epoch there.
    on_bad_batch: called once, in the process with the bad loss, with what reproduces it; returns
        where it put that.
    tally: what was done of the epoch before; `data_loader` brings only the rest of it.
    Returns the averages of the epoch, and how many updates were skipped as non-finite.
    An update with a non-finite loss or gradient in any process is skipped in all of them and
    leaves no trace in the network, BatchNorm's statistics included; its learning rate has passed.
    Raises UserError when `max_bad_steps` updates in a row were such.
    """
    state = EpochState(device) if state is None else state
    model.train(set_training_mode)
    micro_steps = len(data_loader)  # type: ignore[arg-type]
    updates = -(-micro_steps // accum_steps)
    progress = ProgressLogger(
        micro_steps, header or f"Epoch: [{epoch}]", interval=log_interval, start=state.micro
    )
    meters, bad = state.meters, state.bad
    network = getattr(model, "module", model)
    statistics = _Statistics(network)
    optimizer.zero_grad(set_to_none=True)

    def loss_of(module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        seed_step(seed, "step", epoch, batch["micro_step"], distributed.rank())
        with autocast(device, amp_dtype):
            outputs = module(batch["images"])
        answers = batch["teacher_outputs"]
        return criterion(batch["images"], outputs, batch["labels"], teacher_outputs=answers)

    for micro, (images, labels, *_) in enumerate(progress(data_loader), start=state.micro):
        update, last_of_update = micro // accum_steps, (micro + 1) % accum_steps == 0
        last_of_update |= micro + 1 == micro_steps
        in_update = min(accum_steps, micro_steps - update * accum_steps)
        images, labels = send(images, device), send(labels, device)
        if schedule is not None and micro % accum_steps == 0:
            schedule.step(epoch * updates + update, epoch)
        key = BatchKey(epoch % cycle_epochs if cycle_epochs else epoch, micro)
        images, labels, teacher_outputs = show(images, labels, key, seed, mixup_fn, teacher)
        batch = {"images": images, "labels": labels, "teacher_outputs": teacher_outputs}
        batch["micro_step"] = micro
        silent = not last_of_update and hasattr(model, "no_sync")
        with model.no_sync() if silent else contextlib.nullcontext():
            loss = loss_of(model, batch)
            _backward(loss / in_update, loss_scaler)
        terms = {"loss": loss.detach(), **criterion.terms}
        state.add(terms)
        bad.watch(loss, batch | {"terms": terms})
        if not last_of_update:
            continue

        norm, skip = _update(optimizer, network, loss_scaler, max_norm, bad)
        statistics.settle(skip)
        state.micro = micro + 1
        state.add({"grad_norm": norm})
        due = progress.due(micro, in_update)
        if bad.too_many(max_bad_steps, look=due):
            place = {
                "epoch": epoch,
                "update": epoch * updates + update,
                "updates_per_epoch": updates,
                "num_classes": getattr(network.network, "num_classes", None),
                "seed": seed,
                "model": network.network.state_dict(),
                "projections": getattr(network, "projections", nn.Module()).state_dict(),
            }
            overflows = partial(_gradient_overflows, network, loss_of)
            bad.stop(place, max_bad_steps, on_bad_batch, overflows)
        bad.forget()
        if model_ema is not None:
            model_ema.update(network.network, epoch * updates + update)
        if due:
            shown = {name: meter.recent() for name, meter in meters.items()}
            shown["lr"] = max(group["lr"] for group in optimizer.param_groups)
            images_per_step = images.shape[0] * distributed.world_size()
            rates = progress.log(micro, shown, images_per_step=images_per_step)
            if on_log is not None:
                on_log(update, shown | rates)
        if on_update is not None:
            on_update(epoch * updates + update + 1)

    stats = {name: meter.average() for name, meter in meters.items()}
    stats["lr"] = max(group["lr"] for group in optimizer.param_groups)
    return stats | {"skipped_updates": bad.total}


@torch.no_grad()
def show(
    images: Tensor,
    labels: Tensor,
    key: BatchKey,
    seed: int,
    mixup_fn: Callable | None,
    teacher: Callable[[Tensor, BatchKey], Any] | None,
) -> tuple[Tensor, Tensor, Any]:
    """Mix a batch and ask the teacher: all that is the same whenever `key` comes again.

    Returns images (B,3,H,W), labels (B,) or (B,C), and the teacher's answer or None.
    """
    seed_step(seed, "mix", *key, distributed.rank())
    if mixup_fn is not None:
        images, labels = mixup_fn(images, labels)
    return images, labels, teacher(images, key) if teacher is not None else None


def query_epoch(
    data_loader: Iterable,
    teacher: Callable[[Tensor, BatchKey], Any],
    device: torch.device,
    epoch: int,
    *,
    mixup_fn: Callable | None,
    seed: int,
    header: str,
    log_interval: int = 50,
) -> None:
    """Show the teacher an epoch's batches as training would, without a student."""
    progress = ProgressLogger(len(data_loader), header, interval=log_interval)  # type: ignore[arg-type]
    for micro, (images, labels, *_) in enumerate(progress(data_loader)):
        images, labels = send(images, device), send(labels, device)
        show(images, labels, BatchKey(epoch, micro), seed, mixup_fn, teacher)
        if progress.due(micro):
            count = images.shape[0] * distributed.world_size()
            progress.log(micro, {}, images_per_step=count)


def _backward(loss: Tensor, scaler: torch.amp.GradScaler | None) -> None:
    (scaler.scale(loss) if scaler is not None else loss).backward()


def _update(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    scaler: torch.amp.GradScaler | None,
    max_norm: float | None,
    bad: "_BadSteps",
) -> tuple[Tensor, Tensor]:
    """Clip, step unless the update is bad, clear the gradients.

    Returns the gradient norm, and whether the update was bad (bool, the same in all processes). A
    gradient that overflows under a loss scale above 1 is not: the scaler skips it and lowers the
    scale.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters]
    if scaler is not None:
        lost = bad.agree()
        for gradient in gradients[:1]:  # the scaler looks at gradients alone, not at the loss
            gradient.mul_(torch.where(lost, torch.nan, 1.0))
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm(gradients)
    broken = ~torch.isfinite(norm)
    if scaler is not None:
        broken &= scaler.scale(torch.ones_like(norm)) <= 1
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    skip = bad.decide(broken)
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
    return norm, skip


def _gradient_overflows(
    network: nn.Module, loss_of: Callable[[nn.Module, Any], Tensor], batch: Mapping[str, Any]
) -> bool:
    """Return whether a batch alone, in this process alone, has a gradient that is not finite."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss_of(network, batch), parameters, allow_unused=True)
    return not all(g is None or bool(torch.isfinite(g).all()) for g in gradients)


class _Statistics:
    """The running statistics of BatchNorm and its kind, which a bad update must not change.

    The forward pass has changed them before anybody knows whether its loss is finite. All
    processes take those of the first, as DDP does before the next pass, so that evaluation, the
    average and a resumed run see the same. A network without them pays nothing.
    """

    def __init__(self, network: nn.Module) -> None:
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for module in network.modules():
            if getattr(module, "running_mean", None) is not None:
                for buffer in module.buffers(recurse=False):
                    kinds.setdefault(buffer.dtype, []).append(buffer)
        self._kinds = list(kinds.values())
        self._good = [self._flat(buffers) for buffers in self._kinds]

    @staticmethod
    def _flat(buffers: list[Tensor]) -> Tensor:
        return torch.cat([buffer.reshape(-1) for buffer in buffers])

    def settle(self, skip: Tensor) -> None:
        """Take back what the update did if it is to be skipped (bool, on the device)."""
        for i, buffers in enumerate(self._kinds):
            good = torch.where(skip, self._good[i], self._flat(buffers))
            self._good[i] = distributed.broadcast(good)
            parts = self._good[i].split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [p.view_as(b) for p, b in zip(parts, buffers)])


class _BadSteps:
    """Non-finite updates: all processes agree on each, and it is counted on the device.

    counts: bad updates in a row until now, all of the epoch.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(2, dtype=torch.long, device=device)
        self._now = torch.zeros((), dtype=torch.bool, device=device)
        self._batches: list[dict[str, Any]] = []  # of this update

    def start_epoch(self) -> None:
        """Count the epoch's from 0; a streak goes on, also over epochs shorter than the limit."""
        streak = self.counts[0]
        self.counts = torch.stack([streak, torch.zeros_like(streak)])

    def watch(self, loss: Tensor, batch: dict[str, Any]) -> None:
        """Remember a micro-step of this update, and whether its loss was not finite."""
        self._batches.append(batch)
        self._now |= ~torch.isfinite(loss.detach())

    def agree(self) -> Tensor:
        """Return whether any process has had a bad loss in this update (bool)."""
        self._now = distributed.any_rank(self._now)
        return self._now

    def decide(self, broken: Tensor) -> Tensor:
        """Return whether this update is to be skipped, the same (bool) in every process.

        broken: whether its gradient was bad (bool), in this process.
        """
        skip = distributed.any_rank(self._now | broken)
        streak = (self.counts[0] + 1) * skip
        self.counts = torch.stack([streak, self.counts[1] + skip])
        self._now = torch.zeros_like(self._now)
        return skip

    def forget(self) -> None:
        """Let go of the images of this update."""
        self._batches = []

    @property
    def total(self) -> int:
        return int(self.counts[1])

    def too_many(self, limit: int, *, look: bool) -> bool:
        """Return whether the last `limit` updates were bad; GPUs are only asked on `look`."""
        return (look or not self.counts.is_cuda) and int(self.counts[0]) >= limit

    def stop(
        self,
        place: dict[str, Any],
        limit: int,
        save: Callable[[dict[str, Any]], str] | None,
        overflows: Callable[[Mapping[str, Any]], bool],
    ) -> None:
        """Save the first bad batch of this update that any process has; raise UserError.

        overflows: asked, where all losses were finite, whether the gradient of a batch is not.
        """
        what = "the loss was not finite"
        bad = [b for b in self._batches if not torch.isfinite(b["terms"]["loss"])]
        has_one = distributed.all_gather(self.counts.new_tensor(bool(bad)))
        if not has_one.any():
            what = "the loss was finite and its gradient was not,"
            bad = [b for b in self._batches if overflows(b)]
            has_one = distributed.all_gather(self.counts.new_tensor(bool(bad)))
        culprit = int(has_one.argmax())  # of equal ones the first: rank 0, if only the sum is bad
        text = ""
        if distributed.rank() == culprit:
            batch = (bad or self._batches)[0] | {"rank": culprit} | place
            terms = ", ".join(f"{name} {float(v):.4g}" for name, v in batch["terms"].items())
            saved = f"; the batch is in {save(batch)}" if save is not None else ""
            text = (
                f"{what} in {int(self.counts[0])} updates in a row "
                f"(--max-bad-steps {limit}), last in epoch {batch['epoch']}, step "
                f"{batch['micro_step']}, process {culprit}: {terms}{saved}; lower --lr, "
                "set --clip-grad 1, or use --amp bf16"
            )
        raise UserError(distributed.broadcast_object(text, culprit))


@torch.no_grad()
def evaluate(
    data_loader: Iterable,
    model: nn.Module,
    device: torch.device,
    *,
    amp_dtype: torch.dtype | None = None,
    header: str = "Test:",
    log_interval: int = 50,
    interrupt: Interrupt | None = None,
) -> dict[str, float]:
    """Return {"loss", "acc1", "acc5", "count"} of `model` over `data_loader`, in all processes.

    loss: mean cross entropy in nats per image; acc1 and acc5 in percent (with fewer than five
    classes acc5 counts all of them). Each process may bring any number of images, none included:
    sums and counts are added up, so no image is counted twice.
    interrupt: when it has heard a signal in any process, all stop together, without an answer.
    """
    was_training = model.training
    model.eval()
    # loss, top-1, top-5, count, and how many processes broke off
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    progress = ProgressLogger(len(data_loader), header, interval=log_interval)  # type: ignore[arg-type]
    share = " (own share)" * (distributed.world_size() > 1)  # of the printed line; the end has all
    for step, (images, labels, *_) in enumerate(progress(data_loader)):
        images, labels = send(images, device), send(labels, device)
        with autocast(device, amp_dtype):
            logits = model(images)
        if isinstance(logits, tuple):
            logits = sum(logits) / len(logits)
        logits = logits.float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        top1, top5 = accuracy(logits, labels, topk=(1, 5))
        sums[:4] += torch.stack([loss, top1, top5, loss.new_tensor(labels.shape[0])]).double()
        if progress.due(step):
            means = (sums[:2] / sums[3]).tolist()
            progress.log(step, {f"loss{share}": means[0], f"acc1{share}": 100 * means[1]})
        if interrupt is not None and interrupt.heard:
            sums[4] += 1
            break
    model.train(was_training)
    loss, top1, top5, count, broken_off = distributed.all_reduce_sum(sums).tolist()
    if broken_off and interrupt is not None:
        interrupt.stop()
    if count == 0:
        raise UserError("the evaluation set is empty: no image reached the model")
    stats: dict[str, Any] = {
        "loss": loss / count,
        "acc1": 100 * top1 / count,
        "acc5": 100 * top5 / count,
        "count": int(count),
    }
    if distributed.is_main():
        print("* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}".format(**stats), flush=True)
    return stats
