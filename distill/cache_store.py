"""A teacher's answers on disk: written once, replayed in every later run.

Shapes: B batch, C classes, K kept classes. A store has one row for every place of every epoch of
its cycle: in which epoch of the cycle, and how far down that epoch's order. Order, view, mixing
partner and strength all follow from that place, so the row is the answer to the mixed image.
Rows lie in one or two memory-mapped files; processes write different rows of the same files. A
mark for each row is 0 until the row is there and then its checksum: a killed program tears no row,
and those that a crash of the machine tears count as missing. A mark has 4 bytes; beside the 2 of a
hard label it has one, and lets one torn row in 255 pass.
"""

import contextlib
import fcntl
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from base import distributed
from base.errors import UserError, differences

FORMAT = 3
MANIFEST, MARKS = "manifest.json", "marks"
ALL, HARD = "all", "hard"
# How far an answer may be from that of another day: batch size and machine reach the last digits.
CLOSE = {"rtol": 1e-3, "atol": 1e-3}
CLOSE_HALF = {"rtol": 2e-3, "atol": 2e-3}  # of what was rounded to float16 besides


def read_topk(text: str, num_classes: int) -> str | int:
    """Return what a row keeps: "all" (float32 logits), "hard" (the likeliest class), or K.

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
    """Return the files of a store by name, but the marks: type and columns (`mark_kind`)."""
    if keep == ALL:
        return {"logits.f32": ("<f4", num_classes)}
    suffix, kind = ("u32", "<u4") if num_classes > 2**16 else ("u16", "<u2")
    if keep == HARD:
        return {f"classes.{suffix}": (kind, 1)}
    return {f"classes.{suffix}": (kind, keep), "log_probabilities.f16": ("<f2", keep)}


def mark_kind(keep: str | int) -> str:
    """Return the type of a row's mark."""
    return "u1" if keep == HARD else "<u4"


def row_bytes(keep: str | int, num_classes: int) -> int:
    """Return the bytes of a row on disk, its mark included."""
    columns = [*layout(keep, num_classes).values(), (mark_kind(keep), 1)]
    return sum(np.dtype(kind).itemsize * count for kind, count in columns)


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """Return what is stated of the cache in `folder`, or None where there is none.

    Raises UserError for one that cannot be read, or that another version of the program wrote.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        written = found["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable; delete the folder") from error
    if written != FORMAT:
        raise UserError(
            f"--teacher-cache {folder}: of format {written}, this program has {FORMAT}; delete it, "
            "or give a new folder"
        )
    return found


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Wait until no other process is in here, where the file system has locks of folders."""
    place = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


