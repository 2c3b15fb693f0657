"""Training images without labels: find them, and join them to the labelled ones.

--unlabelled-path names a folder of any depth, a tar file, a folder with tar files (shards), or a
text file with the path of an image in each line.
"""

import hashlib
import os
import tarfile
from collections.abc import Sequence

import numpy as np

from base.errors import UserError, shorten
from base.text import printable
from data.folders import Skipped, is_image_name, list_tree
from data.image_ops import ImageLike, decode
from data.image_source import SIZES, Files, Source, spread
from losses import UNLABELLED


class TarImages(Source):
    """The images in tar files, which are read in place and by index.

    members: (tar file, name in it, offset, size) of each image.
    """

    def __init__(self, root: str, members: Sequence[tuple[str, str, int, int]]) -> None:
        super().__init__(None, f"images in tar files in {printable(root)}")
        self.files = np.array([os.fsencode(file) for file, *_ in members])
        self.names = np.array([os.fsencode(name) for _, name, *_ in members])
        self.ranges = np.array([extent for _, _, *extent in members], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ranges)

    def load(self, index: int) -> tuple[ImageLike, int]:
        offset, size = self.ranges[index].tolist()
        with open(os.fsdecode(self.files[index].item()), "rb") as file:
            file.seek(offset)
            return decode(file.read(size)), UNLABELLED

    def name(self, index: int) -> str:
        file, name = (os.fsdecode(part[index].item()) for part in (self.files, self.names))
        return printable(f"{name} of {file}")

    def identity(self) -> bytes:
        """Return a hash of the names, offsets and sizes of all images."""
        return hashlib.sha256(self.names.tobytes() + self.ranges.tobytes()).digest()


class Subset(Source):
    """Some images of a source, in the given order of their indices. has_labels: keep the labels."""

    def __init__(self, source: Source, indices: np.ndarray, what: str, *, has_labels: bool) -> None:
        super().__init__(source.classes, what, mirrors=source.mirrors)
        self.form, self.source, self.indices = source.form, source, indices
        self.has_labels = has_labels

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> tuple[ImageLike, int]:
        image, label = self.source.load(int(self.indices[index]))
        return image, label if self.has_labels else UNLABELLED

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def identity(self) -> bytes:
        chosen = self.indices.tobytes() + repr(self.has_labels).encode()
        return hashlib.sha256(self.source.identity() + chosen).digest()

    def used_classes(self) -> list[int]:
        return np.unique(self.class_numbers()).tolist()

    def class_numbers(self) -> np.ndarray:
        if not self.has_labels:
            return np.full(len(self), UNLABELLED)
        return self.source.class_numbers()[self.indices]

    def notes(self) -> list[str]:
        return self.source.notes() if self.has_labels else []


class WithUnlabelled(Source):
    """Labelled images, and after them images whose label is `UNLABELLED`.

    ratio: unlabelled images for each labelled one; None: every image once. Otherwise the side that
    is too small is repeated. Every image comes at least once. Repeated images have indices of
    their own, so that each gets its own augmentation.
    labelled: how many of the indices are labelled; they are the first.
    """

    def __init__(
        self, source: Source, others: Sequence[Source], ratio: float | None = None
    ) -> None:
        self.parts, self.sizes = [source, *others], [len(source), *map(len, others)]
        few, many = len(source), sum(map(len, others))
        if ratio is None:
            self.labelled, self.unlabelled = few, many
        else:
            self.labelled = max(few, round(many / ratio))
            self.unlabelled = max(many, round(few * ratio))
        joined = f"images: {_times(self.labelled, few)} labelled {source.what}"
        joined += f", {_times(self.unlabelled, many)} unlabelled "
        super().__init__(
            source.classes,
            joined + " and ".join(part.what for part in others),
            mirrors=source.mirrors,
        )
        self.form = source.form

    def __len__(self) -> int:
        return self.labelled + self.unlabelled

    def load(self, index: int) -> tuple[ImageLike, int]:
        part, own = self._find(index)
        return part.load(own)

    def original(self, index: int) -> int:
        if index < self.labelled:
            return repeated(index, self.labelled, self.sizes[0])
        own = repeated(index - self.labelled, self.unlabelled, sum(self.sizes[1:]))
        return self.labelled + own

    def _find(self, index: int) -> tuple[Source, int]:
        """Return the source of an image and its index there."""
        index = self.original(index)
        if index < self.labelled:
            return self.parts[0], index
        index -= self.labelled
        for part, size in zip(self.parts[1:], self.sizes[1:]):
            if index < size:
                return part, index
            index -= size
        raise IndexError(index)

    def name(self, index: int) -> str:
        part, own = self._find(index)
        return part.name(own)

    def identity(self) -> bytes:
        sizes = repr((self.labelled, self.unlabelled, self.sizes)).encode()
        return hashlib.sha256(sizes + b"".join(part.identity() for part in self.parts)).digest()

    def identity_of_unlabelled(self) -> str:
        """Return the number of unlabelled images and a hash of them."""
        digest = hashlib.sha256(b"".join(part.identity() for part in self.parts[1:]))
        return f"{self.unlabelled} images, {digest.hexdigest()[:12]}"

    def used_classes(self) -> list[int] | None:
        return self.parts[0].used_classes()

    def notes(self) -> list[str]:
        return [note for part in self.parts for note in part.notes()]


