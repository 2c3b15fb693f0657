"""Optimizer, learning-rate schedule, and the moving average of the weights (EMA).

Optimizers and schedulers are timm's. A schedule is a function of the global step (updates since
the run began), so that a resumed run continues exactly.
"""

import copy
import inspect
import logging
import math
import reprlib
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import Adahessian, Lookahead, create_optimizer_v2, get_optimizer_class
from timm.scheduler import PlateauLRScheduler, create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from base.errors import UserError
from models import Student

_logger = logging.getLogger(__name__)
LEAST_TRAVEL = 0.3  # updates times learning rate; the quick start has 0.84
REFERENCE_BATCH = 512  # DeiT's --lr is meant for an effective batch of this many images
RENAMED = {"fusedlamb": "lamb", "fusedadam": "adam", "fusedadamw": "adamw"}  # apex's
IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")  # same update, other kernels


@dataclass(frozen=True)
class BatchPlan:
    """Updates, batch and learning rate of a run, on which a published number depends.

    updates: of an epoch; batch: images an update, of all processes and micro-steps; lr: the
    base learning rate, at the top of its schedule.
    """

    epochs: int
    updates: int
    batch: int
    lr: float

    def describe(self) -> str:
        epochs = "1 epoch" if self.epochs == 1 else f"{self.epochs} epochs"
        updates = "1 update" if self.updates == 1 else f"{self.updates} updates"
        return f"{epochs} of {updates}, effective batch {self.batch}, learning rate {self.lr:.3g}"


def build_lr(args: Namespace, world_size: int) -> float:
    """Return the base learning rate: --lr times effective batch / 512, or --lr with --unscale-lr.

    The effective batch counts all processes and accumulated micro-steps."""
    if args.unscale_lr:
        return args.lr
    return args.lr * args.batch_size * world_size * args.grad_accum_steps / REFERENCE_BATCH


