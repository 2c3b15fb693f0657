"""A teacher's answers on disk: written once, replayed in every later run.

Shapes: B batch, C classes, K kept classes. A store has one row for every place of every epoch of
its cycle: in which epoch of the cycle, and how far down that epoch's order. Order, view, mixing
partner and strength all follow from that place, so the row is the answer to the mixed picture.
Rows lie in one or two memory-mapped files; processes write different rows of the same files. A
mark for each row, of one byte, is 0 until the row is there and then its checksum: a killed program
tears no row, and of those that a crash of the machine tears all but one in 255 count as missing.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import distributed
from errors import UserError, differences

FORMAT = 2
MANIFEST, MARKS = "manifest.json", "marks.u8"
ALL, HARD = "all", "hard"


def read_topk(text: str, num_classes: int) -> str | int:
    """Return what a row keeps: "all" (float32 logits), "hard" (the likeliest class), or K.

    Raises UserError for anything else.
    """
    if text in (ALL, HARD):
        return text
    if not text.isdigit() or not 1 <= int(text) < num_classes:
        raise UserError(
            f"--teacher-cache-topk {text}: give all, hard, or a number from 1 to {num_classes - 1}"
        )
    return int(text)


def layout(keep: str | int, num_classes: int) -> dict[str, tuple[str, int]]:
    """Return the files of a store by name, but the marks: type and columns."""
    if keep == ALL:
        return {"logits.f32": ("<f4", num_classes)}
    suffix, kind = ("u32", "<u4") if num_classes > 2**16 else ("u16", "<u2")
    if keep == HARD:
        return {f"classes.{suffix}": (kind, 1)}
    return {f"classes.{suffix}": (kind, keep), "log_probabilities.f16": ("<f2", keep)}


def row_bytes(keep: str | int, num_classes: int) -> int:
    """Return the bytes of a row on disk, its mark included."""
    columns = layout(keep, num_classes).values()
    return sum(np.dtype(kind).itemsize * count for kind, count in columns) + 1


class Store:
    """Rows of a teacher's logits in `folder`, `rows` of them, for `num_classes` classes.

    keep: "all" writes float32 logits, 4 C bytes a row, and replays them bit for bit; K writes the
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
        return ("u1", 1) if name == MARKS else self._layout()[name]

    def size(self) -> int:
        """Return the bytes of all rows on disk, the marks included."""
        return self.rows * row_bytes(self.keep, self.num_classes)

    def _create(self, manifest: Mapping[str, Any]) -> None:
        if (self.folder / MANIFEST).exists():
            return
        shadow = self.folder / (MANIFEST + ".tmp")
        own = {*self._layout(), MARKS, shadow.name}  # left where the last attempt was cut short
        if self.folder.exists() and any(file.name not in own for file in self.folder.iterdir()):
            raise UserError(f"--teacher-cache {self.folder}: holds other files; give a new folder")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in [*self._layout(), MARKS]:
                kind, columns = self._columns(name)
                with open(self.folder / name, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0,
                                       self.rows * columns * np.dtype(kind).itemsize)  # fmt: skip
            shadow.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
            os.replace(shadow, self.folder / MANIFEST)
        except OSError as error:
            for name in own:  # a full disk has better use for them
                with contextlib.suppress(OSError):
                    (self.folder / name).unlink()
            raise UserError(
                f"--teacher-cache {self.folder}: {self.size() / 2**20:.0f} MiB cannot be written "
                f"({error.strerror or error})"
            ) from error

    def _check(self, manifest: Mapping[str, Any]) -> None:
        path = self.folder / MANIFEST
        if not path.exists():
            raise UserError(f"--teacher-cache {self.folder}: no cache there; write one first")
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not readable; delete the folder") from error
        if differ := "; ".join(differences(found, manifest)):
            raise UserError(f"--teacher-cache {self.folder}: refused: {differ}")
        for name in [*self._layout(), MARKS]:
            kind, columns = self._columns(name)
            size = self.rows * columns * np.dtype(kind).itemsize
            there = (self.folder / name).stat().st_size if (self.folder / name).exists() else 0
            if there != size:
                raise UserError(f"{self.folder / name}: {there} bytes, {size} expected; delete it")

    def _map(self, name: str) -> np.memmap:
        kind, columns = self._columns(name)
        path, mode = self.folder / name, "r+"
        if not os.access(path, os.W_OK):
            mode = "r"
        return np.memmap(path, dtype=kind, mode=mode, shape=(self.rows, columns))

    def done(self, rows: np.ndarray) -> np.ndarray:
        """Return which of `rows` have been written and are whole, (B,) bool."""
        return self._files[MARKS][rows, 0] == self._checksums(rows)

    def _checksums(self, rows: np.ndarray) -> np.ndarray:
        """Return a number from 1 to 255 for what lies in each of `rows`, (B,)."""
        parts = [np.ascontiguousarray(self._files[name][rows]) for name in self._layout()]
        sums = np.zeros(len(rows), np.uint32)
        for i in range(len(rows)):
            for part in parts:
                sums[i] = zlib.crc32(part[i], int(sums[i]))
        return (sums % 255 + 1).astype(np.uint8)

    def missing(self, epochs: int = 1, needed: int | None = None) -> int:
        """Return how many rows have no mark, of the first `needed` of each of `epochs`."""
        marks = self._files[MARKS].reshape(epochs, -1)[:, :needed]
        return marks.size - int(np.count_nonzero(marks))

    def write(self, rows: np.ndarray, logits: Tensor) -> None:
        """Write logits (B, C) into `rows` (B,), and mark them."""
        logits = logits.detach().float()
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
        parts = [torch.from_numpy(np.asarray(self._files[name][rows])) for name in self._layout()]
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

    def flush(self) -> None:
        """Bring what was written to the disk."""
        for file in self._files.values():
            if file.mode != "r":
                file.flush()


def agreement(read: Tensor, live: Tensor, keep: str | int) -> float:
    """Return the share of rows in which what was read is what the teacher says now, 0 to 1.

    read, live: (B, C). All classes are compared to 1e-3 (relative, and absolute), top-K and hard
    labels by the likeliest class.
    """
    if keep == ALL:
        same = torch.isclose(read, live.float().cpu(), rtol=1e-3, atol=1e-3).all(dim=1)
    else:
        same = read.argmax(dim=1) == live.argmax(dim=1).cpu()
    return float(same.float().mean())
