"""The classes of the weights that a run starts from, and the held-out share of an evaluated run."""

import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import models
from base import safe_load
from data.folder_parts import find_validation
from data.labels import ModelClasses
from models.class_names import classes_of_file, classes_of_published
from training.checkpointer import is_auto, resolve


def build_trained_classes(args: Namespace) -> ModelClasses | None:
    """Return the outputs of a head that the run keeps, or None if it gets a new head.

    --eval keeps the head of --resume, --finetune or --pretrained; a resumed run that of its
    checkpoint. Every other run gets a head for the classes of its data.
    """
    # --resume auto continues in its own folder, with the same data
    resumed = "" if is_auto(args.resume) else args.resume
    if path := _build_evaluated_file(args) if args.eval else resumed:
        return classes_of_file(path, args.model)
    if args.eval and args.pretrained:
        return classes_of_published(args.model, models.data_config(args.model)["num_classes"])
    return None


def _build_evaluated_file(args: Namespace) -> str:
    return resolve(args.resume, Path(args.output_dir)) or args.finetune


def build_val_fraction(args: Namespace) -> float | None:
    """Return the share of images that the run to evaluate held out, or None for the default."""
    if not args.eval or args.val_fraction is not None or args.data_set != "IMNET":
        return None
    path = _build_evaluated_file(args)
    if not path or not os.path.isdir(args.data_path) or find_validation(args.data_path):
        return None
    settings = safe_load.read_weights_file(path).get("args")
    share = settings.get("val_fraction") if isinstance(settings, Mapping) else None
    return float(share) if isinstance(share, int | float) and 0 < share <= 1 else None
