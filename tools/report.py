"""Write a report on runs: the accuracy of students, and how well they agree with their teachers.

    python tools/report.py runs/none runs/hard --out report.html

It writes one HTML file that loads no other file, and the same numbers as JSON. Data, student and
teacher are those of the run's config.yaml; --data-path, --teacher-model and --teacher-path replace
them. A run without a teacher is compared with the teacher of the first run that has one, or with
--teacher-model, and the page states that.
"""

import argparse
import base64
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
import models  # noqa: E402
import options  # noqa: E402
from base import distributed, safe_load, structured  # noqa: E402
from base.errors import UserError  # noqa: E402
from base.text import class_name  # noqa: E402
from data.samplers import EvalSampler  # noqa: E402
from distill.teacher import AnyTeacher, build_identity, build_teacher  # noqa: E402
from models.class_names import classes_of_file  # noqa: E402
from tools.fidelity import STUDENT, TEACHER, Outputs, agreement, collect, numbers  # noqa: E402
from tools.report_page import page, summary  # noqa: E402
from training import metrics  # noqa: E402

# All flags that determine a teacher's logits; the teacher adapts its input itself
TEACHER_FLAGS = ("teacher_model", "teacher_path", "teacher_weight", "teacher_adaptor")


@dataclass(frozen=True)
class Run:
    """A run that was measured.

    settings: its flags. numbers: all that the report shows, in plain types. predictions: labels and
    predicted classes (P,) by name. farthest: from `farthest()`. data: identifies the images.
    """

    name: str
    settings: Mapping[str, Any]
    numbers: dict[str, Any]
    predictions: Mapping[str, Tensor]
    farthest: list[dict[str, Any]]
    classes: list[str]
    data: str


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = _parser().parse_args(argv)
        runs = build_runs(args)
    except UserError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return 2
    measured = [run.numbers for run in runs]
    found = {"runs": measured, "agreement": between(runs), "verdicts": verdicts(measured)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1))
    args.out.write_text(page(found, [run.farthest for run in runs]), encoding="utf-8")
    for run in runs:
        shown = ", ".join(f"{name} {value}" for name, value in summary(run.numbers))
        print(f"{run.name}: {shown}")
        if run.numbers["teacher_note"]:
            print(f"{run.name}: {run.numbers['teacher_note']}")
    for line in found["verdicts"]:
        print(line)
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
    add(
        "--teacher-model",
        default="",
        help="default: the run's, else that of the first run that has one",
    )
    add("--teacher-path", default="", help="default: the run's, if the model is")
    add("--limit", type=int, help="images at most, from all over the data; default: all")
    add("--batch-size", type=int, default=64)
    add("--device", default="auto")
    add("--plugin", default=[], action="append", metavar="FILE.py", help="what the runs had")
    return parser


def build_runs(args: argparse.Namespace) -> list[Run]:
    """Return all runs of the command line, measured. Raises UserError."""
    folders = list(dict.fromkeys(args.runs))
    settings = [run_settings(folder) for folder in folders]
    named = dict.fromkeys(path for each in settings for path in each["plugin"])
    models.plugins.load_given_plugins(args.plugin, list(named), ", ".join(map(str, folders)))
    short = len({folder.name for folder in folders}) == len(folders)
    names = [folder.name if short else str(folder) for folder in folders]
    distils = [i for i, each in enumerate(settings) if each["distillation_type"] != "none"]
    runs: dict[int, Run] = {}
    for i in dict.fromkeys(distils[:1] + list(range(len(names)))):  # the one that lends goes first
        lender = runs[distils[0]] if runs and distils else None
        runs[i] = build_run(args, names[i], folders[i], settings[i], lender)
    return [runs[i] for i in range(len(names))]


