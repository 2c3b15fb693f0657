"""Exit codes, and the line that is printed when a run ends early."""

import io
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGINT, SIGTERM

import programs
import pytest
import torch
from programs import start

import main
import options
from base import files
from base.errors import Stopped, UserError
from models.plugins import load_plugin
from tools import export, report
from training import exit_codes
from training.exit_codes import exit_code_of, resume_command

ROOT = Path(__file__).resolve().parents[1]


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
    said = capsys.readouterr().out
    assert "Stopped by SIGINT before there was anything to save; start the same command" in said


@pytest.mark.parametrize("program", ["main.py", "console.py"])
def test_ctrl_c_while_modules_are_imported_prints_nothing(program: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)\n")
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / program, "--help"]
    found = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "")


def test_a_dead_worker_that_is_noticed_twice_is_one_line(monkeypatch, capsys) -> None:
    """The broken connection raises an error first, and torch's signal handler raises another."""

    def handler(number: int, frame: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    def lose_worker() -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    late = lambda error: signal.raise_signal(signal.SIGCHLD)  # noqa: E731
    monkeypatch.setattr(exit_codes.plugins, "line_of", late)
    before = signal.signal(signal.SIGCHLD, handler)
    try:
        assert exit_code_of(lose_worker, lambda number: None, []) == 1
        assert signal.getsignal(signal.SIGCHLD) is handler
    finally:
        signal.signal(signal.SIGCHLD, before)
    said = capsys.readouterr().err
    assert said.startswith("error: a DataLoader worker has died") and said.count("\n") == 1


def test_a_worker_that_dies_while_a_checkpoint_is_written_is_reported_as_such(
    tmp_path: Path, capsys
) -> None:
    """torch raises its death from a signal handler, here in the middle of `torch.save`."""

    class Dying(io.BytesIO):
        def write(self, data: bytes) -> int:
            if len(data) == 4000:  # the tensor
                raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
            return super().write(data)

    path = tmp_path / "checkpoint.pth"
    path.write_bytes(b"old")

    def save() -> None:
        files.write_atomically(path, lambda _: torch.save(torch.ones(1000), Dying()))

    with pytest.raises(RuntimeError, match="inline_container"):  # torch hides the first error
        save()
    assert exit_code_of(save, lambda number: None, []) == 1
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


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
@pytest.mark.parametrize("caught", [False, True])
def test_a_signal_during_set_up_ends_in_one_line(
    number: int, code: int, caught: bool, monkeypatch, capsys
) -> None:
    """caught: a library turns the exception of the signal handler into an error of its own."""

    def set_up(*_: object) -> None:
        try:
            signal.raise_signal(number)
        except BaseException as error:
            if not caught:
                raise
            raise RuntimeError("could not determine a type") from error

    monkeypatch.setattr(main, "parse_and_run", set_up)
    stopped: list[int] = []
    before = signal.getsignal(number)
    assert main.run([], on_stop=stopped.append) == code
    assert signal.getsignal(number) is before and stopped == [number]
    name = signal.Signals(number).name
    line = f"Stopped by {name} before there was anything to save; start the same command again"
    assert capsys.readouterr().out.splitlines() == [line]


def test_a_signal_while_a_library_waits_ends_the_process(tmp_path: Path) -> None:
    """Python runs no handler while the main thread is inside of a library."""
    code = """
import ctypes, main, signal, threading
libc = ctypes.CDLL(None)
def wait(argv):
    threading.Timer(0.2, lambda: signal.raise_signal(signal.SIGTERM)).start()
    while True:
        libc.sleep(60)
main.parse_and_run = wait
main.run([])
"""
    (tmp_path / "program.py").write_text(code)
    found = programs.run(script=tmp_path / "program.py")
    assert found.returncode == 75, found.stderr
    assert found.stdout.startswith("Stopped by SIGTERM before") and "Traceback" not in found.stderr


def test_a_signal_in_a_destructor_ends_the_process(tmp_path: Path) -> None:
    code = """
import main, signal
class Half:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)
def run(argv):
    Half()
    print("went on")
main.parse_and_run = run
main.run([])
"""
    (tmp_path / "program.py").write_text(code)
    found = programs.run(script=tmp_path / "program.py")
    assert found.returncode == 75 and not found.stderr
    assert found.stdout.startswith("Stopped by SIGTERM before") and "went on" not in found.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "number", "code"),
    [
        ("student: ", signal.SIGINT, 130),
        ("teacher: accuracy", signal.SIGTERM, 75),
        ("Write: [2/", signal.SIGTERM, 75),
        ("Write: [2/", signal.SIGINT, 130),
    ],
)
def test_a_program_that_is_stopped_before_training_leaves_no_worker(
    words: str, number: int, code: int, tmp_path: Path
) -> None:
    flags = ["--distillation-type", "hard", "--num-workers", "2"]
    if "Write" in words:
        flags += ["--teacher-cache", str(tmp_path / "cache"), "--teacher-cache-mode", "write"]
    process = start(flags, tmp_path / "out")
    log = tmp_path / "out.log"
    end = time.monotonic() + 120
    while words not in log.read_text():
        assert process.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.01)
    os.killpg(process.pid, number)
    assert process.wait(30) == code
    text = log.read_text()
    assert "Traceback" not in text and text.count("before there was anything to save") == 1
    end = time.monotonic() + 15  # a worker looks every five seconds whether its parent lives
    while subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True).stdout:
        assert time.monotonic() < end
        time.sleep(0.2)


def test_an_error_in_the_code_of_a_plugin_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def fail():\n    return missing\n")
    load_plugin(str(file))
    module = next(m for m in sys.modules.values() if getattr(m, "__file__", "") == str(file))
    monkeypatch.setattr(main, "parse_and_run", lambda argv: module.fail())
    assert main.run([]) == 2
    line = f"error: --plugin {file}, line 2: NameError: name 'missing' is not defined\n"
    assert capsys.readouterr().err == line
