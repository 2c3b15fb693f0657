"""One pass over a loader: `train_one_epoch` and `evaluate`.

Shapes: B batch, C classes. The teacher may be a network or a cache of logits; both have the same
interface. All randomness of a step follows from (seed, epoch, micro-step, rank), so a resumed run
draws the same numbers as an uninterrupted one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from base import distributed, terminal
from base.device import DeviceBatches, autocast, seed_device
from base.errors import UserError
from data.samplers import BatchKey, derive_seed
from training.checkpointer import Checkpointer
from training.metrics import ProgressLogger, accuracy
from training.non_finite import BadBatchFinder
from training.state import EpochState
from training.step_config import DEFAULT_STEP, NO_HOOKS, Hooks, StepConfig
from training.updater import Updater

TeacherFn = Callable[[Tensor, BatchKey], Any]  # images (B,3,H,W) and their key to logits (B,C)


class Criterion(Protocol):
    """A loss such as `losses.DistillationLoss`. terms: its unweighted parts at the last call."""

    terms: Mapping[str, Tensor]

    def __call__(
        self, images: Tensor, outputs: Any, labels: Tensor, *, teacher_outputs: Any = None
    ) -> Tensor: ...


def train_one_epoch(
    model: nn.Module,
    criterion: Criterion,
    data_loader: Iterable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    *,
    teacher: TeacherFn | None = None,
    config: StepConfig = DEFAULT_STEP,
    state: EpochState | None = None,
    hooks: Hooks = NO_HOOKS,
) -> dict[str, float]:
    """Train `model` for one epoch and return its averages and its number of skipped updates.

    data_loader: yields images (B,3,H,W) and labels (B,); of a resumed epoch only the rest.
    criterion: such as `losses.DistillationLoss`; teacher: None if the criterion has its own.
    state: where a resumed epoch continues; None starts at its first batch.
    Raises UserError after `config.max_bad_steps` updates in a row with a non-finite loss.
    """
    state = EpochState(device) if state is None else state
    model.train(config.train_mode)
    steps = len(data_loader)  # type: ignore[arg-type]
    updater = Updater(model, optimizer, config, state.bad, epoch=epoch, micro_steps=steps)
    finder = _bad_batch_finder(model, criterion, teacher, config, state, hooks)
    progress = _progress(steps, config.header or f"Epoch: [{epoch}]", config, state.micro_step)
    batches = DeviceBatches(progress(data_loader), device)
    for micro_step, (images, labels) in enumerate(batches, start=state.micro_step):
        key = BatchKey(epoch, micro_step)
        images, labels, outputs_T = mix_and_query(images, labels, key, teacher, config)
        with updater.micro_step(micro_step):
            loss = compute_loss(model, criterion, (images, labels, outputs_T), key, config)
            updater.backward(loss, micro_step)
        del outputs_T  # features need much memory
        terms = {"loss": loss.detach(), **criterion.terms}
        state.add(terms)
        finder.add(terms, images, labels, key, is_last=updater.completes(micro_step))
        if updater.completes(micro_step):
            grad_norm = updater.step(micro_step)
            state.end_update(micro_step, grad_norm)
            due = progress.due(micro_step, updater.size(micro_step))
            finder.end_update(updater.describe(micro_step), look=due)
            if due:
                _log(progress, updater, state, batches, micro_step, hooks)
            hooks.on_update(updater.global_index(micro_step) + 1)
    return state.averages() | {"lr": updater.lr, "skipped_updates": state.bad.in_epoch}


@torch.no_grad()
def mix_and_query(
    images: Tensor, labels: Tensor, key: BatchKey, teacher: TeacherFn | None, config: StepConfig
) -> tuple[Tensor, Tensor, Any]:
    """Mix a batch and compute the teacher's outputs; both depend on the key within the cycle.

    Returns images (B,3,H,W), labels (B,) or (B,C), and the teacher's outputs or None.
    """
    key = config.within_cycle(key)
    seed_step(config.seed, "mix", *key, distributed.rank())
    if config.mixup_fn is not None:
        images, labels = config.mixup_fn(images, labels)
    return images, labels, teacher(images, key) if teacher is not None else None


def compute_loss(
    model: nn.Module,
    criterion: Criterion,
    batch: tuple[Tensor, Tensor, Any],
    key: BatchKey,
    config: StepConfig,
) -> Tensor:
    """Return the loss of a batch: mixed images (B,3,H,W), labels, and the teacher's outputs."""
    images, labels, outputs_T = batch
    seed_step(config.seed, "step", *key, distributed.rank())
    with autocast(images.device, config.amp_dtype):
        outputs = model(images)
    return criterion(images, outputs, labels, teacher_outputs=outputs_T)


def seed_step(*parts: int | str) -> None:
    """Make every random generator of this process a function of `parts`."""
    seed_device(derive_seed(*parts))


def _bad_batch_finder(
    model: nn.Module,
    criterion: Criterion,
    teacher: TeacherFn | None,
    config: StepConfig,
    state: EpochState,
    hooks: Hooks,
) -> BadBatchFinder:
    """Return the object that ends the run after too many bad updates."""
    network = model.module if isinstance(model, DistributedDataParallel) else model

    def replay(images: Tensor, labels: Tensor, key: BatchKey) -> tuple[Tensor, dict[str, Any]]:
        outputs_T = teacher(images, config.within_cycle(key)) if teacher is not None else None
        loss = compute_loss(network, criterion, (images, labels, outputs_T), key, config)
        content = {"images": images, "labels": labels, "teacher_outputs": outputs_T}
        return loss, content | {"micro_step": key.micro_step, "seed": config.seed}

    return BadBatchFinder(
        state.bad, network, config.max_bad_steps, replay=replay, save=hooks.save_bad_batch
    )


