"""The page of `tools/report.py`: from the numbers of runs to one HTML file that loads nothing.

The template is report.html, its style report.css. Charts need an optional package; without it the
page has their tables.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2

from tools import report_charts as draw
from tools.comparison import BASELINE, p_text
from tools.fidelity import STUDENT, TEACHER
from tools.result_table import networks

SHOWN_CLASSES = 20  # of the per-class table; half from each end
TERMS = {  # the rows of the first table
    "trained with": "",
    "top-1": "Share of images whose most probable class is the label.",
    "95 % interval": "Contains the accuracy on all images of this kind in 95 % of cases (Wilson). "
    "Few images give a wide interval.",
    "top-1 among the classes with images": "The same if only these classes may be predicted.",
    "against the baseline": "Difference in points to the run with labels only. p is that of "
    "McNemar's exact test: the probability of a difference at least this large if both were "
    "equally good. It counts the images that only one of the two has right. Below 0.05 the "
    "difference is measurable.",
    "against the teacher": "The same, compared with the teacher.",
    "agrees with teacher": "Share of images with the same prediction, right or wrong.",
    "KL, nats": "Kullback-Leibler divergence of the probabilities from the teacher's, 0 if equal.",
    "ECE": "Expected calibration error: mean difference between confidence and accuracy.",
    "input": "Height and width of the images in pixels.",
    "parameters": "Trained numbers in millions (M).",
    "GMACs": "10⁹ multiply-adds for one image.",
    "size": "Parameters and buffers in memory. 1 MB is 10⁶ bytes.",
    "latency": "Time for one image alone; median of torch.utils.benchmark.",
    "throughput": "Images per second in batches.",
    "teacher": "The teacher that the run is compared with.",
}


def percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def headline(found: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the columns of the first table by title, each with values for some of `TERMS`."""
    return {
        title: student_column(run, found) if role == STUDENT else network_column(run, TEACHER)
        for title, (run, role) in networks(found).items()
    }


def student_column(run: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, str]:
    names, matrix = run["agreement"]["names"], run["agreement"]["matrix"]
    column = {"trained with": run["trained_with"], **network_column(run, STUDENT)}
    for one in found["comparisons"]:
        if one["run"] == run["run"]:
            column[f"against the {one['with']}"] = f"{one['points']:+.2f}, {p_text(one['p'])}"
    if TEACHER in names:
        both = matrix[names.index(STUDENT)][names.index(TEACHER)]
        column["agrees with teacher"] = percent(both)
        column["KL, nats"] = f"{run['kl_nats'][STUDENT]:.4f}"
        owner = run["teacher_of"]
        column["teacher"] = "its own" if owner == run["run"] else f"of {owner}"
    return column


def network_column(run: Mapping[str, Any], name: str) -> dict[str, str]:
    """Return the accuracy, calibration and cost of a run's student or teacher."""
    accuracy, cost = run["accuracy"][name], run["cost"][name]
    low, high = accuracy["acc1_interval"]
    column = {"top-1": f"{accuracy['acc1']:.2f}%", "95 % interval": f"{low:.1f} to {high:.1f}%"}
    if "acc1_present" in accuracy:
        column["top-1 among the classes with images"] = f"{accuracy['acc1_present']:.2f}%"
    return column | {
        "ECE": percent(run["calibration"][name]["ece"]),
        "input": run["teacher_input"] if name == TEACHER else run["input"].split(",")[0],
        "parameters": f"{cost['parameters'] / 1e6:.2f} M",
        "GMACs": f"{cost['gmacs']:.3g}",
        "size": f"{cost['size_mb']:.1f} MB",
        "latency": f"{cost['latency_ms']:.3g} ms",
        "throughput": f"{cost['images_per_s']:,.{cost['images_per_s'] < 10:d}f} images/s",
    }


def page(found: Mapping[str, Any], images: Mapping[str, Any]) -> str:
    """Return the whole report as one HTML page.

    found: the content of the JSON file. images: "disputed", an image for each row of
    found["disputed"]["images"]; "attention", {"head", "rows"} with titles and images.
    """
    runs, columns = found["runs"], headline(found)
    rows = [name for name in TERMS if any(name in column for column in columns.values())]
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True
    )
    figures = [*curves(runs), speed(found), seeds(found["seeds"]), tokens(runs)]
    return environment.get_template("report.html").render(
        style=(folder / "report.css").read_text(),
        program=draw.program() if draw.alt else "",
        install="" if draw.alt else draw.INSTALL,
        verdicts=found["verdicts"],
        data=shown_data(runs),
        notes=[f"{run['run']}: {run['teacher_note']}" for run in runs if run["teacher_note"]],
        columns=columns,
        rows=[(name, [column.get(name) for column in columns.values()]) for name in rows],
        terms={name: TERMS[name] for name in rows if TERMS[name]},
        cost=runs[0]["cost"][STUDENT],
        disputed=found["disputed"],
        thumbnails=images["disputed"],
        figures=[one for one in figures if one],
        attention=images["attention"],
        agreement=found["agreement"] and matrix_table(found["agreement"]),
        runs=[run | section(run) for run in runs],
    )


