"""Teacher logits on disk: written once, read in every later run.

Shapes: B batch, C classes, K stored classes. A store has one row for every image of every epoch of
its cycle: the epoch, and the position in that epoch's order. Order, augmentation, mixing partner
and mixing strength all follow from it, so the row belongs to one mixed image.
Rows are in one or two memory-mapped files; processes write different rows of the same files. The
mark of a row is 0 until the row is written and then its checksum. So a row that a crash has cut
off counts as damaged. A mark has 4 bytes. The mark of a hard label has 1 byte and misses one
damaged row in 255.
"""

import contextlib
import fcntl
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from base import distributed, structured
from base.errors import UserError, differences

FORMAT = 4
READABLE = (3, 4)  # 3 does not record the device and type
MANIFEST, MARKS = "manifest.json", "marks"
WRITTEN_ON = "written on"  # recorded in the manifest, not compared
PRECISION, ONEDNN = "teacher precision", " by oneDNN"  # a suffix that format 3 could have
ALL, HARD = "all", "hard"
# How far logits computed again may differ, relative to the largest of their row: another batch
# size, library or device rounds differently. Four units in the last place of a half type.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}
HALF_LOG = 2e-3  # relative, of a log-probability stored as float16


def read_topk(text: str, num_classes: int) -> str | int:
    """Return what a row holds: "all" (float32 logits), "hard" (the most likely class), or K.

    Raises UserError for anything else.
    """
    if text in (ALL, HARD):
        return text
    if not text.isdecimal() or not 1 <= int(text) < num_classes:
        raise UserError(
            f"--teacher-cache-topk {text}: give all, hard, or a number from 1 to {num_classes - 1}"
        )
    return int(text)


def layout(keep: str | int, num_classes: int) -> dict[str, tuple[str, int]]:
    """Return the type and the number of columns of each file of a store, the marks last."""
    if keep == ALL:
        return {"logits.f32": ("<f4", num_classes), MARKS: ("<u4", 1)}
    suffix, kind = ("u32", "<u4") if num_classes > 2**16 else ("u16", "<u2")
    if keep == HARD:
        return {f"classes.{suffix}": (kind, 1), MARKS: ("u1", 1)}
    files = {f"classes.{suffix}": (kind, keep), "log_probabilities.f16": ("<f2", keep)}
    return {**files, MARKS: ("<u4", 1)}


def row_bytes(keep: str | int, num_classes: int) -> int:
    """Return the bytes of a row on disk, its mark included."""
    return sum(np.dtype(kind).itemsize * n for kind, n in layout(keep, num_classes).values())


class Manifest(msgspec.Struct):
    """What a manifest must state; beside it, it has the facts that determine the logits."""

    rows: Annotated[int, msgspec.Meta(ge=1)]
    classes: Annotated[int, msgspec.Meta(ge=1)]
    keep: int | str


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """Return the content of the manifest of the cache in `folder`, or None where there is none.

    Raises UserError for one that cannot be read, or that has another format.
    """
    path = Path(folder) / MANIFEST
    if not os.path.exists(path):  # Path.exists raises for a name that is too long
        return None
    try:
        found = structured.read(path, dict[str, Any])
        written = structured.convert(found.get("format"), int, f"{path}: format")
        if written in READABLE:
            structured.convert(found, Manifest, str(path))
    except UserError as error:
        raise UserError(
            f"{error.line()}; delete the folder, the cache is then written anew"
        ) from error
    if written not in READABLE:
        raise UserError(
            f"--teacher-cache {folder}: of format {written}, this program reads "
            f"{' and '.join(map(str, READABLE))}; delete it, or give a new folder"
        )
    return found


