"""Settings of the training step, and the functions that a run calls between updates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from data.samplers import BatchKey
from training.optim import Schedule


@dataclass(frozen=True)
class StepConfig:
    """Settings of `engine.train_one_epoch`. The defaults suit a plain loop in float32.

    amp_dtype: autocast type of the forward pass, or None. loss_scaler: for float16.
    accum_steps: micro-steps per update. max_norm: largest gradient norm, None for no clipping.
    schedule: sets the learning rate before every update. update_ema: called after every update
        with its number, from 0; such as `functools.partial(ema.update, network)`.
    mixup_fn: mixes images (B,3,H,W) and labels (B,), and returns labels (B,C).
    train_mode: False keeps the network in evaluation mode (DeiT's fine-tuning).
    seed: all randomness of a step follows from (seed, epoch, micro-step, rank).
    cycle_epochs: epochs after which augmentation and mixing repeat, 0 for never.
    max_bad_steps: non-finite updates in a row after which the run ends.
    log_interval: micro-steps between two printed lines. header: their beginning.
    """

    amp_dtype: torch.dtype | None = None
    loss_scaler: torch.amp.GradScaler | None = None
    accum_steps: int = 1
    max_norm: float | None = None
    schedule: Schedule | None = None
    update_ema: Callable[[int], None] | None = None
    mixup_fn: Callable | None = None
    train_mode: bool = True
    seed: int = 0
    cycle_epochs: int = 0
    max_bad_steps: int = 10
    log_interval: int = 10
    header: str = ""

    def within_cycle(self, key: BatchKey) -> BatchKey:
        """Return the key of the batch in the first cycle that repeats in `key`."""
        return key._replace(epoch=key.epoch % self.cycle_epochs) if self.cycle_epochs else key


def _ignore(*_: Any) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Hooks:
    """Functions that `engine.train_one_epoch` calls.

    on_log: at every printed line, with the update's number in the epoch and the averages.
    on_update: after every update, with the number of updates since the run began; what it raises
        ends the epoch there.
    save_bad_batch: before too many bad updates end the run, in one process, with what reproduces
        a bad batch; it writes that and returns the path.
    """

    on_log: Callable[[int, dict[str, float]], None] = _ignore
    on_update: Callable[[int], None] = _ignore
    save_bad_batch: Callable[[dict[str, Any]], str] | None = None


DEFAULT_STEP, NO_HOOKS = StepConfig(), Hooks()
