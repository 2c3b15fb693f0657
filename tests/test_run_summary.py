"""What a training run prints: on a terminal, and redirected."""

import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import main
from base import terminal
from checks.run_summary import RunSummary, Speed, accuracy_in_words, agreement
from tools import export, predict, report

TOOLS = {"predict.py": predict, "report.py": report, "export.py": export}
CONTRACT = (
    r"\* Acc@1 [\d.]+ Acc@5 [\d.]+ loss [\d.]+",
    r"Accuracy of the network on the 12 test images: [\d.]+%",
    r"Max accuracy: [\d.]+%",
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(text: str) -> list[str]:
    """Return the lines that stay on a terminal."""
    lines = [""]
    for part in re.split("(\n|\r|\033\\[K)", text):
        if part == "\n":
            lines.append("")
        elif part == "\r":
            lines[-1] = ""  # every live line ends with an erasure
        elif part != "\033[K":
            lines[-1] += part
    return lines


@pytest.fixture(scope="module")
def flags(folder_flags: list[str], small_teacher: Path) -> list[str]:
    words = ["--resume", "", "--num-workers", "0", "--checkpoint-steps", "0"]
    teacher = ["--distillation-type", "hard", "--teacher-model", "resnet_pico"]
    return [*folder_flags, *words, *teacher, "--teacher-path", str(small_teacher)]


@pytest.fixture(scope="module")
def on_terminal(flags: list[str], tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of a run that was started in a terminal of 80 columns, and its lines."""
    folder, tty = tmp_path_factory.mktemp("terminal") / "run", Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        patch.setattr(sys, "stdout", tty)
        assert main.run([*flags, "--output_dir", str(folder)]) == 0
    return folder, screen(tty.getvalue())


def test_a_terminal_has_a_summary_a_row_per_epoch_and_the_result_in_80_columns(on_terminal) -> None:
    folder, lines = on_terminal
    assert lines[0] == lines[-2] == f"output: {folder}" and lines[-1] == ""
    for start in (
        "data ",
        "student ",
        "teacher ",
        "device ",
        "plan ",
        "result ",
        "speed ",
        "files ",
    ):
        assert any(line.startswith(start) for line in lines), start
    (header,) = [
        number for number, line in enumerate(lines) if line.split()[:2] == ["epoch", "loss"]
    ]
    rows = [line.split() for line in lines[header + 1 : header + 3]]
    assert [row[0] for row in rows] == ["1/2", "2/2"] and {len(row) for row in rows} == {9}
    assert all(len(line) < 80 for line in lines if str(folder) not in line), lines
    assert not any(re.fullmatch(pattern, line) for pattern in CONTRACT for line in lines)


def test_the_log_file_has_every_line_of_the_run_on_the_terminal(on_terminal) -> None:
    lines = (on_terminal[0] / terminal.LOG).read_text().splitlines()
    stamped = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    for pattern in (
        *CONTRACT,
        r"Epoch: \[1/2\] \[1/\d+\].*memory.*",
        "output: .*",
        "data: train.*",
    ):
        assert any(re.fullmatch(stamped + pattern, line) for line in lines), pattern
    assert sum("Max accuracy" in line for line in lines) == 2, "each line once"


def test_redirected_output_keeps_its_lines_and_has_no_table(flags, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    assert main.run([*flags, "--output_dir", str(folder)]) == 0
    out = capsys.readouterr().out
    for pattern in CONTRACT:
        assert len(re.findall(f"^{pattern}$", out, re.MULTILINE)) >= 2, pattern
    assert "\r" not in out and "\033" not in out
    logged = [line[20:] for line in (folder / terminal.LOG).read_text().splitlines()]
    assert [line for line in out.splitlines() if line not in logged] == []


def test_the_next_commands_work_when_copied(on_terminal, tmp_path, monkeypatch, capsys) -> None:
    lines = on_terminal[1]
    commands = [shlex.split(line) for line in lines if re.match(r"  .*python\S* .*tools/", line)]
    assert [Path(words[1]).name for words in commands] == list(TOOLS)
    for _, path, *words in commands:
        assert Path(path).is_file()
        assert TOOLS[Path(path).name].main(words) == 0, capsys.readouterr().err
    assert (on_terminal[0] / "report.html").exists()
    assert (on_terminal[0] / "exported" / "model.safetensors").exists()


def test_a_run_on_images_without_files_writes_an_example(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    words = ["--epochs", "1", "--num-workers", "0", "--no-model-ema", "--output_dir", str(folder)]
    assert main.run(words) == 0
    (command,) = [line for line in capsys.readouterr().out.splitlines() if "predict.py" in line]
    assert shlex.split(command)[-1] == str(folder / "example.png")
    assert predict.main(shlex.split(command)[2:]) == 0


def test_log_txt_has_time_and_rate(on_terminal) -> None:
    for line in (on_terminal[0] / "log.txt").read_text().splitlines():
        values = json.loads(line)
        assert list(values)[0] == "train_loss" and 0 < values["time_s"] < 600
        assert values["images_per_s"] > 0


def test_the_rate_counts_the_images_of_the_rest_of_a_resumed_epoch(monkeypatch) -> None:
    times = iter([10.0, 12.0, 15.0])
    monkeypatch.setattr("checks.run_summary.time.perf_counter", lambda: next(times))
    speed = Speed(images_per_step=8, steps=5)
    speed.start(done=2)
    speed.end_training()
    assert speed.values() == {"time_s": 5.0, "images_per_s": 12.0}


def test_a_terminal_prints_what_is_held_out_and_long_recipe_lines_in_80_columns(
    image_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    tty = Terminal()
    monkeypatch.setattr(sys, "stdout", tty)
    words = ["--data-path", str(image_folder / "train"), "--model", "deit_pico_distilled_patch4_32"]
    words += ["--epochs", "1", "--num-workers", "0", "--batch-size", "4"]
    assert main.run([*words, "--output_dir", str(tmp_path / "run")]) == 0
    lines = screen(tty.getvalue())
    held_out = "20 % of each class are held out for validation, by a fixed seed"
    assert f"{'':<10}{held_out}" in lines
    assert any("20 training and 4 validation images, 2 classes" in line for line in lines)
    assert any(line.startswith("recipe auto: ") for line in lines)
    assert all(len(line) < 80 for line in lines if str(tmp_path) not in line), lines


def test_agreement_and_interval_by_hand() -> None:
    one, other = torch.tensor([0, 1, 2, 2]), [torch.tensor([0, 1, 1]), torch.tensor([2])]
    assert agreement([one], other) == 75
    assert agreement([], other) is None
    words = accuracy_in_words({"acc1": 80.0, "count": 10})
    assert words == "80.00 % of 10 images right (95 % interval 49.0 to 94.3)"


def test_an_epoch_without_evaluation_has_dashes(monkeypatch) -> None:
    tty = Terminal()
    monkeypatch.setattr(sys, "stdout", tty)
    speed = Speed(8, 5)
    speed.start(0)
    speed.end_training()
    summary = RunSummary(
        [], "", speed, epochs=4, first_epoch=0, teacher={}, teacher_predictions=(), example=""
    )
    with terminal.table(True):
        summary.print_epoch(0, 1.5, {}, {}, -1.0)
    (row,) = [line for line in screen(tty.getvalue()) if line]
    assert row.split()[:6] == ["1/4", "1.5000", "-", "-", "-", "-"]


def test_a_warning_replaces_the_live_line_and_goes_to_the_log_file(tmp_path, monkeypatch) -> None:
    import logging

    tty = Terminal()
    monkeypatch.setattr(sys, "stdout", tty)
    with terminal.table(True):
        logging.getLogger("x").warning("careful")
        terminal.open_log(tmp_path)
        terminal.live("Epoch: [1/2]")
        terminal.important("a line")
    assert [line for line in screen(tty.getvalue()) if line] == ["a line"]
    text = (tmp_path / terminal.LOG).read_text()
    assert "careful" in text and "a line" in text and "Epoch" not in text
