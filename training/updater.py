"""From losses to updated weights: scaling, accumulation, clipping, skipping, and the step."""

import contextlib

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.non_finite import BadUpdateCounter, NormStatistics
from training.step_config import StepConfig


class Updater:
    """Accumulates the gradients of `accum_steps` micro-steps and updates the weights.

    An epoch has `micro_steps`; its last update may have fewer of them. An update with a
    non-finite loss or gradient in any process is skipped in all processes (see `non_finite`).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: StepConfig,
        counter: BadUpdateCounter,
        *,
        epoch: int,
        micro_steps: int,
    ) -> None:
        self.model, self.optimizer, self.config, self.counter = model, optimizer, config, counter
        self.epoch, self.micro_steps = epoch, micro_steps
        self.updates = -(-micro_steps // config.accum_steps)  # of an epoch
        self.statistics = NormStatistics(model)
        optimizer.zero_grad(set_to_none=True)

    def index(self, micro_step: int) -> int:
        """Return the number of a micro-step's update in the epoch, from 0."""
        return micro_step // self.config.accum_steps

    def global_index(self, micro_step: int) -> int:
        """Return the number of a micro-step's update since the run began, from 0."""
        return self.epoch * self.updates + self.index(micro_step)

    def size(self, micro_step: int) -> int:
        """Return how many micro-steps the update of this one has."""
        first = self.index(micro_step) * self.config.accum_steps
        return min(self.config.accum_steps, self.micro_steps - first)

    def completes(self, micro_step: int) -> bool:
        """Return whether a micro-step is the last one of its update."""
        return (micro_step + 1) % self.config.accum_steps == 0 or micro_step + 1 == self.micro_steps

    def describe(self, micro_step: int) -> dict[str, int]:
        """Return where a micro-step is, for the file of a bad batch."""
        update = self.global_index(micro_step)
        return {"epoch": self.epoch, "update": update, "updates_per_epoch": self.updates}

    @property
    def lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    @contextlib.contextmanager
    def micro_step(self, micro_step: int):
        """Context of the forward and the backward pass.

        It sets the learning rate before the first micro-step of an update. Processes exchange
        gradients in the last one alone.
        """
        if self.config.schedule is not None and micro_step % self.config.accum_steps == 0:
            self.config.schedule.step(self.global_index(micro_step), self.epoch)
        parallel = isinstance(self.model, DistributedDataParallel)
        if parallel and not self.completes(micro_step):
            with self.model.no_sync():
                yield
        else:
            yield

    def backward(self, loss: Tensor, micro_step: int) -> None:
        """Add this micro-step's share of the gradient."""
        self.counter.add_loss(loss)
        loss = loss / self.size(micro_step)
        scaler = self.config.loss_scaler
        (scaler.scale(loss) if scaler is not None else loss).backward()

    def step(self, micro_step: int) -> Tensor:
        """Update the weights, or skip a bad update. Returns the gradient norm before clipping."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.config.loss_scaler is not None:
            norm, skip = self._step_scaled(parameters, self.config.loss_scaler)
        else:
            norm = self._clip(parameters)
            skip = self.counter.end_update(~torch.isfinite(norm))
            self._step_unless(skip)
        self.optimizer.zero_grad(set_to_none=True)
        self.statistics.end_update(skip)
        if self.config.update_ema is not None:
            self.config.update_ema(self.global_index(micro_step))
        return norm

    def _clip(self, parameters: list[nn.Parameter]) -> Tensor:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if self.config.max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.max_norm, norm)
        return norm

    def _step_unless(self, skip: Tensor) -> None:
        """Step unless `skip`. A fused optimizer skips on the device; others need its value."""
        if getattr(self.optimizer, "_step_supports_amp_scaling", False) and skip.is_cuda:
            self.optimizer.found_inf = skip.to(torch.float32)
            self.optimizer.grad_scale = None
            self.optimizer.step()
        elif not skip.item():
            self.optimizer.step()

    def _step_scaled(
        self, parameters: list[nn.Parameter], scaler: torch.amp.GradScaler
    ) -> tuple[Tensor, Tensor]:
        """Step under a loss scale. Returns the norm, and whether the update was bad.

        The scaler skips non-finite gradients and lowers its scale. It does not read the loss, so a
        bad loss makes a gradient non-finite here. A gradient that overflows at a scale above 1 is
        skipped and does not count as bad.
        """
        bad_loss = self.counter.any_bad_loss()
        for parameter in parameters[:1]:
            parameter.grad.mul_(torch.where(bad_loss, torch.nan, 1.0))
        scaler.unscale_(self.optimizer)
        norm = self._clip(parameters)
        at_scale_1 = scaler.scale(torch.ones_like(norm)) <= 1
        skip = self.counter.end_update(~torch.isfinite(norm) & at_scale_1)
        scaler.step(self.optimizer)
        scaler.update()
        return norm, skip
