"""How weights move: parameter groups, learning rate, its schedule, and the moving average.

timm's optimizers and schedulers underneath. Schedules are functions of the global step (updates
since the beginning), so that a resumed run goes on where the other stopped.
"""

import copy
import logging
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from base.errors import UserError
from models import Student

_logger = logging.getLogger(__name__)
REFERENCE_BATCH = 512  # DeiT's --lr is meant for an effective batch of this many images
RENAMED = {"fusedlamb": "lamb", "fusedadam": "adam", "fusedadamw": "adamw"}  # apex's


@dataclass(frozen=True)
class BatchPlan:
    """How often and how fast weights move: what a published number depends on.

    updates: of an epoch; batch: images an update, of all processes and micro-steps; lr: the
    base learning rate, at the top of its schedule.
    """

    epochs: int
    updates: int
    batch: int
    lr: float

    def describe(self) -> str:
        return (
            f"{self.epochs} epochs of {self.updates} updates, effective batch {self.batch}, "
            f"learning rate {self.lr:.3g}"
        )


def build_lr(args: Namespace, world_size: int) -> float:
    """Return the base learning rate: --lr times effective batch / 512; --unscale-lr takes it as it
    is. The effective batch counts all processes and accumulated micro-steps."""
    if args.unscale_lr:
        return args.lr
    return args.lr * args.batch_size * world_size * args.grad_accum_steps / REFERENCE_BATCH


