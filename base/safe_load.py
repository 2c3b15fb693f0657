"""Safe reading of files with weights, from a path or URL.

`read_weights_file` reads every released format. `models/` interprets its keys.
"""

import argparse
import contextlib
import json
import logging
import os
import pathlib
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from base import distributed
from base.errors import CorruptFile, UserError, system_error
from base.files import hash_of, is_finite

_logger = logging.getLogger(__name__)
# Types in files of the first DeiT besides tensors. Neither runs code when it is loaded.
LEGACY_TYPES = [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath]
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")  # torch hub's convention
DATA_HASH = "sha256"  # in the metadata of a .safetensors file: of its tensor data
UNREADABLE = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    KeyError,
    ValueError,
    AttributeError,
    IndexError,
    TypeError,
    ImportError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
)


def _brief(error: BaseException) -> str:
    """Return the reason on one line: the message of the system (disk full) if there is one."""
    if cause := system_error(error):
        return cause.strerror
    return (" ".join(str(error).split()) or type(error).__name__)[:120]


def is_url(source: str) -> bool:
    return urlparse(str(source)).scheme in ("http", "https")


def read_weights_file(source: str | Path) -> dict[str, Any]:
    """Return what a .pth, .pt, .bin or .safetensors file holds, tensors on the CPU.

    source: a path, or an http(s) URL whose file name ends in `-<hash>.pth` as torch hub's do, or
        which ends in `#sha256=<hash>`, or in `#unverified` if none is published. Only
        the first process downloads.
    Nothing in the file is executed: pickles are read with `weights_only=True`, and types that old
    DeiT files need (Namespace, PosixPath) come from an allow-list.
    Raises CorruptFile for a file that is missing, cut short, of another kind, or needs other types,
    and UserError for one that cannot be read or downloaded.
    """
    path = fetch(str(source)) if is_url(str(source)) else Path(source)
    if not os.path.exists(path):  # Path.exists raises for a name that is too long
        raise CorruptFile(f"{source}: not there; give a checkpoint file or URL")
    if path.is_dir():
        raise CorruptFile(f"{source}: is a folder; give a checkpoint file in it")
    if not path.is_file():
        raise CorruptFile(f"{source}: is no file (a pipe or device); give a checkpoint file")
    if path.stat().st_size == 0:
        raise CorruptFile(f"{source}: is empty; copy or download it again")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(content, Mapping):
        raise CorruptFile(f"{source}: holds a {type(content).__name__}, not a dict of weights")
    return dict(content)


