"""Compare settings for small data sets on splits of training images.

    python experiments/auto_search.py cifar10_jpeg/train --data six --rows base mix --seeds 0 1
    python experiments/auto_search.py cifar10_jpeg/train --write results/small_data.md

The folder has CLASS/IMAGE. Each data set takes training and validation images of its own from it.
All rows of a table train on the same number of images, in one thread. Images are kept in memory,
padded, cropped and mirrored in batches; the training loop is the engine's. Results are added to
--results, and not computed again.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compare
import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(compare.ROOT))

import engine
import models
from losses import DistillationLoss
from training.optim import Schedule
from training.step_config import StepConfig

# name: classes, first training image, training images and validation images per class
SPLITS = {
    "six": ("airplane automobile bird cat deer dog", 100, 80, 200),
    "four": ("frog horse ship truck", 0, 90, 250),
    "ten": ("airplane automobile bird cat deer dog frog horse ship truck", 180, 40, 150),
    "large": ("airplane automobile bird cat deer dog frog horse ship truck", 0, 400, 100),
}
BASE = {
    "model": "deit_pico_distilled_patch8_32",
    "images": 86_400,  # in the whole run
    "batch": 32,
    "lr": 1e-3,
    "decay": 0.05,
    "mix": (0.0, 0.0, 1.0),  # mixup alpha, CutMix alpha, share of mixed batches
    "erase": 0.0,
    "drop_path": 0.0,
    "smoothing": 0.1,
    "pad": 4,
}
ROWS: dict[str, dict[str, Any]] = {
    "base": {},
    "lr 2e-3": {"lr": 2e-3},
    "mix": {"mix": (0.8, 1.0, 1.0)},
    "cutmix": {"mix": (0.0, 1.0, 1.0)},
    "mix, lr 2e-3": {"mix": (0.8, 1.0, 1.0), "lr": 2e-3},
    "mix, lr 3e-3": {"mix": (0.8, 1.0, 1.0), "lr": 3e-3},
    "mix, lr 4e-3": {"mix": (0.8, 1.0, 1.0), "lr": 4e-3},
    "mix half, lr 2e-3": {"mix": (0.8, 1.0, 0.5), "lr": 2e-3},
    "cutmix, lr 2e-3": {"mix": (0.0, 1.0, 1.0), "lr": 2e-3},
    "mix, decay 0.3": {"mix": (0.8, 1.0, 1.0), "decay": 0.3},
    "batch 64": {"batch": 64},
    "batch 16": {"batch": 16},
    "batch 16, lr 2e-3": {"batch": 16, "lr": 2e-3},
    "batch 16, mix": {"batch": 16, "mix": (0.8, 1.0, 1.0)},
    "batch 16, mix half": {"batch": 16, "mix": (0.8, 1.0, 0.5)},
    "batch 16, mix, lr 2e-3": {"batch": 16, "mix": (0.8, 1.0, 1.0), "lr": 2e-3},
    "erase": {"erase": 0.25},
    "drop path": {"drop_path": 0.1},
}


class Batches:
    """Random crops of padded images (N, 3, H, W), mirrored or not, in batches of one epoch."""

    def __init__(self, images: Tensor, labels: Tensor, row: dict[str, Any], seed: int) -> None:
        self.padded, self.labels, self.row = F.pad(images, [row["pad"]] * 4), labels, row
        self.generator = torch.Generator().manual_seed(seed)
        self.erase = RandomErasing(row["erase"], mode="pixel", device="cpu")

    def __len__(self) -> int:
        return len(self.labels) // self.row["batch"]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        size, pad = self.padded.shape[-1] - 2 * self.row["pad"], self.row["pad"]
        order = torch.randperm(len(self.labels), generator=self.generator)
        for rows in order.split(self.row["batch"])[: len(self)]:
            offsets = torch.randint(2 * pad + 1, (len(rows), 2), generator=self.generator).tolist()
            crops = [
                self.padded[index, :, y : y + size, x : x + size]
                for index, (y, x) in zip(rows.tolist(), offsets)
            ]
            mirror = torch.rand(len(rows), 1, 1, 1, generator=self.generator) < 0.5
            images = torch.stack(crops)
            images = torch.where(mirror, images.flip(-1), images)
            yield self.erase(images), self.labels[rows]


def train(data: str, source: Path, row: dict[str, Any], seed: int) -> dict[str, float]:
    """Train one model; return its accuracy (percent) at the end, the best, and the loss."""
    torch.manual_seed(seed)
    (images, labels), (val_images, val_labels) = load(source, *SPLITS[data])
    classes, batches = len(SPLITS[data][0].split()), Batches(images, labels, row, seed)
    network = models.create_model(
        row["model"], num_classes=classes, drop_path_rate=row["drop_path"]
    )
    models.select_kernels(network, "cpu", None)
    student = models.Student(network)
    groups = [
        {"params": [p for p in network.parameters() if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in network.parameters() if p.ndim >= 2], "weight_decay": row["decay"]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=row["lr"], fused=True)
    epochs = max(1, row["images"] // (len(batches) * row["batch"]))
    total, warmup = epochs * len(batches), 2 * len(batches)
    mixup, cutmix, share = row["mix"]
    mix = Mixup(mixup, cutmix, prob=share, label_smoothing=row["smoothing"], num_classes=classes)
    base = torch.nn.CrossEntropyLoss(label_smoothing=0.0 if mixup or cutmix else row["smoothing"])
    schedule = Cosine(optimizer, row["lr"], warmup, total)
    config = StepConfig(
        schedule=schedule, mixup_fn=mix if mixup or cutmix else None, seed=seed, log_interval=10**9
    )
    criterion = DistillationLoss(base, None, "none", 0.5, 1.0)
    val = [*zip(val_images.split(200), val_labels.split(200))]
    found = []
    for epoch in range(epochs):
        averages = engine.train_one_epoch(
            student, criterion, batches, optimizer, torch.device("cpu"), epoch, config=config
        )
        if epoch == epochs - 1 or (epoch > epochs // 2 and epoch % (epochs // 10 or 1) == 0):
            found.append(engine.evaluate(val, network, torch.device("cpu"))["acc1"])
    return {"acc1": found[-1], "best": max(found), "loss": averages["loss"]}


class Cosine(Schedule):
    """Linear warm-up, then a cosine to 1e-5, as main.py has it."""

    def __init__(self, optimizer: Any, lr: float, warmup: int, total: int) -> None:
        self.groups, self.lr, self.warmup, self.total = optimizer.param_groups, lr, warmup, total

    def step(self, global_step: int, epoch: int) -> None:
        low = 1e-5 + (self.lr - 1e-5) * (1 + math.cos(math.pi * global_step / self.total)) / 2
        rising = 1e-6 + (self.lr - 1e-6) * global_step / self.warmup
        for group in self.groups:
            group["lr"] = rising if global_step < self.warmup else low


def load(source: Path, classes: str, first: int, train: int, val: int) -> list[tuple]:
    """Return (images (N, 3, H, W), labels (N,)) of both parts, normalised to [-1, 1]."""
    parts: list[list] = [[], []]
    for label, name in enumerate(classes.split()):
        paths = sorted((source / name).iterdir())[first : first + train + val]
        for i, path in enumerate(paths):
            pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
            parts[i >= train].append((pixels.permute(2, 0, 1) / 127.5 - 1, label))
    return [
        (torch.stack([image for image, _ in part]), torch.tensor([label for _, label in part]))
        for part in parts
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("source", type=Path)
    add("--data", nargs="+", choices=SPLITS, default=["six", "four", "ten"])
    add("--rows", nargs="+", default=list(ROWS))
    add("--seeds", type=int, nargs="+", default=[0])
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes of every row")
    add("--results", type=Path, default=compare.ROOT / "runs" / "auto_search.jsonl")
    add("--write", type=Path, help="Markdown file for the tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    changes = {k: json.loads(v) for k, v in (word.split("=") for word in args.set)}
    lines = []
    for data in args.data:
        lines += [f"## {data}: {SPLITS[data]}", "", "| row | last, % | best, % | loss |"]
        lines += ["|---|---|---|---|"]
        for name in args.rows:
            row = BASE | ROWS[name] | changes
            done = [result(args, data, row, seed) for seed in args.seeds]
            cells = [
                f"{statistics.mean(run[key] for run in done):.2f}"
                for key in ("acc1", "best", "loss")
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
            print(lines[-1], data, args.seeds, changes, file=sys.stderr, flush=True)
    about = "Top-1 on the validation images of the split, seeds " + " ".join(map(str, args.seeds))
    text = "\n".join([*lines, f"{about}, changes {changes or 'none'}.", ""])
    if args.write:
        args.write.write_text(text)
    print(text)
    return 0


def result(args: argparse.Namespace, data: str, row: dict, seed: int) -> dict[str, float]:
    """Return the result of a run, from --results if it is there."""
    key = json.dumps([data, seed, row], sort_keys=True)
    known = args.results.read_text().splitlines() if args.results.exists() else []
    for line in map(json.loads, known):
        if line["key"] == key:
            return line
    found = train(data, args.source, row, seed) | {"key": key}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("a") as file:
        file.write(json.dumps(found) + "\n")
    return found


if __name__ == "__main__":
    sys.exit(main())
