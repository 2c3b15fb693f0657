"""Write a report on one or several runs: how good the student is, and how faithful to its teacher.

    python tools/report.py runs/none runs/hard --out report.html

One HTML file with everything in it, and the same numbers as JSON beside it. The data, the student
and the teacher are those of the run's config.yaml; --data-path, --teacher-model and --teacher-path
take others. A run without a teacher is measured against that of the first run that has one, or the
one that --teacher-model names, and the page says that it was not its own.
"""

import argparse
import base64
import io
import json
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
from distill.teacher import build_identity, build_teacher  # noqa: E402
from models.class_names import classes_of_file  # noqa: E402
from tools.fidelity import STUDENT, TEACHER, Answers, agreement, collect, numbers  # noqa: E402
from tools.report_page import page, summary  # noqa: E402
from training import metrics  # noqa: E402

# Everything that determines what a teacher answers, beside its input, which it adapts itself
TEACHER_FLAGS = ("teacher_model", "teacher_path", "teacher_weight", "teacher_adaptor")


@dataclass(frozen=True)
class Run:
    """A run that was measured.

    settings: its flags. numbers: what the report says of it, in plain types. said: the classes (P,)
    that label, teacher and student name. strange: of `strange()`. data: which images, in short.
    """

    name: str
    settings: Mapping[str, Any]
    numbers: dict[str, Any]
    said: Mapping[str, Tensor]
    strange: list[dict[str, Any]]
    classes: list[str]
    data: str


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = _parser().parse_args(argv)
        runs = build_runs(args)
    except UserError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return 2
    found = {"runs": [run.numbers for run in runs], "agreement": between(runs)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1))
    args.out.write_text(page(found, [run.strange for run in runs]), encoding="utf-8")
    for run in runs:
        shown = ", ".join(f"{name} {value}" for name, value in summary(run.numbers))
        print(f"{run.name}: {shown}")
        if run.numbers["teacher_note"]:
            print(f"{run.name}: {run.numbers['teacher_note']}")
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
    """Return a run with its numbers and strangest images. lender: of the teacher it may lack.

    Raises UserError for what is not there, or does not fit together.
    """
    given = {
        flag: getattr(args, flag)
        for flag in ("data_path", "data_set")
        if getattr(args, flag) is not None
    }
    fixed = {"eval": True, "finetune": "", "pretrained": False, "resume": "", "attn_only": False}
    wanted = argparse.Namespace(**{**settings, **given, **fixed, "batch_size": args.batch_size})
    processes = distributed.init_processes(args.device)
    inputs = models.build_input_config(wanted)
    weights = checkpoint_of(folder, args.checkpoint)
    trained = classes_of_file(str(weights), wanted.model)
    loaders = datasets.build_loaders(wanted, inputs, processes, trained)
    classes = loaders.classes or []
    classes = classes + [str(number) for number in range(len(classes), loaders.num_classes)]
    student = models.build_student(wanted, loaders.num_classes, inputs).to(processes.device)
    models.load_weights(student.network, str(weights), key=args.key)

    teacher, note = None, ""
    flags, whose = teacher_of(settings, lender, args.teacher_model, args.teacher_path)
    if whose == "lent" and classes != lender.classes:
        flags, note = {}, f"not measured against the teacher of {lender.name}: other classes"
    if flags:
        asked = {"distillation_type": "soft", "match": [], "ranking_kl_weight": 0.0}
        taught = argparse.Namespace(**vars(wanted) | flags | asked)
        try:
            teacher = build_teacher(
                taught, loaders.num_classes, inputs, processes.device, classes=loaders.classes
            )
            note = build_note(taught, whose, lender, settings, weights)
        except UserError as error:  # one that is only looked into may know no classes
            if whose != "own" or settings["distillation_type"] != "none":
                raise
            note = f"not measured against its teacher: {error.line()}"
    batches = loaders.val if args.limit is None else spread(loaders.val, args.limit)
    answers = collect(student.network, teacher, batches, processes.device, limit=args.limit)
    owners = {"own": name, "lent": lender.name if lender else "", "given": "the command line"}
    found = {
        "run": name,
        "folder": str(folder),
        "student": wanted.model,
        "input": inputs.describe(),
        "teacher": teacher.describe() if teacher is not None else "",
        "teacher_of": owners[whose] if teacher is not None else "",
        "teacher_note": note,
        "distillation": settings["distillation_type"],
        "weights": f"{weights.name}, {args.key}",
        "data": loaders.data[-1].description,
        **numbers(answers, classes),
        "curves": metrics.read_log(folder / "log.txt"),
    }
    return Run(
        name,
        settings,
        found,
        answers.said(),
        strange(answers, classes, inputs.mean, inputs.std),
        classes,
        loaders.fingerprint(),
    )


