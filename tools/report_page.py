"""The page of `tools/report.py`: from the numbers of runs to HTML that loads nothing.

Its style is in report.css. Charts are SVG in units of their own, a pixel each or a little less.
"""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.fidelity import CLS, DIST, STUDENT, TEACHER

SHOWN_CLASSES = 20  # of the per-class table; half from each end
WIDTH, HEIGHT, LETTER = 320, 200, 8  # of a chart, and the widest letter of its labels, or so
RIGHT, BOTTOM, TOP = 8, 26, 12  # its margins; the left one is as wide as its labels


def percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def summary(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the run's column of the table at the top: (row, value)."""
    accuracy, names = run["accuracy"], run["agreement"]["names"]
    origin = {"": "–", run["run"]: "its own"}.get(run["teacher_of"], f"of {run['teacher_of']}")
    rows = [("teacher", origin)]
    for name in (TEACHER, STUDENT, CLS, DIST):
        known = f"{accuracy[name]['acc1']:.2f}%" if name in accuracy else "–"
        size = run["teacher_input"] if name == TEACHER and name in accuracy else ""
        rows.append((f"{name} top-1", known + f" at {size}" * bool(size)))
        if "acc1_present" in accuracy.get(name, {}):
            among = f"{accuracy[name]['acc1_present']:.2f}%"
            rows.append((f"{name} top-1 among the classes with images", among))
    both = "–"
    if TEACHER in names:
        both = percent(run["agreement"]["matrix"][names.index(STUDENT)][names.index(TEACHER)])
    rows.append(("agrees with teacher", both))
    rows.append(("KL, nats", f"{run['kl_nats'][STUDENT]:.4f}" if "kl_nats" in run else "–"))
    for name in (STUDENT, TEACHER):
        known = run["calibration"].get(name)
        rows.append((f"ECE {name}", percent(known["ece"]) if known else "–"))
    return rows


def page(found: Mapping[str, Any], images: Sequence[Sequence[Mapping[str, Any]]] = ()) -> str:
    """Return the whole report as one HTML page.

    found: {"runs", "agreement", "verdicts"}, the content of the JSON file. images: of each run,
    those on which it is farthest from its teacher.
    """
    runs = found["runs"]
    columns = [dict(summary(run)) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, "–") for column in columns)] for name in names]
    parts = [
        "<h1>Student and teacher</h1>",
        f"<p>{shown_data(runs)} The student is evaluated as it is used: with two heads, on the "
        "mean of both.</p>",
        table(["", *(run["run"] for run in runs)], rows),
        *(f"<p class=note>{text(line)}.</p>" for line in found["verdicts"]),
        *(
            f"<p class=note><b>{text(run['run'])}</b>: {text(run['teacher_note'])}.</p>"
            for run in runs
            if run["teacher_note"]
        ),
    ]
    if found["agreement"]:
        parts += ["<h2>Agreement between the runs</h2>", agreement_table(found["agreement"])]
    parts += [curves(runs), tokens(runs)]
    sections = [
        run_section(run, farthest) for run, farthest in zip(runs, images or [()] * len(runs))
    ]
    parts += ["<div class=runs>", *sections, "</div>"]
    style = Path(__file__).with_name("report.css").read_text()
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>Student and teacher</title><style>{style}</style><body>{''.join(parts)}</body>"
        "</html>"
    )


