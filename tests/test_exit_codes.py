"""Exit codes, and the line that is printed when a run ends early."""

import shlex
from signal import SIGINT, SIGTERM

import pytest

import main
import options
from base.errors import Stopped
from training.exit_codes import exit_code_of, resume_command


def stopped(number: int, saved: bool) -> None:
    raise Stopped(number, saved=saved)


@pytest.mark.parametrize(("number", "code"), [(SIGTERM, 75), (SIGINT, 130)])
def test_a_stop_prints_the_command_that_continues(number, code, capsys) -> None:
    received: list[int] = []
    argv = ["--output_dir", "a folder", "--resume", "old.pth", "--epochs", "3"]
    assert exit_code_of(lambda: stopped(number, True), received.append, argv) == code
    assert received == [number]
    command = capsys.readouterr().out.strip().partition("to continue: ")[2]
    program, script, *flags = shlex.split(command)
    assert (program, script) == ("python", "main.py")
    args = options.parse_args(flags).args
    assert (args.output_dir, args.resume, args.epochs) == ("a folder", "auto", 3)


def test_a_stop_without_an_output_folder_says_that_nothing_was_saved(capsys) -> None:
    assert exit_code_of(lambda: stopped(SIGINT, False), lambda number: None, []) == 130
    assert "nothing was saved, because there is no --output_dir" in capsys.readouterr().out


def test_the_command_under_torchrun_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert resume_command(["--resume=x", "--seed", "1"]) == (
        "torchrun --nproc_per_node=4 main.py --seed 1 --resume auto"
    )


def test_ctrl_c_before_training_says_that_nothing_was_written(monkeypatch, capsys) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "parse_and_run", interrupted)
    assert main.run([]) == 130
    assert "no checkpoint was written" in capsys.readouterr().out
