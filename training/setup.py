"""From the parsed settings to the objects of a run.

`main.py` calls these functions in this order: `build_runtime`, `build_student`, `build_cache`,
`build_live_teacher`, `build_training`, `build_log`.
"""

import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import models
from base import distributed, files, terminal
from base.device import cpu_has_bf16, pick_amp, seed_device, use_fast_kernels
from base.distributed import Processes, print_important, print_once
from data.samplers import derive_seed
from data.transforms import InputConfig, build_mixup
from datasets import Loaders
from distill import objective
from distill.teacher import AnyTeacher, LogitsOnly, build_identity, build_teacher
from models import Student
from training import metrics, optim, run_folder, trackers
from training.checkpointer import Checkpointer, build_checkpointer
from training.state import EpochState
from training.step_config import Hooks, StepConfig

if TYPE_CHECKING:
    from distill.cached_teacher import CachedTeacher

_logger = logging.getLogger("main")


@dataclass(frozen=True)
class Runtime:
    """Processes, device and precision of a run, and its input.

    amp_dtype, teacher_amp: autocast types of student and teacher, or None.
    """

    processes: Processes
    inputs: InputConfig
    amp_dtype: torch.dtype | None
    teacher_amp: torch.dtype | None

    @property
    def device(self) -> torch.device:
        return self.processes.device


@dataclass(frozen=True)
class Training:
    """What the loop over epochs uses. model: the student, in DDP if there are several processes."""

    model: nn.Module
    student: Student
    teacher: AnyTeacher | None
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    ema: optim.Ema | None
    config: StepConfig
    state: EpochState
    checkpointer: Checkpointer
    batch_plan: optim.BatchPlan
    mean_labelled: Callable[[int], float] | None = None  # see losses.LabelledMean

    @property
    def teacher_logits(self) -> LogitsOnly | None:
        """The teacher's network as a map from images to logits, if there is one."""
        return self.teacher.logits_only() if self.teacher is not None else None

    def images_seen(self, epochs: int) -> int:
        """Return how many images the updates of so many epochs use."""
        return epochs * self.batch_plan.updates * self.batch_plan.batch

    def hooks(self, log: metrics.RunLog, epoch: int) -> Hooks:
        """Return what an epoch calls between its updates: the log, checkpoints, bad batches."""
        seen = self.images_seen(epoch)

        def on_log(update: int, averages: dict[str, float]) -> None:
            images_seen = seen + (update + 1) * self.batch_plan.batch
            log.train(averages, self.criterion.term_weights, images_seen)

        return Hooks(on_log, self.checkpointer.after_update, self.save_bad_batch)

    def save_bad_batch(self, batch: dict[str, Any]) -> str:
        """Save a bad batch with the weights that reproduce it, and return the path."""
        weights = {
            "model": self.student.network.state_dict(),
            "projections": self.student.projections.state_dict(),
            "num_classes": self.student.network.num_classes,
            "classes": self.checkpointer.classes,
        }
        if self.mean_labelled is not None:
            weights["mean_labelled"] = self.mean_labelled(batch["update"])
        return self.checkpointer.save_bad_batch({**batch, **weights})


def build_runtime(args: Namespace) -> Runtime:
    """Join the other processes, seed the first weights, and create the output folder."""
    processes = distributed.init_processes(
        args.device, dist_url=args.dist_url, timeout_min=args.dist_timeout
    )
    metrics.set_up_logging(processes.rank)
    device = processes.device
    use_fast_kernels(device, args.cudnn_benchmark)
    amp_dtype = pick_amp(args.amp, device)
    teacher_amp = pick_amp(args.amp if args.teacher_amp == "auto" else args.teacher_amp, device)
    seed_device(derive_seed(args.seed, "model"))
    is_named = args.output_dir not in ("", run_folder.AUTO)
    if is_named and distributed.is_main() and not (args.eval or args.check or args.dry_run):
        files.make_folder(args.output_dir)
    return Runtime(processes, models.build_input_config(args), amp_dtype, teacher_amp)