def build_run(
    args: argparse.Namespace,
    name: str,
    folder: Path,
    settings: Mapping[str, Any],
    lender: Run | None,
) -> Run:
    """Return a measured run. lender: the run origin teacher is used if this one had none.

    Raises UserError for what does not exist, or does not fit together.
    """
    wanted = evaluation_settings(args, settings)
    processes = distributed.init_processes(args.device)
    inputs = models.build_input_config(wanted)
    weights = checkpoint_of(folder, args.checkpoint)
    trained = classes_of_file(str(weights), wanted.model)
    loaders = datasets.build_loaders(wanted, inputs, processes, trained)
    classes = loaders.classes or []
    classes = classes + [str(number) for number in range(len(classes), loaders.num_classes)]
    student = models.build_student(wanted, loaders.num_classes, inputs).to(processes.device)
    models.load_weights(student.network, str(weights), key=args.key)

    teacher, origin, note = None, "", ""
    flags, origin = teacher_of(settings, lender, args.teacher_model, args.teacher_path)
    if origin == "lent" and classes != lender.classes:
        note = f"not compared with the teacher of {lender.name}: other classes"
    elif flags:
        needed = {"distillation_type": "soft", "match": [], "ranking_kl_weight": 0.0}
        settings_T = argparse.Namespace(**vars(wanted) | flags | needed)
        try:
            teacher = build_teacher(
                settings_T, loaders.num_classes, inputs, processes.device, classes=loaders.classes
            )
            note = build_note(settings_T, origin, lender, settings, weights)
        except UserError as error:  # a teacher of features alone may have other classes
            if origin != "own" or settings["distillation_type"] != "none":
                raise
            note = f"not compared with its teacher: {error.line()}"
    batches = loaders.val if args.limit is None else spread(loaders.val, args.limit)
    outputs = collect(student.network, teacher, batches, processes.device, limit=args.limit)
    found = {
        "run": name,
        "folder": str(folder),
        "student": wanted.model,
        "input": inputs.describe(),
        **teacher_facts(teacher, {"own": name, "lent": lender.name if lender else ""}.get(origin)),
        "teacher_note": note,
        "distillation": settings["distillation_type"],
        "weights": f"{weights.name}, {args.key}",
        "data": loaders.data[-1].description,
        **numbers(outputs, classes, loaders.present),
        "curves": metrics.read_log(folder / "log.txt"),
    }
    images = farthest(outputs, classes, inputs.mean, inputs.std)
    return Run(name, settings, found, outputs.predictions(), images, classes, loaders.fingerprint())


def evaluation_settings(
    args: argparse.Namespace, settings: Mapping[str, Any]
) -> argparse.Namespace:
    """Return the settings of a run, changed so that its weights are evaluated."""
    given = {flag: getattr(args, flag) for flag in ("data_path", "data_set")}
    given = {flag: value for flag, value in given.items() if value is not None}
    fixed = {"eval": True, "finetune": "", "pretrained": False, "resume": "", "attn_only": False}
    return argparse.Namespace(**{**settings, **given, **fixed, "batch_size": args.batch_size})


def teacher_facts(teacher: AnyTeacher | None, owner: str | None) -> dict[str, str]:
    """Return what the report states about a teacher. owner: its run; None for the command line."""
    if teacher is None:
        return {"teacher": "", "teacher_of": "", "teacher_input": ""}
    sizes = ("{}x{}".format(*member.adapter.size) for member in teacher.members)
    return {
        "teacher": teacher.describe(),
        "teacher_of": "the command line" if owner is None else owner,
        "teacher_input": ", ".join(dict.fromkeys(sizes)),
    }


