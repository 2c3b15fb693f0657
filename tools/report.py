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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import base.wait_policy  # noqa: E402, F401  before torch is imported

# isort: split
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import datasets  # noqa: E402
import models  # noqa: E402
import options  # noqa: E402
from base import distributed, safe_load, structured  # noqa: E402
from base.errors import UserError  # noqa: E402
from base.text import class_name  # noqa: E402
from checks import visualize  # noqa: E402
from data.samplers import EvalSampler  # noqa: E402
from data.transforms import InputConfig  # noqa: E402
from distill.teacher import AnyTeacher, build_identity, build_teacher  # noqa: E402
from models.class_names import classes_of_file  # noqa: E402
from tools import result_table  # noqa: E402
from tools.comparison import Run, compare, is_distilled, trained_with  # noqa: E402
from tools.fidelity import STUDENT, TEACHER, collect, numbers  # noqa: E402
from tools.measure import Cost, measure, together  # noqa: E402
from tools.report_page import page  # noqa: E402
from training import metrics  # noqa: E402

# All flags that determine a teacher's logits; the teacher adapts its input itself
TEACHER_FLAGS = ("teacher_model", "teacher_path", "teacher_weight", "teacher_adaptor")
BY_LOGITS = {"distillation_type": "soft", "match": [], "ranking_kl_weight": 0.0}

MOST_MAPS, THUMBNAIL = 6, 96  # images with attention maps, and the width of an image in pixels


@dataclass(frozen=True)
class Networks:
    """Networks of a run, and the batches of their evaluation with the input that they have."""

    student: nn.Module
    teacher: AnyTeacher | None
    batches: Iterable[Any]
    inputs: InputConfig
    device: torch.device


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = _parser().parse_args(argv)
        runs, networks = build_runs(args)
    except UserError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return 2
    found = compare(runs)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(found, indent=1))
    args.out.write_text(page(found, thumbnails(found, networks)), encoding="utf-8")
    if not args.quiet:
        for line in result_table.lines(found):
            print(line)
        for run in runs:
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
    add("--quiet", action="store_true", help="print the names of the written files only")
    return parser


def build_runs(args: argparse.Namespace) -> tuple[list[Run], Networks]:
    """Return all runs of the command line, measured, and the networks of the first distilled one.

    Raises UserError.
    """
    folders = list(dict.fromkeys(args.runs))
    settings = [run_settings(folder) for folder in folders]
    named = dict.fromkeys(path for each in settings for path in each["plugin"])
    models.plugins.load_given_plugins(args.plugin, list(named), ", ".join(map(str, folders)))
    short = len({folder.name for folder in folders}) == len(folders)
    names = [folder.name if short else str(folder) for folder in folders]
    distils = [i for i, each in enumerate(settings) if each["distillation_type"] != "none"]
    shown = next((i for i, each in enumerate(settings) if is_distilled(each)), 0)
    runs: dict[int, Run] = {}
    costs: dict[str, Cost] = {}
    for i in dict.fromkeys(distils[:1] + list(range(len(names)))):  # the one that lends goes first
        lender = runs[distils[0]] if runs and distils else None
        runs[i], loaded = build_run(args, names[i], folders[i], settings[i], lender, costs)
        if i == shown:
            networks = loaded
    return [runs[i] for i in range(len(names))], networks


def build_run(
    args: argparse.Namespace,
    name: str,
    folder: Path,
    settings: Mapping[str, Any],
    lender: Run | None,
    costs: dict[str, Cost],
) -> tuple[Run, Networks]:
    """Return a measured run and its networks.

    lender: the run whose teacher it is compared with if it had none. costs: of the networks
    measured so far by what they are; this adds those of the run.
    Raises UserError for what does not exist, or does not fit together.
    """
    wanted = evaluation_settings(args, settings)
    processes = distributed.init_processes(args.device)
    inputs = models.build_input_config(wanted)
    teacher_file = teacher_file_in(args, folder, lender)
    weights = checkpoint_of(folder, args.checkpoint or teacher_file)
    trained = classes_of_file(str(weights), wanted.model)
    loaders = datasets.build_loaders(wanted, inputs, processes, trained)
    classes = [class_name(loaders.classes, i) for i in range(loaders.num_classes)]
    student = models.build_student(wanted, loaders.num_classes, inputs).to(processes.device)
    models.load_weights(student.network, str(weights), key=args.key)

    teacher = None
    flags, origin = teacher_of(settings, lender, args.teacher_model, args.teacher_path)
    note = why_not_lent(lender, classes, teacher_file) if origin == "lent" else ""
    if flags and not note:
        settings_T = argparse.Namespace(**vars(wanted) | flags | BY_LOGITS)
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
    networks = Networks(student.network, teacher, batches, inputs, processes.device)
    found = {
        "run": name,
        "folder": str(folder),
        "student": wanted.model,
        "input": inputs.describe(),
        **teacher_facts(teacher, {"own": name, "lent": lender and lender.name}.get(origin)),
        "teacher_note": note,
        "teacher_to": [lender.name] if teacher_file else [],
        "distillation": settings["distillation_type"],
        "trained_with": trained_with(settings),
        "weights": f"{weights.name}, {args.key}",
        "data": loaders.data[-1].description,
        **numbers(outputs, classes, loaders.present),
        "cost": costs_of(networks, wanted.model, costs),
        "curves": metrics.read_log(folder / "log.txt"),
    }
    shares, data = outputs.confidence(), loaders.fingerprint()
    return Run(name, settings, found, outputs.predictions(), shares, classes, data), networks


