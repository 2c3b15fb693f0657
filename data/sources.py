"""Data sets by name: folders, archives, packed data and timm's readers.

To add a data set, write a function that returns a `Source` and name it in `DATA_SETS`. timm's
names (`wds/...`, `tfds/...`, `torch/...`) go to timm.
"""

import difflib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
from PIL import Image
from torch.utils.data import IterableDataset
from torchvision.datasets import CIFAR10, CIFAR100

from base.errors import UserError
from base.text import printable
from data.folder_parts import check_folder, open_folder, open_part
from data.folders import some
from data.image_source import Files, Pairs, Shards, Source


@dataclass(frozen=True)
class Part:
    """Which part of a data set to open.

    val_split: of the digits, `test` or `dev`. seed, batch_size: hints for readers of shards.
    in_order: True if these readers must not shuffle. val_fraction, val_labels: of a folder of
    images, see `folder_parts.open_part`.
    """

    is_train: bool
    inat_category: str = "name"
    val_split: str = "test"
    seed: int = 0
    batch_size: int = 1
    in_order: bool = False
    val_fraction: float | None = None
    val_labels: str = ""


# The rows are grouped by writer, so that no writer is in two parts.
DIGITS_ROWS = {"train": (0, 897), "dev": (897, 1197), "test": (1197, 1797)}


def open_digits(root: str, part: Part) -> Pairs:
    """Open scikit-learn's 8x8 handwritten digits: 897 to train, 300 to tune, 600 to test."""
    from sklearn.datasets import load_digits

    split = "train" if part.is_train else part.val_split
    rows = slice(*DIGITS_ROWS[split])
    digits = load_digits()
    images = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)
    pairs = list(zip(map(Image.fromarray, images), digits.target[rows]))
    names = [str(digit) for digit in range(10)]
    return Pairs(pairs, names, f"digits ({split})", mirrors=False)  # "2" mirrored is no digit


def open_imagenet(root: str, part: Part) -> Files:
    """Open the training or the validation part of a folder of images; see `folder_parts`."""
    return open_part(
        root,
        is_train=part.is_train,
        val_fraction=part.val_fraction,
        val_labels=part.val_labels,
    )


def open_cifar(root: str, part: Part, *, num_classes: int) -> Source:
    """Open CIFAR-10 or CIFAR-100, as unpacked from its archive or as folders of images."""
    check_folder(root)
    reader = {10: CIFAR10, 100: CIFAR100}[num_classes]
    base = Path(root).absolute()
    if base.name == reader.base_folder:
        base = base.parent
    if (base / reader.base_folder).is_dir():
        try:
            data = reader(str(base), train=part.is_train)
        except (RuntimeError, OSError, EOFError, KeyError) as error:
            raise UserError(
                f"{base / reader.base_folder}: incomplete or damaged; unpack {reader.url} again"
            ) from error
        what = f"CIFAR-{num_classes} images ({'train' if part.is_train else 'test'})"
        return Pairs(data, data.classes, what)
    if not any(os.path.isdir(os.path.join(root, name)) for name in ("train", "test", "val")):
        raise UserError(
            f"--data-path {root}: holds neither {reader.base_folder}/ nor folders train/ and "
            f"test/; fetch {reader.url} and unpack it there"
        )
    source = open_folder(_split_folder(root, ["train"] if part.is_train else ["test", "val"]))
    if (found := len(source.classes)) != num_classes:
        raise UserError(
            f"{source.root}: {found} classes, CIFAR-{num_classes} has {num_classes}; "
            "--data-set CIFAR10 and CIFAR (100 classes) are these two, IMNET takes any folders"
        )
    return source


def open_inat(root: str, part: Part, *, year: int) -> Files:
    """Open iNaturalist: `train<year>.json` or `val<year>.json`, and categories.json, in `root`.

    Classes are the values of one field of the categories (species `name`, `genus`, ...), in order
    of the category ids. In DeiT they come in the order of the train listing, and a category is
    found by its position in the file. That fails for ids with gaps.
    Images have the path of the listing, or without its second folder (DeiT's layout).
    """
    check_folder(root)
    listing = _read_json(os.path.join(root, f"{'train' if part.is_train else 'val'}{year}.json"))
    categories = _read_json(os.path.join(root, "categories.json"))
    try:
        categories = sorted(categories, key=lambda category: category["id"])
        value_of = {c["id"]: str(c[part.inat_category]) for c in categories}
        category_of = {a["image_id"]: a["category_id"] for a in listing["annotations"]}
        names = [image["file_name"] for image in listing["images"]]
        values = [value_of[category_of[image["id"]]] for image in listing["images"]]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{root}: the {year} listing and categories.json do not fit "
            f"(--inat-category {part.inat_category}; {type(error).__name__}: {error}); "
            "fetch the JSON files of one release"
        ) from error
    if not names:
        raise UserError(f"{root}: the {year} listing names no image")
    first = names[0]
    if not os.path.exists(os.path.join(root, first)):
        names = ["/".join(name.split("/")[:1] + name.split("/")[2:]) for name in names]
        if not os.path.exists(os.path.join(root, names[0])):
            raise UserError(f"{os.path.join(root, first)}: not there; unpack the images in {root}")
    classes = list(dict.fromkeys(value_of.values()))
    label_of = {value: label for label, value in enumerate(classes)}
    return Files(root, names, [label_of[value] for value in values], classes)