def build_batch_plan(args: Namespace, steps: int, world_size: int) -> BatchPlan:
    """Return the pace of a run of `steps` micro-steps an epoch in each process.

    Raises UserError if an update needs more micro-steps than an epoch has.
    """
    if 0 < steps < args.grad_accum_steps:
        raise UserError(
            f"--grad-accum-steps {args.grad_accum_steps}: an epoch has {steps} micro-steps of "
            f"--batch-size {args.batch_size}; set --grad-accum-steps {steps} or less, or a smaller "
            "--batch-size"
        )
    return BatchPlan(
        epochs=args.epochs,
        updates=-(-steps // args.grad_accum_steps),
        batch=args.batch_size * world_size * args.grad_accum_steps,
        lr=build_lr(args, world_size),
    )


def build_warnings(args: Namespace, lr: float) -> list[str]:
    """Return warnings about a schedule with the base learning rate `lr`."""
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


def build_findings(args: Namespace, plan: BatchPlan) -> list[str]:
    """Return a warning for --check and --dry-run if a new network hardly changes in the run.

    Adam moves a weight by about the learning rate in each update.
    """
    is_new = not (args.finetune or args.pretrained or args.resume)
    updates = plan.epochs * plan.updates
    if not is_new or "adam" not in args.opt.lower() or updates * plan.lr >= LEAST_TRAVEL:
        return []
    return [
        f"{updates} updates at a learning rate of {plan.lr:.3g} are too few for a new network; "
        "raise --lr or --epochs, or start from trained weights (--finetune, --pretrained)"
    ]


def build_optimizer(
    args: Namespace, student: Student, world_size: int
) -> tuple[torch.optim.Optimizer, float]:
    """Return the optimizer and its base learning rate.

    Biases, norms and the network's `no_weight_decay` have no weight decay. Every projection is a
    group of its own, with the options of its match.
    Raises UserError for an unknown optimizer, and for an option that it does not have.
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
    device = next(student.parameters()).device
    try:
        options = options | default_options(name, device, args.momentum) | args.opt_kwargs
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
        raise UserError(f"--opt {args.opt}: timm cannot create it ({reason})") from error
    if isinstance(optimizer, Adahessian):
        raise UserError(
            f"--opt {args.opt}: needs second derivatives of the loss, which are not computed here; "
            "use --opt adamw or lamb"
        )
    for name, projection in student.projections.items():
        own = projection.optimizer_options
        if unknown := set(own) - set(optimizer.defaults):
            raise UserError(f"match {name}: proj: {args.opt} has no option {sorted(unknown)}")
        if any(not 0 <= own.get(name, 0) < math.inf for name in ("lr", "weight_decay")):
            raise UserError(f"match {name}: proj: {dict(own)}; rates must not be below 0")
        group = {"params": list(projection.parameters()), "weight_decay": args.weight_decay}
        optimizer.add_param_group(group | own)  # a rate of its own is taken as it is
    if device.type == "cuda" and optimizer.defaults.get("foreach"):
        from training.optimizer_step import SkipOnDevice  # only a GPU needs it

        SkipOnDevice(optimizer)
    return optimizer, lr


def default_options(name: str, device: torch.device, momentum: float) -> dict[str, Any]:
    """Return the options of timm's optimizer `name` that depend on the device and the momentum.

    adam and adamw are fused: three times as fast as the default on a CPU. On a GPU all others are
    multi-tensor where they can be.
    """
    if name.lower() in ("adam", "adamw") and device.type in ("cpu", "cuda"):
        return {"fused": True}
    if "_" in name:  # timm's lookahead_NAME, which has no class of its own
        return {}
    known = inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters
    options = {}
    if "nesterov" in known and momentum == 0:
        options["nesterov"] = False  # timm's default, which needs a momentum
    if "foreach" in known and device.type == "cuda":
        options["foreach"] = True
    return options


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], own: Collection[str] = ()
) -> None:
    """Load a saved state. The implementation (fused, foreach, ...) stays that of `optimizer`.

    own: other options of the groups that stay those of `optimizer`.
    Raises ValueError if the state is not one of this optimizer with these parameters.
    """
    groups = []
    for group, now in zip(saved["param_groups"], optimizer.param_groups):
        kept = {key: now[key] for key in (*IMPLEMENTATION, *own) if key in now}
        groups.append({k: v for k, v in group.items() if k not in IMPLEMENTATION} | kept)
        for key, value in now.items():
            if key != "params" and not compatible(groups[-1].get(key), value):
                found = reprlib.repr(groups[-1].get(key))
                raise ValueError(f"{key} of a parameter group is {found}")
    groups += saved["param_groups"][len(groups) :]  # torch raises the error about their number
    _check_state(saved["state"], optimizer)
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def _check_state(saved: Mapping[Any, Any], optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError where the state of a parameter has other keys, shapes, or NaN.

    A copy of the optimizer makes an update of zeros: on the meta device, which computes nothing,
    or on the CPU if the update needs values.
    """
    if not saved or isinstance(optimizer, Lookahead):  # its state grows later
        return
    try:
        expected = _state_of_copy(optimizer, "meta")
    except RuntimeError:
        expected = _state_of_copy(optimizer, "cpu")
    for index, state in saved.items():
        if state and index not in expected:
            raise ValueError(f"it has a state of parameter {index}, this optimizer has none")
        for key in {**state, **expected[index]} if state else ():
            found = _outline(state[key]) if key in state else "missing"
            should = _outline(expected[index][key]) if key in expected[index] else "unknown"
            if found != should:
                raise ValueError(f"{key} of parameter {index} is {found}, not {should}")
            if isinstance(state[key], Tensor) and bool(state[key].isnan().any()):
                raise ValueError(f"{key} of parameter {index} contains NaN")


def _state_of_copy(optimizer: torch.optim.Optimizer, device: str) -> dict[Any, dict[Any, Any]]:
    other = copy.copy(optimizer)
    other.state, other.param_groups = type(optimizer.state)(dict), []
    for group in optimizer.param_groups:
        parameters = []
        for parameter in group["params"]:
            zeros = nn.Parameter(torch.zeros_like(parameter, device=device))
            zeros.grad = torch.zeros_like(zeros)
            parameters.append(zeros)
        options = copy.deepcopy({k: v for k, v in group.items() if k != "params"})
        options |= {key: False for key in IMPLEMENTATION if key in options}
        other.param_groups.append(options | {"params": parameters})
    other.step()
    return other.state_dict()["state"]


def _outline(value: Any) -> str:
    """Return the shape of a tensor, or "a number", or those of a sequence."""
    if isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0):
        return "a number"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_outline(item) for item in value)}]"
    return type(value).__name__


