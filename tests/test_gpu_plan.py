"""The plan for a GPU: every stage is rehearsed on the CPU, and runs on a GPU if there is one."""

import json
import sys
import time
from pathlib import Path

import programs
import pytest
import torch

from base.errors import UserError
from experiments import gpu_checks, gpu_plan, kill_sweep

CPU = torch.device("cpu")


def plan_of(tmp_path: Path, **changes) -> gpu_plan.Plan:
    named = {"data": "", "teacher": "", "toy": True, "end": time.monotonic() + 600}
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    return gpu_plan.Plan(device=CPU, out=tmp_path / "out", work=work, **named | changes)


def test_finished_measurements_are_skipped_and_failed_ones_are_repeated(
    monkeypatch, tmp_path, capsys
) -> None:
    ran = []

    def measure(name: str):
        def call():
            ran.append(name)
            if name == "bad" and ran.count("bad") == 1:
                raise ValueError("no such thing")
            return {"lines": [f"{name} was measured"]}

        return call

    stage = {name: measure(name) for name in ("good", "bad")}
    monkeypatch.setitem(gpu_plan.STAGES, "speed", lambda plan: stage)
    plan = plan_of(tmp_path)
    assert not gpu_plan.run(plan, ["speed"])
    page = (plan.out / "results.md").read_text()
    assert "good was measured" in page and "ValueError: no such thing" in page
    assert gpu_plan.run(plan, ["speed"]) and ran == ["good", "bad", "bad"]
    page = (plan.out / "results.md").read_text()
    assert "bad was measured" in page and "no such thing" not in page
    assert "good: measured before" in capsys.readouterr().out


def test_no_measurement_starts_after_the_time(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setitem(gpu_plan.STAGES, "speed", lambda plan: {"peak": None})
    assert gpu_plan.run(plan_of(tmp_path, end=0.0), ["speed"])
    assert "peak: no time left" in capsys.readouterr().out


def test_without_a_gpu_the_plan_is_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(
        sys, "argv", ["gpu_plan.py", "--device", "cpu", "--out", str(tmp_path / "out")]
    )
    with pytest.raises(UserError, match="--toy rehearses"):
        gpu_plan.main()
    assert not (tmp_path / "out").exists()


def test_a_rate_is_divided_by_the_peak() -> None:
    seconds = {"none": [0.5, 0.5], "reference": [1.0, 1.0]}
    row = gpu_plan.rate_table(seconds, 10, 0.01)[2]
    assert row == "| none | 20 (20-20) | 20.0 |  | 2.00 (2.00-2.00) |"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["speed", "input", "accuracy"])
def test_every_measurement_of_a_stage_is_rehearsed(stage, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(gpu_plan, "ROWS", {name: gpu_plan.ROWS[name] for name in ("cached hard",)})
    plan = plan_of(tmp_path)
    assert gpu_plan.run(plan, [stage]), (plan.out / "results.md").read_text()
    names = {path.stem for path in (plan.out / stage).glob("*.json")} - {"trace"}
    assert names == set(gpu_plan.STAGES[stage](plan))
    if stage == "speed":
        seconds = json.loads((plan.out / "speed" / "small.json").read_text())["seconds"]
        assert set(seconds) == {"no teacher", "no teacher again", "live", "cached", "reference"}


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu_checks.Checks(CPU, Path(), toy=True).all())
def test_every_check_of_correctness_passes_on_the_cpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kill_sweep, "start", programs.start)  # without the imports of torch
    found = gpu_checks.Checks(CPU, tmp_path, toy=True).all()[name]()
    assert found["passed"], found["lines"]
    assert name == "memory" or found["found"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", gpu_checks.Checks(CPU, Path(), toy=True).all())
def test_every_check_of_correctness_passes_on_the_gpu(name: str, tmp_path: Path) -> None:
    found = gpu_checks.Checks(torch.device("cuda", 0), tmp_path, toy=False).all()[name]()
    assert found["passed"], found["lines"]
