"""How many images one core brings, against DeiT's default transform by timm and Pillow.

    python experiments/bench_loader.py --data /data/imagenet_sample --json loader.json

All rows are measured in turn, the order rotated by one in every round, on one thread and in CPU
seconds, so that other work on the machine moves a ratio little. "timm again" is the first row once
more: what is as near to 1 as that is no difference. The images lie in the page cache. Ours
include the seeding of every sample; timm's transform has none. The growth rows read a table of so
many entries, whose images are those of the sample, from a new process each.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
from base.distributed import Processes  # noqa: E402
from data import image_ops, image_source, packed, samplers, sources, transforms  # noqa: E402
from data.device_augment import Recorded  # noqa: E402
from options import get_args_parser  # noqa: E402
from tools import prepare_data  # noqa: E402

SIDE = 224
INPUTS = transforms.InputConfig((SIDE, SIDE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FULL, CROP = "timm, whole recipe", "timm, up to the crop"
# Rows by name: the least ratio to the whole recipe by timm that is asked for
TARGETS = {
    "prepared raw, up to the crop": 20.0,
    "prepared JPEG, up to the crop": 5.0,
    "prepared raw, whole recipe": 3.0,
    "JPEG files, up to the crop": 2.0,
    "JPEG files, whole recipe": 1.5,
}
GROWTH = (10**4, 10**5, 10**6)
ORIGINAL = 375  # pixels of the shorter side, about that of ImageNet's originals
SCALES = (0.08, 0.25, 0.5, 1.0)  # of a crop, from DeiT's least to its greatest
QUALITY = 90  # of JPEG, as tools/prepare_data.py has it
COPIES = [(256, packed.RAW), (288, packed.RAW), (288, packed.JPEG), (320, packed.RAW)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="", help="folder with val/<class>/*.jpg; empty: made-up images")
    add(
        "--enlarge",
        default=0,
        type=int,
        metavar="SIDE",
        help="first store the images again with this shorter side, as JPEG of quality 97: "
        f"{ORIGINAL}, about ImageNet's originals', where --data has shrunk ones",
    )
    add("--images", default=150, type=int, help="of a round")
    add("--rounds", default=7, type=int, help="after two that do not count")
    add("--json", default="", metavar="FILE", help="write all numbers there")
    add("--grown", default="", help=argparse.SUPPRESS)  # a growth row, in a process of its own
    return parser


def make_up(folder: Path, count: int) -> Path:
    """Write JPEG files of coarse noise, 256 by 340 pixels."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / "val" / f"class{number % 10}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (64, 85, 3), dtype=np.uint8))
        coarse.resize((340, 256), Image.Resampling.BICUBIC).save(path, quality=90)
    return folder


def enlarge(folder: Path, side: int, to: Path) -> Path:
    """Store the validation images of `folder` again under `to`, `side` pixels at the shorter."""
    for path in sorted((folder / "val").glob("*/*")):
        image = Image.open(path).convert("RGB")
        scale = side / min(image.size)
        target = to / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        size = (round(image.width * scale), round(image.height * scale))
        image.resize(size, Image.Resampling.BICUBIC).save(target, "JPEG", quality=97)
    return to


def settings(name: str, folder: Path, *flags: str) -> argparse.Namespace:
    return get_args_parser().parse_args(
        ["--data-set", name, "--data-path", str(folder), "--num-workers", "0", *flags]
    )


def timms() -> Any:
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
    return transform


def rows(folder: Path, work: Path, count: int) -> dict[str, Callable[[int], Any]]:
    """Return what is measured: by name, a function of a place from 0 to `count` - 1."""
    opened: dict[str, image_source.Source] = {}
    for form in (packed.RAW, packed.JPEG):
        if prepare_data.main([str(folder), str(work / form), "--splits", "val", "--format", form]):
            raise SystemExit(2)
        opened[form] = packed.Prepared(work / form, "val")
    opened["files"] = files = sources.open_folder(str(folder / "val"))
    whole = transforms.build_transform(True, settings("IMNET", folder), INPUTS)
    recorded = Recorded(transforms.build_transform(True, settings("IMNET", folder), INPUTS))
    crop = whole.transforms[:2]
    full = timms()
    place_of = np.random.default_rng(0).permutation(len(files))[:count].tolist()

    def by_timm(steps: Sequence[Callable]) -> Callable[[int], Any]:
        def one(number: int) -> Any:
            with open(files.name(place_of[number]), "rb") as file:
                image = Image.open(file).convert("RGB")
            for step in steps:
                image = step(image)
            return image

        return one

    def ours(
        source: image_source.Source, transform: Callable, repeats: int = 1
    ) -> Callable[[int], Any]:
        data = datasets.ImageDataset(source, transform, len(source.classes))

        def one(number: int) -> Any:
            index = place_of[number // repeats]
            samplers.seed_cpu(samplers.derive_seed(0, "view", number % repeats, index))
            return data[index]

        return one

    def cropped(image: image_ops.ImageLike) -> Any:
        for step in crop:
            image = step(image)
        return image

    found = {
        FULL: by_timm(full.transforms),
        "timm again": by_timm(full.transforms),
        CROP: by_timm(full.transforms[:2]),
        "JPEG files, up to the crop": ours(files, cropped),
        "JPEG files, whole recipe": ours(files, whole),
        "JPEG files, whole recipe, 3 views of an image": ours(files, whole, repeats=3),
    }
    for form, name in ((packed.JPEG, "JPEG"), (packed.RAW, "raw")):
        found[f"prepared {name}, up to the crop"] = ours(opened[form], cropped)
        found[f"prepared {name}, whole recipe"] = ours(opened[form], whole)
        found[f"prepared {name}, --augment-on device"] = ours(opened[form], recorded)
    return found


def measure(
    functions: dict[str, Callable[[int], Any]], count: int, rounds: int
) -> dict[str, list[float]]:
    """Return the CPU seconds an image of every round, by row; the order rotates."""
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 2):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            random.seed(number), np.random.seed(number), torch.manual_seed(number)
            started = time.process_time()
            for place in range(count):
                functions[name](place)
            if number >= 2:
                seconds[name].append((time.process_time() - started) / count)
    return seconds


