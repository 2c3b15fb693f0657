"""One command from a folder of images to a distilled student: its runs, and what a kill leaves."""

import functools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import pytest

import main
from tools import distil, export, report
from training.checkpointer import load_run

SMALL = [
    "--model",
    "deit_pico_distilled_patch8_32",
    "--batch-size",
    "4",
    "--num-workers",
    "0",
    "--device",
    "cpu",
]


def steps_of(*flags: str, out: Path = Path("out")) -> dict[str, list[str]]:
    args, others = distil._parser().parse_known_args(flags)
    return {step.name: list(step.flags) for step in distil.build_steps(args, others, out)}


def value(flags: list[str], name: str) -> str:
    return flags[flags.index(name) + 1]


def test_three_runs_share_the_minutes_and_the_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil.hub, "unreachable_reason", lambda: "")
    found = steps_of("images", "--minutes", "50", "--val-fraction", "0.1", "--unlabelled-path", "u")
    assert list(found) == ["teacher", "labels-only", "distilled"]
    assert [value(flags, "--minutes") for flags in found.values()] == ["20", "15", "15"]
    for flags in found.values():
        assert value(flags, "--data-path") == "images" and value(flags, "--val-fraction") == "0.1"
    assert "--pretrained" in found["teacher"]
    assert value(found["distilled"], "--teacher-model") == value(found["teacher"], "--model")
    assert value(found["distilled"], "--teacher-path") == "out/teacher/checkpoint.pth"
    assert [name for name in found if "--unlabelled-path" in found[name]] == ["distilled"]
    assert "--distillation-type" not in found["labels-only"]


def test_a_teacher_is_trained_from_scratch_without_a_network(monkeypatch, capsys) -> None:
    monkeypatch.setattr(distil.hub, "unreachable_reason", lambda: "no network")
    found = steps_of("images")
    assert value(found["teacher"], "--model") == distil.FROM_SCRATCH
    assert value(found["teacher"], "--input-size") == "32"
    assert "--pretrained" not in found["teacher"]
    assert "from scratch" in capsys.readouterr().out


def test_a_given_teacher_is_used_or_fine_tuned_by_its_classes(
    small_teacher: Path, image_folder: Path, tmp_path: Path
) -> None:
    given = ["--teacher-model", "resnet_pico", "--teacher-path", str(small_teacher)]
    same = steps_of(str(image_folder), *given, "--minutes", "8")
    assert list(same) == ["labels-only", "distilled"]
    assert [value(flags, "--minutes") for flags in same.values()] == ["4", "4"]
    assert value(same["distilled"], "--teacher-path") == str(small_teacher)
    other = tmp_path / "other"
    for name in ("one", "three"):
        (other / "train" / name).mkdir(parents=True)
        for image in (image_folder / "train" / "one").iterdir():
            (other / "train" / name / image.name).write_bytes(image.read_bytes())
    found = steps_of(str(other), *given)
    assert list(found) == ["teacher", "labels-only", "distilled"]
    assert value(found["teacher"], "--finetune") == str(small_teacher)


def test_a_longer_run_has_the_same_flags_and_another_folder(tmp_path: Path) -> None:
    words = ["images", "--minutes", "2", "--out", "runs/a", "--unlabelled-path", "b", "--seed", "3"]
    args, _ = distil._parser().parse_known_args(words)
    found = distil.longer(args, words)
    assert found[:5] == ["images", "--unlabelled-path", "b", "--seed", "3"]
    assert found[5:] == ["--minutes", "8", "--out", "runs/a-long"]


def test_plugins_go_to_all_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil.hub, "unreachable_reason", lambda: "no network")
    (tmp_path / "mine.py").write_text("")
    words = ["images", "--out", str(tmp_path), "--plugin", str(tmp_path / "mine.py")]
    commands = distil.build_commands(*distil._parser().parse_known_args(words))
    assert len(commands) == 5
    for command in commands:
        assert value(command, "--plugin") == str(tmp_path / "mine.py")


def test_a_report_older_than_a_checkpoint_is_written_again(tmp_path: Path) -> None:
    report, run = tmp_path / "report.html", tmp_path / "run"
    run.mkdir()
    assert not distil.is_newer(report, [run])
    report.touch()
    (run / "checkpoint.pth").touch()
    os.utime(report, (100, 100))
    assert not distil.is_newer(report, [run])
    os.utime(run / "checkpoint.pth", (99, 99))
    assert distil.is_newer(report, [run])


