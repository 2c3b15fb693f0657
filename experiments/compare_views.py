"""Accuracy against the number of cached views, in the time that a live teacher takes.

    python experiments/compare_views.py --data CIFAR10_FOLDER --write results/cached_views.md

Trains the teacher once, then for every seed the student with the live teacher, without any, and
from caches of so many views, for as many epochs as the live run's time allows: once with the
writing of the cache taken off it, once without, as for a cache that another run has written. How
long an epoch of each kind and the writing of a view take is measured before, in turn and alone, in
medians over rounds: passes over the training data, without start-up and evaluation, in seconds of
the processor on one CPU thread, of the clock elsewhere. What is already complete under --runs is
not repeated. What follows `--` goes to every student's run.
"""

import argparse
import json
import platform
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments import compare, compare_objectives  # noqa: E402

ROUNDS, EPOCHS = 3, 2  # of measuring the batch_plan, and of each of its runs


@dataclass(frozen=True)
class BatchPlan:
    """What an epoch from a cache and the writing of a view take; an epoch with the teacher is 1."""

    reading: float
    writing: float


@dataclass(frozen=True)
class Row:
    """What a row of the table is: a run for each seed.

    epochs: of each run. views: of the cache that is read, or 0. training, writing: their time by
    the batch_plan, where the whole live run takes 1. flags: what is added to the runs'.
    """

    name: str
    epochs: int
    views: int = 0
    training: float = 1.0
    writing: float = 0.0
    flags: Sequence[str] = ()


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = made.add_argument
    add("--data", default="", help="image folder; without it, the embedded digits")
    add("--data-set", default="CIFAR10", help="what --data is; CIFAR10: with train/ and test/")
    add(
        "--images",
        type=int,
        metavar="N",
        help="train the students on the first N images of --data alone, as many of each class",
    )
    add("--student", default=compare_objectives.STUDENT)
    add("--teacher", default=compare_objectives.TEACHER)
    add("--teacher-flags", default="--epochs 30", help="of the teacher's own training")
    add("--views", type=int, nargs="+", default=[1, 4, 16])
    add("--epochs", type=int, default=20, help="of the live run, whose time is everybody's")
    add("--batch-size", type=int, default=64)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--device", default="cpu")
    add("--threads", type=int, default=1, help="CPU threads of each run")
    add("--jobs", type=int, default=1, help="runs at a time, once the batch_plan is known")
    add("--runs", type=Path, default=ROOT / "runs" / "views")
    add("--write", type=Path, help="Markdown file for the table")
    add("--json", type=Path, metavar="FILE", help="times and logs, for machines")
    add("common", nargs="*", help="flags for every student, after --")
    return made


class Runs:
    """The runs of main.py: each once, in a folder of its own, with the seconds of its passes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.folder, self.threads, self.jobs = args.runs, args.threads, args.jobs
        self.seeds = args.seeds
        self.clock = "cpu" if args.device == "cpu" and args.threads == 1 else "wall"
        recipe = [
            *shlex.split(compare_objectives.RECIPE),
            "--device",
            args.device,
            "--batch-size",
            str(args.batch_size),
        ]
        data = ["--data-set", args.data_set, "--data-path", args.data] if args.data else []
        teacher = self.folder / "teacher"
        self.run(teacher, "--model", args.teacher, *data, *recipe, *shlex.split(args.teacher_flags))
        self.teacher_acc1 = last_line(teacher)["test_acc1"]
        if args.images:
            few = self.folder / f"images{args.images}"
            data[-1] = str(some_images(Path(args.data), args.images, few))
        self.student = [
            "--model",
            args.student,
            "--distillation-type",
            "hard",
            "--teacher-model",
            args.teacher,
            "--teacher-path",
            str(teacher / "checkpoint.pth"),
            "--no-teacher-check",
            *data,
            *recipe,
            *args.common,
        ]

    def run(self, folder: Path, *flags: str) -> list[float]:
        """Return the seconds of every pass over the train data."""
        seconds = folder / "seconds.json"
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--timed",
            str(seconds),
            self.clock,
            *flags,
            "--output_dir",
            str(folder),
        ]
        compare.run_once(folder, command, self.threads)
        return json.loads(seconds.read_text())

    def train(self, name: str, seed: int, epochs: int, *flags: str) -> list[float]:
        """Return the seconds of every epoch of a student."""
        return self.run(
            self.folder / name / f"seed{seed}",
            *self.student,
            "--seed",
            str(seed),
            "--epochs",
            str(epochs),
            *flags,
        )

    def write(self, seed: int, views: int, name: str = "cache") -> tuple[list[float], list[str]]:
        """Write a cache; return the seconds of every view, and the flags that read it."""
        folder = self.folder / f"{name}{views}" / f"seed{seed}"
        cache = folder.with_name(f"written{seed}")
        if not (folder / "command.txt").exists():  # half a cache would be finished too soon
            shutil.rmtree(cache, ignore_errors=True)
        flags = ["--teacher-cache", str(cache), "--teacher-cache-views", str(views)]
        seconds = self.run(
            folder, *self.student, "--seed", str(seed), *flags, "--teacher-cache-mode", "write"
        )
        return seconds, [*flags, "--teacher-cache-mode", "read"]

    def batch_plan(self, seed: int) -> BatchPlan:
        """Measure an epoch with the teacher, writing a view and an epoch that reads, in turn."""
        reading, writing = [], []
        for number in range(ROUNDS):
            name = f"batch_plan{number}"
            live = statistics.mean(self.train(f"{name}_live", seed, EPOCHS))
            written, flags = self.write(seed, EPOCHS, f"{name}_cache")
            writing.append(statistics.mean(written) / live)
            read = self.train(f"{name}_read", seed, EPOCHS, *flags)
            reading.append(statistics.mean(read) / live)
        return BatchPlan(statistics.median(reading), statistics.median(writing))

    def train_all(self, rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
        """Train the rows' students; return the last lines of their log.txt, by row."""
        views = {row.views for row in rows if row.views and row.epochs}
        pairs = [(row, seed) for row in rows if row.epochs for seed in self.seeds]

        def train(row: Row, seed: int) -> dict[str, Any]:
            flags = self.write(seed, row.views)[1] if row.views else row.flags
            self.train(row.name, seed, row.epochs, *flags)
            return last_line(self.folder / row.name / f"seed{seed}")

        with ThreadPoolExecutor(self.jobs) as pool:
            list(
                pool.map(
                    self.write,
                    self.seeds * len(views),
                    [each for each in sorted(views) for _ in self.seeds],
                )
            )
            logs = list(pool.map(train, *zip(*pairs)))
        found: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
        for (row, _), log in zip(pairs, logs):
            found[row.name].append(log)
        return found


