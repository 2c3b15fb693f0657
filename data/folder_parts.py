"""The training and the validation part of a folder of images.

DIR/train/<class>/<image>  and  DIR/val/<class>/<image>   (or valid, validation, test)
DIR/train/<class>/<image>, or DIR/<class>/<image>         a share of each class is held out
DIR/train/<class>/<image>  and  DIR/val/<image>           with --val-labels
"""

import hashlib
import os
from collections.abc import Sequence

import numpy as np

from base.errors import UserError
from base.text import printable
from data.folders import list_images, some
from data.image_source import Files

TRAIN = "train"
VALIDATION = ("val", "valid", "validation", "test")
VAL_FRACTION = 0.2
SPLIT_SEED = b"validation split 1/"  # the same split for every run of the same images


def open_part(
    root: str, *, is_train: bool, val_fraction: float | None = None, val_labels: str = ""
) -> Files:
    """Return the training or the validation images of `root`.

    val_fraction: the share of each class that is held out if there is no validation folder; None:
    `VAL_FRACTION`; 0: none. val_labels: the file with the classes of a flat validation folder.
    Raises UserError for folders that are missing or empty, or that may have two meanings.
    """
    check_folder(root)
    val = find_validation(root)
    train = _train_folder(root) if is_train or not val else ""
    if val_labels and not val:
        raise UserError(
            f"--val-labels {val_labels}: {root} has no validation folder; make val/ with its images"
        )
    if val:
        if is_train:
            return open_folder(train)
        return _open_labelled(val, val_labels) if val_labels else _open_class_folders(val)
    fraction = VAL_FRACTION if val_fraction is None else val_fraction
    return _open_share(train, fraction, is_train=is_train)


def open_folder(folder: str, *, natural_order: bool = False) -> Files:
    """Return the images of `folder`, one subfolder per class; see `folders.list_images`."""
    found = list_images(folder, natural_order=natural_order)
    source = Files(folder, found.paths, found.labels, found.classes)
    source.skipped = found.skipped.describe()
    return source


def check_folder(root: str) -> None:
    if not os.path.isdir(root):
        what = "not a folder" if os.path.exists(root) else "not there"
        raise UserError(f"--data-path {root or '(empty)'}: {what}; give the data's folder")


def find_validation(root: str) -> str:
    """Return the validation folder in `root`, or "". Raises UserError if it is not clear."""
    found = [name for name in VALIDATION if os.path.isdir(os.path.join(root, name))]
    if len(found) > 1 and found[0] != VALIDATION[0]:
        raise UserError(
            f"--data-path {root}: has {' and '.join(f'{name}/' for name in found)}; rename the one "
            "to evaluate on to val/"
        )
    return os.path.join(root, found[0]) if found else ""


def _train_folder(root: str) -> str:
    """Return `root`/train, or `root` itself if its subfolders are the classes."""
    train = os.path.join(root, TRAIN)
    if os.path.isdir(train):
        return train
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not folders or any(name in VALIDATION for name in folders):
        names = [f"{name}/" for name in folders]
        raise UserError(
            f"{train}: not there; --data-path needs train/ and val/, or one folder per class; "
            f"{root} has {some(names) or 'no folders'}"
        )
    return root


def held_out(paths: Sequence[str], labels: Sequence[int], fraction: float) -> np.ndarray:
    """Return a mask of the images that are held out for validation, (number of images,).

    Of each class the given share, rounded, but at least one image stays on each side; a class of
    one image trains. The choice depends on the names of the images alone: a larger share contains
    a smaller one. fraction: 1 holds out all images, 0 none.
    """
    ranks = [hashlib.sha256(SPLIT_SEED + os.fsencode(path)).digest() for path in paths]
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(int(label), []).append(index)
    mask = np.zeros(len(paths), dtype=bool)
    for indices in members.values():
        count = round(fraction * len(indices))
        if 0 < fraction < 1:
            count = min(max(count, 1), len(indices) - 1)
        mask[sorted(indices, key=ranks.__getitem__)[:count]] = True
    return mask


def _open_share(folder: str, fraction: float, *, is_train: bool) -> Files:
    """Return the images of a folder that train, or those that are held out."""
    found = list_images(folder)
    mask = held_out(found.paths, found.labels, fraction)
    chosen = np.flatnonzero(mask != is_train)
    source = Files(
        folder,
        [found.paths[index] for index in chosen],
        [found.labels[index] for index in chosen],
        found.classes,
    )
    source.skipped = found.skipped.describe()
    if is_train and fraction:
        source.what += f" ({int(mask.sum())} of {len(mask)} are held out)"
    elif not is_train:
        source.held_out = fraction
        source.what += f" ({100 * fraction:g} % of each class, held out with a fixed seed)"
    return source


def _open_class_folders(folder: str) -> Files:
    """Return the images of a validation folder. Raises UserError if they have no classes."""
    with os.scandir(folder) as entries:
        is_flat = not any(entry.is_dir() for entry in entries)
    if is_flat:
        raise UserError(
            f"{printable(folder)}: no class folders in it; make them, or give the class of each "
            "image with --val-labels FILE (CSV: name,class)"
        )
    return open_folder(folder)


def _open_labelled(folder: str, file: str) -> Files:
    from data.val_labels import read_labelled_folder  # most folders have class folders

    paths, names = read_labelled_folder(folder, file)
    classes = sorted(set(names))
    number = {name: label for label, name in enumerate(classes)}
    return Files(folder, paths, [number[name] for name in names], classes)
