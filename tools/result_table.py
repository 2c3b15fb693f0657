"""The table of `tools/report.py` and `tools/distil.py` as text, from the content of report.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from base import terminal
from tools.comparison import BASELINE
from tools.fidelity import STUDENT, TEACHER

MAX_NAME = 24  # characters
HEAD = ("network", "weights", "top-1", "95 % interval", "latency", "size")
EPOCHS = {"best_checkpoint.pth": "best epoch", "checkpoint.pth": "last epoch"}


def networks(found: Mapping[str, Any]) -> dict[str, tuple[Mapping[str, Any], str]]:
    """Return a run and STUDENT or TEACHER by title, each teacher once.

    First the student, its baseline and its teacher, then the other runs and teachers. A teacher
    that is itself one of the runs has that run's title.
    """
    runs = {run["run"]: run for run in found["runs"]}
    first = [name for role in (STUDENT, BASELINE) if (name := found["headline"][role])]
    students_of_runs = {name for run in found["runs"] for name in run.get("teacher_to", ())}
    lenders = {}  # a run for each teacher
    for run in [*map(runs.get, first), *runs.values()]:
        if TEACHER in run["accuracy"] and run["teacher_of"] not in students_of_runs:
            lenders.setdefault((run["teacher"], run["accuracy"][TEACHER]["acc1"]), run)
    students = {name: (run, STUDENT) for name, run in runs.items()}
    teachers = {}
    for run in lenders.values():
        title = TEACHER if len(lenders) == 1 else f"{TEACHER} of {run['run']}"
        teachers[f"{title} (network)" if title in runs else title] = run, TEACHER
    return {name: students[name] for name in first} | teachers | students


def lines(found: Mapping[str, Any], titles: Sequence[str] = ()) -> list[str]:
    """Return the accuracy, latency and size of all networks in at most 80 columns, and verdicts.

    titles: of the networks in the order of the rows; default: that of `networks`.
    """
    all_of, runs = networks(found), found["runs"]
    chosen = [name for name in titles or all_of if name in all_of]
    rows = [_row(name, *all_of[name]) for name in chosen]
    cost = runs[0]["cost"][STUDENT]
    images = dict.fromkeys(f"{run['images']} images" for run in runs)
    about = f"{' or '.join(images)}; latency of one image on {cost['device']}"
    if any(row[1] == EPOCHS["best_checkpoint.pth"] for row in rows):
        about += "; the best epoch is that with the highest accuracy on these images"
    table = terminal.align([HEAD, *rows], left=2)
    for name in chosen:
        run, role = all_of[name]
        if (present := run["accuracy"][role].get("acc1_present")) is not None:
            table.append(f"{_short(name)}: top-1 among the classes with images {present:.2f}%")
    return [*table, *(terminal.wrap(line) for line in [f"{about}.", *found["verdicts"]])]


def _row(title: str, run: Mapping[str, Any], role: str) -> tuple[str, ...]:
    accuracy, cost = run["accuracy"][role], run["cost"][role]
    file = run["weights"].partition(",")[0] if role == STUDENT else ""
    low, high = accuracy["acc1_interval"]
    return (
        _short(title),
        EPOCHS.get(file, file),
        f"{accuracy['acc1']:.2f}%",
        f"{low:.1f} to {high:.1f}%",
        f"{cost['latency_ms']:.3g} ms",
        f"{cost['size_mb']:.1f} MB",
    )


def _short(title: str) -> str:
    return title if len(title) <= MAX_NAME else f"{title[: MAX_NAME - 3]}..."