def summary(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return, by row, images a second, and the rounds' ratios' median and quartiles."""
    found = {}
    for name, values in seconds.items():
        ratios = [base / value for base, value in zip(seconds[FULL], values)]
        to_crop = [base / value for base, value in zip(seconds[CROP], values)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        found[name] = {
            "ratio": middle,
            "low": low,
            "high": high,
            "ratio_to_crop": statistics.median(to_crop),
            "images_per_second": 1 / statistics.median(values),
        }
    return found


def grow(base: Path, work: Path, entries: int) -> Path:
    """Make a prepared data set of so many entries, whose images are those of `base`, again."""
    folder = work / f"entries{entries}"
    folder.mkdir()
    manifest = json.loads((base / packed.MANIFEST).read_text())
    table = np.resize(np.fromfile(base / "val.table", packed.ROW), entries)
    facts = manifest["splits"]["val"] | {
        "images": entries,
        "table": hashlib.sha256(table.tobytes()).hexdigest(),
    }
    for split in ("train", "val"):
        table.tofile(folder / f"{split}.table")
        os.link(base / "val.bin", folder / f"{split}.bin")
    packed.finish(folder, manifest | {"splits": {"train": facts, "val": facts}})
    return folder


def anonymous_mib() -> float:
    """Return this process's own memory: not the page cache that a memory map shows."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return float("nan")


def read_grown(folder: str, count: int, rounds: int) -> dict[str, float]:
    """Return start-up, throughput and memory with a grown data set."""
    args = settings(
        "PREPARED", Path(folder), "--aa", "none", "--color-jitter", "0", "--reprob", "0"
    )
    before, started = anonymous_mib(), time.perf_counter()
    here = Processes(0, 0, 1, torch.device("cpu"), "single")
    loaders = datasets.build_loaders(args, INPUTS, here)
    loaders.set_epoch(0)
    next(iter(loaders.train_sampler))
    start_up = time.perf_counter() - started
    data = loaders.data[0]
    data.transform.transforms.pop()  # up to the crop
    order = np.random.default_rng(1).integers(0, len(data), (rounds + 2) * count).tolist()
    seconds, memory = [], []
    for number in range(rounds + 2):
        started = time.process_time()
        for index in order[number * count : (number + 1) * count]:
            samplers.seed_cpu(samplers.derive_seed(0, "view", number, index))
            data[index]
        seconds.append((time.process_time() - started) / count)
        memory.append(anonymous_mib())
    return {
        "start_up_s": start_up,
        "images_per_second": 1 / statistics.median(seconds[2:]),
        "own_mib": memory[-1] - before,
        "growth_mib": memory[-1] - memory[1],
    }


def softness(folder: Path, count: int) -> dict[str, list[float]]:
    """Return how much less sharp crops of shrunk copies are, by copy and by scale of the crop.

    The mean difference in steps of 255 between a crop of the image and the same crop of what a
    prepared data set keeps of it, both resized to the network's input. Copies and input are scaled
    to the size of the images, as if their shorter side were `ORIGINAL` pixels.
    """
    places = sorted((folder / "val").glob("*/*"))
    chosen = np.random.default_rng(0).permutation(len(places))[:count]
    images = [Image.open(places[number]).convert("RGB") for number in chosen]
    bicubic, bilinear = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR

    def over_scales(copies: Sequence[Image.Image], mode: Image.Resampling) -> list[float]:
        return [
            statistics.mean(
                difference(one, copy, scale, mode, seed)
                for seed, (one, copy) in enumerate(zip(images, copies))
            )
            for scale in SCALES
        ]

    found = {"for comparison: bilinear instead of bicubic": over_scales(images, bilinear)}
    for side, kind in COPIES:
        copies = []
        for image in images:
            short = round(min(image.size) * side / ORIGINAL)
            data, height, width = packed.encode(image, kind, short, QUALITY)
            copies.append(
                Image.frombytes("RGB", (width, height), data)
                if kind == packed.RAW
                else image_ops.as_image(image_ops.decode(data))
            )
        found[f"copy of {side} px, {kind}"] = over_scales(copies, bicubic)
    return found


def difference(
    image: Image.Image, copy: Image.Image, scale: float, mode: Image.Resampling, seed: int
) -> float:
    """Return the mean difference in steps of 255 between a crop of an image and of its copy.

    scale: the crop's share of the image's area; mode: how the copy's crop is resized; seed: of
    the crop's place and shape.
    """
    side = round(min(image.size) * SIDE / ORIGINAL)
    random.seed(seed)
    shape = torch.empty(3, image.height, image.width)
    top, left, height, width = RandomResizedCropAndInterpolation.get_params(
        shape, (scale, scale), (3 / 4, 4 / 3)
    )
    box = np.array([left, top, left + width, top + height], float)
    factor = np.array(copy.size * 2) / (image.size * 2)
    one = image.resize((side, side), Image.Resampling.BICUBIC, box=tuple(box))
    other = copy.resize((side, side), mode, box=tuple(box * factor))
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


def grown(work: Path, images: int, rounds: int) -> dict[int, dict[str, float]]:
    """Return what `read_grown` finds, each in a new process, by number of entries."""
    found = {}
    for entries in GROWTH:
        target = grow(work / packed.RAW, work, entries)
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--grown",
            str(target),
            "--images",
            str(images),
            "--rounds",
            str(rounds),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[entries] = json.loads(done.stdout)
        shutil.rmtree(target)
    return found


def run(data: str, side: int, images: int, rounds: int) -> dict[str, Any]:
    """Measure everything on one thread; return it with the lines of the tables.

    data: folder with val/<class>/*.jpg, or empty for made-up images; side: to which they are
    enlarged before, or 0.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        work = Path(name)
        given = Path(data) if data else make_up(work / "made", images)
        folder = enlarge(given, side, work / "enlarged") if side else given
        seconds = measure(rows(folder, work, images), images, rounds)
        found: dict[str, Any] = {"rows": summary(seconds), "targets": TARGETS}
        found["growth"] = grown(work, images, rounds)
        found["softness"] = softness(given, images) if data else {}
        sizes = [path.stat().st_size for path in (folder / "val").glob("*/*")]
    torch.set_num_threads(threads)
    found["facts"] = {
        "images": len(sizes),
        "mean_kB": round(statistics.mean(sizes) / 1e3, 1),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "Pillow": PIL.__version__,
        "simplejpeg": getattr(image_ops.simplejpeg, "__version__", "none"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }
    return found | {"lines": table(found)}


def table(found: dict[str, Any]) -> list[str]:
    """Return the tables in Markdown."""
    lines = [
        ", ".join(f"{key} {value}" for key, value in found["facts"].items()) + ".",
        "",
        "| one core | x timm's whole recipe | asked | x timm up to the crop | images/s |",
        "|---|---|---|---|---|",
    ]
    for name, row in found["rows"].items():
        asked = f"{TARGETS[name]:g}" if name in TARGETS else ""
        lines.append(
            f"| {name} | {row['ratio']:.2f} ({row['low']:.2f}-{row['high']:.2f}) | "
            f"{asked} | {row['ratio_to_crop']:.2f} | {row['images_per_second']:.0f} |"
        )
    lines += [
        "",
        "| prepared raw, up to the crop | x the first | images/s | start-up, s | "
        "own memory, MiB | its growth, MiB |",
        "|---|---|---|---|---|---|",
    ]
    first = found["growth"][GROWTH[0]]["images_per_second"]
    for entries, row in found["growth"].items():
        rate = row["images_per_second"]
        lines.append(
            f"| {entries:,} entries | {rate / first:.2f} | {rate:.0f} | "
            f"{row['start_up_s']:.2f} | {row['own_mib']:.1f} | {row['growth_mib']:.1f} |"
        )
    if not found["softness"]:
        return [*lines, "", "Not measured: how soft shrunk copies are, which takes real images."]
    lines += [
        "",
        f"| mean difference of a crop of so much of the image, of {ORIGINAL} px | "
        + " | ".join(f"{100 * scale:g} %" for scale in SCALES)
        + " |",
        "|" + "---|" * (len(SCALES) + 1),
    ]
    for name, values in found["softness"].items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.grown:
        torch.set_num_threads(1)
        print(json.dumps(read_grown(args.grown, 10 * args.images, args.rounds)))
        return 0
    if args.rounds < 2 or args.images < 1:
        raise SystemExit("--rounds must be at least 2, --images 1")
    found = run(args.data, args.enlarge, args.images, args.rounds)
    print("\n".join(found["lines"]))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
