"""Accuracy against the number of cached views, in the time that a live teacher takes.

    python tools/compare_views.py --data CIFAR10_FOLDER --write docs/cached_views.md

Trains the teacher once, then for every seed the student with the live teacher, without any, and
from caches of so many views, for as many epochs as the live run's time allows: once with the
writing of the cache taken off it, once without, as for a cache that another run has written.
Seconds are those of training and writing, without start-up and evaluation: of the processor on one
CPU thread, of the clock elsewhere. What is already complete under --runs is not repeated. What
follows `--` goes to every student's run.
"""

import argparse
import json
import platform
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import compare, compare_objectives  # noqa: E402

READING_EPOCHS = 3  # of the run that says how long an epoch from a cache takes


@dataclass(frozen=True)
class Row:
    """What a row of the table was: runs over the seeds, all of so many epochs."""

    name: str
    epochs: int
    train_s: Sequence[float]  # of each seed, all epochs
    write_s: float  # of the cache, all views
    logs: Sequence[dict[str, Any]]  # the last line of each seed's log.txt


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = made.add_argument
    add("--data", default="", help="image folder; without it, the embedded digits")
    add("--data-set", default="CIFAR10", help="what --data is; CIFAR10: with train/ and test/")
    add("--pictures", type=int, metavar="N", help="train the students on the first N pictures of "
        "--data alone, as many of each class")  # fmt: skip
    add("--student", default=compare_objectives.STUDENT)
    add("--teacher", default=compare_objectives.TEACHER)
    add("--teacher-flags", default="--epochs 30", help="of the teacher's own training")
    add("--views", type=int, nargs="+", default=[1, 4, 16])
    add("--epochs", type=int, default=20, help="of the live run, whose time is everybody's")
    add("--batch-size", type=int, default=64)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--device", default="cpu")
    add("--threads", type=int, default=1, help="CPU threads of each run")
    add("--runs", type=Path, default=ROOT / "runs" / "views")
    add("--write", type=Path, help="Markdown file for the table")
    add("--json", type=Path, metavar="FILE", help="seconds and logs, for machines")
    add("common", nargs="*", help="flags for every student, after --")
    return made


