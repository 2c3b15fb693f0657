"""Several runs on the same images: what distillation gained, agreement, disputed images, seeds.

Shapes: P images.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from base.significance import mcnemar
from base.text import class_name
from tools.fidelity import STUDENT, TEACHER, agreement

BASELINE = "baseline"
ALPHA = 0.05  # a smaller p-value is a measurable difference
MOST_DISPUTED = 12  # images that are shown
# Flags that may differ between runs of one group
SEED_FLAGS = {
    "seed",
    "output_dir",
    "resume",
    "num_workers",
    "log_interval",
    "log_wandb",
    "log_mlflow",
}


@dataclass(frozen=True)
class Run:
    """A run that was measured.

    settings: its flags. numbers: all that the report shows, in plain types. predictions: labels and
    predicted classes (P,) by name. confidence: of the predictions (P,) by name, and with a teacher
    "nats", the divergence of the student from it. data: identifies the images.
    """

    name: str
    settings: Mapping[str, Any]
    numbers: dict[str, Any]
    predictions: Mapping[str, Tensor]
    confidence: Mapping[str, Tensor]
    classes: list[str]
    data: str


def is_distilled(settings: Mapping[str, Any]) -> bool:
    """Return whether a run was trained with a teacher, by logits or features."""
    by_logits = settings["distillation_type"] != "none"
    return bool(by_logits or settings["match"] or settings["ranking_kl_weight"])


def trained_with(settings: Mapping[str, Any]) -> str:
    """Return what a student was trained with, in words."""
    if not is_distilled(settings):
        return "labels only"
    kind = settings["distillation_type"]
    return "features of a teacher" if kind == "none" else f"{kind} distillation"


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the content of the JSON file.

    The first distilled run is the student of the headline.
    """
    student = next((run for run in runs if is_distilled(run.settings)), runs[0])
    baseline = baseline_of(student, runs)
    compared = []
    for run in sorted(runs, key=lambda run: run is not student):
        other = baseline_of(run, runs)
        compared += [versus(run, BASELINE, other)] if other else []
        compared += [versus(run, TEACHER, run)] if TEACHER in run.predictions else []
    return {
        "headline": {
            STUDENT: student.name,
            BASELINE: baseline.name if baseline else "",
            TEACHER: student.numbers["teacher"],
        },
        "runs": [run.numbers for run in runs],
        "agreement": between(runs),
        "comparisons": compared,
        "verdicts": verdicts(runs, compared),
        "disputed": disputed(student, baseline),
        "seeds": seeds(runs),
    }


def baseline_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """Return the first run of the same student with labels only on the same images, or None."""
    for other in runs if is_distilled(run.settings) else ():
        alike = all(run.numbers[key] == other.numbers[key] for key in ("student", "images"))
        if alike and run.data == other.data and not is_distilled(other.settings):
            return other
    return None


def versus(run: Run, kind: str, other: Run) -> dict[str, Any]:
    """Return McNemar's test of a run's student against a baseline, or the run's own teacher."""
    names = STUDENT, STUDENT if kind == BASELINE else TEACHER
    right, right_other = (
        one.predictions[name] == one.predictions["label"] for one, name in zip((run, other), names)
    )
    only, only_other = int((right & ~right_other).sum()), int((right_other & ~right).sum())
    return {
        "run": run.name,
        "with": kind,
        "name": other.name if kind == BASELINE else run.numbers["teacher"],
        "images": len(right),
        "points": 100 * (only - only_other) / len(right),
        "only_run": only,
        "only_other": only_other,
        "p": mcnemar(only, only_other),
    }


