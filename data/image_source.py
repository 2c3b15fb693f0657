"""Labelled images by index: image files, pairs in memory, and streams of shards."""

import hashlib
import os
import stat
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from base.text import printable
from data.image_ops import UNREADABLE, ImageLike, decode, to_rgb

# How many images, spread over the list, an identity covers by file size, by content, and by
# pixels. A network disk takes up to a millisecond for a size: a quarter of an hour for a million.
SIZES, CONTENTS, PIXELS = 1000, 16, 64
CONTENT_BYTES = 2**20  # read of each file, at most
SAMPLES = 8  # 16-bit images that are checked before a run


class Source:
    """Labelled images by index; a data set is a subclass or an instance of one below.

    classes: class names, or None if unknown. what: the images in words.
    form: how the images are stored. mirrors: whether a mirrored image keeps its label.
    unlabelled: how many of the images have no label; they are the last.
    skipped: in words, the files that were found and are not used. held_out: the share of the
    training images that these are, if they are held out for validation.
    """

    form, unlabelled = "as it came", 0

    def __init__(self, classes: list[str] | None, what: str, *, mirrors: bool = True) -> None:
        self.classes, self.what, self.mirrors = classes, what, mirrors
        self.skipped, self.held_out = "", 0.0

    def __len__(self) -> int:
        raise NotImplementedError

    def load(self, index: int) -> tuple[ImageLike, int]:
        """Return the image and its class number. Raises one of `UNREADABLE` for a bad file."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Return the name of an image for messages."""
        return f"{index} of the {self.what}"

    def identity(self) -> bytes:
        """Return a hash of the images that does not depend on their folder, within a second."""
        return b""

    def identity_of_unlabelled(self) -> str:
        """Return the number of the unlabelled images and a hash of them, "" if there are none."""
        return ""

    def used_classes(self) -> list[int] | None:
        """Return the numbers of the classes that have images, or None if unknown."""
        return None

    def class_numbers(self) -> np.ndarray:
        """Return the class number of every image, (number of images,)."""
        return np.array([self.load(index)[1] for index in range(len(self))], dtype=np.int64)

    def original(self, index: int) -> int:
        """Return the first index with the same image file, so that it is counted once."""
        return index

    def notes(self) -> list[str]:
        """Return warnings about these images, a line each."""
        return [f"{self.what}: skipped {self.skipped}"] if self.skipped else []


class Files(Source):
    """Image files below `root`, held as arrays so that worker processes share the memory."""

    def __init__(
        self,
        root: str,
        names: Sequence[str],
        labels: Sequence[int],
        classes: list[str] | None,
        what: str = "",
    ) -> None:
        super().__init__(classes, what or f"images in {printable(root)}")
        self.root = root
        self.names = np.array([os.fsencode(name) for name in names])
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[ImageLike, int]:
        return decode(Path(self.path(index)).read_bytes()), int(self.labels[index])

    def identity(self) -> bytes:
        """Return a hash of every name and label, `SIZES` file sizes and `CONTENTS` contents.

        It differs for images that were resized or encoded again under their names, and for
        another release. A few replaced images among many more than `SIZES` may go unnoticed.
        """
        digest = hashlib.sha256(self.names.tobytes() + self.labels.tobytes())
        total = len(self)
        digest.update(repr([_size(self.path(i)) for i in spread(total, SIZES)]).encode())
        digest.update(repr([_content(self.path(i)) for i in spread(total, CONTENTS)]).encode())
        return digest.digest()

    def class_numbers(self) -> np.ndarray:
        return self.labels

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.names[index].item()))

    def name(self, index: int) -> str:
        return printable(self.path(index))

    def used_classes(self) -> list[int]:
        return np.unique(self.labels).tolist()

    def notes(self) -> list[str]:
        """Return the lines of `Source.notes`, and a warning about images that are nearly black.

        16-bit files are scaled from 0..65535. 12-bit data in them have values up to 4095.
        """
        lines = super().notes()
        largest = {i: most for i in spread(len(self), SAMPLES) if (most := _largest(self.path(i)))}
        if largest and max(largest.values()) < 2**12:
            first = next(iter(largest))
            lines.append(
                f"{self.what}: the values of 16-bit images reach {max(largest.values())} of 65535 "
                f"({self.name(first)}), so they are nearly black; 12-bit data must be multiplied "
                "by 16 first"
            )
        return lines


class Pairs(Source):
    """A sequence of (image, label) pairs, such as a torchvision data set."""

    def __init__(
        self,
        pairs: Sequence[tuple[Image.Image, int]],
        classes: list[str] | None,
        what: str,
        *,
        mirrors: bool = True,
    ) -> None:
        super().__init__(classes, what, mirrors=mirrors)
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int) -> tuple[ImageLike, int]:
        image, label = self.pairs[index]
        return to_rgb(image), label

    def class_numbers(self) -> np.ndarray:
        return np.array([label for _, label in self.pairs], dtype=np.int64)

    def identity(self) -> bytes:
        """Return a hash of the labels and pixels of `PIXELS` images."""
        digest = hashlib.sha256()
        for index in spread(len(self), PIXELS):
            try:
                image, label = self.load(index)
            except UNREADABLE:
                continue
            digest.update(repr((index, label, image.size)).encode() + image.tobytes())
        return digest.digest()


class Shards(Source):
    """timm's reader of shards: images in the order in which they come, without an index.

    folder: of the shards, or empty if unknown.
    """

    def __init__(
        self, dataset: Any, classes: list[str] | None, what: str, folder: str = ""
    ) -> None:
        super().__init__(classes, what)
        self.dataset, self.folder = dataset, folder

    def __len__(self) -> int:
        return len(self.dataset)

    def identity(self) -> bytes:
        """Return the names and sizes of the files in `folder`."""
        found = os.scandir(self.folder) if os.path.isdir(self.folder) else ()
        return repr(sorted((entry.name, _size(entry.path)) for entry in found)).encode()


def spread(total: int, most: int) -> list[int]:
    """Return at most `most` indices, evenly spread over `total`."""
    count = min(total, most)
    return [number * total // count for number in range(count)]


def _largest(path: str) -> int:
    """Return the largest value of a 16-bit image, or 0 for any other file."""
    try:
        with open(path, "rb") as file:
            start = file.read(26)
        is_png16 = start[:4] == b"\x89PNG" and start[24:25] == b"\x10"
        if not is_png16 and start[:4] not in (b"II*\0", b"MM\0*"):
            return 0
        with Image.open(path) as image:
            return int(np.asarray(image).max()) if image.mode.startswith("I;16") else 0
    except UNREADABLE:
        return 0


def _size(path: str) -> int:
    """Return the bytes of a file, or -1 if it is not a regular file, which might block."""
    try:
        found = os.stat(path)
    except OSError:
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


def _content(path: str) -> int:
    """Return a checksum of a file's first `CONTENT_BYTES`, or -1 if it cannot be read."""
    try:
        if _size(path) < 0:
            return -1
        with open(path, "rb") as file:
            return zlib.crc32(file.read(CONTENT_BYTES))
    except OSError:
        return -1