def shown_data(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return which images the numbers are of, one entry if all runs have the same."""
    shown = [f"{run['images']} of {run['data']}" for run in runs]
    if len(set(shown)) == 1:
        return shown[:1]
    names = {one: [run["run"] for run, own in zip(runs, shown) if own == one] for one in shown}
    return [f"{', '.join(own)} on {one}" for one, own in names.items()]


def section(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page shows of one run alone: {"heads", "matrix", "figures"}."""
    heads = {
        name: [
            f"{value['acc1']:.2f}%",
            f"{value['acc5']:.2f}%",
            percent(run["calibration"][name]["ece"]),
            f"{run['kl_nats'][name]:.4f}" if name in run.get("kl_nats", {}) else "–",
        ]
        for name, value in run["accuracy"].items()
    }
    figures = [confusion(run["confusion"]), gaps(run["class_gaps"]), calibration(run)]
    return {"heads": heads, "matrix": matrix_table(run["agreement"]), "figures": figures}


def matrix_table(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the rows of a matrix of shares, in percent without the sign: a phone is narrow."""
    return {
        name: [f"{100 * share:.1f}" for share in row]
        for name, row in zip(found["names"], found["matrix"])
    }


# --- figures: charts and their tables ---------------------------------------------------------


def figure(
    title: str, rows: draw.Rows, make: Callable[[draw.Rows], Any], about: str = "", note: str = ""
) -> dict[str, Any]:
    """Return a chart, drawn by `make` from `rows`, and the rows for a table; {} without rows."""
    if not rows:
        return {}
    chart = draw.specification(make(rows), title) if draw.alt else None
    return {"title": title, "about": about, "note": note, "rows": rows, "chart": chart}


def curves(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the learning curves of all runs, a figure for each quantity."""
    names = [run["run"] for run in runs]
    figures = []
    for key, quantity in (
        ("test_acc1", "top-1, %"),
        ("ema_acc1", "top-1 of the moving average, %"),
        ("train_loss", "training loss"),
    ):
        rows = [
            {"run": run["run"], "epoch": line["epoch"], quantity: round(line[key], 4)}
            for run in runs
            for line in run["curves"]
            if line.get(key) is not None
        ]
        chart = partial(draw.lines, x="epoch", y=quantity, name="run", names=names)
        figures.append(figure(f"{quantity.split(',')[0].capitalize()} by epoch", rows, chart))
    return figures


def tokens(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the cosine of class and distillation token by layer, of all runs that have both."""
    rows = [
        {"run": run["run"], "block": block, "cosine": round(cosine, 4)}
        for run in runs
        for block, cosine in enumerate(run["token_cosine"])
    ]
    names = [run["run"] for run in runs]
    chart = partial(draw.lines, x="block", y="cosine", name="run", names=names)
    return figure("Class and distillation token", rows, chart, "Cosine after each block; 0: input.")


def speed(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return accuracy against throughput of all students and of the teachers of runs."""
    rows = []
    for title, (run, role) in networks(found).items():
        accuracy, cost = run["accuracy"][role], run["cost"][role]
        low, high = accuracy["acc1_interval"]
        row = {"network": title, "images/s": float(f"{cost['images_per_s']:.3g}")}
        row |= {"top-1, %": round(accuracy["acc1"], 2), "from": round(low, 2), "to": round(high, 2)}
        rows.append(row | {"latency, ms": float(f"{cost['latency_ms']:.3g}")})
    names = list(dict.fromkeys([run["run"] for run in found["runs"]] + list(networks(found))))
    chart = partial(
        draw.scatter, x="images/s", y="top-1, %", ends=("from", "to"), name="network", names=names
    )
    about = "Lines are 95 % intervals. Up and to the right is better."
    return figure("Accuracy and throughput", rows, chart, about)


def seeds(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the spread of runs that differ in the seed alone."""
    rows = [
        {"runs": f"{group['runs'][0]} and {len(group['runs']) - 1} more"}
        | {"run": name, "top-1, %": round(acc1, 2)}
        for group in groups
        for name, acc1 in zip(group["runs"], group["acc1"])
    ]
    note = " ".join(
        f"{', '.join(group['runs'])}: mean {group['mean']:.2f}%, standard deviation "
        f"{group['std']:.2f} points."
        for group in groups
    )
    chart = partial(draw.spread, category="runs", x="top-1, %")
    about = f"Runs that differ in the seed alone; the line is their mean. {note}"
    return figure("Spread over seeds", rows, chart, about)


def confusion(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the confusion matrix of a student."""
    rows = [
        {"label": label, "predicted": predicted, "images": count}
        | {"% of the label": round(100 * count / max(1, sum(counts)), 1)}
        for label, counts in zip(found["classes"], found["counts"])
        for predicted, count in zip(found["classes"], counts)
    ]
    chart = partial(draw.matrix, x="predicted", y="label", count="images", share="% of the label")
    about = "Images by label (row) and the student's prediction (column)."
    return figure("Confusion matrix", rows, chart, about)


def gaps(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the accuracy by class, the worst and the best where there are many classes."""
    half = SHOWN_CLASSES // 2
    shown = list(found) if len(found) <= SHOWN_CLASSES else [*found[:half], *found[-half:]]
    rows = [
        {key: round(value, 1) if isinstance(value, float) else value for key, value in row.items()}
        for row in shown
    ]

    def chart(rows: draw.Rows) -> Any:
        bars = [
            {"class": row["class"], "network": name, "accuracy, %": row[name]}
            for row in rows
            for name in (STUDENT, BASELINE, TEACHER)
            if name in row
        ]
        return draw.bars(bars, category="class", x="accuracy, %", name="network")

    left = len(found) - len(shown)
    note = f"{left} classes between these are in the JSON file." if left else ""
    about = "Sorted by the gap: student minus teacher, in points."
    return figure("Accuracy by class", rows, chart, about, note)


def calibration(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return accuracy over confidence of a run's networks."""
    rows = [
        {"network": name, "confidence, %": round(100 * one["confidence"], 1)}
        | {"accuracy, %": round(100 * one["accuracy"], 1), "images": one["count"]}
        for name, found in run["calibration"].items()
        for one in found["bins"]
    ]
    chart = partial(draw.reliability, x="confidence, %", y="accuracy, %", name="network")
    about = "Accuracy of the predictions with a confidence; on the diagonal both are equal."
    return figure("Calibration", rows, chart, about)