def print_notes(notes: Sequence[str], about: Sequence[str]) -> None:
    """Print the lines about a recipe, and log the warnings about flags."""
    for line in about:
        print_important(terminal.fit(line))
    for note in notes:
        _logger.warning("%s", note)


def build_student(args: Namespace, loaders: Loaders, runtime: Runtime) -> Student:
    """Return the student on its device, and print what it is and the data it gets."""
    student = models.build_student(
        args, loaders.num_classes, runtime.inputs, classes=loaders.classes
    ).to(runtime.device)
    models.select_kernels(student.network, runtime.device.type, runtime.amp_dtype)
    print_once("data", loaders.describe())
    inputs = runtime.inputs.describe()
    print_once("student", f"{args.model}, {student.describe()}; input {inputs}")
    return student


def build_cache(args: Namespace, loaders: Loaders, runtime: Runtime) -> "CachedTeacher | None":
    """Return the teacher's cached logits, or None without --teacher-cache."""
    if not args.teacher_cache:
        return None
    from distill.cached_teacher import build_cached_teacher  # most runs have no cache

    return build_cached_teacher(
        args, loaders, runtime.inputs, runtime.processes, runtime.teacher_amp
    )


def build_live_teacher(args: Namespace, loaders: Loaders, runtime: Runtime) -> AnyTeacher | None:
    """Return the teacher's network, or None if the objective needs none."""
    return build_teacher(
        args,
        loaders.num_classes,
        runtime.inputs,
        runtime.device,
        runtime.teacher_amp,
        classes=loaders.classes,
    )


def build_processes_line(args: Namespace, runtime: Runtime) -> str:
    """Return the line on processes and precision."""
    line = f"{runtime.processes.describe()}; amp {runtime.amp_dtype or 'off'}"
    if args.amp == "auto" and cpu_has_bf16(runtime.device):
        line += " (this CPU computes in bf16: --amp bf16)"
    return line


def build_training(
    args: Namespace,
    loaders: Loaders,
    student: Student,
    teacher: AnyTeacher | None,
    runtime: Runtime,
) -> Training:
    """Return the objective, the optimizer and the state of a run, after --resume."""
    batch_plan = optim.build_batch_plan(args, len(loaders.train), runtime.processes.world_size)
    ema = optim.build_ema(args, student.network)
    mean_labelled = build_mean_labelled(args, loaders, teacher, runtime)
    criterion = objective.build_objective(
        args,
        student,
        teacher,
        mean_labelled=mean_labelled,
        mixing=build_mixup(args, loaders.num_classes) is not None,
        input_size=runtime.inputs.input_size,
        total_updates=args.epochs * batch_plan.updates,
    )
    if isinstance(criterion, objective.Objective):
        print_once("objective", criterion.describe())
    optimizer, _ = optim.build_optimizer(args, student, runtime.processes.world_size)
    schedule = optim.build_schedule(args, optimizer, batch_plan.updates, criterion.at_update)
    update_ema = partial(ema.update, student.network) if ema is not None else None
    config = build_step_config(
        args, loaders, teacher, runtime, schedule=schedule, update_ema=update_ema
    )
    print_once("recipe", batch_plan.describe())
    state = EpochState(runtime.device)
    parts = {
        "model": student.network,
        "projections": student.trained_projections(),
        "optimizer": optimizer,
        "lr_scheduler": schedule,
        "scaler": config.loss_scaler,
        "model_ema": ema,
    }
    checkpointer = build_checkpointer(
        args,
        parts,
        state,
        facts=build_run_facts(args, loaders, config, runtime),
        classes=loaders.classes,
        steps=len(loaders.train) if loaders.train_sampler is not None else 0,
        device=runtime.device,
    )
    return Training(
        model=build_model(args, student, runtime),
        student=student,
        teacher=teacher,
        criterion=criterion,
        optimizer=optimizer,
        ema=ema,
        config=config,
        state=state,
        checkpointer=checkpointer,
        batch_plan=batch_plan,
        mean_labelled=mean_labelled,
    )