def costs_of(networks: Networks, model: str, known: dict[str, Cost]) -> dict[str, dict[str, Any]]:
    """Return the cost of student and teacher. known: costs by network, each is measured once."""
    members = {STUDENT: (model, [(networks.student, networks.inputs.input_size)])}
    if (teacher := networks.teacher) is not None:
        all_T = [(member.network, member.adapter.size) for member in teacher.members]
        members[TEACHER] = teacher.describe(), all_T
    found = {}
    for role, (what, parts) in members.items():
        key = f"{what} {[size for _, size in parts]}"
        if key not in known:
            known[key] = together([measure(network, size) for network, size in parts])
        found[role] = asdict(known[key])
    return found


def evaluation_settings(
    args: argparse.Namespace, settings: Mapping[str, Any]
) -> argparse.Namespace:
    """Return the settings of a run, changed so that its weights are evaluated."""
    given = {flag: getattr(args, flag) for flag in ("data_path", "data_set")}
    given = {flag: value for flag, value in given.items() if value is not None}
    fixed = {"eval": True, "finetune": "", "pretrained": False, "resume": "", "attn_only": False}
    return argparse.Namespace(**{**settings, **given, **fixed, "batch_size": args.batch_size})


def teacher_file_in(args: argparse.Namespace, folder: Path, lender: Run | None) -> str:
    """Return the name of the checkpoint in a folder that is the teacher of `lender`, or ""."""
    path = lender.settings["teacher_path"] if lender is not None else ""
    if args.teacher_model or args.teacher_path or not path or not isinstance(path, str):
        return ""
    file = Path(path).resolve()
    return file.name if file.parent == folder.resolve() else ""


def why_not_lent(lender: Run, classes: Sequence[str], teacher_file: str) -> str:
    """Return why a run is not compared with the teacher of `lender`, or "".

    teacher_file: its checkpoint that is this teacher, or "".
    """
    if teacher_file:
        return f"it is the teacher of {lender.name}"
    different = f"not compared with the teacher of {lender.name}: other classes"
    return different if classes != lender.classes else ""


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


def teacher_of(
    settings: Mapping[str, Any], lender: Run | None, model: str, path: str
) -> tuple[dict[str, Any], str]:
    """Return the flags of the teacher that a run is compared with, and where it comes from.

    model, path: of the command line, or empty. Origin: "own", "lent", "given", or "" for none.
    Raises UserError for a file without a model.
    """
    learns = is_distilled(settings)
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
    indices = torch.linspace(0, len(keys) - 1, min(limit, len(keys))).long().tolist()
    return loader.subset([keys[index] for index in indices])


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


def thumbnails(found: Mapping[str, Any], networks: Networks) -> dict[str, Any]:
    """Return the images of the page: disputed ones, and attention maps of student and teacher."""
    rows = found["disputed"]["images"]
    indices = [row["index"] for row in rows] or list(range(MOST_MAPS))
    images = pick(networks.batches, indices, networks.device)
    shown = visualize.to_uint8(images, networks.inputs)
    images = images[:MOST_MAPS]
    maps = visualize.attention_maps(networks.student, images)
    maps = {f"student, {token}": weights for token, weights in maps.items()}
    for member in networks.teacher.members if networks.teacher is not None else ():
        own = visualize.attention_maps(member.network, member.adapter(images), images.shape[-2:])
        maps |= {f"teacher, {token}": weights for token, weights in own.items()}
    attention = [
        [data_uri(image), *(data_uri(visualize.overlay(image, each[i])) for each in maps.values())]
        for i, image in enumerate(shown[:MOST_MAPS])
    ]
    return {
        "disputed": [data_uri(image) for image in shown[: len(rows)]],
        "attention": {"head": ["image", *maps], "rows": attention if maps else []},
    }


def pick(batches: Iterable[Any], indices: Sequence[int], device: torch.device) -> Tensor:
    """Return the images (B, 3, H, W) at `indices` of the data; those past its end are left out."""
    found: dict[int, Tensor] = {}
    start = 0
    for images, labels in batches:
        chosen = [index for index in indices if start <= index < start + len(labels)]
        if chosen:
            images = images.to(device)
            found |= {index: images[index - start] for index in chosen}
        start += len(labels)
        if start > max(indices):
            break
    return torch.stack([found[index] for index in indices if index in found])


def data_uri(pixels: Tensor) -> str:
    """Return an image (3, H, W) uint8 as a small JPEG inside a data: address."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image = image.resize((THUMBNAIL, round(THUMBNAIL * image.height / image.width)))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    sys.exit(main())
