"""The benchmarks: every part runs, and its numbers are computed as they should be."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import IO, Any

import programs
import pytest
import torch

from base.errors import UserError
from data import sources
from experiments import bench_loader, bench_race, benchmark, compare, kill_sweep
from experiments.bench_steps import Batches, Case, Ours


def test_a_race_warms_up_and_rotates_the_order() -> None:
    ran = []
    entries = {name: lambda steps, name=name: ran.append(name) or 1.0 for name in "abc"}
    seconds = bench_race.race(entries, 3, 5)
    assert "".join(ran) == "bcacababcbcacab"
    assert seconds == {name: [1.0] * 3 for name in "abc"}


class Counter:
    def __init__(self, start: int) -> None:
        self.at = start

    def __call__(self, steps: int) -> float:
        if steps == 7:
            os._exit(7)
        self.at += steps
        return float(os.getpid())


def test_contestants_run_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_race.OwnProcess.method == "spawn"
    monkeypatch.setattr(bench_race.OwnProcess, "method", "fork")  # without the imports of torch
    both = [bench_race.OwnProcess(Counter, start) for start in (10, 20)]
    assert len({each(3) for each in both} | {os.getpid()}) == 3
    assert [each.attribute("at") for each in both] == [13, 23]
    with pytest.raises(AttributeError, match="missing"):
        both[0].attribute("missing")
    with pytest.raises(UserError, match="process of a contestant ended"):
        both[1](7)
    both[0].end()
    with pytest.raises(TypeError):
        bench_race.OwnProcess(Counter)


def test_a_ratio_is_computed_within_each_round() -> None:
    assert bench_race.ratio([1, 2, 4], [2, 6, 4]) == (2, 1.5, 2.5)  # of 2, 3 and 1
    columns = {"x a": lambda _: "a", "x itself": lambda name: name, "x c": lambda _: "c"}
    row = bench_race.table({"a": [0.002, 0.004], "b": [0.001, 0.002]}, columns)[-1]
    assert row == "| b | 2.00 (2.00-2.00) | 1 |  | 1.50 (1.25-1.75) |"


def test_the_stopwatch_leaves_out_the_lead_and_the_first_step(monkeypatch) -> None:
    times = iter([0, 100, 101, 110, 120, 130])
    monkeypatch.setattr(bench_race.time, "perf_counter", lambda: next(times))
    watch = bench_race.Stopwatch(torch.device("cpu"), steps=2, lead=3)
    for _ in range(6):
        watch.mark()
    assert watch.per_step() == 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rounds 1", "at least 2"),
        ("--steps 0", "at least 2, --steps"),
        ("--teacher resnet_pico", "one for each --teacher"),
        ("--student vit_tiny_patch16_224", "no distillation head"),
        ("--parts loader --json nowhere/found.json", "--json nowhere/found.json: No such"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_measured(flags, message, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags.split()])
    with pytest.raises(UserError, match=message):
        benchmark.main()


def test_the_break_even_is_a_number_of_runs() -> None:
    text = benchmark.break_even(0.010, 0.020, 0.012)
    assert "10.0 ms" in text and "saves 8.0 ms" in text and "1.25 runs" in text
    assert "saves nothing" in benchmark.break_even(0.010, 0.020, 0.021)


@pytest.mark.slow
def test_the_loaders_rows_are_measured() -> None:
    found = bench_loader.measure("", 2, 2)
    rows = found["seconds"]
    assert len(rows) == 12 and all(len(each) == 2 and min(each) > 0 for each in rows.values())
    assert any(line.startswith("| timm again |") for line in found["lines"])


@pytest.mark.slow
def test_the_timed_steps_start_after_the_batches_that_workers_have_ready(
    image_folder, tmp_path
) -> None:
    student, cpu = "deit_pico_distilled_patch8_32", torch.device("cpu")
    case = Case(student, "resnet_pico", 32, 4, cpu, tmp_path)
    data = ["--data-set", "IMNET", "--data-path", str(image_folder), "--num-workers", "1"]
    ours = Ours(case, "fp32", "none", flags=data)
    seen = []
    ours.training.model.register_forward_pre_hook(lambda *_: seen.append(1))
    assert ours(2) > 0
    assert len(seen) == 2 + 2 + 1, "two batches that the worker has ready, two, and one more"
    assert len(list(Batches(ours.loaders, 7))) == 7, "one epoch has six batches"


@pytest.mark.slow
def test_every_row_of_the_steps_runs_and_the_cache_needs_no_network(
    capsys, monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr(benchmark, "OwnProcess", InProcess)
    words = f"--student deit_tiny_distilled_patch16_224 --teacher resnet_pico --img-size 32 \
        --batch-size 4 --rounds 2 --steps 1 --parts step --precision bf16 \
        --json {tmp_path}/found.json"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words.split()])
    assert benchmark.main() == 0
    out = capsys.readouterr().out
    for row in ("reference, bf16", "timm, bf16", "live, bf16", "no teacher again, bf16"):
        assert f"| {row} |" in out, row
    assert "Cache, bf16: writing takes" in out
    found = json.loads((tmp_path / "found.json").read_text())["step resnet_pico"]
    assert len(found["seconds"]) == 6
    assert all(len(each) == 2 and min(each) > 0 for each in found["seconds"].values())
    cached = InProcess.made["cached"]
    assert cached.training.teacher.network is None and not cached.training.teacher.missing()


class InProcess:
    """A contestant in this process."""

    made: dict[str, Ours] = {}

    def __init__(self, make, *arguments, **named) -> None:
        self.own = self.made[arguments[-1]] = make(*arguments, **named)

    def __call__(self, steps: int) -> float:
        return self.own(steps)

    def attribute(self, name: str):
        return getattr(self.own, name)

    def end(self) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("name", compare.SETS["objectives"])
def test_every_row_of_the_objectives_runs(name: str, run_inside, monkeypatch) -> None:
    monkeypatch.setattr(sources, "DIGITS_ROWS", {"train": (0, 32), "test": (1197, 1213)})
    flags = [*compare.STUDENT.split(), *compare.SETS["objectives"][name].split()]
    at = flags.index("--teacher-path")
    del flags[at : at + 2]
    result = run_inside(*flags, "--epochs", "1", "--batch-size", "16", "--output_dir", "")
    assert result.returncode == 0, result.stderr
    assert "* Acc@1" in result.stdout


@pytest.mark.slow
def test_a_comparison_trains_the_teacher_once_and_reads_what_is_complete(
    monkeypatch, tmp_path, capsys
) -> None:
    def run(command: list[str], stdout: IO[str], **_: Any) -> subprocess.CompletedProcess:
        done = programs.run(*command[2:])
        stdout.write(done.stdout + done.stderr)
        return done

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=run, STDOUT=None))
    rows = {name: compare.SETS["views"][name] for name in ("live", "1 views")}
    monkeypatch.setitem(compare.SETS, "views", rows)
    page = tmp_path / "page.md"
    argv = f"compare.py --rows views --seeds 0 --runs {tmp_path} --write {page} --jobs 1 -- \
        --epochs 1 --batch-size 300 --warmup-epochs 0"
    monkeypatch.setattr(sys, "argv", argv.split())
    assert compare.main() == 0
    assert "teacher seed 0: done" in capsys.readouterr().err
    assert compare.main() == 0 and "done" not in capsys.readouterr().err
    rows = [
        line.split(" | ")
        for line in page.read_text().splitlines()
        if line.startswith("| ") and " ± " in line
    ]
    live, cached = rows
    assert live[1:4] == cached[1:4], "in its only epoch the live run uses the view of the cache"


def test_a_sweep_reports_how_many_runs_are_identical() -> None:
    rows = [[1, "0 workers", "writing", "", "identical"], [2, "2 workers", "evaluation", "", ".x"]]
    page = kill_sweep.report(rows)
    assert "1 of 2 killed runs are identical" in page and page.endswith("| .x |\n")
