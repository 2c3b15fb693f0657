"""Atomic writes, folder locks, and hashes of files."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import logging
import os
import shutil
import socket
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from base.errors import UserError, system_error

_logger = logging.getLogger(__name__)
LOCK = ".lock"  # in a run's folder
PATIENCE_S, PATIENCE_AFAR_S = 10.0, 120.0
MOST_WORDS = 300_000  # the largest models have some ten thousand parameters


def is_finite(value: torch.Tensor) -> bool:
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def hash_of(path: Path, start: int = 0) -> str:
    """Return the sha256 of a file from byte `start` on, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(
    path: Path, write: Callable[[Any], object], *, keep: int = 1, copy_to: Path | None = None
) -> None:
    """Call `write(file)` so that `path` is at every moment the old file or the complete new one.

    keep: number of versions to keep, with this one; older ones are `aged(path, 1)` and so on.
    copy_to: second name of the same content, written before `path` changes.
    Raises UserError if it cannot be written (disk full, no permission); the old files stay. Other
    errors of `write` are raised unchanged.
    """
    shadow = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(shadow, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if copy_to is not None:
            _link(shadow, copy_to)
        for age in range(keep - 1, 1, -1):
            if aged(path, age - 1).exists():
                os.replace(aged(path, age - 1), aged(path, age))
        if keep > 1 and path.exists():
            _link(path, aged(path, 1))
        os.replace(shadow, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        failed = system_error(error)
        if failed is None or "CUDA" in str(error):  # not the disk, or a dead DataLoader worker
            raise
        raise UserError(
            f"{path}: cannot be written ({failed.strerror}); the file from before is untouched"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            shadow.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Replace the text of a file; see `write_atomically`."""
    write_atomically(path, lambda file: file.write(text.encode()))


def save_atomically(
    content: Any, path: str | Path, *, keep: int = 1, copy_to: Path | None = None
) -> None:
    """Write `content` with torch.save; see `write_atomically`."""
    write_atomically(Path(path), lambda file: torch.save(content, file), keep=keep, copy_to=copy_to)


def outline(content: Any) -> str:
    """Return a hash of the keys, the plain values, and the types and shapes of tensors.

    The archive's checksums cover the numbers in tensors. Raises ValueError for more than
    `MOST_WORDS` keys and values, which a few nested lists can contain.
    """
    digest, left, count = hashlib.sha256(), [content], 0
    while left:
        item, count = left.pop(), count + 1
        if count > MOST_WORDS:
            raise ValueError("more keys and values than any run has")
        if isinstance(item, torch.Tensor):
            word = f"{item.dtype} {tuple(item.shape)}"
        elif isinstance(item, Mapping):
            word = f"mapping of {len(item)}"
            left += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple):
            word = f"sequence of {len(item)}"
            left += item
        else:
            word = repr(item)
        digest.update(word.encode() + b"\n")
    return digest.hexdigest()


def aged(path: Path, age: int) -> Path:
    """Return the name of the file that was `path` before the last `age` writes."""
    return path.with_name(f"{path.stem}-{age}{path.suffix}") if age else path


def _link(source: Path, target: Path) -> None:
    """Link `target` to `source`, or copy it where links are not possible; replace an old one."""
    shadow = source.with_name(f".{target.name}.{os.getpid()}.tmp")
    shadow.unlink(missing_ok=True)
    try:
        os.link(source, shadow)
    except OSError:
        shutil.copyfile(source, shadow)
        with open(shadow, "rb") as file:
            os.fsync(file.fileno())
    os.replace(shadow, target)
    shadow.unlink(missing_ok=True)  # renaming one name of a file to another does nothing


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: str | Path) -> None:
    """Make the output folder. Raises UserError if it cannot be made or written to."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder, f".probe.{os.getpid()}")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--output_dir {folder}: cannot be written to ({error.strerror}); choose another"
        ) from error


def lock_folder(folder: Path) -> IO[str]:
    """Return an open file that locks `folder`: no other process can write a run there.

    The kernel releases the lock when the process ends. This waits `PATIENCE_S` for a process on
    this machine. It waits longer for one on another machine, because a file server releases the
    lock of a dead machine late. A restarted Slurm job takes over the lock of its earlier start.
    Without locks in the file system, the file is returned unlocked. Raises UserError if the folder
    stays locked, and OSError if the file cannot be opened.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    me = f"process {os.getpid()}{f' of job {job}' * bool(job)} on {socket.gethostname()}"
    file = (folder / LOCK).open("a+", errors="replace")
    started, warned = time.monotonic(), False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return file
        file.seek(0)
        holder = file.read().strip() or "another process"
        here = holder.endswith(f" {socket.gethostname()}")
        patience = PATIENCE_S if here else PATIENCE_AFAR_S
        if time.monotonic() - started > patience:
            if job and not here and f" of job {job} on " in holder:  # a job runs once at a time
                _logger.warning("%s: taken over from %s", folder, holder)
                break
            file.close()
            raise UserError(
                f"--output_dir {folder}: {holder} writes its run there; end it, or choose another"
                + f"; if its machine is dead, remove {LOCK} there" * (not here)
            )
        if not warned:
            _logger.warning("%s: waiting for %s, which writes its run there", folder, holder)
            warned = True
        time.sleep(0.2)
    with contextlib.suppress(OSError):  # a full disk has the lock without the name
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"{me}\n".encode())
    return file


def to_plain(value: Any) -> Any:
    """Return `value` in types that `weights_only=True` reads: dicts, lists, numbers, tensors."""
    if isinstance(value, Namespace):
        return to_plain(vars(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k if isinstance(k, str | int) else str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item) for item in value]
    return value if isinstance(value, torch.Tensor | str | int | float | None) else str(value)