def verdicts(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each student above its teacher or below a run without distillation.

    Runs are compared that have the same student and the same images.
    """
    lines = []
    for run in runs:
        acc1 = run["accuracy"][STUDENT]["acc1"]
        teacher = run["accuracy"].get(TEACHER, {"acc1": acc1})["acc1"]
        if acc1 > teacher:
            lines.append(
                f"{run['run']}: the student ({acc1:.2f}%) is above the teacher ({teacher:.2f}%)"
            )
        for other in runs if run["distillation"] != "none" else ():
            alike = all(run[key] == other[key] for key in ("student", "data", "images"))
            baseline = other["accuracy"][STUDENT]["acc1"]
            if alike and other["distillation"] == "none" and acc1 < baseline:
                lines.append(
                    f"{run['run']}: the student ({acc1:.2f}%) is below {other['run']}, which was "
                    f"trained without distillation ({baseline:.2f}%)"
                )
    return lines


def teacher_of(
    settings: Mapping[str, Any], lender: Run | None, model: str, path: str
) -> tuple[dict[str, Any], str]:
    """Return the flags of the teacher that a run is compared with, and where it comes from.

    model, path: of the command line, or empty. Origin: "own", "lent", "given", or "" for none.
    Raises UserError for a file without a model.
    """
    learns = (
        settings["distillation_type"] != "none"
        or settings["match"]
        or settings["ranking_kl_weight"]
    )
    own = {flag: settings[flag] for flag in TEACHER_FLAGS}
    if model and model != own["teacher_model"]:
        unset = {"teacher_weight": None, "teacher_adaptor": ""}
        return {"teacher_model": model, "teacher_path": path, **unset}, "given"
    if learns or model:
        flags, origin = own, "own" if learns else "given"
    elif lender is not None:
        flags, origin = {flag: lender.settings[flag] for flag in TEACHER_FLAGS}, "lent"
    elif path:
        raise UserError(f"--teacher-path {path}: no run has a teacher; give --teacher-model too")
    else:
        return {}, ""
    return flags | ({"teacher_path": path} if path else {}), origin


def build_note(
    args: argparse.Namespace,
    origin: str,
    lender: Run | None,
    settings: Mapping[str, Any],
    weights: Path,
) -> str:
    """Return how the teacher in `args` differs from that of the run, or an empty text.

    settings, weights: of the run; the checkpoint stores the sha256 of its teacher.
    """
    if origin == "lent":
        return f"it had no teacher; compared with that of {lender.name}"
    if origin == "given":
        had = settings["distillation_type"] != "none"
        own = f"its own was {settings['teacher_model']}" if had else "it had none"
        return f"compared with --teacher-model {args.teacher_model}; {own}"
    had = (safe_load.read_weights_file(weights).get("facts") or {}).get("teacher")
    now = build_identity(args)
    if had and had != now:
        was, is_ = (", ".join(one[:12] for one in hashes) for hashes in (had, now))
        return f"not the teacher of its training: sha256 {is_} instead of {was}"
    return ""


def spread(loader: datasets.ImageLoader, limit: int) -> datasets.ImageLoader:
    """Return a loader of `limit` images, evenly spread over the data; of a stream, the first."""
    if not isinstance(loader.sampler, EvalSampler):
        return loader
    keys = list(loader.sampler)
    places = torch.linspace(0, len(keys) - 1, min(limit, len(keys))).long().tolist()
    return loader.subset([keys[place] for place in places])


def between(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Return the agreement between the students of several runs, labels and teachers.

    None for one run, and for runs with different images. A teacher that all were compared with
    is listed once.
    """
    same = len({(run.data, run.numbers["images"]) for run in runs}) == 1
    if len(runs) == 1 or not same:
        return None
    predictions = {"label": runs[0].predictions["label"]}
    settings_T = [run for run in runs if TEACHER in run.predictions]
    if settings_T and all(
        torch.equal(run.predictions[TEACHER], settings_T[0].predictions[TEACHER])
        for run in settings_T
    ):
        predictions[TEACHER] = settings_T[0].predictions[TEACHER]
    else:
        predictions |= {f"{TEACHER} of {run.name}": run.predictions[TEACHER] for run in settings_T}
    predictions |= {
        f"run {run.name}" if run.name in predictions else run.name: run.predictions[STUDENT]
        for run in runs
    }
    return {"names": list(predictions), "matrix": agreement(predictions)}


def run_settings(folder: Path) -> dict[str, Any]:
    """Return all flags of a run, from its config.yaml. Raises UserError if there is none."""
    path = folder / "config.yaml"
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise UserError(f"{folder}: no config.yaml in it; give the --output_dir of a run")
    return options.settings_of_run(structured.read(path, dict[str, Any]), str(path))


def checkpoint_of(folder: Path, name: str = "") -> Path:
    """Return the run's checkpoint: `name`, else the best, else the last. Raises UserError."""
    names = [name] if name else ["best_checkpoint.pth", "checkpoint.pth"]
    for path in (folder / one for one in names):
        if path.is_file():
            return path
    raise UserError(f"{folder}: has no {' and no '.join(names)}")


def farthest(
    outputs: Outputs, classes: list[str], mean: Sequence[float], std: Sequence[float]
) -> list[dict[str, Any]]:
    """Return the images on which the student is farthest from its teacher, ready to be shown."""
    found = []
    for nats, image, index in outputs.farthest:
        row = {
            "nats": nats,
            "label": class_name(classes, int(outputs.labels[index])),
            "image": data_uri(image, mean, std),
        }
        for name in (TEACHER, STUDENT):
            share, answer = outputs.logits[name][index].softmax(0).max(0)
            row[name] = f"{class_name(classes, int(answer))} {100 * share:.0f}%"
        found.append(row)
    return found


def data_uri(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> str:
    """Return a normalised image (3, H, W) as a JPEG inside a data: address, 160 px wide."""
    shown = pixels * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    array = (shown.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(array)
    image = image.resize((160, round(160 * image.height / image.width)))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    sys.exit(main())
