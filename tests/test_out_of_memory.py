"""Too little memory, a failing GPU, and a closed standard output."""

import os
from pathlib import Path
from typing import IO

import programs
import pytest
import torch

import main
import options
from base import files
from base.errors import UserError
from training.exit_codes import user_errors_about_batch_size

GPU = "CUDA out of memory. Tried to allocate 616.00 MiB. GPU 0 has a capacity of 79 GiB"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(GPU),
        torch.OutOfMemoryError(
            f"Caught OutOfMemoryError in pin memory thread for device 0.\nOriginal Traceback (most "
            f"recent call last):\n torch.OutOfMemoryError: {GPU}"
        ),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_too_little_memory_is_one_line_with_what_helps(error, monkeypatch, capsys) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(main, "main", fail)
    assert main.run(["--batch-size", "48"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: --batch-size 48: ")
    for flag in ("--grad-accum-steps", "--grad-checkpointing", "--dry-run"):
        assert flag in lines[0]
    options.parse_args(["--batch-size", "24", "--grad-accum-steps", "2", "--grad-checkpointing"])


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), user_errors_about_batch_size(4):
        raise RuntimeError("shapes differ")


def test_a_gpu_that_fails_while_a_checkpoint_is_saved_is_not_a_full_disk(
    monkeypatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        files.save_atomically({}, tmp_path / "checkpoint.pth")
    assert not isinstance(caught.value, UserError)
    assert not list(tmp_path.iterdir()), "no partial file"


def start(errors: Path, *flags: str) -> tuple[programs.Program, IO[str]]:
    """Start main.py; return it with the pipe of what it prints. Errors go to a file."""
    pipe = errors.with_name("pipe")
    os.mkfifo(pipe)
    errors.touch()
    return programs.Program(flags, pipe, errors), pipe.open()


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--help", "--list-models"])
def test_a_listing_ends_quietly_when_its_reader_leaves(flag: str, tmp_path: Path) -> None:
    run, output = start(tmp_path / "errors", flag)
    output.close()
    assert run.wait(60) == 0 and (tmp_path / "errors").read_text() == ""


@pytest.mark.slow
def test_training_saves_and_ends_when_its_reader_leaves(tmp_path: Path) -> None:
    flags = ["--epochs", "30", "--num-workers", "1", "--log-interval", "1"]
    errors = tmp_path / "errors"
    run, output = start(errors, *flags, "--output_dir", str(tmp_path))
    while "Epoch: [1/30]" not in output.readline():
        pass
    output.close()
    assert run.wait(120) == 75, errors.read_text()
    assert "DataLoader" not in errors.read_text()
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert saved["global_step"] > 0
