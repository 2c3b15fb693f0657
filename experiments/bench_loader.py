"""How many images one core loads and augments, beside DeiT's default transform by timm and Pillow.

Part `loader` of experiments/benchmark.py. CPU seconds on one thread; the images are in the page
cache. Ours include the seeding of every sample; timm's transform has none.
"""

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform

import datasets
from base.errors import UserError
from data import image_source, packed, samplers, sources, transforms
from data.byte_batches import DeferNormalize
from experiments.bench_race import race, table
from options import get_args_parser
from tools import prepare_data

SIDE = 224
INPUTS = transforms.InputConfig((SIDE, SIDE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FULL, CROP = "timm, whole recipe", "timm, up to the crop"


def measure(data: str, images: int, rounds: int) -> dict[str, Any]:
    """Return the seconds per image of every row, and the lines of their table."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        work = Path(name)
        folder = Path(data) if data else write_noise(work / "noise", images)
        entries = {row: turn(function) for row, function in rows(folder, work, images).items()}
        seconds = race(entries, rounds, images)
    torch.set_num_threads(threads)
    columns = {"x timm's whole recipe": lambda _: FULL, "x timm up to the crop": lambda _: CROP}
    lines = table(seconds, columns, "ms per image")
    return {"seconds": seconds, "lines": ["### Loader, one core", "", *lines]}


def turn(function: Callable[[int], Any]) -> Callable[[int], float]:
    """Return a contestant that calls `function` with 0, 1, ..."""

    def run(images: int) -> float:
        started = time.process_time()
        for number in range(images):
            function(number)
        return (time.process_time() - started) / images

    return run


def write_noise(folder: Path, count: int) -> Path:
    """Write JPEG files of coarse noise, 256 by 340 pixels, under val/."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / "val" / f"class{number % 10}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (64, 85, 3), dtype=np.uint8))
        coarse.resize((340, 256), Image.Resampling.BICUBIC).save(path, quality=90)
    return folder


def prepare(folder: Path, to: Path, form: str) -> Path:
    """Pack the validation images of `folder`. Raises UserError if that fails."""
    if prepare_data.main([str(folder), str(to), "--splits", "val", "--format", form]):
        raise UserError(f"{folder}: its images could not be packed; see the line above")
    return to


def timms() -> list[Callable]:
    """Return DeiT's default training transform by timm, with the one repair that it needs."""
    transform = create_transform(
        SIDE,
        is_training=True,
        color_jitter=0.3,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )
    for operation in transforms.augment_ops(transform):
        if operation.name.startswith("Posterize"):
            operation.aug_fn = transforms.posterize
    return transform.transforms


def rows(folder: Path, work: Path, count: int) -> dict[str, Callable[[int], Any]]:
    """Return what is measured: by name, a function of a number from 0 to `count` - 1."""
    files = sources.open_folder(str(folder / "val"))
    raw = packed.Prepared(prepare(folder, work / "raw", packed.RAW), "val")
    jpeg = packed.Prepared(prepare(folder, work / "jpeg", packed.JPEG), "val")
    args: argparse.Namespace = get_args_parser().parse_args(["--data-path", str(folder)])
    whole = transforms.build_transform(True, args, INPUTS)
    recorded = DeferNormalize(transforms.build_transform(True, args, INPUTS), augments=True)
    index_of = np.random.default_rng(0).permutation(len(files))[:count].tolist()

    def by_timm(steps: Sequence[Callable]) -> Callable[[int], Any]:
        def load(number: int) -> Any:
            with open(files.name(index_of[number]), "rb") as file:
                return _apply(steps, Image.open(file).convert("RGB"))

        return load

    def ours(source: image_source.Source, transform: Callable) -> Callable[[int], Any]:
        data = datasets.ImageDataset(source, transform, len(source.classes))

        def load(number: int) -> Any:
            samplers.seed_cpu(samplers.derive_seed(0, "view", 0, index_of[number]))
            return data[index_of[number]]

        return load

    full = timms()
    found = {FULL: by_timm(full), "timm again": by_timm(full), CROP: by_timm(full[:2])}
    for name, source in {"JPEG files": files, "packed JPEG": jpeg, "packed raw": raw}.items():
        found[f"{name}, up to the crop"] = ours(source, lambda x: _apply(whole.transforms[:2], x))
        found[f"{name}, whole recipe"] = ours(source, whole)
        found[f"{name}, --augment-on device"] = ours(source, recorded)
    return found


def _apply(steps: Sequence[Callable], image: Any) -> Any:
    for step in steps:
        image = step(image)
    return image
