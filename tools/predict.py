"""Print the most probable classes of images, by the student of a run or of an export.

    python tools/predict.py runs/student cat.jpg dog.jpg
    python tools/predict.py exported photos --top-k 3 --format csv > predictions.csv
    python tools/predict.py runs/student/checkpoint.pth 'photos/*.jpg' --format json

IMAGE is a file, a folder (its images and those in its subfolders) or a pattern. Images get the
resize, crop and normalisation of the run. Unreadable images are printed on stderr and left out;
the exit code is then 2.
"""

import argparse
import csv
import glob
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import base.wait_policy  # noqa: E402, F401  before torch is imported

# isort: split
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import models  # noqa: E402
import options  # noqa: E402
from base import safe_load  # noqa: E402
from base.distributed import pick_device  # noqa: E402
from base.errors import UserError  # noqa: E402
from base.text import class_name, printable  # noqa: E402
from data.folders import list_tree, some  # noqa: E402
from data.image_ops import UNREADABLE, decode  # noqa: E402
from data.transforms import InputConfig, eval_transform  # noqa: E402
from models.class_names import CONFIG, LOCAL, classes_of_published  # noqa: E402
from tools import export  # noqa: E402
from training.metrics import bar  # noqa: E402

WEIGHTS = "model.safetensors"  # of an export
MAX_NAME = 40  # characters of a class name in text


