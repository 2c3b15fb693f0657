"""A small file system that fills up while a run writes its files."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_faults import taught_by
from test_main import assert_one_line

from base import files, safe_load
from base.errors import UserError
from distill import cache_store
from training import metrics
from training.checkpointer import Checkpointer, load_run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB, in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> None:
    """Write until nothing more goes in."""
    handle = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        while True:
            os.write(handle, bytes(4096))
    except OSError:
        os.close(handle)


@pytest.mark.parametrize(
    ("name", "room", "method"),
    [
        ("out/config.yaml", metrics.RunLog, "config"),
        ("out/log.txt", metrics.RunLog, "epoch"),
        ("out/tensorboard", metrics.RunLog, "image"),
        ("out/checkpoint.pth", Checkpointer, "after_update"),
        ("--teacher-cache", cache_store.Store, "_create"),
    ],
)
def test_a_disk_that_fills_up_is_one_line_and_the_checkpoint_before_loads(
    name: str,
    room: type,
    method: str,
    small_disk: Path,
    small_run,
    small_teacher: Path,
    run_inside,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, flags = small_run
    out = small_disk / "out"
    shutil.copytree(folder, out)
    (out / "log.txt").unlink()  # so that its next line needs a block of its own
    flags = [*flags, "--output_dir", str(out)]
    if method != "after_update":
        flags += ["--checkpoint-steps", "0"]
    if name == "--teacher-cache":
        flags += [*taught_by(small_teacher), "--teacher-cache", str(small_disk / "cache")]
    original = getattr(room, method)

    def fill_first(*args, **options):
        fill(small_disk)
        return original(*args, **options)

    monkeypatch.setattr(room, method, fill_first)
    assert_one_line(run_inside(*flags), name, "cannot be written (No space left on device)")
    (small_disk / "filler").unlink()
    monkeypatch.undo()
    assert load_run(out / "checkpoint.pth")["epoch"] == 0
    if method == "after_update":
        assert run_inside(*flags).returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_is_one_line_and_the_file_before_survives(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        path = disk / "checkpoint.pth"
        files.save_atomically({"w": torch.ones(20_000)}, path, keep=2)
        with pytest.raises(UserError, match="No space left on device.*untouched"):
            files.save_atomically({"w": torch.ones(60_000)}, path, keep=2)
        assert safe_load.read_weights_file(path)["w"].sum() == 20_000
        assert os.listdir(disk) == ["checkpoint.pth"]
        with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        with files.lock_folder(disk):  # what a kill has left may be what fills it
            assert (disk / ".lock").read_text() == ""
    finally:
        subprocess.run(["umount", str(disk)], check=True)
