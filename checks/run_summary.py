"""What a training run prints for its user: a summary, a table of epochs, and the result.

All lines have at most `terminal.WIDTH` columns, but for paths and commands.
"""

import os
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from base import distributed, terminal
from base.distributed import print_important, print_once
from base.significance import wilson_interval
from base.text import printable
from checks.evaluation import print_accuracy
from data.image_dataset import ImageDataset
from data.image_ops import as_image
from data.image_source import Files
from datasets import Loaders
from training import recipe, run_folder
from training.metrics import clock, number
from training.setup import Runtime, Training

EXAMPLE = "example.png"
COLUMNS = {"epoch": 8, "loss": 9, "acc1": 8, "acc5": 8, "ema": 8, "best": 8, "images/s": 10}
COLUMNS |= {"time": 9, "left": 10}


class Speed:
    """The time of an epoch and its images per second, of all processes together."""

    def __init__(self, images_per_step: int, steps: int) -> None:
        self.images_per_step, self.steps = images_per_step, steps
        self.images, self.train_s = 0, 0.0

    def start(self, done: int) -> None:
        """Begin an epoch. done: steps that it has done before, in a resumed run."""
        self._began = time.perf_counter()
        self._images = (self.steps - done) * self.images_per_step

    def end_training(self) -> None:
        self._train_s = time.perf_counter() - self._began
        self.images += self._images
        self.train_s += self._train_s

    def values(self) -> dict[str, float]:
        """Return the epoch's seconds until now, with evaluation, and its training rate."""
        rate = self._images / max(self._train_s, 1e-9)
        return {"time_s": time.perf_counter() - self._began, "images_per_s": rate}


class RunSummary:
    """Prints the lines of one run. All processes call its methods; the first one prints.

    lines: of the start. images: of the validation data. teacher: accuracy and, unless empty, the
    class that it predicts for each image of this process. example: an image file, or "".
    plugins: files that the run had.
    expected: maps the accuracy to a line that compares it with the recipe's, or to "".
    """

    def __init__(
        self,
        lines: Sequence[str],
        folder: str,
        speed: Speed,
        *,
        epochs: int,
        first_epoch: int,
        teacher: Mapping[str, float],
        teacher_predictions: Sequence[Tensor],
        example: str,
        plugins: Sequence[str] = (),
        expected: Callable[[float], str] = lambda acc1: "",
    ) -> None:
        self.lines, self.folder, self.speed = lines, folder, speed
        self.epochs, self.first_epoch, self.example = epochs, first_epoch, example
        self.teacher, self.teacher_predictions = teacher, teacher_predictions
        self.expected, self.plugins = expected, plugins
        self._began = time.time()

    def print_start(self) -> None:
        for line in self.lines:
            print_important(line)
        if distributed.is_main():
            terminal.row("".join(f"{name:>{width}}" for name, width in COLUMNS.items()))

    def print_epoch(
        self,
        epoch: int,
        loss: float,
        stats: Mapping[str, float],
        ema: Mapping[str, float],
        best: float,
    ) -> None:
        """Print the row of an epoch, or DeiT's lines. Values that were not measured are dashes."""
        speed, seconds = self.speed.values(), time.time() - self._began
        left = seconds / (epoch + 1 - self.first_epoch) * (self.epochs - epoch - 1)
        cells = [f"{epoch + 1}/{self.epochs}", number(loss)]
        cells += [f"{stats[name]:.2f}" if stats else "-" for name in ("acc1", "acc5")]
        cells += [f"{ema['acc1']:.2f}" if ema else "-", f"{best:.2f}" if best >= 0 else "-"]
        cells += [f"{speed['images_per_s']:.0f}", clock(speed["time_s"]), clock(left)]
        if distributed.is_main():
            terminal.row("".join(f"{cell:>{n}}" for cell, n in zip(cells, COLUMNS.values())))
        if stats:
            print_accuracy(stats)
            print_once(None, f"Max accuracy: {best:.2f}%")
            if count := self.epochs - epoch - 1:
                print_once(None, f"{count} epoch{'s' * (count > 1)} left, about {clock(left)}")

    def print_end(
        self,
        stats: Mapping[str, float],
        ema: Mapping[str, float],
        best: float,
        predictions: Sequence[Tensor],
    ) -> None:
        """Print the result, the files and the next commands. stats: {} if nothing was trained."""
        total = clock(time.time() - self._began)
        if not stats:
            done = f"{self.first_epoch} of {self.epochs} epochs are done"
            print_important(f"Nothing to train: {done}")
        elif line := self.expected(stats["acc1"]):
            print_important(f"recipe: {line}")
        print_once(None, f"Training time {total}")
        lines = self._result(stats, ema, best, predictions, total) if stats else []
        if self.folder and distributed.is_main():
            lines.append(f"files     {', '.join(names_in(self.folder))}")
            lines += ["next      classify an image, write a report, export:"]
            commands = next_commands(self.folder, self.example, self.plugins)
            lines += [f"  {command}" for command in commands]
        for line in lines:
            print_important(line)

    def _result(
        self,
        stats: Mapping[str, float],
        ema: Mapping[str, float],
        best: float,
        predictions: Sequence[Tensor],
        total: str,
    ) -> list[str]:
        lines = [f"result    {accuracy_in_words(stats)}, last epoch"]
        lines += [f"          {best:.2f} % in the best epoch"]
        if ema:
            lines[-1] += f"; {ema['acc1']:.2f} % of the moving average"
        if self.teacher:
            lines.append(f"teacher   {accuracy_in_words(self.teacher)}")
            same = agreement(self.teacher_predictions, predictions)
            if same is not None:
                lines.append(f"          agrees with the student on {same:.1f} % of the images")
        rate = self.speed.images / max(self.speed.train_s, 1e-9)
        lines.append(f"speed     {rate:.0f} images/s in training, {total} with evaluation")
        return lines