@dataclass(frozen=True)
class Predictor:
    """A network in evaluation mode, its input, and its class names or None."""

    network: nn.Module
    inputs: InputConfig
    classes: Sequence[str] | None
    device: torch.device

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """Return the class probabilities (B, C) of images (3, H, W)."""
        logits = self.network(torch.stack(list(images)).to(self.device))
        return logits.float().softmax(dim=1).cpu()


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, by falling probability."""

    image: str
    classes: list[str]
    probabilities: list[float]


def load(
    source: Path,
    device: torch.device,
    model: str | None,
    key: str | None,
    plugins: Sequence[str] = (),
) -> Predictor:
    """Return the predictor of a run's folder, a checkpoint or an exported folder.

    model, key: the architecture and the entry of a checkpoint that does not state them. plugins:
    files to run first; those that a run names are not run.
    Raises UserError for anything else.
    """
    if (source / CONFIG).is_file() and (source / WEIGHTS).is_file():
        models.plugins.load_given_plugins(plugins, [], source)
        return _load_export(source, device)
    if source.suffix in (".onnx", ".pt2"):
        raise UserError(f"{source}: give its folder, which has {WEIGHTS} and {CONFIG}")
    given = {"source": source, "model": model, "key": key, "plugin": plugins, "half": False}
    student = export.build_student(argparse.Namespace(**given))
    return Predictor(student.network.to(device), student.inputs, student.classes, device)


def _load_export(folder: Path, device: torch.device) -> Predictor:
    name = f"{LOCAL}{folder.resolve()}"
    network = models.create_model(name, pretrained=True).eval().to(device)
    stated = models.stated_input(str(folder / WEIGHTS))
    if stated is None:
        raise UserError(f"{folder / CONFIG}: does not state the input of the network")
    inputs = models.to_inputs(stated)
    known = classes_of_published(name, network.num_classes)
    return Predictor(network, inputs, known.names if known else None, device)


def find_images(words: Sequence[str]) -> list[str]:
    """Return the image files of files, folders and patterns, each once, in their order.

    Raises UserError for a word that gives no file.
    """
    found: list[str] = []
    for word in words:
        if os.path.isdir(word):
            paths = [os.path.join(word, path) for path in list_tree(word)[0]]
        elif os.path.lexists(word):
            paths = [word]
        else:
            paths = sorted(path for path in glob.glob(word, recursive=True) if os.path.isfile(path))
        if not paths:
            what = "no images in it" if os.path.isdir(word) else "not there"
            raise UserError(f"{printable(word)}: {what}; give image files, folders or patterns")
        found += paths
    return list(dict.fromkeys(found))


def predict(
    predictor: Predictor,
    paths: Sequence[str],
    top_k: int,
    batch_size: int,
    on_bad: Callable[[str, str], None],
) -> Iterator[Prediction]:
    """Yield the predictions of images in their order; call `on_bad(path, reason)` for others."""
    transform = eval_transform(predictor.inputs)
    names: list[str] = []
    images: list[Tensor] = []
    for number, path in enumerate(paths, start=1):
        try:
            if not os.path.isfile(path):
                raise OSError("not a regular file")
            images.append(transform(decode(Path(path).read_bytes())))
            names.append(path)
        except UNREADABLE as error:
            on_bad(path, " ".join(str(error).split())[:200] or type(error).__name__)
        if images and (len(images) == batch_size or number == len(paths)):
            yield from _name_classes(names, predictor(images), predictor.classes, top_k)
            names, images = [], []


def _name_classes(
    paths: Sequence[str], probabilities: Tensor, classes: Sequence[str] | None, top_k: int
) -> Iterator[Prediction]:
    best = probabilities.topk(min(top_k, probabilities.shape[1]), dim=1)
    for path, values, indices in zip(paths, best.values.tolist(), best.indices.tolist()):
        yield Prediction(path, [class_name(classes, index) for index in indices], values)


def print_text(predictions: Iterator[Prediction]) -> None:
    for each in predictions:
        names = [printable(name)[:MAX_NAME] for name in each.classes]
        width = max(map(len, names))
        print(printable(each.image))
        for name, share in zip(names, each.probabilities):
            print(f"  {name:<{width}}  {100 * share:5.1f}%  {bar(share, 20)}")


def print_json(predictions: Iterator[Prediction]) -> None:
    rows: list[dict[str, Any]] = [
        {
            "image": each.image,
            "predictions": [
                {"class": name, "probability": share}
                for name, share in zip(each.classes, each.probabilities)
            ],
        }
        for each in predictions
    ]
    print(json.dumps(rows, indent=2))


def print_csv(predictions: Iterator[Prediction]) -> None:
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["image", "rank", "class", "probability"])
    for each in predictions:
        for rank, (name, share) in enumerate(zip(each.classes, each.probabilities), start=1):
            table.writerow([printable(each.image), rank, printable(name), f"{share:.6f}"])


FORMATS: dict[str, Callable[[Iterator[Prediction]], None]] = {
    "text": print_text,
    "json": print_json,
    "csv": print_csv,
}


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word}: give a whole number of at least 1")
    return int(word)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = options.Parser("predict.py", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("source", type=Path, help="a run's folder, a checkpoint, or an exported folder")
    add("images", nargs="+", metavar="IMAGE", help="file, folder or pattern")
    add("--top-k", type=_positive, default=5, help="classes per image (default: 5)")
    add("--format", default="text", choices=list(FORMATS))
    add("--batch-size", type=_positive, default=32, help="images at once (default: 32)")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--model", help="its name, for a file that does not state it")
    add("--key", help="model (default) or model_ema")
    add("--plugin", default=[], action="append", metavar="FILE.py", help="what the run had")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING)
    bad: list[str] = []

    def on_bad(path: str, reason: str) -> None:
        bad.append(path)
        print(f"{printable(path)}: left out, not readable ({printable(reason)})", file=sys.stderr)

    try:
        args = _parser().parse_args(argv)
        paths = find_images(args.images)
        with safe_load.in_one_line(f"{args.source}: damaged, or of another version"):
            device = pick_device(args.device, 0)
            predictor = load(args.source, device, args.model, args.key, args.plugin)
        FORMATS[args.format](predict(predictor, paths, args.top_k, args.batch_size, on_bad))
        if bad:
            raise UserError(f"{len(bad)} of {len(paths)} images are not readable: {some(bad)}")
    except UserError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has closed standard output, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