class Store:
    """Rows of a teacher's logits in `folder`, `rows` of them, for `num_classes` classes.

    keep: "all" keeps float32 logits, 4 C bytes a row, and replays them bit for bit; K writes the
        K largest probabilities (float16 logarithms) and their classes, 4 K bytes (6 K from 65,536
        classes on), and spreads what is left evenly over the others; "hard" writes the likeliest
        class, 2 bytes.
    facts: all that determines the answers, as plain values. A store that was written under other
        facts is refused.
    Raises UserError, naming each line that differs, and for a folder that holds something else.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        rows: int,
        num_classes: int,
        keep: str | int,
        facts: Mapping[str, Any],
        may_create: bool,
    ) -> None:
        self.folder, self.rows, self.num_classes, self.keep = Path(folder), rows, num_classes, keep
        manifest = {"format": FORMAT, "rows": rows, "classes": num_classes, "keep": keep, **facts}
        manifest = json.loads(json.dumps(manifest))  # as it will be read again
        if may_create:
            distributed.on_main(lambda: self._create(manifest))
        self._check(manifest)
        self._files = {name: self._map(name) for name in [*self._layout(), MARKS]}

    def _layout(self) -> dict[str, tuple[str, int]]:
        return layout(self.keep, self.num_classes)

    def _columns(self, name: str) -> tuple[str, int]:
        return (mark_kind(self.keep), 1) if name == MARKS else self._layout()[name]

    def size(self) -> int:
        """Return the bytes of all rows on disk, the marks included."""
        return self.rows * row_bytes(self.keep, self.num_classes)

    def _bytes(self, name: str) -> int:
        kind, columns = self._columns(name)
        return self.rows * columns * np.dtype(kind).itemsize

    def _create(self, manifest: Mapping[str, Any]) -> None:
        """Make the files and then the manifest, unless it is there. Of several runs one does."""
        if (self.folder / MANIFEST).exists():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _only_one(self.folder):
                if not (self.folder / MANIFEST).exists():
                    self._fill(manifest)
        except OSError as error:
            raise UserError(
                f"--teacher-cache {self.folder}: {self.size() / 2**20:.0f} MiB cannot be written "
                f"({error.strerror or error})"
            ) from error

    def _fill(self, manifest: Mapping[str, Any]) -> None:
        shadow = self.folder / (MANIFEST + ".tmp")
        own = {*self._layout(), MARKS, shadow.name}  # left where the last attempt was cut short
        if any(file.name not in own for file in self.folder.iterdir()):
            raise UserError(f"--teacher-cache {self.folder}: holds other files; give a new folder")
        try:
            for name in [*self._layout(), MARKS]:
                with open(self.folder / name, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, self._bytes(name))
            shadow.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
            os.replace(shadow, self.folder / MANIFEST)
        except OSError:
            for name in own:  # a full disk has better use for them
                with contextlib.suppress(OSError):
                    (self.folder / name).unlink()
            raise

    def _check(self, manifest: Mapping[str, Any]) -> None:
        found = read_manifest(self.folder)
        if found is None:
            raise UserError(f"--teacher-cache {self.folder}: no cache there; write one first")
        if differ := "; ".join(differences(found, manifest)):
            raise UserError(f"--teacher-cache {self.folder}: refused: {differ}")
        for name in [*self._layout(), MARKS]:
            path, size = self.folder / name, self._bytes(name)
            there = path.stat().st_size if path.exists() else 0
            if there != size:
                raise UserError(
                    f"{path}: {there} bytes, {size} expected; delete {self.folder} and write again"
                )

    def _map(self, name: str) -> np.memmap:
        kind, columns = self._columns(name)
        mode = "r+" if os.access(self.folder / name, os.W_OK) else "r"
        return np.memmap(self.folder / name, dtype=kind, mode=mode, shape=(self.rows, columns))

    def done(self, rows: np.ndarray) -> np.ndarray:
        """Return which of `rows` have been written and are whole, (B,) bool."""
        return self._files[MARKS][rows, 0] == self._checksums(rows)

    def _checksums(self, rows: np.ndarray) -> np.ndarray:
        """Return a number that is not 0 for what lies in each of `rows`, (B,)."""
        parts = [np.ascontiguousarray(part) for part in self._parts(rows)]
        sums = np.zeros(len(rows), np.uint32)
        for i in range(len(rows)):
            for part in parts:
                sums[i] = zlib.crc32(part[i], int(sums[i]))
        most = 2**8 - 1 if self.keep == HARD else 2**32 - 1
        return (sums % most + 1).astype(mark_kind(self.keep))

    def _parts(self, rows: np.ndarray) -> list[np.ndarray]:
        return [self._files[name][rows] for name in self._layout()]

    def missing(self, epochs: int = 1, needed: int | None = None) -> int:
        """Return how many rows have no mark, of the first `needed` of each of `epochs`."""
        marks = self._files[MARKS].reshape(epochs, -1)[:, :needed]
        return marks.size - int(np.count_nonzero(marks))

    def write(self, rows: np.ndarray, logits: Tensor) -> None:
        """Write logits (B, C) into `rows` (B,), and mark them.

        Raises UserError for a teacher that has no number to say, and for files that are read-only.
        """
        logits = logits.detach().float()
        if not logits.isfinite().all():
            raise UserError(
                f"--teacher-cache {self.folder}: the teacher's answer is not finite and not kept; "
                "try --teacher-amp off"
            )
        if not self.is_writable:
            raise UserError(
                f"--teacher-cache {self.folder}: {len(rows)} rows are missing, and the "
                "files cannot be written; change their permissions"
            )
        if self.keep == ALL:
            parts = [logits]
        elif self.keep == HARD:
            parts = [logits.argmax(dim=1, keepdim=True)]
        else:
            values, classes = logits.log_softmax(dim=1).topk(self.keep, dim=1)
            parts = [classes, values]
        for (name, (kind, _)), part in zip(self._layout().items(), parts):
            self._files[name][rows] = part.cpu().numpy().astype(kind)
        self._files[MARKS][rows, 0] = self._checksums(rows)

    def read(self, rows: np.ndarray) -> Tensor:
        """Return logits (B, C), float32 on the CPU, of `rows` (B,), which must be done.

        "hard" gives 0 for the class and -inf for the others, K gives log-probabilities.
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

    def agrees(self, rows: np.ndarray, live: Tensor) -> Tensor:
        """Return which `rows` (B,) hold what the teacher says now, logits (B, C): (B,) bool.

        Logits and logarithms of the K probabilities are compared to `CLOSE`. Classes must be the
        likeliest ones, to that again, so that a tie is broken either way.
        """
        live = live.detach().float().cpu()
        parts = [torch.from_numpy(np.asarray(part)) for part in self._parts(rows)]
        if self.keep == ALL:
            return torch.isclose(parts[0], live, **CLOSE).all(dim=1)
        if self.keep != HARD:
            live = live.log_softmax(dim=1)
        kept = live.gather(1, parts[0].long())  # (B, K)
        best = live.topk(kept.shape[1], dim=1).values
        same = torch.isclose(kept.sort(dim=1, descending=True).values, best, **CLOSE)
        if self.keep != HARD:
            same &= torch.isclose(parts[1].float(), kept.half().float(), **CLOSE_HALF)
        return same.all(dim=1)

    @property
    def is_writable(self) -> bool:
        return all(file.mode != "r" for file in self._files.values())

    def flush(self) -> None:
        """Bring what was written to the disk."""
        for file in self._files.values():
            if file.mode != "r":
                file.flush()