def _times(total: int, different: int) -> str:
    return str(total) if total == different else f"{total} (of {different} different)"


def repeated(index: int, total: int, size: int) -> int:
    """Return the image at a position in `total` positions of `size` images, each repeated.

    After whole rounds, the images of the last, incomplete round are spread over all images, which
    are sorted by class.
    """
    rounds, rest = divmod(total, size)
    if index < rounds * size:
        return index % size
    return (index - rounds * size) * size // rest


def open_unlabelled(path: str) -> Source:
    """Return the images of one --unlabelled-path. Raises UserError if there are none."""
    flag = f"--unlabelled-path {printable(path)}"
    if not os.path.exists(path):
        raise UserError(f"{flag}: not there; give a folder, a tar file or a text file of paths")
    if os.path.isfile(path):
        source = _open_tars("", [path], Skipped()) if path.endswith(".tar") else _read_list(path)
    else:
        images, tars, skipped = list_tree(path)
        if images and tars:
            raise UserError(f"{flag}: holds images and tar files; give each a folder of its own")
        source = _open_tars(path, tars, skipped) if tars else _open_files(path, images, skipped)
    if not len(source):
        skipped_files = f" (skipped: {source.skipped})" if source.skipped else ""
        raise UserError(f"{flag}: no image in it{skipped_files}; give another folder or file")
    return source


def _open_files(root: str, names: Sequence[str], skipped: Skipped) -> Source:
    source = Files(root, names, [UNLABELLED] * len(names), None)
    source.skipped = skipped.describe()
    return source


def _open_tars(root: str, tars: Sequence[str], skipped: Skipped) -> Source:
    """Return the images of tar files. Raises UserError for a damaged or compressed one."""
    members = []
    for name in tars:
        path = os.path.join(root, name)
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if member.isfile() and is_image_name(member.name):
                        members.append((path, member.name, member.offset_data, member.size))
                    elif member.isfile():
                        skipped.add("members that are no images", f"{path}/{member.name}")
        except (tarfile.TarError, OSError) as error:
            raise UserError(
                f"--unlabelled-path {printable(path)}: not a whole, uncompressed tar file "
                f"({' '.join(str(error).split())}); unpack it and give the folder"
            ) from error
    source = TarImages(root or tars[0], members)
    source.skipped = skipped.describe()
    return source


def _read_list(path: str) -> Source:
    """Return the images of a text file; its paths are absolute or relative to its folder."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            names = [line.strip() for line in file if line.strip()]
    except OSError as error:
        raise UserError(
            f"--unlabelled-path {printable(path)}: cannot be read ({error.strerror})"
        ) from error
    root = os.path.dirname(path)
    for index in spread(len(names), SIZES):
        if not os.path.isfile(os.path.join(root, names[index])):
            raise UserError(
                f"--unlabelled-path {printable(path)}: line {shorten(names[index])} is no file; "
                "write the path of one image in each line, absolute or relative to the text file"
            )
    what = f"images listed in {printable(path)}"
    return Files(root, names, [UNLABELLED] * len(names), None, what)


def keep_labels(
    source: Source, per_class: int, *, keep_others: bool
) -> tuple[Source, list[Source]]:
    """Return the images that keep their labels, and the others.

    Of each class `per_class` images, evenly spread over the class, or all if there are fewer.
    keep_others: False leaves the others out.
    """
    labels = source.class_numbers()
    chosen = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen[members[spread(len(members), per_class)]] = True
    if chosen.all():
        return source, []
    what = f"{source.what}, {per_class} of each class"
    if not keep_others:
        what += f", {int((~chosen).sum())} left out"
    kept = Subset(source, np.flatnonzero(chosen), what, has_labels=True)
    rest = Subset(source, np.flatnonzero(~chosen), f"{source.what}", has_labels=False)
    return kept, [rest] if keep_others else []