def shown_data(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return which images the numbers are of, and that they differ where they do."""
    shown = [f"{run['images']} of {run['data']}" for run in runs]
    if len(set(shown)) == 1:
        return f"On {text(shown[0])}."
    names = {one: [run["run"] for run, own in zip(runs, shown) if own == one] for one in shown}
    each = "; ".join(f"{text(', '.join(own))} on {text(one)}" for one, own in names.items())
    return (
        "<strong>The runs were evaluated on different images, so their columns cannot be "
        "compared</strong>: "
        f"{each}."
    )


def run_section(run: Mapping[str, Any], images: Sequence[Mapping[str, Any]]) -> str:
    """Return all that belongs to one run alone."""
    about = [
        f"{run['student']}, input {run['input']}; distillation {run['distillation']}; "
        f"{run['weights']}."
    ]
    if run["teacher"]:
        about.append(f"Teacher: {run['teacher']}.")
    if run["teacher_note"]:
        about.append(f"Note: {run['teacher_note']}.")
    heads = [
        [
            name,
            f"{value['acc1']:.2f}%",
            f"{value['acc5']:.2f}%",
            percent(run["calibration"][name]["ece"]),
            f"{run['kl_nats'][name]:.4f}" if name in run.get("kl_nats", {}) else "–",
        ]
        for name, value in run["accuracy"].items()
    ]
    parts = [
        f"<h2>{text(run['run'])}</h2>",
        *(f"<p>{text(line)}</p>" for line in about),
        table(["", "top-1", "top-5", "ECE", "KL from teacher, nats"], heads),
        "<h3>Agreement</h3>",
        agreement_table(run["agreement"]),
        "<h3>Calibration</h3><p>Accuracy (height) of the predictions with a confidence "
        "(across); on the diagonal the two are equal.</p><div class=plots>",
    ]
    parts += [reliability(name, found) for name, found in run["calibration"].items()]
    parts.append("</div>")
    if "class_gaps" in run:
        parts += [
            "<h3>Classes</h3><p>Accuracy of the student minus that of the teacher, in points.</p>",
            gaps(run["class_gaps"]),
        ]
    if images:
        parts += [
            "<h3>Where they disagree most</h3><p>The images with the largest KL(teacher ‖ "
            "student), in nats; in bold the label.</p><div class=images>"
        ]
        parts += [
            f"<figure><img src='{row['image']}' alt='{text(row['label'])}'><figcaption>"
            f"<b>{text(row['label'])}</b><br>teacher {text(row[TEACHER])}<br>student "
            f"{text(row[STUDENT])}<br>{row['nats']:.2f} nats</figcaption></figure>"
            for row in images
        ]
        parts.append("</div>")
    return f"<section>{''.join(parts)}</section>"


def agreement_table(found: Mapping[str, Any]) -> str:
    """Return a matrix of shares with its names, without a sign in each cell: a phone is narrow."""
    rows = [
        [name, *(f"{100 * share:.1f}" for share in row)]
        for name, row in zip(found["names"], found["matrix"])
    ]
    about = "<p>Percent of the images in which the two name the same class.</p>"
    return about + table(["", *found["names"]], rows)


def tokens(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the cosine of class and distillation token by layer, of all runs that have both."""
    series = {run["run"]: list(enumerate(run["token_cosine"])) for run in runs}
    if not any(series.values()):
        return ""
    low = -1 if min(y for line in series.values() for _, y in line) < 0 else 0
    return (
        "<h2>Class and distillation token</h2><p>Cosine of the two after each block; 0 is the "
        f"input. The axis goes from {low} to 1.</p><div class=plots>"
        f"{chart('cosine by layer', series, (low, 1))}</div>"
    )


def text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first column names the rows; it scrolls by itself on a phone."""
    broken = (text(name).replace("distill", "distil&shy;l") for name in head)  # on a phone
    top = "".join(f"<th scope=col>{name}</th>" for name in broken)
    body = "".join(
        f"<tr><th scope=row>{text(row[0])}</th>"
        + "".join(f"<td>{text(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead>{body}</table></div>"


def curves(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the training curves of all runs, one chart a quantity."""
    parts = []
    for key, title in (
        ("test_acc1", "top-1, %"),
        ("ema_acc1", "top-1 of the average, %"),
        ("train_loss", "training loss"),
    ):
        series = {
            run["run"]: [
                (line["epoch"], line[key]) for line in run["curves"] if line.get(key) is not None
            ]
            for run in runs
        }
        if any(series.values()):
            parts.append(chart(title + " by epoch", series))
    return f"<h2>Training</h2><div class=plots>{''.join(parts)}</div>" if parts else ""


def chart(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    ends: tuple[float, float] | None = None,
) -> str:
    """Return lines through (x, y) points as SVG, with the ends of both axes and a legend.

    ends: of the upward axis; by default those of the values. A line without points keeps its colour
    for its name in other charts, and is not drawn.
    """
    points = [point for line in series.values() for point in line]
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y0, y1 = ends or (min(y for _, y in points), max(y for _, y in points))
    if y0 == y1:
        y0, y1 = y0 - 1, y1 + 1
    left = margin(f"{y0:.4g}", f"{y1:.4g}")

    def place(x: float, y: float) -> tuple[str, str]:
        across = left + (x - x0) / ((x1 - x0) or 1) * (WIDTH - left - RIGHT)
        up = HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP)
        return f"{across:.1f}", f"{up:.1f}"

    lines, legend = "", ""
    for i, (name, line) in enumerate(series.items()):
        if line:
            places = [place(*point) for point in line]
            (x, y), colour = places[-1], f"class=c{i % 6}"
            lines += f"<polyline {colour} points='{' '.join(map(','.join, places))}'/>"
            lines += f"<circle {colour} cx={x} cy={y} r=3 />"
            legend += f"<span {colour}>{text(name)}</span> "
    labels = label(left, HEIGHT - 8, f"{x0:g}", "start")
    if x1 > x0:
        labels += label(WIDTH - RIGHT, HEIGHT - 8, f"{x1:g}", "end")
    return figure(
        title, left, f"{y0:.4g}", f"{y1:.4g}", labels + lines, legend if len(series) > 1 else ""
    )


