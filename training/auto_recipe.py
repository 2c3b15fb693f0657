"""Settings for small training sets: what --recipe auto chooses, and why.

The numbers were found on splits of training images (results/small_data.md). They depend on how
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
from models.deit import FILES, VITS
from training.recipe import NONE

MOST_IMAGES = 100_000  # from here on DeiT's defaults apply
MIX_EPOCHS = 60  # with fewer epochs a new network learns too little from mixed images
SAMPLES = 16  # images whose sizes are read
SMALL_SIDE, SMALL_INPUT = 64, 112  # pixels: input of a trained CNN for images of at most this side
SMALL_BATCH_IMAGES = 5_000  # with fewer images, a smaller batch gives more updates
PUBLISHED = "deit_tiny_distilled_patch16_224"
GENTLE = {  # crops and mirrors alone
    "unscale_lr": True,
    "model_ema": False,
    "repeated_aug": False,
    "aa": "none",
    "color_jitter": 0.0,
    "reprob": 0.0,
    "drop_path": 0.0,
}
GROUPS = ("optimizer, schedule and EMA", "augmentation and mixing", "regularization")
TRAINING_FLAGS = frozenset(flag.dest for name in GROUPS for flag in flag_table.GROUPS[name])


@dataclass(frozen=True)
class TrainingSet:
    """How many images there are, and the median of their shorter sides in pixels."""

    images: int
    side: int


def build_auto_recipe(
    args: Namespace, explicit: frozenset[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return flags by destination name, and what to print.

    Where DeiT's defaults apply, the only flag is --recipe none. explicit: flags of the command
    line. Data that cannot be read get DeiT's defaults: loading them later raises the error.
    """
    data = None if args.eval else build_training_set(args)
    if data is None:
        return {"recipe": NONE}, []
    if data.images >= MOST_IMAGES:
        return {"recipe": NONE}, [f"recipe: DeiT's defaults, for {MOST_IMAGES:,} images or more"]
    if given := sorted(explicit & TRAINING_FLAGS):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        return {"recipe": NONE}, [f"recipe: DeiT's defaults beside {names}"]
    student: dict[str, Any] = {}
    lines = []
    if not explicit & {"model", "finetune", "pretrained"}:
        student, line = choose_student(data, args.minutes)
        lines.append(line)
    settings = Namespace(**vars(args) | student)
    batch_size = 32 if data.images < SMALL_BATCH_IMAGES else 64
    if data.images < 1000 and build_starts_trained(settings):
        batch_size = 16  # few epochs fit into a short time
    if smaller := build_input_flags(settings, data):
        lines.append(f"input: {SMALL_INPUT} pixels, because the images have {data.side}")
    flags = GENTLE | student | smaller | {"batch_size": batch_size}
    flags |= build_schedule_flags(settings, args.epochs)
    first = f"recipe auto: {data.images:,} images: "
    first += "augmentation and lr by --minutes" if args.minutes else describe(flags)
    return flags, [f"{first} (--recipe none: DeiT's defaults)", *lines]


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


def choose_student(data: TrainingSet, minutes: float | None) -> tuple[dict[str, Any], str]:
    """Return the student, its input size and whether it starts from published weights; and why."""
    has_gpu, file = torch.cuda.is_available(), VITS[PUBLISHED].file
    is_cached = os.path.exists(os.path.join(torch.hub.get_dir(), "checkpoints", file))
    reason = "" if is_cached else hub.unreachable_reason(FILES + file)
    if not reason:
        is_short = not has_gpu and minutes is not None and minutes < 60
        flags = {"model": PUBLISHED, "input_size": [112 if is_short else 224], "pretrained": True}
        return flags, f"student: {PUBLISHED}, {flags['input_size'][0]} pixels, published weights"
    is_large = has_gpu and data.images >= SMALL_BATCH_IMAGES
    if data.side <= 48:
        model, pixels = f"deit_{'tiny' if is_large else 'pico'}_distilled_patch4_32", 32
    else:
        model, pixels = (PUBLISHED, 224) if is_large else ("deit_pico_distilled_patch8_32", 64)
    line = f"student: {model}, {pixels} pixels, from scratch, because published weights "
    return {"model": model, "input_size": [pixels]}, f"{line}cannot be loaded ({reason})"


def build_input_flags(args: Namespace, data: TrainingSet) -> dict[str, list[int]]:
    """Return a smaller --input-size for a trained CNN on small images, or {}.

    Enlarging them further costs time and does not raise the accuracy. Transformers have weights
    that depend on the size.
    """
    is_small = data.side <= SMALL_SIDE and not is_transformer(args.model)
    if args.input_size is not None or not (is_small and build_starts_trained(args)):
        return {}
    config = timm.models.get_pretrained_cfg(args.model)
    takes_any = (
        config is not None and not config.fixed_input_size and config.input_size[1] > SMALL_INPUT
    )
    return {"input_size": [SMALL_INPUT]} if takes_any else {}


def build_starts_trained(args: Namespace) -> bool:
    """Return whether the student starts from trained weights."""
    return bool(args.finetune or args.pretrained)


def build_schedule_flags(args: Namespace, epochs: int) -> dict[str, Any]:
    """Return what depends on how often the run sees each image, and on the initial weights."""
    starts_trained = build_starts_trained(args)
    mixes = epochs >= MIX_EPOCHS and not starts_trained
    return {
        "lr": choose_lr(args.model, starts_trained=starts_trained),
        "warmup_epochs": min(2, epochs // 2),
        "mixup": 0.8 if mixes else 0.0,
        "cutmix": 1.0 if mixes else 0.0,
    }


def choose_lr(model: str, *, starts_trained: bool) -> float:
    """Return the learning rate: of a new ViT, it falls with the width, from 2e-3 at width 64."""
    if not is_transformer(model):
        return 1e-3
    if starts_trained:
        return 2e-4
    vit = VITS.get(model.partition(".")[0])
    return max(2e-4, round(2e-3 * 64 / vit.width, 5)) if vit is not None else 5e-4


def describe(flags: dict[str, Any]) -> str:
    """Return the flags of `build_schedule_flags` in words."""
    mixing = " and mixing" if flags["mixup"] else ""
    warmup = flags["warmup_epochs"]
    return (
        f"gentle augmentation{mixing}, lr {flags['lr']:g}, "
        f"{warmup} warm-up epoch{'s' * (warmup != 1)}"
    )