class Runs:
    """The runs of main.py: each once, in a folder of its own, with the seconds of its passes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.folder, self.threads = args.runs, args.threads
        self.clock = "cpu" if args.device == "cpu" and args.threads == 1 else "wall"
        recipe = [*shlex.split(compare_objectives.RECIPE), "--device", args.device,
                  "--batch-size", str(args.batch_size)]  # fmt: skip
        data = ["--data-set", args.data_set, "--data-path", args.data] if args.data else []
        teacher = self.folder / "teacher"
        self.run(teacher, "--model", args.teacher, *data, *recipe, *shlex.split(args.teacher_flags))
        self.teacher_acc1 = last_line(teacher)["test_acc1"]
        if args.pictures:
            few = self.folder / f"pictures{args.pictures}"
            data[-1] = str(some_pictures(Path(args.data), args.pictures, few))
        self.student = ["--model", args.student, "--distillation-type", "hard", "--teacher-model",
                        args.teacher, "--teacher-path", str(teacher / "checkpoint.pth"),
                        "--no-teacher-check", *data, *recipe, *args.common]  # fmt: skip

    def run(self, folder: Path, *flags: str) -> list[float]:
        """Return the seconds of every pass over the train data."""
        seconds = folder / "seconds.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--timed", str(seconds),
                   self.clock, *flags, "--output_dir", str(folder)]  # fmt: skip
        compare.run_once(folder, command, self.threads)
        return json.loads(seconds.read_text())

    def train(self, name: str, seed: int, epochs: int, *flags: str) -> tuple[list[float], dict]:
        """Return the seconds of every epoch of a student, and the last line of its log.txt."""
        folder = self.folder / name / f"seed{seed}"
        seconds = self.run(
            folder, *self.student, "--seed", str(seed), "--epochs", str(epochs), *flags
        )
        return seconds, last_line(folder)

    def write(self, seed: int, views: int) -> list[float]:
        """Write a cache; return the seconds of every view."""
        folder = self.folder / f"write{views}" / f"seed{seed}"
        if not (folder / "command.txt").exists():  # half a cache would be finished too soon
            shutil.rmtree(self.cache(seed, views), ignore_errors=True)
        flags = self.reading(seed, views, "write")
        return self.run(folder, *self.student, "--seed", str(seed), *flags)

    def cache(self, seed: int, views: int) -> Path:
        return self.folder / "caches" / f"views{views}_seed{seed}"

    def reading(self, seed: int, views: int, mode: str = "read") -> list[str]:
        return ["--teacher-cache", str(self.cache(seed, views)), "--teacher-cache-views",
                str(views), "--teacher-cache-mode", mode]  # fmt: skip


def some_pictures(folder: Path, count: int, to: Path) -> Path:
    """Return an image folder with `count` of the training pictures of another, and all others."""
    for split in (path for path in folder.resolve().iterdir() if path.is_dir()):
        classes = sorted(path for path in split.iterdir() if path.is_dir())
        each = count // len(classes) if split.name == "train" else None
        for path in (picture for one in classes for picture in sorted(one.iterdir())[:each]):
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
    engine.ask_teacher = noting(engine.ask_teacher)
    code = main.run(flags)
    Path(file).write_text(json.dumps(seconds))
    return code


def epochs_in(budget_s: float, write_s: float, epoch_s: float) -> int:
    """Return how many whole epochs are left of a budget once the writing is paid."""
    return max(0, int((budget_s - write_s) / epoch_s))


def compare_views(args: argparse.Namespace) -> tuple[Runs, list[Row]]:
    runs, seeds = Runs(args), args.seeds
    live = [runs.train("live", seed, args.epochs) for seed in seeds]
    rows = [row_of("live", args.epochs, live, 0.0)]
    budget = statistics.mean(rows[0].train_s)
    writing = {
        views: statistics.mean(sum(runs.write(seed, views)) for seed in seeds)
        for views in args.views
    }
    some = args.views[0]
    reading, _ = runs.train("reading", seeds[0], READING_EPOCHS, *runs.reading(seeds[0], some))
    epoch_s = statistics.median(reading)
    epochs = epochs_in(budget, 0.0, epoch_s)
    alone = [runs.train("none", seed, epochs, "--distillation-type", "none") for seed in seeds]
    rows.append(row_of("none, labels alone", epochs, alone, 0.0))
    for counted in (False, True):
        for views, write_s in writing.items():
            name = f"{views} view{'s' * (views > 1)}, writing{' not' * (not counted)} counted"
            epochs = epochs_in(budget, write_s * counted, epoch_s)
            found = []
            if epochs:
                found = [
                    runs.train(name, seed, epochs, *runs.reading(seed, views)) for seed in seeds
                ]
            rows.append(row_of(name, epochs, found, write_s))
    return runs, rows


def row_of(name: str, epochs: int, found: Sequence[tuple], write_s: float) -> Row:
    return Row(name, epochs, [sum(s) for s, _ in found], write_s, [log for _, log in found])


def table(rows: Sequence[Row]) -> list[str]:
    """Return the rows in Markdown; seconds are means over the seeds."""
    lines = ["| the teacher's answers | epochs | training, s | writing, s | top-1, % | "
             "EMA top-1, % | train loss |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        write_s = f"{row.write_s:.0f}" if row.write_s else "–"
        cells = ["0", "–", write_s, "writing takes all the time", "", ""]
        if row.logs:
            cells = [str(row.epochs), f"{statistics.mean(row.train_s):.0f}", write_s]
            cells += [compare.spread([log.get(key) for log in row.logs])
                      for key in ("test_acc1", "ema_acc1", "train_loss")]  # fmt: skip
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return lines


def about(args: argparse.Namespace, runs: Runs) -> list[str]:
    """Return in words what was run, on what, and by which command."""
    import timm
    import torch

    command = shlex.join(["python", "tools/compare_views.py", *sys.argv[1:]])
    machine = f"{platform.machine()}, {args.threads} CPU thread(s) per run"
    if args.device != "cpu":
        machine = torch.cuda.get_device_name(args.device)
    kind = "CPU seconds" if runs.clock == "cpu" else "wall-clock seconds"
    return ["", f"Mean ± sample standard deviation over {len(args.seeds)} seeds, after the last "
            f"epoch. Student {args.student}, teacher {args.teacher} "
            f"({runs.teacher_acc1:.1f} %); {kind} of training and writing.", "", "```", command,
            "```", "", f"Commit {compare.commit()}, torch {torch.__version__.split('+')[0]}, timm "
            f"{timm.__version__}, {machine}.", ""]  # fmt: skip


def main() -> int:
    if sys.argv[1:2] == ["--timed"]:  # a run, in a process of its own
        return timed(sys.argv[2:])
    args = parser().parse_args()
    runs, rows = compare_views(args)
    text = "\n".join(table(rows) + about(args, runs))
    print(text)
    for path, content in ((args.write, text), (args.json, json.dumps([vars(r) for r in rows]))):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