def teacher_of(
    settings: Mapping[str, Any], lender: Run | None, model: str, path: str
) -> tuple[dict[str, Any], str]:
    """Return the flags of the teacher to measure a run against, and whose it is.

    model, path: given on the command line, or empty. Whose: "own", "lent", "given", or "" for none.
    Raises UserError for a file of nobody.
    """
    learns = (
        settings["distillation_type"] != "none"
        or settings["match"]
        or settings["ranking_kl_weight"]
    )
    own = {flag: settings[flag] for flag in TEACHER_FLAGS}
    if model and model != own["teacher_model"]:
        nobody = {"teacher_weight": None, "teacher_adaptor": ""}
        return {"teacher_model": model, "teacher_path": path, **nobody}, "given"
    if learns or model:
        flags, whose = own, "own" if learns else "given"
    elif lender is not None:
        flags, whose = {flag: lender.settings[flag] for flag in TEACHER_FLAGS}, "lent"
    elif path:
        raise UserError(f"--teacher-path {path}: no run has a teacher; give --teacher-model too")
    else:
        return {}, ""
    return flags | ({"teacher_path": path} if path else {}), whose


def build_note(
    args: argparse.Namespace,
    whose: str,
    lender: Run | None,
    settings: Mapping[str, Any],
    weights: Path,
) -> str:
    """Return what a reader has to know of the teacher in `args`: that it is not what the run had.

    settings, weights: of the run, whose checkpoint tells the sha256 of the teacher that it had.
    """
    if whose == "lent":
        return f"it had no teacher of its own; measured against that of {lender.name}"
    if whose == "given":
        had = settings["distillation_type"] != "none"
        own = f"its own was {settings['teacher_model']}" if had else "it had none of its own"
        return f"measured against --teacher-model {args.teacher_model}; {own}"
    had = (safe_load.read_weights_file(weights).get("facts") or {}).get("teacher")
    now = build_identity(args)
    if had and had != now:
        was, is_ = (", ".join(one[:12] for one in hashes) for hashes in (had, now))
        return f"not the teacher it learnt from: sha256 {is_} instead of {was}"
    return ""


def spread(loader: torch.utils.data.DataLoader, limit: int) -> torch.utils.data.DataLoader:
    """Return a loader of `limit` images from all over the data; a stream gives its first ones."""
    if not isinstance(loader.sampler, EvalSampler):
        return loader
    keys = list(loader.sampler)
    places = torch.linspace(0, len(keys) - 1, min(limit, len(keys))).long().tolist()
    return datasets.EvalLoader(
        loader.dataset,
        sampler=[keys[place] for place in places],
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
    )


def between(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Return the agreement between the students of several runs, labels and teachers.

    None for one run, and for runs that were shown different images. A teacher that all were
    measured against comes once.
    """
    same = len({(run.data, run.numbers["images"]) for run in runs}) == 1
    if len(runs) == 1 or not same:
        return None
    said = {"label": runs[0].said["label"]}
    taught = [run for run in runs if TEACHER in run.said]
    if taught and all(torch.equal(run.said[TEACHER], taught[0].said[TEACHER]) for run in taught):
        said[TEACHER] = taught[0].said[TEACHER]
    else:
        said |= {f"{TEACHER} of {run.name}": run.said[TEACHER] for run in taught}
    said |= {f"run {run.name}" if run.name in said else run.name: run.said[STUDENT] for run in runs}
    return {"names": list(said), "matrix": agreement(said)}


def run_settings(folder: Path) -> dict[str, Any]:
    """Return all flags of a run, from its config.yaml. Raises UserError if there is none."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: no config.yaml in it; give the --output_dir of a run")
    return options.settings_of_run(structured.read(path, dict[str, Any]), str(path))


def checkpoint_of(folder: Path, name: str = "") -> Path:
    """Return the run's checkpoint: `name`, else the best, else the last. Raises UserError."""
    names = [name] if name else ["best_checkpoint.pth", "checkpoint.pth"]
    for path in (folder / one for one in names):
        if path.is_file():
            return path
    raise UserError(f"{folder}: has no {' and no '.join(names)}")


def strange(
    answers: Answers, classes: list[str], mean: Sequence[float], std: Sequence[float]
) -> list[dict[str, Any]]:
    """Return the images on which the student is farthest from its teacher, ready to be shown."""
    found = []
    for nats, image, index in answers.strange:
        row = {
            "nats": nats,
            "label": class_name(classes, int(answers.labels[index])),
            "image": data_uri(image, mean, std),
        }
        for name in (TEACHER, STUDENT):
            share, answer = answers.logits[name][index].softmax(0).max(0)
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