def build_batch_plan(args: Namespace, steps: int, world_size: int) -> BatchPlan:
    """Return the pace of a run of `steps` micro-steps an epoch in each process."""
    return BatchPlan(
        epochs=args.epochs,
        updates=-(-steps // args.grad_accum_steps),
        batch=args.batch_size * world_size * args.grad_accum_steps,
        lr=build_lr(args, world_size),
    )


def build_warnings(args: Namespace, lr: float) -> list[str]:
    """Return what speaks against a schedule that begins at the base learning rate `lr`."""
    found = []
    if lr < args.min_lr:
        found.append(
            f"the learning rate {lr:.3g} is below --min-lr {args.min_lr:.3g}: it will rise, not "
            "fall; raise --lr (it is scaled by batch / 512 without --unscale-lr)"
        )
    if 0 < args.epochs <= args.warmup_epochs and args.sched != "plateau":
        found.append(
            f"--warmup-epochs {args.warmup_epochs} of --epochs {args.epochs}: the learning rate "
            "never gets past its warm-up"
        )
    return found


def build_optimizer(
    args: Namespace, student: Student, world_size: int
) -> tuple[torch.optim.Optimizer, float]:
    """Return the optimizer and its base learning rate.

    No weight decay on biases, norms and what the network names in `no_weight_decay`. Every
    projection is a group of its own, with the options that its match gives.
    Raises UserError for an optimizer timm does not know, or an option that it does not have.
    """
    lr = build_lr(args, world_size)
    name = RENAMED.get(args.opt.lower(), args.opt)
    if name != args.opt:
        _logger.warning("--opt %s is apex's name; timm's %s is used", args.opt, name)
    options: dict[str, Any] = {}
    if args.opt_betas:
        options["betas"] = tuple(args.opt_betas)
    if args.opt_eps is not None:
        options["eps"] = args.opt_eps
    first = next(student.parameters())
    if name.lower() in ("adam", "adamw") and first.device.type in ("cpu", "cuda"):
        # One kernel: 3 times as fast as the default on a CPU, where foreach is slower than that;
        # on a GPU it can skip a bad update without a sync.
        options["fused"] = True
    options |= args.opt_kwargs
    try:
        optimizer = create_optimizer_v2(
            student.network,
            opt=name,
            lr=lr,
            weight_decay=args.weight_decay,
            momentum=args.momentum,
            layer_decay=args.layer_decay,
            **options,
        )
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--opt {args.opt}: timm cannot make it ({reason})") from error
    for name, projection in student.projections.items():
        own = projection.optimizer_options
        if unknown := set(own) - set(optimizer.defaults):
            raise UserError(f"match {name}: proj: {args.opt} has no option {sorted(unknown)}")
        if any(
            name in ("lr", "weight_decay") and not 0 <= value < float("inf")
            for name, value in own.items()
        ):
            raise UserError(f"match {name}: proj: {dict(own)}; rates must not be below 0")
        group = {"params": list(projection.parameters()), "weight_decay": args.weight_decay}
        optimizer.add_param_group(group | own)  # a rate of its own is taken as it is
    return optimizer, lr


class Schedule:
    """timm's learning-rate scheduler, stepped from the global step or the epoch.

    A plateau scheduler is the one that looks back: it hears each epoch's accuracy. follower: is
    told the global step too, such as the weights of a loss.
    """

    def __init__(
        self, scheduler: Any, *, on_updates: bool, on_step: Callable[[int], None] | None = None
    ) -> None:
        self.scheduler, self.on_updates, self.on_step = scheduler, on_updates, on_step
        self._is_plateau = type(scheduler).__name__ == "PlateauLRScheduler"

    def step(self, global_step: int, epoch: int) -> None:
        """Set the learning rate for update `global_step`, which lies in `epoch`; both from 0."""
        if self.on_step is not None:
            self.on_step(global_step)
        if self.on_updates:
            self.scheduler.step_update(global_step)
        elif not self._is_plateau:
            self.scheduler.step(epoch)

    def end_epoch(self, epoch: int, acc1: float) -> None:
        """Tell a plateau scheduler the accuracy (percent) after `epoch`."""
        if self._is_plateau:
            self.scheduler.step(epoch + 1, acc1)

    def state_dict(self) -> dict[str, Any]:
        state = self.scheduler.state_dict()
        if self._is_plateau:
            state["plateau"] = self.scheduler.lr_scheduler.state_dict()
        return {k: v for k, v in state.items() if k != "optimizer"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a plateau's memory; the others have none, and follow the flags of today."""
        if self._is_plateau and "plateau" in state:
            self.scheduler.lr_scheduler.load_state_dict(state["plateau"])


def build_schedule(
    args: Namespace,
    optimizer: torch.optim.Optimizer,
    updates_per_epoch: int,
    on_step: Callable[[int], None] | None = None,
) -> Schedule:
    """Return the learning rate's schedule over --epochs. Raises UserError for an unknown one."""
    on_updates = args.sched_on_updates and args.sched != "plateau"
    lr = max(group["lr"] for group in optimizer.param_groups)
    for line in build_warnings(args, lr):
        _logger.warning("%s", line)
    noise = args.lr_noise
    if noise and len(noise) == 1:
        noise = noise[0]
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=args.sched,
            num_epochs=max(1, args.epochs),
            decay_epochs=args.decay_epochs,
            cooldown_epochs=0,
            patience_epochs=args.patience_epochs,
            decay_rate=args.decay_rate,
            min_lr=args.min_lr,
            warmup_lr=args.warmup_lr,
            warmup_epochs=args.warmup_epochs,
            noise=noise,
            noise_pct=args.lr_noise_pct,
            noise_std=args.lr_noise_std,
            noise_seed=args.seed,
            step_on_epochs=not on_updates,
            updates_per_epoch=updates_per_epoch,
        )
    except (AssertionError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--sched {args.sched}: timm cannot make it ({reason})") from error
    if scheduler is None:
        raise UserError(f"--sched {args.sched}: unknown to timm; cosine, step, plateau, ...")
    return Schedule(scheduler, on_updates=on_updates, on_step=on_step)


class Ema:
    """A moving average of a network's weights, in a network of its own (`.module`).

    decay: what stays of it at every update; `warmup` shortens it at the beginning
        (1 - step^(-2/3)), so that short runs do not average their first weights.
    device: where it is kept, or None for where the network is.
    """

    def __init__(
        self, network: nn.Module, *, decay: float, warmup: bool, device: str | None = None
    ) -> None:
        # timm's, for its decays and its own device; the update is here, without its walk over
        # both networks at every step, which takes as long as the arithmetic of a small one.
        self._ema = ModelEmaV3(network, decay=decay, use_warmup=warmup, device=device)
        self._pairs: tuple[Any, list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]] | None
        self._pairs = None

    @property
    def module(self) -> nn.Module:
        return self._ema.module

    @torch.no_grad()
    def update(self, network: nn.Module, global_step: int) -> None:
        """Move towards the weights of `network`, always the same one, after `global_step`."""
        if not self._ema.foreach:  # on another device than the network
            self._ema.update(network, step=global_step)
            return
        if self._pairs is None or self._pairs[0] is not network:
            self._pairs = (network, *_paired(self.module, network))
        _, mine, its, counters = self._pairs
        torch._foreach_lerp_(mine, its, weight=1 - self._ema.get_decay(global_step))
        for own, other in counters:
            own.copy_(other)

    def refresh(self, network: nn.Module) -> None:
        """Start again from the weights of `network`."""
        self._ema.set(network)

    def on(self, device: torch.device) -> nn.Module:
        """Return the average on `device`: itself if it is there, else a copy."""
        if next(self.module.parameters()).device.type == device.type:
            return self.module
        return copy.deepcopy(self.module).to(device)

    def state_dict(self) -> dict[str, Any]:
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state)


def _paired(
    average: nn.Module, network: nn.Module
) -> tuple[list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Return the numbers that are averaged, on both sides, and the pairs that are counters."""
    pairs = list(zip(average.state_dict().values(), network.state_dict().values()))
    mine, its = zip(*[pair for pair in pairs if pair[0].is_floating_point()])
    return list(mine), list(its), [pair for pair in pairs if not pair[0].is_floating_point()]


def build_ema(args: Namespace, network: nn.Module) -> Ema | None:
    """Return the moving average of `network`, or None without --model-ema."""
    if not args.model_ema:
        return None
    return Ema(
        network,
        decay=args.model_ema_decay,
        warmup=args.model_ema_warmup,
        device="cpu" if args.model_ema_force_cpu else None,
    )
