"""Export the student of a run in formats that other programs read; each file is verified.

    python tools/export.py runs/student exported
    python tools/export.py runs/student exported --formats onnx
    python tools/export.py runs/student exported --push-to-hub user/name --license apache-2.0
    python tools/export.py runs/teacher/checkpoint.pth teacher.safetensors --half

A folder gets `model.safetensors` with `config.json` (timm: `local-dir:exported`), `model.onnx`,
`model.pt2` (torch.export) and a model card, README.md. They hold the student alone, without teacher
and projections, and return the mean of both heads where it has two. A name that ends in
.safetensors gets the weights alone; they load with --resume (--eval), --finetune, --teacher-path.
With --half the weights are rounded to float16, and .safetensors files store them so.
--push-to-hub prints what it would upload, and uploads after a "y" or with --yes.
"""

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import models  # noqa: E402
import options  # noqa: E402
from base import files, safe_load  # noqa: E402
from base.errors import UserError, system_error  # noqa: E402
from data.transforms import InputConfig  # noqa: E402
from models.class_names import classes_of_file  # noqa: E402
from models.file_layouts import RAW_KEYS  # noqa: E402
from models.loading import read_weights, weight_keys  # noqa: E402
from tools.export_card import Card, Rows, history, settings_of  # noqa: E402

TOLERANCE = 1e-5  # largest difference of logits (of their size, where that is above 1)
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime")}  # packages that requirements.txt lacks
UNKNOWN = "unknown"  # the Hub's word for a licence that nobody has stated


@dataclass(frozen=True)
class Student:
    """What is exported: the network in evaluation mode, its name, its input, and its history.

    half: its weights are rounded to float16. classes: their names, None where not known.
    """

    network: nn.Module
    name: str
    inputs: InputConfig
    rows: Rows
    classes: list[str] | None = None
    half: bool = False

    def describe(self) -> str:
        """Return size, input and output of the network, in three sentences."""
        inputs, network = self.inputs, self.network
        count = sum(p.numel() for p in network.parameters()) / 1e6
        both = models.has_distillation_head(network)
        heads = "the mean of its class and its distillation head" if both else "its class head"
        rounded = ", rounded to float16 after they were evaluated" * self.half
        return (
            f"{count:.2f} M parameters{rounded}, {network.num_classes} classes. Input "
            f"{'x'.join(map(str, inputs.input_size))} pixels, mean {inputs.mean}, std "
            f"{inputs.std}, {inputs.interpolation}, crop {inputs.crop_ratio}. It returns the "
            f"logits of {heads}."
        )

    def examples(self, count: int) -> Tensor:
        """Return random images (count, 3, height, width), the same every time."""
        generator = torch.Generator().manual_seed(count)
        return torch.randn(count, 3, *self.inputs.input_size, generator=generator)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = _parser().parse_args(argv)
        if args.out.suffix == ".safetensors":
            if args.push_to_hub:
                raise UserError(f"--push-to-hub: {args.out} is one file; give a folder")
            with _writing(args.out):
                _export_weights(args.source, args.out, args.key, args.half)
            return 0
        with safe_load.in_one_line(f"{args.source}: damaged, or of another version"):
            student = build_student(args)
        with _writing(args.out):
            written = _export_folder(args, student)
        if args.push_to_hub:
            push_to_hub(args.out, written, args.push_to_hub, ask=not args.yes)
    except UserError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Report a full disk or an unwritable folder as a one-line UserError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        cause = system_error(error)
        if cause is None and not isinstance(error, SafetensorError):
            raise
        reason = cause.strerror if cause else " ".join(str(error).split())[:120]
        raise UserError(f"{out}: cannot be written ({reason})") from error