def some_images(folder: Path, count: int, to: Path) -> Path:
    """Return an image folder with `count` of the training images of another, and all others."""
    for split in (path for path in folder.resolve().iterdir() if path.is_dir()):
        classes = sorted(path for path in split.iterdir() if path.is_dir())
        each = count // len(classes) if split.name == "train" else None
        for path in (image for one in classes for image in sorted(one.iterdir())[:each]):
            link = to / path.relative_to(folder.resolve())
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(path)
    return to


def last_line(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "log.txt").read_text().splitlines()[-1])


def timed(argv: Sequence[str]) -> int:
    """Run main.py in this process: FILE for the seconds of its passes, cpu or wall, its flags."""
    import engine
    import main

    file, clock, *flags = argv
    now = time.process_time if clock == "cpu" else time.perf_counter
    seconds: list[float] = []

    def noting(function: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            started = now()
            found = function(*args, **options)  # at its end it has waited for the device
            seconds.append(now() - started)
            return found

        return call

    engine.train_one_epoch = noting(engine.train_one_epoch)
    engine.query_epoch = noting(engine.query_epoch)
    code = main.run(flags)
    Path(file).write_text(json.dumps(seconds))
    return code


def epochs_in(budget: float, writing: float, epoch: float) -> int:
    """Return how many whole epochs are left of a time once the writing is paid."""
    return max(0, int((budget - writing) / epoch))


def rows_of(epochs: int, views: Sequence[int], batch_plan: BatchPlan) -> list[Row]:
    """Return the rows of the table. epochs: of the live run, whose time is everybody's."""
    alone = epochs_in(epochs, 0.0, batch_plan.reading)
    rows = [
        Row("live", epochs),
        Row(
            "none, labels alone",
            alone,
            training=alone * batch_plan.reading / epochs,
            flags=("--distillation-type", "none"),
        ),
    ]
    for counted in (False, True):
        for each in views:
            name = f"{each} view{'s' * (each > 1)}, writing{' not' * (not counted)} counted"
            writing = each * batch_plan.writing
            left = epochs_in(epochs, writing * counted, batch_plan.reading)
            rows.append(Row(name, left, each, left * batch_plan.reading / epochs, writing / epochs))
    return rows


def table(rows: Sequence[Row], logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return the rows in Markdown; times are parts of the live run's. logs: by row."""
    lines = [
        "| the teacher's answers | epochs | training, of the live run's time | writing | "
        "top-1, % | EMA top-1, % | train loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [str(row.epochs), f"{row.training:.2f}", f"{row.writing:.2f}"]
        cells += [
            compare.spread([log.get(key) for log in logs[row.name]])
            for key in ("test_acc1", "ema_acc1", "train_loss")
        ]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return lines


def about(args: argparse.Namespace, runs: Runs, batch_plan: BatchPlan) -> list[str]:
    """Return in words what was run, on what, and by which command."""
    import timm
    import torch

    command = shlex.join(["python", "experiments/compare_views.py", *sys.argv[1:]])
    machine = f"{platform.machine()}, {args.threads} CPU thread(s) per run"
    if args.device != "cpu":
        machine = torch.cuda.get_device_name(args.device)
    kind = "processor" if runs.clock == "cpu" else "clock"
    return [
        "",
        f"Mean ± sample standard deviation over {len(args.seeds)} seeds, after the last "
        f"epoch. Student {args.student}, teacher {args.teacher} ({runs.teacher_acc1:.1f} %). "
        f"By the {kind}, an epoch that reads takes {batch_plan.reading:.2f} of an epoch with the "
        f"teacher, writing a view {batch_plan.writing:.2f}: medians of {ROUNDS} rounds.",
        "",
        "```",
        command,
        "```",
        "",
        f"Commit {compare.commit()}, torch {torch.__version__.split('+')[0]}, timm "
        f"{timm.__version__}, {machine}.",
        "",
    ]


def main() -> int:
    if sys.argv[1:2] == ["--timed"]:  # a run, in a process of its own
        return timed(sys.argv[2:])
    args = _parser().parse_args()
    if args.images and not args.data:
        raise SystemExit("--images takes some of --data, which is not given")
    runs = Runs(args)
    batch_plan = runs.batch_plan(args.seeds[0])
    rows = rows_of(args.epochs, args.views, batch_plan)
    logs = runs.train_all(rows)
    text = "\n".join(table(rows, logs) + about(args, runs, batch_plan))
    print(text)
    numbers = {
        "batch_plan": vars(batch_plan),
        "rows": [vars(row) | {"logs": logs[row.name]} for row in rows],
    }
    for path, content in ((args.write, text), (args.json, json.dumps(numbers, indent=1) + "\n")):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
