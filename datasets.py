"""Which index gives which picture and label, and the loaders that bring them in batches.

A source knows pictures: `len(source)`, `source.load(index) -> (RGB picture, label)`,
`source.name(index)` and `source.classes`. To add a data set, write a function that opens a source
and name it in `DATA_SETS`. timm's names (`wds/...`, `tfds/...`, `torch/...`, `folder`) go to timm.
"""

import difflib
import hashlib
import json
import logging
import numbers
import os
import re
import struct
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import timm.data
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS

from augment import InputConfig, Transform, build_transform
from distributed import Processes, leave_signals_to_parent
from errors import UserError
from samplers import EvalSampler, SeededViews, TrainSampler, derive_seed

_logger = logging.getLogger(__name__)

REPEATS = 3  # views of a picture in an epoch of repeated augmentation (DeiT)
MAX_WORKERS = 10  # DeiT's --num_workers
UNREADABLE_IN_A_ROW = 100  # more is a lost disk, not a bad picture
# what Pillow raises for files that are no whole picture
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error,
              Image.DecompressionBombError)  # fmt: skip


def to_rgb(picture: Image.Image) -> Image.Image:
    """Return a picture in RGB, 8 bits; those of 16 bits are scaled, where Pillow would clip."""
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise ValueError(
            f"mode {picture.mode}, whose white nobody knows; save it with 8 or 16 bits"
        )
    return picture.convert("RGB")


class Source(Protocol):
    """Labelled pictures by index. `classes` holds their names, or is None where nobody knows."""

    classes: list[str] | None
    what: str

    def __len__(self) -> int: ...
    def load(self, index: int) -> tuple[Image.Image, int]: ...
    def name(self, index: int) -> str: ...


class Files:
    """Picture files below `root`, held as arrays so that worker processes share the memory."""

    def __init__(
        self, root: str, names: Sequence[str], labels: Sequence[int], classes: list[str] | None
    ) -> None:
        self.root, self.classes, self.what = root, classes, f"pictures in {root}"
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Image.Image, int]:
        with open(self.name(index), "rb") as file:
            return to_rgb(Image.open(file)), int(self.labels[index])

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index].item()))


class Pairs:
    """Anything that has pairs of a picture and a label, such as a torchvision data set."""

    def __init__(
        self, pairs: Sequence[tuple[Image.Image, int]], classes: list[str] | None, what: str
    ) -> None:
        self.pairs, self.classes, self.what = pairs, classes, what

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int) -> tuple[Image.Image, int]:
        picture, label = self.pairs[index]
        return to_rgb(picture), label

    def name(self, index: int) -> str:
        return f"{index} of the {self.what}"