def test_weights_of_a_teacher_without_its_model_are_refused(capsys) -> None:
    assert distil.main(["images", "--teacher-path", "x.pth"]) == 2
    assert "give its model with --teacher-model" in capsys.readouterr().err


SLEEPS = """import pathlib, os, sys, time
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""


def test_a_run_ends_with_a_killed_command_and_passes_its_exit_code_on(tmp_path: Path) -> None:
    (tmp_path / "sleeps.py").write_text(SLEEPS)
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    assert distil.run([str(tmp_path / "fails.py")]) == 3
    words, started = [str(tmp_path / "sleeps.py"), str(tmp_path / "started")], tmp_path / "started"
    command = multiprocessing.get_context("fork").Process(target=distil.run, args=(words,))
    command.start()
    wait_until(lambda: started.exists() and started.read_text())
    os.kill(command.pid, signal.SIGKILL)
    command.join()
    status = Path("/proc", started.read_text(), "status")
    wait_until(lambda: not status.exists() or "State:\tZ" in status.read_text())


def wait_until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_command_continues_and_ends_with_a_report_and_an_export(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The runs and tools are called in this process, and the second run is killed in a fork."""
    out = tmp_path / "out"
    argv = [str(image_folder), "--out", str(out), "--epochs", "2", *SMALL, "--checkpoint-steps=1"]
    tools = {"main.py": main.run, "tools/report.py": report.main, "tools/export.py": export.main}
    ran = []

    def run(command: list[str], killed: bool = False) -> int:
        program, *flags = command
        ran.append((program, killed))
        if not (killed and program == "main.py" and str(out / "labels-only") in flags):
            return tools[program](flags)
        process = programs.Program(flags, tmp_path / "log")
        wait_until((out / "labels-only" / "checkpoint.pth").exists)
        process.kill()
        return 128 + signal.SIGKILL

    monkeypatch.setattr(distil, "run", functools.partial(run, killed=True))
    assert distil.main(argv) == 128 + signal.SIGKILL
    assert "the same command continues" in capsys.readouterr().out
    monkeypatch.setattr(distil, "run", run)
    assert distil.main(argv) == 0
    assert [program for program, killed in ran if killed] == ["main.py"] * 2
    finished = ["main.py", "main.py", "tools/report.py", "tools/export.py"]
    assert [program for program, killed in ran if not killed] == finished
    printed = capsys.readouterr().out
    assert not (out / "labels-only" / "previous-1").exists(), "the killed run was resumed"
    for name in ("teacher", "labels-only", "distilled"):
        assert load_run(out / name / "checkpoint.pth")["epoch"] == 1
    runs = json.loads((out / "report.json").read_text())["runs"]
    assert [run["run"] for run in runs] == ["distilled", "labels-only", "teacher"]
    assert (out / "report.html").exists() and (out / "exported" / "model.safetensors").exists()
    check_result(printed, out, image_folder)
    made = [out / "report.json", out / "exported" / "config.json"]
    times = [path.stat().st_mtime_ns for path in made]
    ran.clear()
    assert distil.main(argv) == 0 and not ran, "nothing is left to do"
    check_result(capsys.readouterr().out, out, image_folder)
    assert [path.stat().st_mtime_ns for path in made] == times


def check_result(printed: str, out: Path, image_folder: Path) -> None:
    """Check the table of the report's numbers, the paths and the next commands."""
    found = json.loads((out / "report.json").read_text())
    assert [run["teacher_to"] for run in found["runs"]] == [[], [], ["distilled"]]
    accuracies = {run["run"]: run["accuracy"]["student"] for run in found["runs"]}
    rows = [line.split() for line in printed.splitlines()]
    rows = [row for row in rows if len(row) > 4 and row[0] in accuracies and row[2] == "epoch"]
    assert [row[0] for row in rows] == ["teacher", "labels-only", "distilled"]
    for row in rows:
        accuracy = accuracies[row[0]]
        assert row[3] == f"{accuracy['acc1']:.2f}%"
        assert row[4] == f"{accuracy['acc1_interval'][0]:.1f}"
    example = image_folder / "val" / "one" / "00.png"
    for line in (f"report    {out}/report.html", f"student   {out}/exported"):
        assert line in printed.splitlines()
    assert f"predict.py {out}/exported {example}\n" in printed
    assert f"export.py {out}/distilled {out}/all-formats\n" in printed
    assert printed.rstrip().endswith(f"--epochs 8 --out {out}-long")
