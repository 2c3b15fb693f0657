"""Settings for small training sets: what --recipe auto chooses, and why.

The numbers were found on splits of training images (results/auto_search.md). They depend on how
many images there are, on their size, on the initial weights and on --minutes.
"""

import os
from argparse import Namespace
from dataclasses import dataclass
from statistics import median
from typing import Any

import timm
import torch

from base import flag_table
from base.errors import UserError
from data.image_ops import UNREADABLE, size_of
from data.image_source import Shards, Source, spread
from data.sources import Part, open_source
from models import hub

MOST_IMAGES = 100_000  # from here on DeiT's defaults apply
SAMPLES = 16  # images whose sizes are read
GROUPS = ("optimizer, schedule and EMA", "augmentation and mixing", "regularization")
TRAINING_FLAGS = frozenset(flag.dest for name in GROUPS for flag in flag_table.GROUPS[name])
PUBLISHED = "deit_tiny_distilled_patch16_224"


@dataclass(frozen=True)
class TrainingSet:
    """How many images there are, and the median of their shorter sides in pixels."""

    images: int
    side: int


def build_auto_recipe(
    args: Namespace, explicit: frozenset[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return flags by destination name, and what to print. No flags: DeiT's defaults apply.

    explicit: flags of the command line. Data that cannot be read get no flags: loading them later
    raises the error.
    """
    data = None if args.eval else build_training_set(args)
    if data is None:
        return {}, []
    if data.images >= MOST_IMAGES:
        return {}, [f"recipe: DeiT's defaults, for {MOST_IMAGES:,} images or more"]
    if given := sorted(explicit & TRAINING_FLAGS):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        return {}, [f"recipe: DeiT's defaults beside {names}"]
    flags: dict[str, Any] = {}
    lines = []
    if not explicit & {"model", "finetune", "pretrained"}:
        flags, line = choose_student(data, args.minutes, has_gpu=torch.cuda.is_available())
        lines.append(line)
    starts_trained = bool(args.finetune or args.pretrained or flags.get("pretrained"))
    has_patches = is_transformer(flags.get("model", args.model))
    flags |= choose_training(data, starts_trained=starts_trained, has_patches=has_patches)
    flags = {name: value for name, value in flags.items() if name not in explicit}
    return flags, [describe(data, flags), *lines]


def build_training_set(args: Namespace) -> TrainingSet | None:
    """Return the size of the training set, with `MOST_IMAGES` for more; None if it is unknown."""
    if str(args.data_set).startswith(("INAT", "tfds/")):  # opening them takes long
        return None
    train = os.path.join(args.data_path, "train") if args.data_path else ""
    if has_many_files(train if os.path.isdir(train) else args.data_path):
        return TrainingSet(MOST_IMAGES, 0)
    part = Part(is_train=True, val_fraction=args.val_fraction, val_labels=args.val_labels)
    try:
        source = open_source(args.data_set or "IMNET", args.data_path, part)
        return TrainingSet(len(source), _median_side(source))
    except (UserError, TypeError):  # shards may have no length
        return None


def has_many_files(folder: str) -> bool:
    """Return whether a folder and its subfolders hold at least `MOST_IMAGES` files."""
    count = 0
    for _, _, files in os.walk(folder):
        count += len(files)
        if count >= MOST_IMAGES:
            return True
    return False


def _median_side(source: Source) -> int:
    """Return the median shorter side of some images; 224 if none can be read."""
    sides = []
    for index in spread(0 if isinstance(source, Shards) else len(source), SAMPLES):
        try:
            sides.append(min(size_of(source.load(index)[0])))
        except UNREADABLE:
            continue
    return int(median(sides)) if sides else 224


def is_transformer(name: str) -> bool:
    """Return whether timm's configuration of a model says that it cuts images into patches."""
    config = timm.models.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    return "patch_embed" in str(config.first_conv if config is not None else "patch_embed")


def choose_student(
    data: TrainingSet, minutes: float | None, *, has_gpu: bool
) -> tuple[dict[str, Any], str]:
    """Return the student, its input size and whether it starts from published weights; and why."""
    reason = hub.unreachable_reason()
    if not reason:
        is_quick = not has_gpu and minutes is not None and minutes < 60
        flags = {"model": PUBLISHED, "pretrained": True, "input_size": [112 if is_quick else 224]}
        return flags, f"student: {PUBLISHED}, published weights, {flags['input_size'][0]} pixels"
    if data.side <= 48:
        flags = {"model": "deit_pico_distilled_patch4_32", "input_size": [32]}
    else:
        flags = {"model": "deit_pico_distilled_patch8_32", "input_size": [64]}
    line = f"student: {flags['model']} from scratch, {flags['input_size'][0]} pixels, because "
    return flags, f"{line}published weights cannot be loaded ({reason})"


def choose_training(
    data: TrainingSet, *, starts_trained: bool, has_patches: bool
) -> dict[str, Any]:
    """Return batch size, learning rate, augmentation and regularization."""
    lr = 2e-4 if starts_trained and has_patches else 1e-3
    return {
        "batch_size": min(32, max(1, data.images // 4)),
        "lr": lr,
        "unscale_lr": True,
        "warmup_epochs": 2,
        "model_ema": False,
        "repeated_aug": False,
        "aa": "none",
        "color_jitter": 0.0,
        "reprob": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "drop_path": 0.0,
    }


def describe(data: TrainingSet, flags: dict[str, Any]) -> str:
    """Return the line on what applies and why."""
    return (
        f"recipe auto: {data.images:,} images: gentle augmentation, lr {flags['lr']:g}, "
        f"{flags['warmup_epochs']} warm-up epochs (--recipe none: DeiT's defaults)"
    )