class Pictures(Dataset):
    """A source and a transform: index to (tensor (3, H, W) float32, label).

    bad_pictures: "fail" raises UserError naming the file; "replace" takes the next readable
    picture of the source instead; "leave out" returns None, so that evaluation counts no picture
    twice. Every unreadable picture is counted once, also when worker processes meet it.
    """

    def __init__(
        self, source: Source, transform: Transform, num_classes: int, bad_pictures: str = "fail"
    ) -> None:
        self.source, self.transform, self.num_classes = source, transform, num_classes
        self.bad_pictures = bad_pictures
        self.classes = source.classes
        self.description = f"{len(source)} {source.what}, {num_classes} classes"
        marks = len(source) if bad_pictures != "fail" else 0
        self._unreadable = torch.zeros(marks, dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | None:
        tries = min(len(self), UNREADABLE_IN_A_ROW)
        for step in range(tries):
            here = (index + step) % len(self)
            try:
                picture, label = self.source.load(here)
            except UNREADABLE as error:
                self._report(here, error)
                if self.bad_pictures == "leave out":
                    return None
                continue
            return self.transform(picture), check_label(label, self.num_classes)
        raise UserError(
            f"{tries} pictures in a row cannot be read, from {self.source.name(index)} on; "
            "is the disk still there?"
        )

    def skipped(self) -> int:
        """Return how many different pictures could not be read so far, in all workers."""
        return int(self._unreadable.sum())

    def _report(self, index: int, error: Exception) -> None:
        name, reason = self.source.name(index), " ".join(str(error).split())
        if isinstance(error, UnidentifiedImageError):
            reason = "not a picture"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        if self.bad_pictures == "fail":
            raise UserError(
                f"picture {name} cannot be read: {reason or type(error).__name__}; "
                "mend or remove it, or use --on-bad-image skip"
            ) from error
        if not self._unreadable[index]:
            self._unreadable[index] = True
            _logger.warning("picture %s cannot be read: %s; skipped", name, reason)


def check_label(label: Any, num_classes: int) -> int:
    """Return the label as an int. Raises UserError if it is none of the `num_classes` classes."""
    if not isinstance(label, numbers.Integral) or not 0 <= label < num_classes:
        raise UserError(
            f"label {label}: must be a class number from 0 to {num_classes - 1}; "
            "if there are more classes, give their number with --nb-classes"
        )
    return int(label)


class Stream(IterableDataset):
    """timm's reader of shards (wds, tfds): pictures in the order in which they come.

    There are no indices, so no repeated augmentation, no exact resume, no seed per picture; in
    several processes the reader shares the shards, and evaluation counts what comes. The reader
    leaves out bad pictures, with a warning, whatever --on-bad-image says.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Transform,
        num_classes: int,
        classes: list[str] | None,
        what: str,
    ) -> None:
        self.dataset, self.transform = dataset, transform
        self.num_classes, self.classes = num_classes, classes
        self.description = f"{len(dataset)} pictures streamed from {what}, {num_classes} classes"

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for picture, label in self.dataset:
            yield self.transform(to_rgb(picture)), check_label(label, self.num_classes)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def set_workers(self, num_workers: int) -> None:
        """Tell the reader how many workers share its shards; its length depends on it."""
        self.dataset.set_loader_cfg(num_workers=num_workers)

    def skipped(self) -> int:
        """Return 0: timm's readers leave out bad pictures without counting them."""
        return 0


@dataclass(frozen=True)
class Part:
    """Which part of a data set to open, in the words of all data sets.

    val_split: of the digits, `test` or `dev`. seed, batch_size: hints for readers of shards.
    """

    is_train: bool
    inat_category: str = "name"
    val_split: str = "test"
    seed: int = 0
    batch_size: int = 1


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
    """Open `root`/train or `root`/val, folders with a folder of pictures for every class."""
    return open_folder(_split_folder(root, ["train"] if part.is_train else ["val"]))


def open_cifar(root: str, part: Part, *, num_classes: int) -> Source:
    """Open CIFAR-10 or CIFAR-100, as unpacked from its archive or as folders of pictures."""
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
        what = f"CIFAR-{num_classes} pictures ({'train' if part.is_train else 'test'})"
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
    Pictures lie where the listing says, or without its second folder (DeiT's layout).
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
        raise UserError(f"{root}: the {year} listing names no picture")
    first = names[0]
    if not os.path.exists(os.path.join(root, first)):
        names = ["/".join(name.split("/")[:1] + name.split("/")[2:]) for name in names]
        if not os.path.exists(os.path.join(root, names[0])):
            raise UserError(
                f"{os.path.join(root, first)}: not there; unpack the pictures in {root}"
            )
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
}
WITHOUT_FLIP = {"DIGITS"}  # a mirrored digit is another sign, or none


def open_folder(folder: str) -> Files:
    """List the pictures of `folder`, one class a subfolder, in sorted order; no file is opened.

    Hidden files and folders are no pictures and no classes. Raises UserError for a class without
    pictures, and for a folder without classes.
    """
    classes = sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != ".")
    if not classes:
        raise UserError(f"{folder}: no folders of pictures in it; one folder a class is needed")
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_pictures_below(os.path.join(folder, name)))
        names += [os.path.relpath(path, folder) for path in found]
        labels += [label] * len(found)
    present = set(labels)
    empty = [name for label, name in enumerate(classes) if label not in present]
    if empty:
        raise UserError(
            f"{folder}: {len(empty)} of {len(classes)} classes without pictures "
            f"({_some(empty)}); fill or remove the folders"
        )
    return Files(folder, names, labels, classes)


