"""The folder of a run without --output-dir."""

import json
import re
import shlex
from pathlib import Path

import pytest

import main
import options
from base.errors import Stopped, UserError
from training import run_folder

MODEL = "deit_pico_distilled_patch4_32"


@pytest.fixture
def run_flags(image_folder: Path) -> list[str]:
    """The flags of a run of one epoch."""
    words = f"--model {MODEL} --batch-size 4 --epochs 1 --num-workers 0 --no-model-ema".split()
    return [*words, "--data-path", str(image_folder)]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def folder_of(*flags: str) -> str:
    with run_folder.build_settings(options.parse_args(flags).args) as settings:
        Path(settings.output_dir, "checkpoint.pth").touch()
    return settings.output_dir


def test_a_run_without_a_folder_is_saved_below_runs_and_its_first_and_last_line_say_so(
    run_flags: list[str], image_folder: Path, capsys
) -> None:
    assert main.run(run_flags) == 0
    lines = capsys.readouterr().out.splitlines()
    (folder,) = Path("runs").iterdir()
    assert re.fullmatch(rf"{image_folder.name}-{MODEL}-\d{{8}}-\d{{6}}", folder.name)
    assert lines[0] == lines[-1] == f"output: {folder}"
    assert {"checkpoint.pth", "best_checkpoint.pth", "log.txt", "config.yaml"} <= {
        path.name for path in folder.iterdir()
    }


@pytest.mark.parametrize("flags", [["--eval"], ["--check"], ["--dry-run"], ["--list-models"]])
def test_a_command_that_does_not_train_makes_no_folder(flags: list[str]) -> None:
    assert main.run(flags) == 0
    assert not Path("runs").exists()


@pytest.mark.parametrize("flags", [["--output_dir", ""], ["--output-dir="]])
def test_an_empty_folder_name_saves_nothing(flags: list[str], run_flags, capsys) -> None:
    assert main.run([*run_flags, *flags]) == 0
    assert list(Path().iterdir()) == []
    assert "nothing is saved" in capsys.readouterr().out.splitlines()[-1]


def test_two_runs_that_begin_in_one_second_have_two_folders(monkeypatch) -> None:
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: "20260102-030405")
    first, second = (folder_of("--data-path", "x") for _ in range(2))
    assert second == f"{first}-2"


def test_the_name_has_the_last_part_of_data_and_model() -> None:
    name = folder_of("--data-path", "a/my images/", "--model", "hf-hub:timm/vit_tiny.x")
    assert re.fullmatch(r"runs/my-images-vit_tiny\.x-\d{8}-\d{6}", name)


def test_a_folder_train_has_the_name_of_the_one_above() -> None:
    assert run_folder.data_name("a/pets/train", "IMNET") == "pets"
    assert run_folder.data_name("a/pets/", "IMNET") == "pets"
    assert run_folder.data_name("", "DIGITS") == "digits"


def test_a_run_that_fails_before_its_first_checkpoint_leaves_no_folder(capsys) -> None:
    assert main.run(["--data-path", "missing"]) == 2
    assert list(Path("runs").iterdir()) == []


def test_resume_auto_continues_the_newest_run_of_this_data_and_model(monkeypatch) -> None:
    dates = iter(["20260102-030405", "20260102-030406"])
    monkeypatch.setattr(run_folder.time, "strftime", lambda form: next(dates))
    folder_of("--data-path", "x", "--model", "deit_tiny_patch16_224")
    newest = folder_of("--data-path", "x", "--model", "deit_tiny_patch16_224")
    flags = ["--data-path", "x", "--model", "deit_tiny_patch16_224", "--resume", "auto"]
    assert folder_of(*flags) == newest


def test_the_printed_resume_command_continues_the_run(run_flags, monkeypatch, capsys) -> None:
    from training.checkpointer import Checkpointer

    end_epoch = Checkpointer.end_epoch

    def stop_after_epoch(self: Checkpointer, acc1: float) -> None:
        end_epoch(self, acc1)
        raise Stopped(15, folder=str(self.folder))

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "end_epoch", stop_after_epoch)
        assert main.run([*run_flags, "--epochs", "2"]) == 75
    command = capsys.readouterr().out.strip().partition("to continue: ")[2]
    assert main.run(shlex.split(command)[2:]) == 0
    (folder,) = Path("runs").iterdir()
    epochs = [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()]
    assert epochs == [0, 1]


def test_a_file_named_runs_is_one_line(capsys) -> None:
    Path("runs").touch()
    with pytest.raises(UserError, match="cannot be"):
        folder_of("--data-path", "x")


@pytest.mark.slow
def test_two_processes_use_the_folder_that_the_first_has_made(
    run_torchrun, run_flags, tmp_path: Path
) -> None:
    result = run_torchrun(2, *run_flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "checkpoint.pth").exists()
    assert result.stdout.count("output: ") == 2