def p_text(p: float) -> str:
    """Return "p = 0.012" with two digits, "p < 0.001" below."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def verdicts(runs: Sequence[Run], compared: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return in words what distillation gained, and which students are above their teachers."""
    accuracy = {run.name: run.numbers["accuracy"] for run in runs}
    lines = []
    for one in compared:
        run, points, p = one["run"], one["points"], p_text(one["p"])
        other = one["name"] if "labels" in one["name"] else f"{one['name']} (labels only)"
        if one["with"] == TEACHER:
            student, teacher = (accuracy[run][key]["acc1"] for key in (STUDENT, TEACHER))
            if student > teacher:
                above = f"is above the teacher ({teacher:.2f}%), {p}"
                lines.append(f"{run}: the student ({student:.2f}%) {above}")
        elif one["p"] < ALPHA:
            word = "better" if points > 0 else "worse"
            lines.append(f"{run}: {abs(points):.1f} points {word} than {other}, {p}")
        else:
            lines.append(
                f"{run}: no measurable gain on {one['images']} images, {points:+.1f} points over "
                f"{other}, {p}"
            )
    if not any(one["with"] == BASELINE for one in compared):
        lines.append(
            "The gain of distillation is unknown: add a run of the same student with "
            "--distillation-type none"
        )
    return lines


def between(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Return the agreement between the students of several runs, labels and teachers.

    None for one run, and for runs with different images. A teacher that all were compared with
    is listed once, also where it is one of the runs.
    """
    same = len({(run.data, run.numbers["images"], *run.classes) for run in runs}) == 1
    if len(runs) == 1 or not same:
        return None
    predictions = {"label": runs[0].predictions["label"]}
    with_T = [run for run in runs if TEACHER in run.predictions]
    if with_T and all(
        torch.equal(run.predictions[TEACHER], with_T[0].predictions[TEACHER]) for run in with_T
    ):
        predictions[TEACHER] = with_T[0].predictions[TEACHER]
    else:
        predictions |= {f"{TEACHER} of {run.name}": run.predictions[TEACHER] for run in with_T}
    predictions |= {
        f"run {run.name}" if run.name in predictions else run.name: run.predictions[STUDENT]
        for run in runs
        if not run.numbers.get("teacher_to")
    }
    return {"names": list(predictions), "matrix": agreement(predictions)}


def disputed(student: Run, baseline: Run | None) -> dict[str, Any]:
    """Return {"between", "count", "images"}: the images that the networks disagree on.

    between: which of student, baseline and teacher there are. Each of at most `MOST_DISPUTED`
    images has its index in the data, the label and the predictions with their confidence. Those
    with the largest divergence of student and teacher come first.
    """
    sides = {STUDENT: (student, STUDENT)}
    if baseline is not None and baseline.classes == student.classes:
        sides[BASELINE] = baseline, STUDENT
    if TEACHER in student.predictions:
        sides[TEACHER] = student, TEACHER
    predicted = torch.stack([run.predictions[name] for run, name in sides.values()])
    differs = (predicted != predicted[0]).any(0)
    nats = student.confidence.get("nats", torch.zeros(len(differs)))
    order = nats.argsort(descending=True, stable=True)
    images = []
    for index in order[differs[order]][:MOST_DISPUTED].tolist():
        label = int(student.predictions["label"][index])
        row = {"index": index, "label": class_name(student.classes, label)}
        for side, (run, name) in sides.items():
            predicted_class = int(run.predictions[name][index])
            share = 100 * float(run.confidence[name][index])
            row[side] = f"{class_name(run.classes, predicted_class)} {share:.0f}%"
            row[side] += " ✓" * (predicted_class == label)
        images.append(row | ({"nats": float(nats[index])} if TEACHER in sides else {}))
    return {"between": list(sides), "count": int(differs.sum()), "images": images}


def seeds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return accuracy, mean and standard deviation of runs that differ in the seed alone."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        kept = {key: value for key, value in run.settings.items() if key not in SEED_FLAGS}
        groups.setdefault(repr((run.data, sorted(kept.items()))), []).append(run)
    found = []
    for group in groups.values():
        if len({run.settings.get("seed") for run in group}) > 1:
            acc1 = [run.numbers["accuracy"][STUDENT]["acc1"] for run in group]
            names = [run.name for run in group]
            summary = {"mean": statistics.mean(acc1), "std": statistics.stdev(acc1)}
            found.append({"runs": names, "acc1": acc1, **summary})
    return found