def _pictures_below(folder: str) -> Iterator[str]:
    for where, _, files in os.walk(folder, followlinks=True):
        for name in files:
            if name.lower().endswith(IMG_EXTENSIONS) and name[0] != ".":
                yield os.path.join(where, name)


def _some(names: Sequence[str], limit: int = 3) -> str:
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
        f"{root} has {_some(found) or 'no folders'}"
    )


TIMM_PREFIXES = ("torch", "wds", "tfds")
TIMM_FOLDERS = ("folder", "image_folder")
HUGGING_FACE = ("hfds", "hfids")  # their package has the name of this file
TRAIN_SPLITS, VAL_SPLITS = ("train", "training"), ("validation", "val", "valid", "eval", "test")
TIMM_FAILS = (AssertionError, AttributeError, ImportError, KeyError, OSError, RuntimeError,
              TypeError, ValueError)  # fmt: skip


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
                is_training=part.is_train,
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
            f"--data-set {name}: Hugging Face data sets are not read; save their pictures as "
            "train/<class>/<picture> and val/<class>/<picture> (--data-set IMNET), or as shards "
            "(wds/)"
        )
    if prefix in TIMM_FOLDERS or (prefix in TIMM_PREFIXES and rest):
        return
    known = [*DATA_SETS, *TIMM_FOLDERS, *(f"{p}/NAME" for p in TIMM_PREFIXES)]
    spelled = {word.lower(): word for word in known}
    close = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.5)
    hint = f"did you mean {spelled[close[0]]}? " if close else ""
    raise UserError(f"--data-set {name}: unknown; {hint}known are {', '.join(known)}")


def _class_names(dataset: Any) -> list[str] | None:
    """Return the class names by label, where torchvision or a timm reader tells them."""
    names = getattr(dataset, "classes", None)
    if names:
        return [name if isinstance(name, str) else ", ".join(map(str, name)) for name in names]
    numbered = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    return sorted(numbered, key=numbered.__getitem__) if numbered else None


def build_dataset(
    is_train: bool, args: Namespace, inputs: InputConfig
) -> tuple[Pictures | Stream, int]:
    """Return the train or evaluation data of `args`, and how many classes the student needs.

    The data set gives (tensor (3, H, W) normalised, int label) by index, and has `classes` (list
    of names or None), `description` (one line) and `skipped()`. Shards (wds/, tfds/) give an
    iterable one instead. No picture is decoded here.
    Raises UserError for what is not there, not complete, or does not fit --nb-classes.
    """
    part = Part(
        is_train=is_train,
        inat_category=args.inat_category,
        val_split=args.val_split,
        seed=derive_seed(args.seed, "reader") % 2**31,
        batch_size=args.batch_size,
    )
    name, root = str(args.data_set), str(args.data_path)
    hflip = 0.0 if name in WITHOUT_FLIP else 0.5
    transform = build_transform(is_train, args, inputs, hflip=hflip)
    bad_pictures = "fail"
    if args.on_bad_image == "skip":
        bad_pictures = "replace" if is_train else "leave out"
    if name in DATA_SETS:
        source: Source = DATA_SETS[name](root, part)
    else:
        dataset, what = open_timm(name, root, part)
        classes = _class_names(dataset)
        if isinstance(dataset, IterableDataset):
            num_classes = count_classes(classes, args.nb_classes, what)
            return Stream(dataset, transform, num_classes, classes, what), num_classes
        samples = getattr(getattr(dataset, "reader", dataset), "samples", None)
        if samples:  # paths and labels, as in our folders: then a bad picture can be named
            paths, labels = zip(*samples)
            source = Files(root, [os.path.abspath(path) for path in paths], labels, classes)
            source.what = f"pictures of {what}"
        else:
            source = Pairs(dataset, classes, f"pictures of {what}")
    num_classes = count_classes(source.classes, args.nb_classes, source.what)
    return Pictures(source, transform, num_classes, bad_pictures), num_classes


