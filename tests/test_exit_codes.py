"""Exit codes, and the line that is printed when a run ends early."""

import shlex
from pathlib import Path
from signal import SIGINT, SIGTERM

import pytest
import torch

import main
import options
from base import files
from base.errors import Stopped, UserError
from tools import export, report
from training.exit_codes import exit_code_of, resume_command


def stopped(number: int, folder: str) -> None:
    raise Stopped(number, folder=folder)


@pytest.mark.parametrize(("number", "code"), [(SIGTERM, 75), (SIGINT, 130)])
def test_a_stop_prints_the_command_that_continues(number, code, capsys) -> None:
    received: list[int] = []
    argv = ["--output_dir", "a folder", "--resume", "old.pth", "--epochs", "3"]
    assert exit_code_of(lambda: stopped(number, "a folder"), received.append, argv) == code
    assert received == [number]
    command = capsys.readouterr().out.strip().partition("to continue: ")[2]
    program, script, *flags = shlex.split(command)
    assert (program, script) == ("python", "main.py")
    args = options.parse_args(flags).args
    assert (args.output_dir, args.resume, args.epochs) == ("a folder", "auto", 3)


def test_a_stop_without_an_output_folder_says_that_nothing_was_saved(capsys) -> None:
    assert exit_code_of(lambda: stopped(SIGINT, ""), lambda number: None, []) == 130
    assert "nothing was saved, because --output_dir is empty" in capsys.readouterr().out


def test_the_command_under_torchrun_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert resume_command(["--resume=x", "--seed", "1"], "runs/a") == (
        "torchrun --nproc_per_node=4 main.py --seed 1 --output-dir runs/a --resume auto"
    )


def test_ctrl_c_before_training_says_that_nothing_was_written(monkeypatch, capsys) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "parse_and_run", interrupted)
    assert main.run([]) == 130
    assert "no checkpoint was written" in capsys.readouterr().out


def test_a_worker_that_dies_while_a_checkpoint_is_written_is_reported_as_such(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    """torch raises its death from a signal handler, here in the middle of `torch.save`."""
    write, written = files._RecordingFile.write, []

    def die(self: files._RecordingFile, data: bytes) -> int:
        written.append(data)
        if len(data) == 4000:  # the tensor
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        return write(self, data)

    monkeypatch.setattr(files._RecordingFile, "write", die)
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(b"old")
    content = {"weights": torch.ones(1000)}
    with pytest.raises(RuntimeError, match="inline_container"):  # torch hides the first error
        files.save_atomically(content, path)
    assert exit_code_of(lambda: files.save_atomically(content, path), lambda number: None, []) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: a DataLoader worker has died (DataLoader worker (pid 7)")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_unknown_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code_of(lambda: 1 / 0, lambda number: None, [])


LONG_NAME = "9" * 400  # longer than a file name may be


@pytest.mark.parametrize(
    "flags",
    [
        ["--recipe", LONG_NAME],
        ["--finetune", LONG_NAME],
        ["--resume", LONG_NAME],
        ["--resume", f"auto:{LONG_NAME}", "--output_dir", "out"],
        ["--distillation-type", "soft", "--teacher-path", LONG_NAME],
        ["--distillation-type", "soft", "--teacher-cache", LONG_NAME],
        ["--data-set", "PREPARED", "--data-path", LONG_NAME],
        ["--output_dir", LONG_NAME],
        ["--max-bad-steps", LONG_NAME],
    ],
    ids=" ".join,
)
def test_a_name_that_is_too_long_is_one_line(
    flags: list[str], run_inside, image_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--model", "resnet_pico", "--data-path", str(image_folder)]
    small += ["--teacher-model", "resnet_pico", "--batch-size", "4", "--num-workers", "0"]
    result = run_inside(*small, *flags)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(lines) == 1, result.stderr
    assert "999" in lines[0]


@pytest.mark.parametrize("program", [export.main, report.main])
def test_a_name_that_is_too_long_is_one_line_in_the_tools(program, capsys) -> None:
    assert program([LONG_NAME, *(["out"] if program is export.main else [])]) == 2
    assert capsys.readouterr().err.count("error: ") == 1


def test_a_null_character_in_a_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('flags: {output-dir: "a\\0b"}')
    with pytest.raises(UserError, match="--output-dir .*: has a null character"):
        options.parse_args(["--recipe", str(path)])