def _export_folder(args: argparse.Namespace, student: Student) -> list[str]:
    """Write all formats and the card, or nothing; return the names of the files."""
    args.out.mkdir(parents=True, exist_ok=True)
    left_out = [] if args.formats else [name for name in FORMATS if missing(name)]
    wanted = [name for name in args.formats or FORMATS if name not in left_out]
    with tempfile.TemporaryDirectory(dir=args.out) as partial:
        done = [FORMATS[name](student, Path(partial)) for name in wanted]
        card = Card(
            title=student.name,
            about=student.describe(),
            rows=student.rows,
            classes=student.classes,
            files=done,
            inputs=student.inputs,
            license=args.license,
            data_license=args.data_license,
            repository=args.push_to_hub or "",
        )
        (Path(partial) / "README.md").write_text(card.text(), encoding="utf-8")
        written = sorted(os.listdir(partial))
        old = {path.name for path in args.out.glob("model.*")} - set(written)
        if old:
            raise UserError(
                f"{args.out}: {', '.join(sorted(old))} of an earlier export would lie beside "
                "the new card; write all formats at once (--formats), or give another folder"
            )
        for name in written:
            os.replace(Path(partial) / name, args.out / name)
    print("\n  ".join([f"{args.out}:", *done, "README.md: the model card"]))
    for name in left_out:
        print(f"{name}: left out; it needs pip install {' '.join(missing(name))}")
    return written


def _parser() -> argparse.ArgumentParser:
    parser = options.Parser("export.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("source", type=Path, help="output folder of a run, or a checkpoint file")
    add("out", type=Path, help="folder, or a .safetensors file")
    formats = "default: all whose packages are installed"
    add("--formats", nargs="+", choices=list(FORMATS), help=formats)
    add("--model", help="its name, for a file that does not state it")
    add("--key", help="model (default) or model_ema")
    add("--plugin", default=[], action="append", metavar="FILE.py", help="what the run had")
    half = "round the weights to float16; half the size in .safetensors"
    add("--half", action="store_true", help=half)
    licence = "licence of the {}, by the Hub's identifier (apache-2.0, other, ...)"
    add("--license", default=UNKNOWN, help=licence.format("weights"))
    add("--data-license", default=UNKNOWN, help=licence.format("training data"))
    add("--push-to-hub", metavar="USER/NAME", help="upload the folder to this Hub repository")
    add("--yes", action="store_true", help="upload without asking")
    return parser


def push_to_hub(folder: Path, names: Sequence[str], repository: str, *, ask: bool) -> None:
    """Print what would be uploaded; upload it to a private repository once that is confirmed.

    Raises UserError if the Hub refuses or cannot be reached.
    """
    import huggingface_hub

    sizes = [f"{name} ({(folder / name).stat().st_size / 1024:.0f} KiB)" for name in names]
    print(f"upload to {huggingface_hub.constants.ENDPOINT}/{repository} (private if new):")
    print("\n".join(f"  {size}" for size in sizes))
    if ask and not (sys.stdin.isatty() and input("upload these files? [y/N] ").lower() == "y"):
        print("nothing was uploaded; add --yes to upload without being asked")
        return
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(names))
    except (OSError, ValueError) as error:  # the library's errors are of these kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--push-to-hub {repository}: nothing was uploaded ({reason})") from error
    print(f"uploaded to {repository}")