def build_mean_labelled(
    args: Namespace, loaders: Loaders, teacher: AnyTeacher | None, runtime: Runtime
) -> Callable[[int], float] | None:
    """Return the labelled images of a micro-step in one process, as a mean over an update.

    It is a function of the number of the update; None if every image has a label. The order of
    the images is known, so no process asks another one.
    """
    source, sampler = loaders.data[0].source, loaders.train_sampler
    if sampler is None or not source.unlabelled:
        return None
    world, cycle = runtime.processes.world_size, teacher.cycle_epochs if teacher else 0
    steps, accum = len(loaders.train), args.grad_accum_steps

    @lru_cache(maxsize=1)
    def counts(epoch: int) -> list[int]:
        return sampler.count_below(len(source) - source.unlabelled, epoch, args.batch_size * world)[
            :steps
        ].tolist()

    def mean_labelled(update: int) -> float:
        epoch, index = divmod(update, -(-steps // accum))
        found = counts(epoch % cycle if cycle else epoch)[index * accum : (index + 1) * accum]
        return sum(found) / len(found) / world

    return mean_labelled


def build_step_config(
    args: Namespace,
    loaders: Loaders,
    teacher: AnyTeacher | None,
    runtime: Runtime,
    *,
    schedule: optim.Schedule | None = None,
    update_ema: Callable[[int], None] | None = None,
) -> StepConfig:
    """Return the settings of the training step."""
    is_fp16 = runtime.amp_dtype == torch.float16
    return StepConfig(
        amp_dtype=runtime.amp_dtype,
        loss_scaler=torch.amp.GradScaler(runtime.device.type) if is_fp16 else None,
        accum_steps=args.grad_accum_steps,
        max_norm=args.clip_grad if args.clip_grad and args.clip_grad > 0 else None,
        schedule=schedule,
        update_ema=update_ema,
        mixup_fn=build_mixup(args, loaders.num_classes),
        train_mode=args.train_mode,
        seed=args.seed,
        cycle_epochs=teacher.cycle_epochs if teacher is not None else 0,
        max_bad_steps=args.max_bad_steps,
        log_interval=args.log_interval,
    )


def build_run_facts(
    args: Namespace, loaders: Loaders, config: StepConfig, runtime: Runtime
) -> dict[str, Any]:
    """Return what must not change within a run, besides the settings."""
    cycle = config.cycle_epochs
    return {
        "processes": runtime.processes.world_size,
        "data": loaders.fingerprint(),
        "teacher": build_identity(args),
        "views that come again": cycle if cycle < args.epochs else 0,
    }


def build_model(args: Namespace, student: Student, runtime: Runtime) -> nn.Module:
    """Return the module that trains: the student, in DDP if there are several processes."""
    model: nn.Module = student
    if runtime.processes.world_size > 1:
        example = torch.zeros(2, 3, *runtime.inputs.input_size, device=runtime.device)
        model = distributed.data_parallel(student, example)
    if args.torchcompile:  # in place: parameter names stay; evaluation runs the plain .network
        student.compile(backend=args.torchcompile, dynamic=False)
    return model


def build_log(args: Namespace, training: Training) -> metrics.RunLog:
    """Return log.txt, config.yaml and the trackers of the first process."""
    folder = args.output_dir if distributed.is_main() else ""
    images_seen = training.checkpointer.global_step * training.batch_plan.batch
    log = metrics.RunLog(
        folder,
        training.checkpointer.epoch,
        trackers.build_trackers(args, images_seen) if folder else [],
    )
    log.config(vars(args))
    if args.output_dir and distributed.is_main():
        terminal.open_log(Path(args.output_dir))
    return log


def count_skipped_images(loaders: Loaders, runtime: Runtime) -> int:
    """Return how many images could not be read, in all processes."""
    count = torch.tensor(loaders.skipped(), device=runtime.device)
    return int(distributed.all_reduce_sum(count))