def compatible(found: Any, own: Any) -> bool:
    """Return whether an option of a saved optimizer can replace ours: switches, numbers, pairs."""
    if own is None or isinstance(own, bool):
        return found is None or isinstance(found, bool)  # which older torch did not have
    if isinstance(own, int | float):
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        return is_number and math.isfinite(found)
    if isinstance(own, list | tuple):
        same = isinstance(found, list | tuple) and len(found) == len(own)
        return same and all(compatible(x, y) for x, y in zip(found, own))
    return isinstance(found, type(own))


class Schedule:
    """timm's learning-rate scheduler, stepped from the global step or the epoch.

    on_step: is also called with the global step, for example to set the weights of a loss. A
    plateau scheduler has a state of its own: it depends on the accuracy of every epoch.
    """

    def __init__(self, scheduler: Any, on_step: Callable[[int], None] | None = None) -> None:
        self.scheduler, self.on_step = scheduler, on_step
        self._is_plateau = isinstance(scheduler, PlateauLRScheduler)

    def step(self, global_step: int, epoch: int) -> None:
        """Set the learning rate for update `global_step`, which lies in `epoch`; both from 0."""
        if self.on_step is not None:
            self.on_step(global_step)
        self.scheduler.step_update(global_step)  # timm's schedulers skip one of the two
        if not self._is_plateau:
            self.scheduler.step(epoch)

    def end_epoch(self, epoch: int, acc1: float) -> None:
        """Step a plateau scheduler with the accuracy (percent) after `epoch`."""
        if self._is_plateau:
            self.scheduler.step(epoch + 1, acc1)

    def state_dict(self) -> dict[str, Any]:
        state = self.scheduler.state_dict()
        if self._is_plateau:
            state["plateau"] = self.scheduler.lr_scheduler.state_dict()
            state["restore_lr"] = self.scheduler.restore_lr  # the rates without noise
        return {k: v for k, v in state.items() if k != "optimizer"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a plateau scheduler; all others follow the flags of this run."""
        if self._is_plateau and "plateau" in state:
            self.scheduler.lr_scheduler.load_state_dict(state["plateau"])
            self.scheduler.restore_lr = state.get("restore_lr")


def build_schedule(
    args: Namespace,
    optimizer: torch.optim.Optimizer,
    updates_per_epoch: int,
    on_step: Callable[[int], None] | None = None,
) -> Schedule:
    """Return the learning rate's schedule over --epochs. Raises UserError for an unknown one."""
    lr = max(group["lr"] for group in optimizer.param_groups)
    for line in build_warnings(args, lr):
        _logger.warning("%s", line)
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
            noise=args.lr_noise[0] if args.lr_noise and len(args.lr_noise) == 1 else args.lr_noise,
            noise_pct=args.lr_noise_pct,
            noise_std=args.lr_noise_std,
            noise_seed=args.seed,
            step_on_epochs=not args.sched_on_updates or args.sched == "plateau",
            updates_per_epoch=updates_per_epoch,
        )
    except (AssertionError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--sched {args.sched}: timm cannot create it ({reason}); use --sched cosine"
        ) from error
    if scheduler is None:
        raise UserError(f"--sched {args.sched}: timm has no schedule of it; use --sched constant")
    return Schedule(scheduler, on_step)


class Ema:
    """A moving average of a network's weights, in a network of its own (`.module`).

    decay: share of the average that an update keeps; `warmup` lowers it at the beginning
        (1 - step^(-2/3)), so that short runs do not average their first weights.
    device: of the average; None for the network's device.
    """

    def __init__(
        self, network: nn.Module, *, decay: float, warmup: bool, device: str | None = None
    ) -> None:
        self._ema = ModelEmaV3(network, decay=decay, use_warmup=warmup, device=device)
        self.module: nn.Module = self._ema.module

    def update(self, network: nn.Module, global_step: int) -> None:
        """Update the moving average from `network` after `global_step`."""
        self._ema.update(network, step=global_step)

    def refresh(self, network: nn.Module) -> None:
        """Set the average to the weights of `network`."""
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
