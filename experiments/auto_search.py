"""Compare settings for small data sets on splits of CIFAR-10's training images.

    python experiments/auto_search.py cifar10_jpeg --data six --rows base b32
    python experiments/auto_search.py cifar10_jpeg --write results/auto_search.md

`cifar10_jpeg` has train/CLASS/*; the images under test/ are not read. Each data set has its own
training and validation images. All runs train on the same number of images; one CPU thread each.
Complete runs in --runs are read, not repeated; `--jobs` and the other flags are compare.py's.
"""

import argparse
import os
import sys
from pathlib import Path

import compare

# name: classes, first training image, training images and validation images per class
SPLITS = {
    "six": ("airplane automobile bird cat deer dog", 100, 80, 200),
    "four": ("frog horse ship truck", 0, 90, 250),
    "ten": ("airplane automobile bird cat deer dog frog horse ship truck", 180, 40, 150),
}
COMMON = (
    "--unscale-lr --no-repeated-aug --color-jitter 0 --num-workers 0 --val-interval 1000 "
    "--log-interval 1000 --model deit_pico_distilled_patch8_32 --epochs 180"
)
BASE = {
    "batch-size": 64,
    "lr": 1e-3,
    "warmup-epochs": 2,
    "aa": "none",
    "reprob": 0,
    "mixup": 0,
    "cutmix": 0,
    "drop-path": 0,
}
ROWS: dict[str, dict[str, float | str]] = {
    "base": {"model-ema-decay": 0.998},
    "b32": {"batch-size": 32},
    "b16": {"batch-size": 16},
    "lr2": {"lr": 2e-3},
    "b32 lr2": {"batch-size": 32, "lr": 2e-3},
    "b32 lr0.5": {"batch-size": 32, "lr": 5e-4},
    "b32 aa": {"batch-size": 32, "aa": "rand-m5-n2-mstd0.5-inc1"},
    "b32 mix": {"batch-size": 32, "mixup": 0.2, "cutmix": 0.5, "mixup-prob": 0.5},
    "b32 mix1": {"batch-size": 32, "mixup": 0.8, "cutmix": 1.0},
    "b32 aa mix1": {
        "batch-size": 32,
        "aa": "rand-m5-n2-mstd0.5-inc1",
        "mixup": 0.8,
        "cutmix": 1.0,
    },
    "b32 erase": {"batch-size": 32, "reprob": 0.25},
    "b32 decay": {"batch-size": 32, "weight-decay": 0.3},
    "b32 drop path": {"batch-size": 32, "drop-path": 0.1},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("source", type=Path)
    add("--data", nargs="+", choices=SPLITS, default=list(SPLITS))
    add("--rows", nargs="+", default=list(ROWS))
    add("--seeds", type=int, nargs="+", default=[0])
    add("--runs", type=Path, default=compare.ROOT / "runs" / "auto_search")
    add("--write", type=Path, help="Markdown file for the tables")
    args = parser.parse_args()
    lines = []
    for data in args.data:
        split(args.source / "train", args.runs / data / "images", *SPLITS[data])
        found, flags = {}, {}
        for row in args.rows:
            values = {"no-model-ema": ""} if row != "base" else {}
            values |= BASE | ROWS[row]
            flags[row] = " ".join(f"--{name} {value}".strip() for name, value in values.items())
            words = f"{COMMON} --data-path {{runs}}/images {flags[row]}".split()
            own = argparse.Namespace(runs=args.runs / data)
            found[row] = [compare.one_run(own, row, seed, words) for seed in args.seeds]
        lines += [f"## {data}: {SPLITS[data]}", "", *compare.table(flags, found), ""]
    text = "\n".join([*lines, *compare.about(args), ""])
    print(text)
    if args.write:
        args.write.write_text(text)
    return 0


def split(source: Path, folder: Path, classes: str, first: int, train: int, val: int) -> None:
    """Link images of `source` into train/ and val/ of `folder`, unless it is there."""
    for name in classes.split() if not folder.exists() else ():
        images = sorted((source / name).iterdir())[first : first + train + val]
        for part, paths in (("train", images[:train]), ("val", images[train:])):
            (folder / part / name).mkdir(parents=True)
            for path in paths:
                os.symlink(path.resolve(), folder / part / name / path.name)


if __name__ == "__main__":
    sys.exit(main())