def _export_weights(source: Path, out: Path, key: str | None, half: bool) -> None:
    weights = read_weights(str(file_of(source)), key)
    if half:
        weights = to_half(weights)
    weights = {name: value.contiguous() for name, value in weights.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as partial:
        file = Path(partial) / out.name
        safe_load.save_safetensors(weights, file)
        loaded = load_file(file)
        if not all(torch.equal(value, loaded[name]) for name, value in weights.items()):
            raise UserError(f"{out}: differs from the weights when read back; nothing was written")
        os.replace(file, out)
    print(f"{out}: {len(weights)} tensors, {out.stat().st_size / 1024:.0f} KiB")


def to_half(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights in float16, counts as they are. Raises UserError for one that is too large."""
    halves = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    for name, value in halves.items():
        if not files.is_finite(value):
            raise UserError(f"--half: {name} has values too large for float16; leave --half out")
    return halves


def file_of(source: Path) -> Path:
    """Return the checkpoint of a run's folder, the best one if there is; a file as it is."""
    if not os.path.isdir(source):  # Path.is_dir raises for a name that is too long
        return source
    found = [source / name for name in ("best_checkpoint.pth", "checkpoint.pth")]
    for path in found:
        if path.exists():
            return path
    raise UserError(f"{source}: has no checkpoint.pth; give the --output_dir of a run, or a file")


def build_student(args: argparse.Namespace) -> Student:
    """Return the student of a run or file. Raises UserError if no model is stated."""
    path = file_of(args.source)
    content = safe_load.read_weights_file(path)
    settings = settings_of(content)
    models.plugins.load_given_plugins(args.plugin, settings.get("plugin") or [], path)
    name = args.model or settings.get("model")
    if not name:
        raise UserError(f"{path}: does not state which model it is; give --model")
    own = vars(options.argparse_with_help().parse_args([]))
    known = {key: value for key, value in settings.items() if key in own}
    inputs = models.build_input_config(argparse.Namespace(**own | known | {"model": name}))
    outputs = classes_of_file(str(path), name)
    count = outputs.count if outputs is not None else None
    network = models.create_model(name, num_classes=count, img_size=inputs.input_size)
    models.load_weights(network, str(path), key=args.key)
    if args.half:
        network.load_state_dict(to_half(network.state_dict()))
    rows = history(path, content, args.key or weight_keys(str(path))[0] or RAW_KEYS[0])
    classes = content.get("classes")
    if not classes or len(classes) != network.num_classes:
        classes = None
    return Student(network.eval(), name, inputs, rows, classes, args.half)


def verify(student: Student, path: Path, exported: Callable[[Tensor], Tensor]) -> str:
    """Return a line about a written file whose logits were compared with the student's.

    Raises UserError if they differ by more than TOLERANCE.
    """
    worst = 0.0
    for count in (1, 3):
        images = student.examples(count)
        with torch.no_grad():
            wanted, found = student.network(images), exported(images)
        scale = max(1.0, float(wanted.abs().max()))
        worst = max(worst, float((wanted - found).abs().max()) / scale)
    if not worst <= TOLERANCE:
        raise UserError(
            f"{path.name}: its logits differ from the student's by {worst:.1e} (at most "
            f"{TOLERANCE:g} is allowed), so nothing was written"
        )
    size = path.stat().st_size / 1024
    return f"{path.name}: {size:.0f} KiB, logits differ by at most {worst:.1e}"


def timm_config(student: Student) -> dict[str, Any]:
    """Return config.json, from which timm alone builds the network."""
    inputs, network = student.inputs, student.network
    architecture, arguments = models.released.plain_timm(student.name)
    if student.name.startswith("local-dir:"):
        source = json.loads((Path(student.name[len("local-dir:") :]) / "config.json").read_text())
        architecture, arguments = source["architecture"], source.get("model_args", {})
    elif student.name.startswith(models.SOURCES):
        architecture = network.pretrained_cfg["architecture"]
    embed = getattr(network, "patch_embed", getattr(network, "stem", None))
    sized = {"img_size": list(inputs.input_size)} if hasattr(embed, "img_size") else {}
    return {
        "architecture": architecture,
        "num_classes": network.num_classes,
        "num_features": network.num_features,
        **({"label_names": student.classes} if student.classes else {}),
        "model_args": arguments | sized,
        "pretrained_cfg": {
            "input_size": [3, *inputs.input_size],
            "mean": list(inputs.mean),
            "std": list(inputs.std),
            "interpolation": inputs.interpolation,
            "crop_pct": inputs.crop_ratio,
            "num_classes": network.num_classes,
            "first_conv": network.pretrained_cfg.get("first_conv"),
            "classifier": network.pretrained_cfg.get("classifier"),
        },
    }


def to_safetensors(student: Student, folder: Path) -> str:
    path, network = folder / "model.safetensors", student.network
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    if student.half:
        weights = to_half(weights)
    safe_load.save_safetensors(weights, path)
    (folder / "config.json").write_text(json.dumps(timm_config(student), indent=2))
    shutil.copymode(folder / "config.json", path)  # safetensors makes it readable by its owner only
    loaded = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True).eval()
    return verify(student, path, loaded)


def missing(form: str) -> list[str]:
    """Return the packages that a format needs and that are not installed."""
    return [name for name in NEEDS.get(form, ()) if importlib.util.find_spec(name) is None]


def to_onnx(student: Student, folder: Path) -> str:
    if absent := missing("onnx"):
        raise UserError(f"--formats onnx: needs pip install {' '.join(absent)}")
    import onnxruntime

    path = folder / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            student.network,
            (student.examples(2),),
            str(path),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return verify(
        student, path, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
    )


def to_torch_export(student: Student, folder: Path) -> str:
    path = folder / "model.pt2"
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(student.network, (student.examples(2),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return verify(student, path, torch.export.load(path).module())


FORMATS: dict[str, Callable[[Student, Path], str]] = {
    "safetensors": to_safetensors,
    "onnx": to_onnx,
    "torch_export": to_torch_export,
}


if __name__ == "__main__":
    sys.exit(main())
