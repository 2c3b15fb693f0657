"""How many epochs fit into --minutes: timed once, before training, on a copy of the student."""

import contextlib
import copy
import itertools
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import engine
from base import distributed, terminal
from data.samplers import BatchKey
from data.transforms import build_mixup
from datasets import Loaders
from distill import objective
from distill.teacher import AnyTeacher
from models import Student
from training import auto_recipe, optim, setup
from training.checkpointer import load_run, resolve
from training.recipe import AUTO
from training.setup import Runtime
from training.step_config import Hooks

SHARE = 0.03  # of the minutes: a warm-up, as long for timed updates, and for an evaluation
MOST = 0.1  # of the minutes: time for updates if one takes long
EVALUATIONS = 0.05  # share of the training time that evaluations before the last one may take
DISK = 3e8  # bytes a second at which a checkpoint is written
DECIDED = ("epochs", "val_interval")

OnUpdate = Callable[[int], None]


class _Enough(Exception):
    """Ends a timed epoch."""


@dataclass(frozen=True)
class Seconds:
    """What a run spends: before its first epoch, in an epoch, and in an evaluation with saving.

    writing_epochs: how many of the first epochs compute the teacher's logits and write them into a
        cache; each takes `writing_epoch` seconds.
    """

    start: float
    epoch: float
    evaluation: float
    writing_epochs: float = 0.0
    writing_epoch: float = 0.0

    def fit(self, budget: float) -> dict[str, int]:
        """Return the --epochs and --val-interval whose time is closest to `budget` seconds."""
        left = budget - self.start - self.evaluation  # the last epoch has an evaluation
        interval = max(1, round(self.evaluation / (EVALUATIONS * self.epoch)))
        epochs = self._epochs(left, self.evaluation / interval)
        if epochs <= interval:
            epochs = self._epochs(left, 0.0)
        return {"epochs": epochs, "val_interval": min(interval, epochs)}

    def _epochs(self, left: float, evaluation: float) -> int:
        """Return how many epochs fit into `left` seconds. evaluation: seconds for each epoch."""
        writing = self.writing_epoch + evaluation
        if self.writing_epochs * writing > max(left, 0):
            return max(1, round(left / writing))
        reading = (left - self.writing_epochs * writing) / (self.epoch + evaluation)
        return max(1, round(self.writing_epochs + reading))

    def describe(self) -> str:
        text = f"{self.start:.1f} s to start, {self.epoch:.2f} s an epoch, "
        text += f"{self.evaluation:.2f} s an evaluation"
        if self.writing_epochs:
            text += f"; {self.writing_epoch:.2f} s while the cache is filled, "
            text += f"for {self.writing_epochs:.1f} epochs"
        return text


def build_settings(
    args: Namespace,
    loaders: Loaders,
    student: Student,
    teacher: AnyTeacher | None,
    runtime: Runtime,
) -> Namespace:
    """Return the settings with the --epochs and --val-interval that fit into --minutes.

    With --recipe auto, learning rate and mixing follow from these epochs. A resumed run keeps those
    of its checkpoint. All processes use the first one's numbers.
    """
    found = distributed.on_main(lambda: saved_settings(args.resume, args.output_dir))
    if found:
        line = f"resumed: {found['epochs']} epochs, as in the checkpoint"
    else:
        with terminal.silent():
            seconds = _build_seconds(args, loaders, student, teacher, runtime)
        found = distributed.broadcast_object(seconds.fit(60 * args.minutes))
        shown = " ".join(f"--{name.replace('_', '-')} {found[name]}" for name in DECIDED)
        line = f"{args.minutes:g} minutes are {shown}: {seconds.describe()}"
    if args.recipe == AUTO and not args.teacher_cache:  # a cache has one kind of mixing
        found |= auto_recipe.build_schedule_flags(args, found["epochs"])
        line += f"; {auto_recipe.describe(found)}"
    distributed.print_once("minutes", line)
    return Namespace(**vars(args) | found)


def saved_settings(source: str, folder: str) -> dict[str, int]:
    """Return the settings in the checkpoint that --resume means, or {} if there is none."""
    path = resolve(source, Path(folder) if folder else None) if source else ""
    content = load_run(path) if path else {}
    saved = content["args"] if "facts" in content else {}  # DeiT's have no such entry
    return {name: saved[name] for name in DECIDED} if set(DECIDED) <= set(saved) else {}


