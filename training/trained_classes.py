"""The classes of the weights that a run starts from."""

from argparse import Namespace
from pathlib import Path

import models
from data.labels import ModelClasses
from models.class_names import classes_of_file, classes_of_published
from training.checkpointer import is_auto, resolve


def build_trained_classes(args: Namespace) -> ModelClasses | None:
    """Return the outputs of a head that the run keeps, or None if it gets a new head.

    --eval keeps the head of --resume, --finetune or --pretrained; a resumed run that of its
    checkpoint. Every other run gets a head for the classes of its data.
    """
    if args.eval:
        path = resolve(args.resume, Path(args.output_dir)) or args.finetune
    else:  # --resume auto continues in its own folder, with the same data
        path = "" if is_auto(args.resume) else args.resume
    if path:
        return classes_of_file(path, args.model)
    if args.eval and args.pretrained:
        return classes_of_published(args.model, models.data_config(args.model)["num_classes"])
    return None
