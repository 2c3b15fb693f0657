"""Labelled images by index, from folders, archives and timm's readers.

To add a data set, write a function that opens a source and name it in `DATA_SETS`. timm's names
(`wds/...`, `tfds/...`, `torch/...`, `folder`) go to timm.
"""

import difflib
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import timm.data
from PIL import Image
from torch.utils.data import IterableDataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS

from base.errors import UserError
from data.image_ops import UNREADABLE, ImageLike, decode, to_rgb
from data.packed import open_prepared


class Source(Protocol):
    """Labelled images by index. `classes` holds their names, or is None where nobody knows.

    An `identity()`, where a source has one, are bytes that say which images these are, wherever
    they lie. It is found out within a second, so each says how much it knows. A prepared source has
    `flips`, whether a mirrored image keeps its label, and `form`, how its images are kept.
    """

    classes: list[str] | None
    what: str

    def __len__(self) -> int: ...
    def load(self, index: int) -> tuple[ImageLike, int]: ...
    def name(self, index: int) -> str: ...


# Of so many images, spread over the list, an identity has the size of the file, its content, or
# the pixels. A network disk takes up to a millisecond for a size, a quarter hour for a million.
SIZES, CONTENTS, PIXELS = 1000, 16, 64
CONTENT_BYTES = 2**20  # of a file, at most


def _spread(total: int, most: int) -> list[int]:
    """Return at most `most` places, evenly spread over `total`."""
    count = min(total, most)
    return [number * total // count for number in range(count)]


def _size(path: str) -> int:
    """Return the bytes of a file, or -1 for what is none, of which reading might never end."""
    try:
        found = os.stat(path)
    except OSError:
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


def _content(path: str) -> int:
    """Return a checksum of a file, or -1 where there is none to read."""
    try:
        if _size(path) < 0:
            return -1
        with open(path, "rb") as file:
            return zlib.crc32(file.read(CONTENT_BYTES))
    except OSError:
        return -1


class Files:
    """Image files below `root`, held as arrays so that worker processes share the memory."""

    def __init__(
        self, root: str, names: Sequence[str], labels: Sequence[int], classes: list[str] | None
    ) -> None:
        self.root, self.classes, self.what = root, classes, f"images in {root}"
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[ImageLike, int]:
        return decode(Path(self.name(index)).read_bytes()), int(self.labels[index])

    def identity(self) -> bytes:
        """Return what says which images these are, wherever the folder lies.

        It knows every name and label, the size of `SIZES` files and the content of `CONTENTS`: so
        it finds out images that were resized or encoded again under their names, and another
        release. It does not see a few replaced images among many more than `SIZES`.
        """
        digest = hashlib.sha256(self.names.tobytes() + self.labels.tobytes())
        total = len(self)
        digest.update(repr([_size(self.name(i)) for i in _spread(total, SIZES)]).encode())
        digest.update(repr([_content(self.name(i)) for i in _spread(total, CONTENTS)]).encode())
        return digest.digest()

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index].item()))


class Pairs:
    """Anything that has pairs of an image and a label, such as a torchvision data set."""

    def __init__(
        self, pairs: Sequence[tuple[Image.Image, int]], classes: list[str] | None, what: str
    ) -> None:
        self.pairs, self.classes, self.what = pairs, classes, what

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int) -> tuple[ImageLike, int]:
        image, label = self.pairs[index]
        return to_rgb(image), label

    def identity(self) -> bytes:
        """Return what says which images these are: labels and pixels of `PIXELS` of them."""
        digest = hashlib.sha256()
        for index in _spread(len(self), PIXELS):
            try:
                image, label = self.load(index)
            except UNREADABLE:
                continue
            digest.update(repr((index, label, image.size)).encode() + image.tobytes())
        return digest.digest()

    def name(self, index: int) -> str:
        return f"{index} of the {self.what}"


@dataclass(frozen=True)
class Part:
    """Which part of a data set to open, in the words of all data sets.

    val_split: of the digits, `test` or `dev`. seed, batch_size: hints for readers of shards;
    in_order: they do not shuffle.
    """

    is_train: bool
    inat_category: str = "name"
    val_split: str = "test"
    seed: int = 0
    batch_size: int = 1
    in_order: bool = False


# The digits' rows come grouped by writer, so splitting them in order splits the writers.
DIGITS_ROWS = {"train": (0, 897), "dev": (897, 1197), "test": (1197, 1797)}


def open_digits(root: str, part: Part) -> Pairs:
    """Open scikit-learn's 8x8 handwritten digits: 897 to train, 300 to tune, 600 to test."""
    from sklearn.datasets import load_digits

    split = "train" if part.is_train else part.val_split
    rows = slice(*DIGITS_ROWS[split])
    digits = load_digits()
    images = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)
    pairs = list(zip(map(Image.fromarray, images), digits.target[rows]))
    return Pairs(pairs, [str(digit) for digit in range(10)], f"digits ({split})")


def open_imagenet(root: str, part: Part) -> Files:
    """Open `root`/train or `root`/val, folders with a folder of images for every class."""
    return open_folder(_split_folder(root, ["train"] if part.is_train else ["val"]))


