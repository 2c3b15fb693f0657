"""experiments/fuzz.py: it finds each kind of unplanned end, and its unchanged inputs run."""

import os
import random
import sys
import time
from pathlib import Path

import pytest

from experiments import fuzz, fuzz_inputs
from experiments.fuzz_inputs import CANARY, COMMAND, KINDS, Input


def end_with(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


ENDS = {
    "done": (lambda argv: 0, ""),
    "user error": (lambda argv: end_with("error: --lr: nan", 2), ""),
    "two lines": (lambda argv: end_with("error: a\nerror: b", 2), "exit code 2 with 2 error lines"),
    "silent fault": (lambda argv: end_with("", 1), "exit code 1 with 0 error lines"),
    "uncaught": (lambda argv: 1 // 0, "a traceback"),
    "another code": (lambda argv: 3, "exit code 3"),
    "killed": (lambda argv: os.kill(os.getpid(), 9), "exit code -9"),
    "frozen": (lambda argv: time.sleep(60), "ran longer than 0.5 s"),
    "executed": (lambda argv: os.system(COMMAND), "code in the input was executed"),
}


@pytest.mark.parametrize("name", ENDS)
def test_every_unplanned_end_is_found(name: str, tmp_path: Path, monkeypatch) -> None:
    program, problem = ENDS[name]
    monkeypatch.setitem(fuzz.PROGRAMS, "main.py", program)
    found, _ = fuzz.run_input(Input([]), tmp_path, limit_s=0.5, as_program=False)
    assert found == problem
    assert (tmp_path / CANARY).exists() == (name == "executed")


def test_a_run_that_still_trains_must_end_after_ctrl_c(tmp_path: Path, monkeypatch) -> None:
    def train(argv: list[str]) -> int:
        print("Epoch: [1/300]", flush=True)
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            return int(argv[0])
        return 0

    monkeypatch.setitem(fuzz.PROGRAMS, "main.py", train)
    for code, problem in (("130", ""), ("0", "exit code 0")):
        found = fuzz.run_input(Input([code]), tmp_path, limit_s=0.5, as_program=False)
        assert found == (problem, "still training")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    fuzz.write_seeds(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["recipes", "configs", "caches", "data", "logs", "checkpoints"])
def test_unchanged_inputs_end_with_exit_code_0(kind, seeds, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fuzz_inputs, "mutate_bytes", lambda rng, data: data)
    monkeypatch.setattr(fuzz_inputs, "mutate_plain", lambda rng, value, leaves: value)
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        request = KINDS[kind](random.Random(number), seeds, folder)
        found = fuzz.run_input(request, folder, limit_s=60, as_program=False)
        assert found == ("", "exit code 0"), fuzz.output_of(folder)


def test_an_input_depends_on_seed_kind_and_number_alone(tmp_path: Path) -> None:
    requests = []
    for name in "ab":
        (tmp_path / name).mkdir()
        requests.append(KINDS["flags"](random.Random("0 flags 7"), tmp_path, tmp_path / name))
    assert requests[0] == requests[1]


def test_two_processes_end_together(seeds: Path, tmp_path: Path) -> None:
    address = ["--dist-url", f"file://{tmp_path / 'meeting'}", "--dist-timeout", "1"]
    words = [*fuzz_inputs.TRAIN, "--data-path", str(seeds / "images"), *address]
    for more, end in (([], "exit code 0"), (["--teacher-cache", "cache"], "exit code 2")):
        request = Input([*words, *more], processes=2)
        found = fuzz.run_input(request, tmp_path, limit_s=60, as_program=False)
        assert found == ("", end), fuzz.output_of(tmp_path)
        (tmp_path / "meeting").unlink(missing_ok=True)