def _progress(steps: int, header: str, config: StepConfig, start: int = 0) -> ProgressLogger:
    return ProgressLogger(steps, header, interval=config.log_interval, start=start)


def _log(
    progress: ProgressLogger,
    updater: Updater,
    state: EpochState,
    batches: DeviceBatches,
    micro_step: int,
    hooks: Hooks,
) -> None:
    """Print the averages since the last printed line, for which the host waits for the device."""
    count = batches.batch_size * distributed.world_size()
    if micro_step + 1 < updater.micro_steps:
        batches.fetch_ahead()
    averages = state.recent() | {"lr": updater.lr}
    rates = progress.log(micro_step, averages, images_per_step=count)
    hooks.on_log(updater.index(micro_step), averages | rates)


def query_epoch(
    data_loader: Iterable,
    teacher: TeacherFn,
    device: torch.device,
    epoch: int,
    *,
    config: StepConfig = DEFAULT_STEP,
) -> None:
    """Call the teacher on an epoch's batches, as training would, without a student."""
    steps = len(data_loader)  # type: ignore[arg-type]
    progress = _progress(steps, config.header, config)
    for micro_step, (images, labels) in enumerate(DeviceBatches(progress(data_loader), device)):
        mix_and_query(images, labels, BatchKey(epoch, micro_step), teacher, config)
        if progress.due(micro_step):
            count = len(images) * distributed.world_size()
            progress.log(micro_step, {}, images_per_step=count)


@torch.no_grad()
def evaluate(
    data_loader: Iterable,
    model: nn.Module,
    device: torch.device,
    *,
    amp_dtype: torch.dtype | None = None,
    header: str = "Test:",
    log_interval: int = 50,
    interrupt: Checkpointer | None = None,
    present: Sequence[int] | None = None,
    predictions: list[Tensor] | None = None,
) -> dict[str, float]:
    """Return {"loss", "acc1", "acc5", "count"} of `model` over `data_loader`, in all processes.

    loss: mean cross entropy in nats per image; acc1 and acc5 in percent (with fewer than five
    classes acc5 counts all of them). Each process may have any number of images, also none:
    sums and counts are added up, so no image is counted twice.
    interrupt: a stop signal in any process ends the evaluation in all of them.
    present: the outputs that have images; adds "acc1_present", of the largest of these logits.
    predictions: gets the most probable class of each image of this process, a tensor per batch.
    """
    was_training = model.training
    model.eval()
    among = torch.tensor(present, device=device) if present is not None else None
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # of batch_scores
    count = stopped = 0
    progress = ProgressLogger(len(data_loader), header, interval=log_interval)  # type: ignore[arg-type]
    share = " (own share)" * (distributed.world_size() > 1)  # of the printed line; the end has all
    for step, (images, labels) in enumerate(DeviceBatches(progress(data_loader), device)):
        with autocast(device, amp_dtype):
            logits = model(images)
        logits = mean_of_heads(logits)
        sums += batch_scores(logits, labels, among)
        if predictions is not None:
            predictions.append(logits.argmax(dim=1))
        count += len(labels)
        if progress.due(step):
            loss, acc1 = (sums[:2] / count).tolist()
            progress.log(step, {f"loss{share}": loss, f"acc1{share}": 100 * acc1})
        if interrupt is not None and interrupt.stop_signal:
            stopped = 1
            break
    model.train(was_training)
    totals = torch.cat([sums, torch.tensor([count, stopped], dtype=sums.dtype, device=device)])
    loss, top1, top5, top1_present, count, stopped = distributed.all_reduce_sum(totals).tolist()
    if stopped and interrupt is not None:
        interrupt.stop()
    if count == 0:
        raise UserError("the evaluation set is empty: no image reached the model")
    stats = {"loss": loss / count, "acc1": 100 * top1 / count, "acc5": 100 * top5 / count}
    if distributed.is_main():
        terminal.detail("* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {loss:.3f}".format(**stats))
    if present is not None:
        stats["acc1_present"] = 100 * top1_present / count
    return stats | {"count": int(count)}


def mean_of_heads(logits: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return float32 logits (B, C): of one head, or the mean of two."""
    heads = logits if isinstance(logits, tuple) else (logits,)
    return torch.as_tensor(sum(heads) / len(heads)).float()


def batch_scores(logits: Tensor, labels: Tensor, among: Tensor | None) -> Tensor:
    """Return a batch's summed cross entropy, and its top-1, top-5 and top-1 `among` hits, (4,).

    logits: (B, C). among: the outputs that the last number is restricted to, (K,), or None for all.
    """
    loss = F.cross_entropy(logits, labels, reduction="sum")
    top1, top5 = accuracy(logits, labels, topk=(1, 5))
    hits = top1 if among is None else (among[logits[:, among].argmax(dim=1)] == labels).sum()
    return torch.stack([loss.double(), top1.double(), top5.double(), hits.double()])