def reliability(name: str, found: Mapping[str, Any]) -> str:
    """Return the reliability diagram of one network as SVG, bars as wide as their bins."""
    left = margin("100%")
    wide, high = WIDTH - left - RIGHT, HEIGHT - BOTTOM - TOP
    bars = ""
    for one in found["bins"]:
        tall = max(2.0, high * one["accuracy"])  # 0 is to be seen too
        bars += (
            f"<rect class=c0 x={left + wide * one['lower']:.1f} y={HEIGHT - BOTTOM - tall:.1f} "
            f"width={wide * (one['upper'] - one['lower']) - 1:.1f} height={tall:.1f}>"
            f"<title>{one['count']} images, confidence {100 * one['confidence']:.1f}%, "
            f"accuracy {100 * one['accuracy']:.1f}%</title></rect>"
        )
    diagonal = f"<path class=ideal d='M{left} {HEIGHT - BOTTOM}L{left + wide} {TOP}'/>"
    labels = label(left, HEIGHT - 8, "confidence 0", "start")
    labels += label(WIDTH - RIGHT, HEIGHT - 8, "100%", "end")
    return figure(
        f"{name}, ECE {percent(found['ece'])}", left, "0", "100%", labels + bars + diagonal
    )


def figure(title: str, left: int, low: str, high: str, inside: str, legend: str = "") -> str:
    """Return a chart around `inside`. low, high: labels of the upward axis; left: its margin."""
    axes = f"<path class=axis d='M{left} {TOP - 4}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}'/>"
    ends = label(left - 4, TOP + 4, high, "end") + label(left - 4, HEIGHT - BOTTOM, low, "end")
    return (
        f"<figure class=chart><figcaption>{text(title)}</figcaption>"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img aria-label='{text(title)}'>{axes}{ends}"
        f"{inside}</svg><div class=legend>{legend}</div></figure>"
    )


def margin(*labels: str) -> int:
    """Return the room that labels need left of an axis."""
    return 10 + LETTER * max(map(len, labels))


def label(x: float, y: float, words: str, anchor: str) -> str:
    return f"<text x={x} y={y} text-anchor={anchor}>{text(words)}</text>"


def gaps(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the per-class table, the worst and the best where there are many."""
    half = SHOWN_CLASSES // 2
    shown = list(rows) if len(rows) <= SHOWN_CLASSES else [*rows[:half], *rows[-half:]]
    cells = [
        [
            row["class"],
            f"{row['gap']:+.1f}",
            f"{row['student']:.1f}%",
            f"{row['teacher']:.1f}%",
            str(row["count"]),
        ]
        for row in shown
    ]
    left = len(rows) - len(shown)
    note = f"<p>{left} classes between these are in the JSON file.</p>" if left else ""
    return table(["class", "gap", "student", "teacher", "images"], cells) + note
