"""Prepared data: a data set in a few large files, read through a memory map.

A folder holds `manifest.json` and two files for `train` and `val`: `<split>.bin` has the images
one after another, `<split>.table` a row for each. Raw images are uint8 (height, width, 3); JPEG
images are complete files. `tools/prepare_data.py` writes them, `--data-set PREPARED` reads them.
"""

import fcntl
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import msgspec
import numpy as np
from PIL import Image

from base import structured
from base.errors import UserError, differences, shorten
from base.text import printable
from data.image_ops import ImageLike, as_image, decode
from data.image_source import Source

FORMAT = 1
MANIFEST, PLAN = "manifest.json", "unfinished.json"
RAW, JPEG = "raw", "jpeg"
# place: the image's index in the original data set; crc: checksum of its bytes
ROW = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u4"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("label", "<u4"),
        ("place", "<u4"),
        ("crc", "<u4"),
    ]
)
SYNC_ROWS = 1024  # rows between two calls of fsync
AGAIN = "write it again with python tools/prepare_data.py"


def shrink(image: Image.Image, short_side: int) -> Image.Image:
    """Return the image with its shorter side at `short_side` pixels, bicubic; never enlarged."""
    width, height = image.size
    if min(width, height) <= short_side:
        return image
    scale = short_side / min(width, height)
    size = (max(short_side, round(width * scale)), max(short_side, round(height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def encode(source: ImageLike, kind: str, short_side: int, quality: int) -> tuple[bytes, int, int]:
    """Return the stored bytes of an image, and its height and width in pixels."""
    image = shrink(as_image(source), short_side)
    if kind == RAW:
        return image.tobytes(), image.height, image.width
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue(), image.height, image.width


class Writer:
    """Writes one split of `folder`, and continues one that was interrupted.

    An image is written before its row, so that a killed process loses no complete image. Both files
    are synced every `SYNC_ROWS` rows. The last `SYNC_ROWS` rows of an interrupted split are checked
    against the images, and incomplete ones are removed.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self._images, self._table = _open(folder, split, "bin"), _open(folder, split, "table")
        try:
            # flock would share the lock with the workers, which end seconds after this process
            fcntl.lockf(self._table, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder}: another process is writing there; wait for it") from error
        written = self._table.read()
        keep = len(written) // ROW.itemsize
        rows = np.frombuffer(written, ROW, count=keep)
        size = os.fstat(self._images.fileno()).st_size
        for number in range(max(0, keep - SYNC_ROWS), keep):
            if not self._is_whole(rows[number], size):
                keep = number
                break
        self.rows = keep
        self.next_place = int(rows["place"][keep - 1]) + 1 if keep else 0
        self._end = int(rows["offset"][keep - 1]) + int(rows["size"][keep - 1]) if keep else 0
        self._table.truncate(keep * ROW.itemsize)
        self._images.truncate(self._end)
        self._table.seek(0, os.SEEK_END)
        self._images.seek(0, os.SEEK_END)

    def _is_whole(self, row: np.void, size: int) -> bool:
        if int(row["offset"]) + int(row["size"]) > size:
            return False
        self._images.seek(int(row["offset"]))
        return zlib.crc32(self._images.read(int(row["size"]))) == row["crc"]

    def append(self, data: bytes, height: int, width: int, label: int, place: int) -> None:
        row = (self._end, len(data), height, width, label, place, zlib.crc32(data))
        for file, content in ((self._images, data), (self._table, np.array(row, ROW).tobytes())):
            file.write(content)
            file.flush()
        self._end += len(data)
        self.rows += 1
        if self.rows % SYNC_ROWS == 0:
            self.sync()

    def sync(self) -> None:
        """Write everything to the disk."""
        for file in (self._images, self._table):
            os.fsync(file.fileno())

    def close(self) -> dict[str, Any]:
        """Finish the split; return its entry in the manifest."""
        self.sync()
        self._table.seek(0)
        digest = hashlib.sha256(self._table.read()).hexdigest()
        self._images.close()
        self._table.close()
        return {"pictures": self.rows, "bytes": self._end, "table": digest}


def _open(folder: Path, split: str, ending: str) -> BinaryIO:
    path = folder / f"{split}.{ending}"
    path.touch()
    return open(path, "r+b")


def begin(folder: Path, plan: Mapping[str, Any]) -> bool:
    """Create or find `folder` for a data set written by `plan`; return whether it is complete.

    plan: plain values that determine every byte. Raises UserError for a folder with other files, or
    with a data set of another plan, and names the differences.
    """
    plan = json.loads(json.dumps(plan))
    found = None
    for name in (MANIFEST, PLAN):
        if (folder / name).is_file():
            found = _read(folder / name).get("plan", {})
            break
    if found is not None:
        if differ := "; ".join(differences(found, plan)):
            raise UserError(f"{folder}: begun with other settings: {differ}; give a new folder")
        return (folder / MANIFEST).is_file()
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: holds other files; give a new folder")
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / PLAN, {"plan": plan})
    except OSError as error:
        if made and folder.is_dir():
            folder.rmdir()
        raise UserError(
            f"{printable(str(folder))}: cannot be written ({error.strerror}); give another folder"
        ) from error
    return False


def finish(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, which makes the data set complete."""
    _write(folder / MANIFEST, {"format": FORMAT, **manifest})
    (folder / PLAN).unlink(missing_ok=True)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w") as file:
            file.write(json.dumps(content, indent=1, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


Count = Annotated[int, msgspec.Meta(ge=0)]


class Split(msgspec.Struct):
    """A split in a manifest. table: sha256 of the rows."""

    pictures: Count
    bytes: Count
    table: str


class Manifest(msgspec.Struct):
    """Required keys of a manifest."""

    splits: dict[str, Split]
    kind: Literal["raw", "jpeg"]
    classes: list[str] | None
    flips: bool
    plan: dict[str, Any] = {}


def _read(path: Path) -> dict[str, Any]:
    try:
        return structured.read(path, dict[str, Any])
    except UserError as error:
        raise UserError(f"{error.line()}; {AGAIN}") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest. Raises UserError if it is missing or has another format."""
    if not os.path.isfile(folder / MANIFEST):  # Path.is_file raises for a name that is too long
        reason = "not complete; start tools/prepare_data.py again to continue"
        if not os.path.isfile(folder / PLAN):
            reason = "no prepared data set there; make one with tools/prepare_data.py"
        raise UserError(f"{folder}: {reason}")
    manifest = _read(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        found = shorten(manifest.get("format"))
        raise UserError(f"{folder}: format {found}, this program reads {FORMAT}; {AGAIN}")
    try:
        structured.convert(manifest, Manifest, str(folder / MANIFEST))
    except UserError as error:
        raise UserError(f"{error.line()}; {AGAIN}") from error
    return manifest


class Prepared(Source):
    """One split of a prepared data set.

    Opening it checks the sizes of both files and the checksum of the table. The checksum of a JPEG
    image is checked whenever it is read. Raw images are checked by `damaged` only, because a crop
    reads a part of them. Workers share the memory.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        self.folder, self.split = Path(folder), split
        manifest = read_manifest(self.folder)
        facts = manifest["splits"].get(split)
        if facts is None:
            raise UserError(
                f"{folder}: has no {split} part, only {', '.join(manifest['splits'])}; {AGAIN}"
            )
        what = f"images prepared in {printable(str(folder))} ({split})"
        super().__init__(manifest["classes"], what, mirrors=manifest["flips"])
        self.kind = manifest["kind"]
        made = manifest.get("plan", {})
        words = (f"{name} {made[name]}" for name in ("short side", "quality") if name in made)
        self.form = ", ".join([f"prepared {self.kind}", *words])
        self._digest = facts["table"]
        self._bytes = self._map("bin", facts["bytes"], np.dtype("u1"))
        self._rows = self._map("table", facts["pictures"], ROW)
        if hashlib.sha256(self._rows).hexdigest() != self._digest:
            raise UserError(f"{self.folder / split}.table: damaged (checksum); {AGAIN}")
        self._check_labels(len(manifest["classes"] or []))

    def _check_labels(self, count: int) -> None:
        """Raise UserError for a label beyond the `count` class names. 0: there are no names."""
        last = max(self.used_classes(), default=0)
        if count and last >= count:
            raise UserError(
                f"{self.folder / MANIFEST}: names {count} classes, and an image of {self.split} "
                f"has label {last}; {AGAIN}"
            )

    def _map(self, ending: str, count: int, kind: np.dtype) -> np.ndarray:
        path = self.folder / f"{self.split}.{ending}"
        size = path.stat().st_size if path.is_file() else 0
        if size != count * kind.itemsize:
            raise UserError(f"{path}: {size} bytes, {count * kind.itemsize} expected; {AGAIN}")
        if not count:
            return np.empty(0, kind)
        return np.memmap(path, kind, "r").view(np.ndarray)

    def __reduce__(self) -> tuple:
        return Prepared, (self.folder, self.split)  # a pickled map would be the whole file

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        return f"{index} ({self.split}) of {self.folder}"

    def identity(self) -> bytes:
        """Return a hash of all bytes and labels, which does not depend on the folder."""
        return f"{self.kind} {self._digest}".encode()

    def used_classes(self) -> list[int]:
        return np.unique(self._rows["label"]).tolist()

    def class_numbers(self) -> np.ndarray:
        return self._rows["label"].astype(np.int64)

    def load(self, index: int) -> tuple[ImageLike, int]:
        """Return image and label. Raises ValueError for a JPEG whose checksum is wrong."""
        row = self._rows[index]
        data = self._data(row)
        if self.kind == RAW:
            return data.reshape(row["height"], row["width"], 3), int(row["label"])
        data = data.tobytes()
        if zlib.crc32(data) != row["crc"]:
            raise ValueError("damaged (checksum)")
        return decode(data), int(row["label"])

    def damaged(self) -> Iterator[int | None]:
        """Read every image; yield its index if its checksum is wrong, else None."""
        for index, row in enumerate(self._rows):
            yield index if zlib.crc32(self._data(row)) != row["crc"] else None

    def _data(self, row: np.void) -> np.ndarray:
        start = int(row["offset"])
        return self._bytes[start : start + int(row["size"])]


def open_prepared(root: str, part: Any) -> Prepared:
    """Open the train or val part of the prepared data set in `root`."""
    return Prepared(root, "train" if part.is_train else "val")