def accuracy_in_words(stats: Mapping[str, float]) -> str:
    """Return the accuracy with Wilson's 95 % interval, in percent."""
    low, high = wilson_interval(stats["acc1"] / 100 * stats["count"], int(stats["count"]))
    return (
        f"{stats['acc1']:.2f} % of {stats['count']:.0f} images right "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f})"
    )


def agreement(one: Sequence[Tensor], other: Sequence[Tensor]) -> float | None:
    """Return on how many images (percent, of all processes) two networks predict the same class.

    None if either has no predictions. one, other: of batches, (B,), in the same order of images.
    """
    if not one or not other:
        return None
    first, second = torch.cat(list(one)), torch.cat(list(other))
    same = (first == second).sum() if len(first) == len(second) else first.new_tensor(0)
    counts = torch.stack([same.double(), first.new_tensor(len(first)).double()])
    hits, count = distributed.all_reduce_sum(counts).tolist()
    return 100 * hits / count


def names_in(folder: str) -> list[str]:
    """Return the files of a run that its user may open."""
    wanted = ("best_checkpoint.pth", "checkpoint.pth", "log.txt", terminal.LOG, "config.yaml")
    return [name for name in wanted if os.path.exists(os.path.join(folder, name))]


def next_commands(folder: str, example: str, plugins: Sequence[str] = ()) -> list[str]:
    """Return the commands that classify an image, write a report and export the student.

    plugins: files that the run had.
    """
    flags = [word for path in plugins for word in ("--plugin", path)]
    lines = [terminal.command("tools/predict.py", folder, example, *flags)] if example else []
    out = os.path.join(folder, "report.html")
    lines.append(terminal.command("tools/report.py", folder, "--out", out, *flags))
    exported = os.path.join(folder, "exported")
    return [*lines, terminal.command("tools/export.py", folder, exported, *flags)]


def build_summary(
    args: Namespace,
    training: Training,
    loaders: Loaders,
    runtime: Runtime,
    teacher: Mapping[str, float],
    teacher_predictions: Sequence[Tensor],
) -> RunSummary:
    """Return the summary of a run. teacher: its accuracy if known, and what it predicts."""
    val, processes = loaders.data[-1], runtime.processes
    has_order = isinstance(val, ImageDataset)
    return RunSummary(
        _build_start_lines(args, training, loaders, runtime, teacher),
        args.output_dir,
        Speed(args.batch_size * processes.world_size, len(loaders.train)),
        epochs=args.epochs,
        first_epoch=training.checkpointer.epoch,
        teacher=teacher,
        teacher_predictions=teacher_predictions if has_order else (),
        example=_build_example(args, val) if has_order and distributed.is_main() else "",
        plugins=args.plugin,
        expected=partial(recipe.beside, args.recipe),
    )


def _build_start_lines(
    args: Namespace,
    training: Training,
    loaders: Loaders,
    runtime: Runtime,
    teacher: Mapping[str, float],
) -> list[str]:
    counts = " and ".join(
        f"{len(data)} {part}" for data, part in zip(loaders.data, ("training", "validation"))
    )
    where = run_folder.data_name(args.data_path, args.data_set)
    size = "x".join(map(str, runtime.inputs.input_size))
    millions = training.student.num_parameters() / 1e6
    names = args.teacher_model if isinstance(args.teacher_model, list) else [args.teacher_model]
    lines = {
        "data": f"{where}: {counts} images, {loaders.num_classes} classes",
        "student": f"{args.model}, {millions:.2f} M parameters, {size} pixels",
        "teacher": "none, labels only",
        "device": f"{runtime.processes.describe()}; amp {runtime.amp_dtype or 'off'}",
        "plan": training.batch_plan.describe(),
    }
    if training.teacher is not None:
        lines["teacher"] = ", ".join(names)
    text = [f"{name:<10}{printable(line)}" for name, line in lines.items()]
    if teacher:
        text.insert(3, f"{'':<10}{accuracy_in_words(teacher)}")
    if share := loaders.data[-1].source.held_out:
        held_out = f"{100 * share:g} % of each class are held out for validation, by a fixed seed"
        text.insert(1, f"{'':<10}{held_out}")
    return [
        line if len(line) <= terminal.WIDTH else f"{line[: terminal.WIDTH - 3]}..." for line in text
    ]


def _build_example(args: Namespace, data: ImageDataset) -> str:
    """Return the path of a validation image; one without a file is written to the folder."""
    if isinstance(data.source, Files):
        return data.source.path(0)
    if not args.output_dir:
        return ""
    path = os.path.join(args.output_dir, EXAMPLE)
    as_image(data.source.load(0)[0]).save(path)
    return path
