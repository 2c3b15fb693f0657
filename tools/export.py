"""Take the student out of a run, in formats that others read, each one loaded back and compared.

    python tools/export.py runs/student exported
    python tools/export.py runs/student exported --formats onnx
    python tools/export.py runs/teacher/checkpoint.pth teacher.safetensors --half

A folder gets `model.safetensors` with `config.json` (timm: `local-dir:exported`), `model.onnx`,
`model.pt2` (torch.export) and a card, README.md. They hold the student alone, no teacher and no
projection, and answer with the mean of both heads where it has two. A name that ends in
.safetensors gets the weights alone; they load with --resume (--eval), --finetune, --teacher-path.
With --half the weights are rounded to float16, and .safetensors files store them so.
"""

import argparse
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import models  # noqa: E402
import options  # noqa: E402
from base import files, safe_load  # noqa: E402
from base.errors import UserError  # noqa: E402
from data.transforms import InputConfig  # noqa: E402
from models.loading import RAW_KEYS, read_weights, weight_keys  # noqa: E402
from tools.export_card import Rows, card, history, settings_of  # noqa: E402

TOLERANCE = 1e-5  # largest difference of logits (of their size, where that is above 1)
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime")}  # packages that requirements.txt lacks


@dataclass(frozen=True)
class Student:
    """What is exported: the network in evaluation mode, its name, its input, and its history.

    half: its weights are whole float16 numbers. classes: their names, None where not known.
    """

    network: nn.Module
    name: str
    inputs: InputConfig
    rows: Rows
    classes: list[str] | None = None
    half: bool = False

    def describe(self) -> str:
        """Return sizes, normalisation and what answers, in two sentences."""
        inputs, network = self.inputs, self.network
        count = sum(p.numel() for p in network.parameters()) / 1e6
        both = models.has_distillation_head(network)
        answer = "the mean of its class and its distillation head" if both else "its class head"
        rounded = ", rounded to float16 after they were evaluated" * self.half
        return (
            f"{count:.2f} M parameters{rounded}, {network.num_classes} classes. Input "
            f"{'x'.join(map(str, inputs.input_size))} pixels, mean {inputs.mean}, std "
            f"{inputs.std}, {inputs.interpolation}, crop {inputs.crop_ratio}. Its answer is "
            f"{answer}."
        )

    def examples(self, count: int) -> Tensor:
        """Return random images (count, 3, height, width), the same every time."""
        generator = torch.Generator().manual_seed(count)
        return torch.randn(count, 3, *self.inputs.input_size, generator=generator)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = _parser().parse_args(argv)
        if args.out.suffix == ".safetensors":
            _export_weights(args.source, args.out, args.key, args.half)
            return 0
        with safe_load.in_one_line(f"{args.source}: damaged, or of another version"):
            student = build_student(args)
        args.out.mkdir(parents=True, exist_ok=True)
        left_out = [] if args.formats else [name for name in FORMATS if missing(name)]
        wanted = [name for name in args.formats or FORMATS if name not in left_out]
        with tempfile.TemporaryDirectory(dir=args.out) as partial:  # all of it or nothing
            done = [FORMATS[name](student, Path(partial)) for name in wanted]
            about = card(student.name, student.describe(), student.rows, student.classes, done)
            (Path(partial) / "README.md").write_text(about)
            old = {path.name for path in args.out.glob("model.*")} - set(os.listdir(partial))
            if old:
                raise UserError(
                    f"{args.out}: {', '.join(sorted(old))} of an earlier export would lie beside "
                    "the new card; write all formats at once (--formats), or give another folder"
                )
            for file in Path(partial).iterdir():
                os.replace(file, args.out / file.name)
    except UserError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return 2
    print("\n  ".join([f"{args.out}:", *done, "README.md: the card"]))
    for name in left_out:
        print(f"{name}: left out; it needs pip install {' '.join(missing(name))}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = options.Parser("export.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("source", type=Path, help="output folder of a run, or a checkpoint file")
    add("out", type=Path, help="folder, or a .safetensors file")
    add(
        "--formats",
        nargs="+",
        choices=list(FORMATS),
        help="default: all whose packages are installed",
    )
    add("--model", help="its name, for a file that does not say")
    add("--key", help="model (default) or model_ema")
    add(
        "--half",
        action="store_true",
        help="round the weights to float16; half the size in .safetensors",
    )
    return parser


def _export_weights(source: Path, out: Path, key: str | None, half: bool) -> None:
    weights = read_weights(str(file_of(source)), key)
    if half:
        weights = to_half(weights)
    weights = {name: value.contiguous() for name, value in weights.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as partial:
        file = Path(partial) / out.name
        save_file(weights, file)
        loaded = load_file(file)
        if not all(torch.equal(value, loaded[name]) for name, value in weights.items()):
            raise UserError(f"{out}: does not read back as it was, so nothing was written")
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
    if not source.is_dir():
        return source
    found = [source / name for name in ("best_checkpoint.pth", "checkpoint.pth")]
    for path in found:
        if path.exists():
            return path
    raise UserError(f"{source}: has no checkpoint.pth; give the --output_dir of a run, or a file")


def build_student(args: argparse.Namespace) -> Student:
    """Return the student of a run or file. Raises UserError if nothing says which model it is."""
    path = file_of(args.source)
    content = safe_load.read_weights_file(path)
    settings = settings_of(content)
    name = args.model or settings.get("model")
    if not name:
        raise UserError(f"{path}: does not say which model it is; give --model")
    weights = read_weights(str(path), args.key)
    heads = [
        weights[key]
        for key in ("head.weight", "fc.weight", "head.fc.weight", "classifier.weight")
        if key in weights
    ]
    own = vars(options.argparse_with_help().parse_args([]))
    known = {key: value for key, value in settings.items() if key in own}
    inputs = models.build_input_config(argparse.Namespace(**own | known | {"model": name}))
    network = models.create_model(
        name, num_classes=heads[0].shape[0] if heads else None, img_size=inputs.input_size
    )
    models.load_weights(network, str(path), key=args.key)
    if args.half:
        network.load_state_dict(to_half(network.state_dict()))
    rows = history(path, content, args.key or weight_keys(str(path))[0] or RAW_KEYS[0])
    classes = content.get("classes")
    if not classes or len(classes) != network.num_classes:
        classes = None
    return Student(network.eval(), name, inputs, rows, classes, args.half)


def verify(student: Student, path: Path, answer: Callable[[Tensor], Tensor]) -> str:
    """Return the line that says what was written, once its logits are the student's.

    Raises UserError if they differ by more than TOLERANCE.
    """
    worst = 0.0
    for count in (1, 3):
        images = student.examples(count)
        with torch.no_grad():
            wanted, found = student.network(images), answer(images)
        scale = max(1.0, float(wanted.abs().max()))
        worst = max(worst, float((wanted - found).abs().max()) / scale)
    if not worst <= TOLERANCE:
        raise UserError(
            f"{path.name}: its logits differ from the student's by {worst:.1e} (at most "
            f"{TOLERANCE:g} is allowed), so nothing was written"
        )
    size = path.stat().st_size / 1024
    return f"{path.name}: {size:.0f} KiB, logits differ by at most {worst:.1e}"


def timm_name(name: str) -> str:
    """Return what timm calls an architecture that here has its name in DeiT's code."""
    found = models.released.find(name)
    return (found.timm if found else name).partition(".")[0]


def to_safetensors(student: Student, folder: Path) -> str:
    path, network = folder / "model.safetensors", student.network
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    if student.half:
        weights = to_half(weights)
    save_file(weights, path, metadata={"format": "pt"})
    inputs = student.inputs
    embed = getattr(network, "patch_embed", getattr(network, "stem", None))
    sized = {"img_size": list(inputs.input_size)} if hasattr(embed, "img_size") else {}
    config = {
        "architecture": timm_name(student.name),
        "num_classes": network.num_classes,
        "num_features": network.num_features,
        **({"label_names": student.classes} if student.classes else {}),
        "model_args": sized,
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
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copymode(folder / "config.json", path)  # safetensors lets nobody else read it
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