def _build_seconds(
    args: Namespace,
    loaders: Loaders,
    student: Student,
    teacher: AnyTeacher | None,
    runtime: Runtime,
) -> Seconds:
    """Time updates and evaluation on a copy of the student."""
    if args.match or args.ranking_kl_weight:  # the objective adds taps to the teacher
        student, teacher = copy.deepcopy((student, teacher))
    else:
        student = copy.deepcopy(student)
    limit, device = SHARE * 60 * args.minutes, runtime.device
    steps, ema = len(loaders.train), optim.build_ema(args, student.network)
    update_ema = partial(ema.update, student.network) if ema is not None else None
    config = setup.build_step_config(args, loaders, teacher, runtime, update_ema=update_ema)
    train = partial(
        engine.train_one_epoch,
        setup.build_model(args, student, runtime),
        objective.build_objective(
            args,
            student,
            teacher,
            mixing=build_mixup(args, loaders.num_classes) is not None,
            input_size=runtime.inputs.input_size,
            total_updates=1,
        ),
        loaders.train,
        optim.build_optimizer(args, student, runtime.processes.world_size)[0],
        device,
        teacher=teacher,
        config=replace(config, log_interval=2**31),
    )

    missing = teacher.missing_shares() if teacher is not None else ()
    first = missing.index(max(missing)) if missing else 0  # the epoch that lacks most rows

    def run_epoch(epoch: int, on_update: OnUpdate) -> None:
        loaders.set_epoch(config.within_cycle(BatchKey(first + epoch, 0)).epoch)
        train(first + epoch, hooks=Hooks(on_update=on_update))

    updates = -(-steps // args.grad_accum_steps)
    epoch_s, done = seconds_of_epoch(run_epoch, updates, device, limit, warm_up=limit)
    writing: dict[str, float] = {}
    if teacher is not None and any(missing):  # repeated, these updates read what they have written
        writing = {"writing_epoch": epoch_s, "writing_epochs": sum(teacher.missing_shares())}
        epoch_s, _ = seconds_of_epoch(run_epoch, updates, device, limit, most=done)
    evaluate = partial(
        seconds_of_evaluation, loaders.val, device=device, batches=int(2 * limit * steps / epoch_s)
    )
    evaluation_s = evaluate(student.network) * (1 if ema is None else 2)
    size = sum(value.nbytes for value in student.state_dict().values())
    saving_s = (4 if ema is not None else 3) * size / DISK * bool(args.output_dir)
    network_T = teacher.logits_only() if teacher is not None and args.teacher_check else None
    teacher_s = evaluate(network_T) if network_T is not None else 0.0
    return Seconds(process_age() + teacher_s, epoch_s, evaluation_s + saving_s, **writing)


def seconds_of_epoch(
    run_epoch: Callable[[int, OnUpdate], None],
    updates: int,
    device: torch.device,
    limit: float,
    *,
    warm_up: float = 0.0,
    most: int | None = None,
) -> tuple[float, int]:
    """Return the seconds of an epoch of so many updates, and how many updates were done.

    They come from about `limit` seconds of training after `warm_up` seconds, in which a process is
    slower, and from `most` updates at most. run_epoch: trains the epoch of that number and calls
    `on_update` after every update. The first update is not counted, nor the first epoch if there
    is a later whole one.
    """
    times: list[float] = []
    begin, first = time.perf_counter() + warm_up, 0  # first: the update from which time counts

    def on_update(_: int) -> None:
        nonlocal first
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter())
        spent, slow = times[-1] - begin, MOST / SHARE * limit
        if spent <= 0:
            first = len(times) - 1
        timed = len(times) - first
        enough = (spent > limit and timed > 4) or (spent > slow and timed > 1)
        enough = enough or len(times) == most
        if distributed.any_rank(torch.tensor(enough, device=device)):
            raise _Enough

    with contextlib.suppress(_Enough):
        for epoch in itertools.count():
            run_epoch(epoch, on_update)
    start, end = -(-(first + 1) // updates), len(times) // updates  # whole epochs between
    if end > start:
        seconds = (times[end * updates - 1] - times[start * updates - 1]) / (end - start)
    else:
        seconds = (times[-1] - times[first]) / (len(times) - 1 - first) * updates
    return seconds, len(times)


@dataclass(frozen=True)
class _Beginning:
    """The first batches of a loader."""

    loader: Iterable
    batches: int

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.loader, self.batches)


def seconds_of_evaluation(
    loader: Any, network: nn.Module, *, device: torch.device, batches: int
) -> float:
    """Return the seconds of an evaluation, from at most so many batches, at least one."""
    total = len(loader)
    batches = min(total, max(1, batches))
    engine.evaluate(_Beginning(loader, 1), network, device)  # starts the workers
    begin = time.perf_counter()
    engine.evaluate(_Beginning(loader, batches), network, device)
    return (time.perf_counter() - begin) * total / batches


def process_age() -> float:
    """Return the seconds since this process started; without Linux's /proc its CPU time."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since the machine started
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, ValueError):
        return time.process_time()