def save_safetensors(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a .safetensors file with the SHA-256 of its tensor data in the metadata.

    `read_weights_file` compares it. Files of other programs have none and are not checked.
    """
    from safetensors.torch import save_file

    unknown = "0" * 64
    save_file(dict(weights), path, metadata={"format": "pt", DATA_HASH: unknown})
    _, start = _safetensors_metadata(path)
    with path.open("r+b") as file:
        header = file.read(start).replace(unknown.encode(), hash_of(path, start).encode(), 1)
        file.seek(0)
        file.write(header)


def _safetensors_metadata(path: Path) -> tuple[dict[str, str], int]:
    """Return the metadata of a .safetensors file, and at which byte its tensor data starts."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(size)).get("__metadata__") or {}, 8 + size


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content = load_file(path)
        metadata, start = _safetensors_metadata(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptFile(f"{path}: not a readable safetensors file ({_brief(error)})") from error
    stated = metadata.get(DATA_HASH)
    if stated and stated != hash_of(path, start):
        raise CorruptFile(f"{path}: its data differs from its hash: damaged; copy it again")
    return content


def _read_pickle(path: Path) -> Any:
    try:
        _check_archive(path)
        with torch.serialization.safe_globals(LEGACY_TYPES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old storage classes
            content = torch.load(path, map_location="cpu", weights_only=True)
            _check_tensors(content)
            return content
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UNREADABLE as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(
            r"(?:class|function|type) (?:<class ')?([\w]+(?:\.[\w]+)+)", str(error)
        )
        if wanted:
            raise CorruptFile(
                f"{path}: refused, because reading it would run {wanted.group(1)}; only tensors "
                "and plain values are read. If you trust its source, save it again as safetensors"
            ) from error
        reason = "not a file of torch.save" if "Weights only" in str(error) else _brief(error)
        raise CorruptFile(
            f"{path}: not a readable checkpoint ({reason}); it may be cut short or no "
            "checkpoint at all"
        ) from error


def _check_archive(path: Path) -> None:
    """Raise ValueError for a damaged archive, or one that unpacks to more than its size.

    torch checks neither. It writes a checksum (CRC-32) of every entry and never compresses.
    Files from before torch 1.6 are no archives and have no checksum.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if (
            any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            or sum(entry.file_size for entry in entries) > path.stat().st_size
        ):
            raise ValueError("it would unpack to more than its size")
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"the checksum of {damaged} differs")


def _check_tensors(content: Any) -> None:
    """Raise ValueError for a tensor that is larger than its numbers, sparse or without any.

    A few bytes can be spread over terabytes by strides of 0.
    """
    left, seen = [content], set()
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            if item.layout != torch.strided or item.device.type != "cpu":
                raise ValueError(f"a tensor in it is {item.layout}, on {item.device}")
            if item.numel() * item.element_size() > item.untyped_storage().nbytes():
                raise ValueError("a tensor in it is larger than its numbers")
        elif isinstance(item, Mapping):
            left += item.values()
        elif isinstance(item, list | tuple):
            left += item


@contextlib.contextmanager
def in_one_line(words: str) -> Iterator[None]:
    """Convert any error raised while parsing a file into a UserError that begins with `words`."""
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{words} ({reason})") from error


def check_numbers(
    found: Mapping[str, Any], ours: Mapping[str, Any], *, same_type: bool = False
) -> None:
    """Raise ValueError for values that torch would round, truncate, or load although not finite.

    same_type: require the same dtype; else any floating-point type may replace another one.
    torch itself checks names and shapes.
    """
    for name, own in ours.items():
        value = found.get(name)
        if not isinstance(value, torch.Tensor):
            continue
        compatible = value.is_floating_point() == own.is_floating_point() and not value.is_complex()
        if not compatible or (same_type and value.dtype != own.dtype):
            raise ValueError(f"{name} is {value.dtype}, not {own.dtype}")
        if not is_finite(value) and is_finite(own):
            raise ValueError(f"{name} holds values that are not finite")


def fetch(url: str) -> Path:
    """Return the local copy of a URL, downloaded once and checked against its hash every time.

    With `#unverified` it is checked against the hash of the first download, which is logged.
    Raises UserError for a URL without a hash, a failed download, or another hash.
    """
    parts = urlparse(url)
    name = os.path.basename(parts.path)
    asked = re.fullmatch(r"sha256=([0-9a-fA-F]{8,64})", parts.fragment)
    found = HASH_IN_NAME.search(name)
    unverified = parts.fragment == "unverified"
    if not asked and not found and not unverified:
        raise UserError(
            f"{url}: its name has no hash; add #sha256=<hash of the file>, or download it and "
            "give the path"
        )
    match = asked or found
    prefix = match.group(1).lower() if match else ""
    target = Path(torch.hub.get_dir()) / "checkpoints" / name
    with distributed.main_first():
        if not target.exists():
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(
                    url.partition("#")[0], str(target), hash_prefix=prefix or None, progress=False
                )
            except (OSError, ValueError) as error:
                raise UserError(f"{url}: cannot be downloaded ({_brief(error)})") from error
            except RuntimeError as error:  # torch raises it for another hash
                raise UserError(f"{url}: refused, {_brief(error)}") from error
        digest = hash_of(target)
        if unverified and not match:
            prefix = _first_hash(target, digest)
    if not digest.startswith(prefix):
        raise UserError(f"{target}: its sha256 is {digest[:16]}..., {prefix} was asked; delete it")
    return target


def fingerprint(source: str) -> str:
    """Return the sha256 of a weights file or URL. Raises UserError where it is not there."""
    path = fetch(source) if is_url(source) else Path(source)
    if not path.is_file():
        raise UserError(f"{source}: not there; its hash tells which teacher it is")
    return hash_of(path)


def _first_hash(target: Path, digest: str) -> str:
    """Return the hash that a file without a published one had when it was first used."""
    note = target.with_name(target.name + ".sha256")
    if not note.exists():
        note.write_text(digest)
        _logger.warning("%s: no hash is published for it; its sha256 is %s", target.name, digest)
    return note.read_text().strip()