def count_classes(classes: list[str] | None, wanted: int | None, what: str) -> int:
    """Return how many classes the student needs: `wanted` (--nb-classes), else those found."""
    if classes is None and wanted is None:
        raise UserError(f"{what}: it does not tell its classes; give their number (--nb-classes)")
    if classes is not None and wanted is not None and wanted < len(classes):
        raise UserError(
            f"--nb-classes {wanted}: the {what} have {len(classes)} classes; "
            "leave it out, or give at least as many"
        )
    return wanted if wanted is not None else len(classes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Loaders:
    """The batches of a run. `train` and `train_sampler` are None where nothing trains.

    Batches are pictures (B, 3, H, W) float32 and labels (B,) int64. The train sampler is None for
    streamed data too.
    """

    train: DataLoader | None
    val: DataLoader
    num_classes: int
    classes: list[str] | None
    train_sampler: TrainSampler | None
    data: tuple[Pictures | Stream, ...]

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Choose the order and the views of the next pass over `train`, from batch `done` on."""
        if self.train_sampler is not None:
            self.train_sampler.set_epoch(epoch)
            self.train_sampler.set_start(done * self.train.batch_size)
        for data in self.data:
            if isinstance(data, Stream):
                data.set_epoch(epoch)

    def fingerprint(self) -> str:
        """Return which pictures have which labels, in a few words, wherever the folders lie."""
        digest = hashlib.sha256()
        for data in self.data:
            digest.update(repr((len(data), data.num_classes, data.classes)).encode())
            source = getattr(data, "source", None)
            if isinstance(source, Files):
                digest.update(source.names.tobytes() + source.labels.tobytes())
        counts = " + ".join(str(len(data)) for data in self.data)
        return f"{counts} pictures, {digest.hexdigest()[:12]}"

    def skipped(self) -> int:
        """Return how many different pictures this process and its workers could not read."""
        return sum(data.skipped() for data in self.data)

    def describe(self) -> str:
        """Return one line: what there is, how much of it an epoch takes, who loads it."""
        words = []
        if self.train is not None:
            words.append(f"train on {self.data[0].description}")
            sampler = self.train_sampler
            if sampler is not None and sampler.repeats > 1:
                epoch = len(sampler) * sampler.num_replicas
                words[0] += f" (an epoch: {epoch} views, {sampler.repeats} of a picture)"
        words.append(f"evaluate on {self.data[-1].description}")
        workers = max(self.train.num_workers if self.train is not None else 0, self.val.num_workers)
        words.append(f"{workers or 'no'} worker{'s' * (workers != 1)}")
        return "; ".join(words)


class EvalLoader(DataLoader):
    """A loader whose pictures may be left out (None), whole batches included."""

    def __init__(self, dataset: Dataset, **options: Any) -> None:
        super().__init__(dataset, collate_fn=collate_present, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return (batch for batch in super().__iter__() if batch is not None)


def collate_present(samples: list[Any]) -> Any:
    """Stack the samples that are not None; None if there is none."""
    present = [sample for sample in samples if sample is not None]
    return default_collate(present) if present else None


def build_loaders(args: Namespace, inputs: InputConfig, processes: Processes) -> Loaders:
    """Return the loaders of a run; with args.eval the train data is not touched.

    Training drops the last, smaller batch; evaluation is exact, with batches 1.5 times as large.
    Every picture's randomness depends on (seed, view, index) alone, whatever the workers.
    Raises UserError, before any picture is read, for missing or empty folders, class lists that
    differ, and a batch that an epoch cannot fill.
    """
    workers = args.num_workers
    if workers is None:
        workers = auto_workers(processes.launcher, os.environ, cores_here())
    make = partial(
        _build_loader,
        seed=args.seed,
        workers=workers,
        timeout_min=args.loader_timeout,
        pin_memory=args.pin_mem and processes.device.type == "cuda",
        rank=processes.rank,
    )
    train_data = train = sampler = None
    if not args.eval:
        train_data, _ = build_dataset(True, args, inputs)
    val_data, num_classes = build_dataset(False, args, inputs)
    if len(val_data) == 0:
        raise UserError(f"the evaluation data is empty: {val_data.description}")
    if train_data is not None:
        check_same_classes(train_data.classes, val_data.classes)
        if isinstance(train_data, Pictures):
            sampler = TrainSampler(
                len(train_data),
                num_replicas=processes.world_size,
                rank=processes.rank,
                seed=args.seed,
                repeats=REPEATS if args.repeated_aug else 1,
            )
        train = make(train_data, sampler, batch_size=args.batch_size, is_train=True)
        if len(train) == 0:
            each = len(sampler) if sampler is not None else len(train_data)
            raise UserError(
                f"--batch-size {args.batch_size}: larger than the {each} pictures that each of "
                f"{processes.world_size} processes sees in an epoch of {train_data.description}; "
                f"use --batch-size {each} or less"
            )
    if isinstance(val_data, Stream) and processes.world_size > 1 and processes.rank == 0:
        _logger.warning(
            "evaluation on shards in %d processes may count a picture twice or not at all; "
            "for exact numbers use --eval in one process",
            processes.world_size,
        )
    shard = EvalSampler(len(val_data), processes.world_size, processes.rank)
    val = make(
        val_data,
        shard if isinstance(val_data, Pictures) else None,
        batch_size=int(1.5 * args.batch_size),
        is_train=False,
    )
    data = (train_data, val_data) if train_data is not None else (val_data,)
    return Loaders(train, val, num_classes, val_data.classes, sampler, data)


def _build_loader(
    data: Pictures | Stream,
    sampler: TrainSampler | EvalSampler | None,
    *,
    batch_size: int,
    is_train: bool,
    seed: int,
    workers: int,
    timeout_min: float,
    pin_memory: bool,
    rank: int,
) -> DataLoader:
    dataset: Dataset = data
    if isinstance(data, Stream):
        data.set_workers(workers)
    else:
        dataset = SeededViews(data, seed)
        workers = min(workers, -(-len(sampler) // batch_size))  # type: ignore[arg-type]
    return (DataLoader if is_train else EvalLoader)(
        dataset,
        sampler=sampler,
        batch_size=batch_size,
        num_workers=workers,
        timeout=60 * timeout_min if workers else 0,
        pin_memory=pin_memory,
        drop_last=is_train,
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator().manual_seed(derive_seed(seed, "workers", rank)),
    )


def check_same_classes(train: list[str] | None, val: list[str] | None) -> None:
    """Raise UserError, naming the first classes that differ, unless both lists are the same."""
    if train is None or val is None or train == val:
        return
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    parts = [
        f"{len(only)} only in {where} ({_some(only)})"
        for only, where in ((only_train, "train"), (only_val, "evaluation"))
        if only
    ]
    raise UserError(
        f"train data has {len(train)} classes, evaluation data {len(val)}: "
        f"{'; '.join(parts) or 'the order differs'}; they must be the same"
    )


def cores_here() -> int:
    """Return the CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def auto_workers(launcher: str, environ: Mapping[str, str], cores: int) -> int:
    """Return the workers for one process: its share of the node's cores, DeiT's 10 at most."""
    if launcher == "slurm" and "SLURM_CPUS_PER_TASK" in environ:
        return min(MAX_WORKERS, cores, int(environ["SLURM_CPUS_PER_TASK"]))
    tasks = {"torchrun": "LOCAL_WORLD_SIZE", "slurm": "SLURM_TASKS_PER_NODE"}.get(launcher, "")
    # Slurm writes "8(x2),4": the tasks of its nodes, the largest number first
    neighbours = int(re.split(r"\D", environ.get(tasks, "1"))[0])
    return min(MAX_WORKERS, cores // neighbours)
