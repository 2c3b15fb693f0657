"""Write a report on one or several runs: how good the student is, and how faithful to its teacher.

    python tools/report.py runs/none runs/hard --out report.html

One HTML file with everything in it, and the same numbers as JSON beside it. The data, the student
and the teacher are those of the run's config.yaml; --data-path, --teacher-model and --teacher-path
take others. A run without a teacher is compared with the one that --teacher-model names.
"""

import argparse
import base64
import html
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
import distributed  # noqa: E402
import models  # noqa: E402
import options  # noqa: E402
import teachers  # noqa: E402
from errors import UserError  # noqa: E402
from tools.fidelity import (  # noqa: E402
    CLS,
    DIST,
    STUDENT,
    TEACHER,
    Answers,
    collect,
    numbers,
)

SHOWN_CLASSES = 20  # of the per-class table; half from each end


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        short = len({folder.name for folder in args.runs}) == len(args.runs)
        runs = [{"run": folder.name if short else str(folder)} | build_run(args, folder)
                for folder in args.runs]  # fmt: skip
    except UserError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(runs), encoding="utf-8")
    plain = [{k: v for k, v in run.items() if k != "strange"} for run in runs]
    args.out.with_suffix(".json").write_text(json.dumps(plain, indent=1))
    for run in runs:
        print(f"{run['run']}: " + ", ".join(f"{name} {value}" for name, value in summary(run)))
    print(f"{args.out} and {args.out.with_suffix('.json').name}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = options.Parser("report.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="output folder of a run")
    add("--out", type=Path, default=Path("report.html"))
    add("--checkpoint", default="", help="default: best_checkpoint.pth, else checkpoint.pth")
    add("--key", default="model", choices=("model", "model_ema"), help="weights to look at")
    add("--data-path", help="default: the run's")
    add("--data-set", help="default: the run's")
    add("--teacher-model", help="default: the run's")
    add("--teacher-path", help="default: the run's")
    add("--limit", type=int, help="pictures at most; default: all")
    add("--batch-size", type=int, default=64)
    add("--device", default="auto")
    return parser


def build_run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the numbers and the strangest pictures of one run. Raises UserError."""
    settings = run_settings(folder)
    given = {name: getattr(args, name) for name in ("data_path", "data_set", "teacher_model",
             "teacher_path") if getattr(args, name) is not None}  # fmt: skip
    if args.teacher_model and settings["distillation_type"] == "none":
        given["distillation_type"] = "soft"
        given.setdefault("teacher_path", "")
    fixed = {"eval": True, "finetune": "", "pretrained": False, "resume": "", "attn_only": False}
    wanted = argparse.Namespace(**settings | given | fixed | {"batch_size": args.batch_size})
    processes = distributed.init_processes(args.device)
    inputs = models.build_input_config(wanted)
    loaders = datasets.build_loaders(wanted, inputs, processes)
    student = models.build_student(wanted, loaders.num_classes, inputs).to(processes.device)
    weights = checkpoint_of(folder, args.checkpoint)
    models.load_weights(student.network, str(weights), key=args.key)
    teacher = teachers.build_teacher(wanted, loaders.num_classes, inputs, processes.device)
    answers = collect(student.network, teacher, loaders.val, processes.device, limit=args.limit)
    classes = loaders.classes or [str(number) for number in range(loaders.num_classes)]
    return {
        "folder": str(folder),
        "student": wanted.model,
        "teacher": teacher.describe() if teacher is not None else "",
        "distillation": settings["distillation_type"],
        "weights": f"{weights.name}, {args.key}",
        "data": loaders.data[-1].description,
        **numbers(answers, classes),
        "curves": read_log(folder / "log.txt"),
        "strange": strange(answers, classes, inputs.mean, inputs.std),
    }


def run_settings(folder: Path) -> dict[str, Any]:
    """Return all flags of a run, from its config.yaml. Raises UserError if there is none."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: no config.yaml in it; give the --output_dir of a run")
    defaults = vars(options.argparse_with_help().parse_args([]))
    return defaults | yaml.safe_load(path.read_text())


def checkpoint_of(folder: Path, name: str = "") -> Path:
    """Return the run's checkpoint: `name`, else the best, else the last. Raises UserError."""
    names = [name] if name else ["best_checkpoint.pth", "checkpoint.pth"]
    for path in (folder / one for one in names):
        if path.is_file():
            return path
    raise UserError(f"{folder}: has no {' and no '.join(names)}")


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def strange(
    answers: Answers, classes: list[str], mean: Sequence[float], std: Sequence[float]
) -> list[dict[str, Any]]:
    """Return the pictures on which the student is farthest from its teacher, ready to be shown."""
    found = []
    for nats, picture, index in answers.strange:
        row = {"nats": nats, "label": classes[answers.labels[index]],
               "picture": data_uri(picture, mean, std)}  # fmt: skip
        for name in (TEACHER, STUDENT):
            share, answer = answers.logits[name][index].softmax(0).max(0)
            row[name] = f"{classes[answer]} {100 * share:.0f}%"
        found.append(row)
    return found