def open_cifar(root: str, part: Part, *, num_classes: int) -> Source:
    """Open CIFAR-10 or CIFAR-100, as unpacked from its archive or as folders of images."""
    _check_folder(root)
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
    if len(source.classes) != num_classes:
        raise UserError(
            f"{source.root}: {len(source.classes)} classes, CIFAR-{num_classes} has {num_classes}; "
            "--data-set CIFAR10 and CIFAR (100 classes) are these two, IMNET takes any folders"
        )
    return source


def open_inat(root: str, part: Part, *, year: int) -> Files:
    """Open iNaturalist: `train<year>.json` or `val<year>.json`, and categories.json, in `root`.

    Classes are the values of one field of the categories (species `name`, `genus`, ...), in order
    of the category ids. Differs from DeiT, where they come in the order of the train listing and
    a category is found by its place in the file, which fails where ids have gaps.
    Images lie where the listing says, or without its second folder (DeiT's layout).
    """
    _check_folder(root)
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


DATA_SETS: dict[str, Callable[[str, Part], Source]] = {
    "DIGITS": open_digits,
    "CIFAR10": partial(open_cifar, num_classes=10),
    "CIFAR": partial(open_cifar, num_classes=100),
    "IMNET": open_imagenet,
    "INAT": partial(open_inat, year=2018),
    "INAT19": partial(open_inat, year=2019),
    "PREPARED": open_prepared,
}
WITHOUT_FLIP = {"DIGITS"}  # a mirrored digit is another sign, or none


def open_folder(folder: str) -> Files:
    """List the images of `folder`, one class a subfolder, in sorted order; no file is opened.

    Hidden files and folders are no images and no classes. Raises UserError for a class without
    images, and for a folder without classes.
    """
    classes = sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != ".")
    if not classes:
        raise UserError(f"{folder}: no folders of images in it; one folder a class is needed")
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_images_below(os.path.join(folder, name)))
        names += [os.path.relpath(path, folder) for path in found]
        labels += [label] * len(found)
    present = set(labels)
    empty = [name for label, name in enumerate(classes) if label not in present]
    if empty:
        raise UserError(
            f"{folder}: {len(empty)} of {len(classes)} classes without images "
            f"({some(empty)}); fill or remove the folders"
        )
    return Files(folder, names, labels, classes)


def _images_below(folder: str) -> Iterator[str]:
    for where, _, files in os.walk(folder, followlinks=True):
        for name in files:
            if name.lower().endswith(IMG_EXTENSIONS) and name[0] != ".":
                yield os.path.join(where, name)


def some(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _check_folder(root: str) -> None:
    if not os.path.isdir(root):
        what = "not a folder" if os.path.exists(root) else "not there"
        raise UserError(f"--data-path {root or '(empty)'}: {what}; give the data's folder")


def _split_folder(root: str, names: Sequence[str]) -> str:
    """Return the first folder `root`/name that is there."""
    _check_folder(root)
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
HUGGING_FACE = ("hfds", "hfids")  # their package has the name of this file
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


def open_timm(name: str, root: str, part: Part) -> tuple[Any, str]:
    """Return timm's data set of that name, and what it is in words.

    Raises UserError for an unknown name, and with timm's reason where timm cannot open it.
    """
    check_name(name)
    prefix, _, rest = name.lower().partition("/")
    if not root and prefix != "tfds":
        raise UserError(f"--data-set {name}: give its folder with --data-path")
    splits: Sequence[str] = TRAIN_SPLITS if part.is_train else VAL_SPLITS
    if prefix in TIMM_FOLDERS or rest in TIMM_FOLDERS:
        # without such a folder timm would take `root` itself, for training and for evaluation
        splits = [os.path.basename(_split_folder(root, splits))]
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
        return dataset, f"{name} ({split}{f' of {root}' if root else ''})"
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
    """Return the class names by label, where torchvision or a timm reader tells them."""
    names = getattr(dataset, "classes", None)
    if names:
        return [name if isinstance(name, str) else ", ".join(map(str, name)) for name in names]
    numbered = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    return sorted(numbered, key=numbered.__getitem__) if numbered else None


@dataclass(frozen=True)
class Shards:
    """timm's reader of shards: images in the order in which they come, without an index.

    folder: in which the shards lie, or empty where only the reader knows.
    """

    dataset: Any
    classes: list[str] | None
    what: str
    folder: str = ""

    def identity(self) -> bytes:
        """Return what says which shards these are: names and sizes of the files in `folder`."""
        found = os.scandir(self.folder) if os.path.isdir(self.folder) else ()
        return repr(sorted((entry.name, _size(entry.path)) for entry in found)).encode()


def open_source(name: str, root: str, part: Part) -> Source | Shards:
    """Return the images of a data set. Raises UserError for what is not there or not complete."""
    if name in DATA_SETS:
        return DATA_SETS[name](root, part)
    dataset, what = open_timm(name, root, part)
    classes = class_names(dataset)
    if isinstance(dataset, IterableDataset):
        return Shards(dataset, classes, what, root if name.lower().startswith("wds/") else "")
    samples = getattr(getattr(dataset, "reader", dataset), "samples", None)
    if not samples:
        return Pairs(dataset, classes, f"images of {what}")
    paths, labels = zip(*samples)  # as in our folders: then a bad image can be named
    source = Files(root, [os.path.relpath(path, root) for path in paths], labels, classes)
    source.what = f"images of {what}"
    return source