def _read_json(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; iNaturalist's JSON is needed") from error
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error


def _open_prepared(root: str, part: Part) -> Source:
    from data.packed import open_prepared  # only packed data needs it

    return open_prepared(root, part)


DATA_SETS: dict[str, Callable[[str, Part], Source]] = {
    "DIGITS": open_digits,
    "CIFAR10": partial(open_cifar, num_classes=10),
    "CIFAR": partial(open_cifar, num_classes=100),
    "IMNET": open_imagenet,
    "INAT": partial(open_inat, year=2018),
    "INAT19": partial(open_inat, year=2019),
    "PREPARED": _open_prepared,
}


def _split_folder(root: str, names: Sequence[str]) -> str:
    """Return the first folder `root`/name that is there."""
    check_folder(root)
    for name in names:
        if os.path.isdir(os.path.join(root, name)):
            return os.path.join(root, name)
    found = sorted(e.name + "/" for e in os.scandir(root) if e.is_dir())
    raise UserError(
        f"{os.path.join(root, names[0])}: not there; --data-path needs train/ and val/, "
        f"{root} has {some(found) or 'no folders'}"
    )


TIMM_PREFIXES = ("torch", "wds", "tfds")
TIMM_FOLDERS = ("folder", "image_folder")
HUGGING_FACE = ("hfds", "hfids")
TRAIN_SPLITS, VAL_SPLITS = ("train", "training"), ("validation", "val", "valid", "eval", "test")
TIMM_FAILS = (
    AssertionError,
    AttributeError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def open_timm(name: str, root: str, part: Part) -> Source:
    """Return timm's data set of that name.

    Raises UserError for an unknown name, and with timm's reason if timm cannot open it.
    """
    check_name(name)
    prefix, _, rest = name.lower().partition("/")
    if not root and prefix != "tfds":
        raise UserError(f"--data-set {name}: give its folder with --data-path")
    splits = TRAIN_SPLITS if part.is_train else VAL_SPLITS
    if prefix in TIMM_FOLDERS or rest in TIMM_FOLDERS:
        folder = _split_folder(root, splits)
        # timm's own reader sorts class names in natural order, torchvision's as strings
        source = open_folder(folder, natural_order=prefix in TIMM_FOLDERS)
        source.what = f"images of {name} ({os.path.basename(folder)} of {printable(root)})"
        return source
    dataset, split = _create_timm(name, root, part, splits)
    what = f"{name} ({split}{f' of {printable(root)}' if root else ''})"
    classes = class_names(dataset)
    if isinstance(dataset, IterableDataset):
        return Shards(dataset, classes, what, root if prefix == "wds" else "")
    samples = getattr(getattr(dataset, "reader", dataset), "samples", None)
    if not samples:
        return Pairs(dataset, classes, f"images of {what}")
    paths, labels = zip(*samples)  # as in our folders, so that a bad image can be named
    names = [os.path.relpath(path, root) for path in paths]
    return Files(root, names, labels, classes, f"images of {what}")


def _create_timm(name: str, root: str, part: Part, splits: Sequence[str]) -> tuple[Any, str]:
    """Return timm's data set and the first name in `splits` under which it can be opened."""
    reasons = []
    for split in splits:
        try:
            dataset = timm.data.create_dataset(
                name,
                root=root or None,
                split=split,
                is_training=part.is_train and not part.in_order,
                batch_size=part.batch_size,
                seed=part.seed,
            )
        except TIMM_FAILS as error:
            reasons.append(" ".join(str(error).split()) or type(error).__name__)
            continue
        return dataset, split
    raise UserError(f"--data-set {name}: timm cannot open its {splits[0]} part: {reasons[0]}")


def check_name(name: str) -> None:
    """Raise UserError for a data set that neither we nor timm can open."""
    prefix, _, rest = name.lower().partition("/")
    if prefix in HUGGING_FACE:
        raise UserError(
            f"--data-set {name}: Hugging Face data sets are not read; save their images as "
            "train/<class>/<image> and val/<class>/<image> (--data-set IMNET), or as shards "
            "(wds/)"
        )
    if prefix in TIMM_FOLDERS or (prefix in TIMM_PREFIXES and rest):
        return
    known = [*DATA_SETS, *TIMM_FOLDERS, *(f"{p}/NAME" for p in TIMM_PREFIXES)]
    spelled = {word.lower(): word for word in known}
    close = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.5)
    hint = f"did you mean {spelled[close[0]]}? " if close else ""
    raise UserError(f"--data-set {name}: unknown; {hint}known are {', '.join(known)}")


def class_names(dataset: Any) -> list[str] | None:
    """Return the class names by label, if torchvision or a timm reader has them."""
    names = getattr(dataset, "classes", None)
    if names:
        return [name if isinstance(name, str) else ", ".join(map(str, name)) for name in names]
    numbered = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    return sorted(numbered, key=numbered.__getitem__) if numbered else None


def open_source(name: str, root: str, part: Part) -> Source:
    """Return the images of a data set. Raises UserError for data that are missing or incomplete."""
    if name in DATA_SETS:
        return DATA_SETS[name](root, part)
    return open_timm(name, root, part)