def data_uri(picture: Tensor, mean: Sequence[float], std: Sequence[float]) -> str:
    """Return a normalised picture (3, H, W) as a JPEG inside a data: address, 160 px wide."""
    shown = picture * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    array = (shown.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(array)
    image = image.resize((160, round(160 * image.height / image.width)))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def summary(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the run's row of the table at the top: (column, value)."""
    accuracy, names = run["accuracy"], run["agreement"]["names"]
    row = [(f"{name} top-1", f"{accuracy[name]['acc1']:.2f}%" if name in accuracy else "–")
           for name in (TEACHER, STUDENT, CLS, DIST)]  # fmt: skip
    both = "–"
    if TEACHER in names:
        share = run["agreement"]["matrix"][names.index(STUDENT)][names.index(TEACHER)]
        both = f"{100 * share:.2f}%"
    row.append(("agrees with teacher", both))
    row.append(("KL, nats", f"{run['kl_nats'][STUDENT]:.4f}" if "kl_nats" in run else "–"))
    for name in (STUDENT, TEACHER):
        known = run["calibration"].get(name)
        row.append((f"ECE {name}", f"{100 * known['ece']:.2f}%" if known else "–"))
    return row


# --- the page -------------------------------------------------------------------------------


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the whole report as one HTML page that loads nothing from anywhere."""
    rows = [[row[0][0], *(value for _, value in row)] for row in zip(*map(summary, runs))]
    parts = [
        "<h1>Student and teacher</h1>",
        f"<p>On {text(runs[0]['pictures'])} pictures of {text(runs[0]['data'])}. The student is "
        "evaluated as it is used: with two heads, on the mean of both.</p>",
        table(["", *(run["run"] for run in runs)], rows),
    ]
    parts += [curves(runs)]
    parts += ["<div class=runs>", *map(run_section, runs), "</div>"]
    style = (Path(__file__).with_name("report.css")).read_text()
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>Student and teacher</title><style>{style}</style><body>{''.join(parts)}</body>"
        "</html>"
    )


def run_section(run: Mapping[str, Any]) -> str:
    """Return all that belongs to one run alone."""
    about = f"{run['student']}, distillation {run['distillation']}; {run['weights']}"
    if run["teacher"]:
        about += f"; teacher {run['teacher']}"
    names, matrix = run["agreement"]["names"], run["agreement"]["matrix"]
    cells = [[name, *(f"{100 * share:.2f}%" for share in row)] for name, row in zip(names, matrix)]
    top5 = [[name, f"{value['acc1']:.2f}%", f"{value['acc5']:.2f}%",
             f"{100 * run['calibration'][name]['ece']:.2f}%",
             f"{run['kl_nats'][name]:.4f}" if name in run.get("kl_nats", {}) else "–"]
            for name, value in run["accuracy"].items()]  # fmt: skip
    parts = [f"<h2>{text(run['run'])}</h2><p>{text(about)}</p>",
             table(["", "top-1", "top-5", "ECE", "KL from teacher, nats"], top5),
             "<h3>Agreement</h3><p>Share of the pictures in which the two name the same class.</p>",
             table(["", *names], cells),
             "<h3>Calibration</h3><p>Accuracy of the answers given with a confidence; on the "
             "diagonal the two are equal.</p><div class=plots>"]  # fmt: skip
    parts += [reliability(name, found["bins"]) for name, found in run["calibration"].items()]
    parts.append("</div>")
    if run["token_cosine"]:
        series = {"cosine": list(enumerate(run["token_cosine"]))}
        parts += ["<h3>Class and distillation token</h3><p>Cosine of the two after each block; "
                  "0 is the input.</p>", chart("cosine by layer", series)]  # fmt: skip
    if "class_gaps" in run:
        parts += ["<h3>Classes</h3><p>Accuracy of the student minus that of the teacher, in points."
                  "</p>", gaps(run["class_gaps"])]  # fmt: skip
    if run.get("strange"):
        parts += ["<h3>Where they disagree most</h3><div class=pictures>"]
        parts += [
            f"<figure><img src='{row['picture']}' alt='{text(row['label'])}'><figcaption>"
            f"<b>{text(row['label'])}</b><br>teacher {text(row[TEACHER])}<br>student "
            f"{text(row[STUDENT])}<br>{row['nats']:.2f} nats</figcaption></figure>"
            for row in run["strange"]
        ]
        parts.append("</div>")
    return f"<section>{''.join(parts)}</section>"


def text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first column names the rows; it scrolls by itself on a phone."""
    top = "".join(f"<th scope=col>{text(name)}</th>" for name in head)
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
    for key, title in (("test_acc1", "top-1, %"), ("ema_acc1", "top-1 of the average, %"),
                       ("train_loss", "training loss")):  # fmt: skip
        series = {run["run"]: [(line["epoch"], line[key]) for line in run["curves"] if key in line]
                  for run in runs}  # fmt: skip
        series = {name: points for name, points in series.items() if points}
        if series:
            parts.append(f"<div>{chart(title + ' by epoch', series)}</div>")
    return f"<h2>Training</h2><div class=plots>{''.join(parts)}</div>" if parts else ""


WIDTH, HEIGHT, LEFT, BOTTOM = 320, 200, 44, 24  # of a chart, in its own units


def chart(title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Return lines through (x, y) points as SVG, with the ends of both axes and a legend."""
    points = [point for line in series.values() for point in line]
    (x0, x1), (y0, y1) = (
        (min(values), max(values)) for values in ([p[0] for p in points], [p[1] for p in points])
    )

    def place(x: float, y: float) -> str:
        across = LEFT + (x - x0) / ((x1 - x0) or 1) * (WIDTH - LEFT - 8)
        up = HEIGHT - BOTTOM - (y - y0) / ((y1 - y0) or 1) * (HEIGHT - BOTTOM - 12)
        return f"{across:.1f},{up:.1f}"

    lines = "".join(
        f"<polyline class=c{i % 6} points='{' '.join(place(*p) for p in line)}'/>"
        + f"<circle class=c{i % 6} cx={place(*line[-1]).split(',')[0]} "
        f"cy={place(*line[-1]).split(',')[1]} r=3 />"
        for i, line in enumerate(series.values())
    )
    legend = "".join(f"<span class=c{i % 6}>{text(n)}</span> " for i, n in enumerate(series))
    return (
        f"<figure class=chart><figcaption>{text(title)}</figcaption>{svg(title)}{axes()}"
        f"{label(LEFT - 4, 14, f'{y1:.4g}', 'end')}"
        f"{label(LEFT - 4, HEIGHT - BOTTOM, f'{y0:.4g}', 'end')}"
        f"{label(LEFT, HEIGHT - 8, f'{x0:g}', 'start')}"
        f"{label(WIDTH - 8, HEIGHT - 8, f'{x1:g}', 'end')}"
        f"{lines}</svg><div class=legend>{legend if len(series) > 1 else ''}</div></figure>"
    )


def reliability(name: str, bins: Sequence[Mapping[str, float]]) -> str:
    """Return the reliability diagram of one network as SVG, bars as wide as their bins."""
    wide, high = WIDTH - LEFT - 8, HEIGHT - BOTTOM - 12
    bars = "".join(
        f"<rect class=c0 x={LEFT + wide * one['lower']:.1f} "
        f"y={HEIGHT - BOTTOM - high * one['accuracy']:.1f} "
        f"width={wide * (one['upper'] - one['lower']) - 1:.1f} "
        f"height={high * one['accuracy']:.1f}><title>{one['count']} pictures, confidence "
        f"{100 * one['confidence']:.1f}%, accuracy {100 * one['accuracy']:.1f}%</title></rect>"
        for one in bins
    )
    diagonal = f"<path class=ideal d='M{LEFT} {HEIGHT - BOTTOM}L{LEFT + wide} 12'/>"
    ends = label(LEFT - 4, 16, "100%", "end") + label(LEFT, HEIGHT - 8, "0", "start")
    ends += label(WIDTH - 8, HEIGHT - 8, "confidence 100%", "end")
    return (
        f"<figure class=chart><figcaption>{text(name)}</figcaption>{svg(name)}{axes()}{bars}"
        f"{diagonal}{ends}</svg></figure>"
    )


def svg(title: str) -> str:
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img aria-label='{text(title)}'>"


def axes() -> str:
    return f"<path class=axis d='M{LEFT} 8V{HEIGHT - BOTTOM}H{WIDTH - 8}'/>"


def label(x: float, y: float, words: str, anchor: str) -> str:
    return f"<text x={x} y={y} text-anchor={anchor}>{text(words)}</text>"


def gaps(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the per-class table, the worst and the best where there are many."""
    half = SHOWN_CLASSES // 2
    shown = list(rows) if len(rows) <= SHOWN_CLASSES else [*rows[:half], *rows[-half:]]
    cells = [[row["class"], f"{row['gap']:+.1f}", f"{row['student']:.1f}%",
              f"{row['teacher']:.1f}%", str(row["count"])] for row in shown]  # fmt: skip
    left = len(rows) - len(shown)
    note = f"<p>{left} classes between these are in the JSON file.</p>" if left else ""
    return table(["class", "gap", "student", "teacher", "pictures"], cells) + note


if __name__ == "__main__":
    sys.exit(main())