def _compared(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a manifest that must be equal, with the values of this format."""
    found = {name: value for name, value in manifest.items() if name not in ("format", WRITTEN_ON)}
    if isinstance(precision := found.get(PRECISION), str):
        found[PRECISION] = precision.removesuffix(ONEDNN)
    return found


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, where the file system has such locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Store:
    """Rows of a teacher's logits in `folder`, `rows` of them, for `num_classes` classes.

    keep: "all" stores float32 logits, 4 C bytes a row, exactly. K stores the K largest
        log-probabilities as float16 and their classes, 4 K bytes (6 K from 65,536 classes on); the
        rest is spread evenly over the other classes. "hard" stores the most likely class, 2 bytes.
    fingerprint: all that determines the logits, as plain values. A store with another one is
        refused.
    written_on: the device and type that compute the logits; recorded, not compared.
    Raises UserError, naming each entry that differs, and for a folder with other files.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        rows: int,
        num_classes: int,
        keep: str | int,
        fingerprint: Mapping[str, Any],
        may_create: bool,
        written_on: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.rows, self.num_classes, self.keep = Path(folder), rows, num_classes, keep
        self._layout = layout(keep, num_classes)
        manifest = {"format": FORMAT, "rows": rows, "classes": num_classes, "keep": keep}
        manifest |= {**fingerprint, WRITTEN_ON: dict(written_on or {})}
        manifest = json.loads(json.dumps(manifest))  # as it will be read again
        if may_create:
            distributed.on_main(lambda: self._create(manifest))
        self._recorded = self._check(manifest)
        self._files = {name: self._map(name) for name in self._layout}

    @property
    def written_on(self) -> str:
        """The device and type that computed the logits, in words."""
        found = self._recorded.get(WRITTEN_ON) or {"device": "an unrecorded device"}
        return " in ".join(str(found[key]) for key in ("device", "dtype") if key in found)

    def size(self) -> int:
        """Return the bytes of all rows on disk, the marks included."""
        return self.rows * row_bytes(self.keep, self.num_classes)

    def _bytes(self, name: str) -> int:
        kind, columns = self._layout[name]
        return self.rows * columns * np.dtype(kind).itemsize

    def _create(self, manifest: Mapping[str, Any]) -> None:
        """Create the files and then the manifest, unless it exists. One of several runs does it."""
        if os.path.exists(self.folder / MANIFEST):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder):
                if not (self.folder / MANIFEST).exists():
                    self._fill(manifest)
        except OSError as error:
            raise UserError(
                f"--teacher-cache {self.folder}: {self.size() / 2**20:.0f} MiB cannot be written "
                f"({error.strerror or error})"
            ) from error

    def _fill(self, manifest: Mapping[str, Any]) -> None:
        temporary = self.folder / (MANIFEST + ".tmp")
        own = {*self._layout, temporary.name}  # an interrupted attempt leaves them
        if any(file.name not in own for file in self.folder.iterdir()):
            raise UserError(f"--teacher-cache {self.folder}: holds other files; give a new folder")
        try:
            for name in self._layout:
                with open(self.folder / name, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, self._bytes(name))
            temporary.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
            os.replace(temporary, self.folder / MANIFEST)
        except OSError:
            for name in own:  # do not leave a full disk full
                with contextlib.suppress(OSError):
                    (self.folder / name).unlink()
            raise

    def _check(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Return the manifest on disk. Raises UserError if it or the files differ."""
        found = read_manifest(self.folder)
        if found is None:
            raise UserError(
                f"--teacher-cache {self.folder}: no cache there; write one with "
                "--teacher-cache-mode write"
            )
        if differ := "; ".join(differences(_compared(found), _compared(manifest))):
            raise UserError(
                f"--teacher-cache {self.folder}: refused: {differ}; use the first settings, or "
                "another folder"
            )
        for name in self._layout:
            path, size = self.folder / name, self._bytes(name)
            there = path.stat().st_size if path.exists() else 0
            if there != size:
                raise UserError(
                    f"{path}: {there} bytes, {size} expected; delete {self.folder} and write again"
                )
        return found

    def _map(self, name: str) -> np.memmap:
        kind, columns = self._layout[name]
        mode = "r+" if os.access(self.folder / name, os.W_OK) else "r"
        return np.memmap(self.folder / name, dtype=kind, mode=mode, shape=(self.rows, columns))

    def done(self, rows: np.ndarray) -> np.ndarray:
        """Return which of `rows` (B,) are written and undamaged, (B,) bool."""
        return self._files[MARKS][rows, 0] == self._checksums(rows)

    def marked(self, rows: np.ndarray) -> np.ndarray:
        """Return which of `rows` (B,) are written, (B,) bool; they may be damaged."""
        return self._files[MARKS][rows, 0] != 0

    def _checksums(self, rows: np.ndarray) -> np.ndarray:
        """Return the checksums of `rows` (B,), none of them 0, (B,)."""
        parts = [np.ascontiguousarray(part) for part in self._parts(rows)]
        sums = np.zeros(len(rows), np.uint32)
        for i in range(len(rows)):
            for part in parts:
                sums[i] = zlib.crc32(part[i], int(sums[i]))
        most = 2**8 - 1 if self.keep == HARD else 2**32 - 1
        return (sums % most + 1).astype(self._layout[MARKS][0])

    def _parts(self, rows: np.ndarray) -> list[np.ndarray]:
        return [self._files[name][rows] for name in self._layout if name != MARKS]

    def missing(self, epochs: int = 1, needed: int | None = None) -> int:
        """Return how many rows have no mark, of the first `needed` of each of `epochs`."""
        return sum(self.missing_by_epoch(epochs, needed))

    def missing_by_epoch(self, epochs: int, needed: int | None) -> list[int]:
        """Return how many rows of each of `epochs` have no mark, of its first `needed`."""
        marks = self._files[MARKS].reshape(epochs, -1)[:, :needed]
        return (marks.shape[1] - np.count_nonzero(marks, axis=1)).tolist()

    def write(self, rows: np.ndarray, logits: Tensor) -> None:
        """Write logits (B, C) into `rows` (B,), and mark them.

        Raises UserError for logits that are not finite, and for read-only files.
        """
        logits = logits.detach().float()
        if not logits.isfinite().all():
            raise UserError(
                f"--teacher-cache {self.folder}: the teacher's logits are not finite; "
                "try --teacher-amp off"
            )
        if any(file.mode == "r" for file in self._files.values()):
            raise UserError(
                f"--teacher-cache {self.folder}: rows are missing or damaged, and the files "
                "cannot be written; change their permissions"
            )
        if self.keep == ALL:
            parts = [logits]
        elif self.keep == HARD:
            parts = [logits.argmax(dim=1, keepdim=True)]
        else:
            values, classes = logits.log_softmax(dim=1).topk(self.keep, dim=1)
            parts = [classes, values]
        for (name, (kind, _)), part in zip(self._layout.items(), parts):  # all but the marks
            self._files[name][rows] = part.cpu().numpy().astype(kind)
        self._files[MARKS][rows, 0] = self._checksums(rows)

    def read(self, rows: np.ndarray) -> Tensor:
        """Return logits (B, C), float32 on the CPU, of `rows` (B,), which must be done.

        "hard" returns 0 for the class and -inf for the others, K returns log-probabilities.
        """
        parts = [torch.from_numpy(np.asarray(part)) for part in self._parts(rows)]
        if self.keep == ALL:
            return parts[0]
        classes = parts[0].long()
        if self.keep == HARD:
            logits = torch.full((len(classes), self.num_classes), -torch.inf)
            return logits.scatter_(1, classes, 0.0)
        values = parts[1].float()
        left = (1 - values.exp().sum(dim=1, keepdim=True)).clamp_min(1e-7)  # (B, 1)
        rest = (left / (self.num_classes - self.keep)).log()
        return rest.expand(-1, self.num_classes).clone().scatter_(1, classes, values)

    def agrees(self, rows: np.ndarray, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """Return which `rows` (B,) hold the teacher's `logits` (B, C), computed again: (B,) bool.

        dtype: the type in which they were computed, which sets the tolerance. Of K classes the
        log-probabilities are compared. Classes must be the most likely ones within the tolerance,
        so that a tie may be broken either way.
        """
        logits = logits.detach().float().cpu()
        parts = [torch.from_numpy(np.asarray(part)) for part in self._parts(rows)]
        limit = TOLERANCE[dtype] * logits.abs().amax(1, keepdim=True).clamp_min(1.0)  # (B, 1)
        if self.keep == ALL:
            return ((parts[0] - logits).abs() <= limit).all(dim=1)
        if self.keep != HARD:
            logits, limit = logits.log_softmax(dim=1), 2 * limit  # of a logit and of the sum
        stored = logits.gather(1, parts[0].long())  # (B, K)
        best = logits.topk(stored.shape[1], dim=1).values
        same = (stored.sort(dim=1, descending=True).values - best).abs() <= limit
        if self.keep != HARD:
            same &= (parts[1].float() - stored).abs() <= limit + HALF_LOG * stored.abs()
        return same.all(dim=1)

    def flush(self) -> None:
        """Write the files' pages to the disk."""
        for file in self._files.values():
            if file.mode != "r":
                file.flush()
