"""--minutes: how many epochs fit, and that timing them changes nothing else."""

import re
from pathlib import Path

import pytest
import torch

from checks import time_budget
from checks.time_budget import Seconds
from training import auto_recipe
from training.metrics import read_log

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("seconds", "epochs", "interval"),
    [
        (Seconds(10, 1, 0.04), 106, 1),  # (120 - 10 - 0.04) / 1.04 = 105.7
        (Seconds(10, 1, 0.5), 104, 10),  # (120 - 10 - 0.5) / 1.05 = 104.3
        (Seconds(20, 10, 8), 9, 9),  # the last evaluation alone: (120 - 20 - 8) / 10 = 9.2
        (Seconds(10, 500, 5), 1, 1),  # at least one epoch
        (Seconds(200, 1, 1), 1, 1),  # the time is over before training
        (Seconds(10, 1, 0.04, 2, 20), 69, 1),  # 2 + (120 - 10 - 0.04 - 40.08) / 1.04 = 69.2
        (Seconds(10, 1, 0.04, 8, 20), 5, 1),  # (120 - 10 - 0.04) / 20.04 = 5.5
        (Seconds(10, 1, 0.04, 0.5, 20), 97, 1),  # 0.5 + (120 - 10 - 0.04 - 10.02) / 1.04 = 96.6
    ],
)
def test_epochs_and_evaluations_fill_two_minutes(
    seconds: Seconds, epochs: int, interval: int
) -> None:
    assert seconds.fit(120) == {"epochs": epochs, "val_interval": interval}


@pytest.mark.parametrize(
    ("updates", "limit", "expected"),
    [
        (5, 20.0, 10.0),  # epochs of 5 updates and 5 s between: the first epoch is left out
        (100, 20.0, 100.0),  # less than an epoch: 1 s an update, without the slow first one
    ],
)
def test_seconds_of_an_epoch(
    monkeypatch: pytest.MonkeyPatch, updates: int, limit: float, expected: float
) -> None:
    now = 0.0
    monkeypatch.setattr(time_budget.time, "perf_counter", lambda: now)

    def run_epoch(epoch: int, on_update: time_budget.OnUpdate) -> None:
        nonlocal now
        now += 5
        for update in range(updates):
            now += 1
            on_update(update)

    seconds, _ = time_budget.seconds_of_epoch(run_epoch, updates, CPU, limit)
    assert seconds == pytest.approx(expected)
    seconds, timed = time_budget.seconds_of_epoch(run_epoch, updates, CPU, limit, most=3)
    assert timed == 3 and seconds == pytest.approx(updates)


@pytest.mark.parametrize("updates", [3, 100])
def test_slower_updates_of_the_warm_up_are_not_counted(
    monkeypatch: pytest.MonkeyPatch, updates: int
) -> None:
    """Updates of 2 s in the first 20 s, and of 1 s later."""
    now = 0.0
    monkeypatch.setattr(time_budget.time, "perf_counter", lambda: now)

    def run_epoch(epoch: int, on_update: time_budget.OnUpdate) -> None:
        nonlocal now
        for update in range(updates):
            now += 2 if now < 20 else 1
            on_update(update)

    found = time_budget.seconds_of_epoch(run_epoch, updates, CPU, 15.0, warm_up=20.0)
    assert found == (pytest.approx(updates), 26)


def test_a_slow_update_is_timed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now, done = 0.0, 0
    monkeypatch.setattr(time_budget.time, "perf_counter", lambda: now)

    def run_epoch(epoch: int, on_update: time_budget.OnUpdate) -> None:
        nonlocal now, done
        for update in range(3):
            now, done = now + 100, done + 1
            on_update(update)

    assert time_budget.seconds_of_epoch(run_epoch, 3, CPU, 4.0) == (pytest.approx(300), 2)
    assert done == 2


def test_minutes_give_the_weights_of_the_printed_epochs(
    run_inside, folder_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run keeps the number too."""
    monkeypatch.setattr(time_budget, "process_age", lambda: 0.0)
    monkeypatch.setattr(Seconds, "fit", lambda self, budget: {"epochs": 3, "val_interval": 2})
    at = folder_flags.index("--epochs")
    flags = [*folder_flags[:at], *folder_flags[at + 2 :], "--num-workers", "0"]
    timed = ["--minutes", "0.001", "--output-dir", str(tmp_path / "timed")]
    result = run_inside(*flags, *timed)
    assert result.returncode == 0, result.stderr
    assert "--epochs 3 --val-interval 2" in result.stdout
    fixed = ["--epochs", "3", "--val-interval", "2", "--output-dir", str(tmp_path / "fixed")]
    assert run_inside(*flags, *fixed).returncode == 0
    one, other = (
        torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)
        for name in ("timed", "fixed")
    )
    assert one["args"]["epochs"] == 3
    for part in ("model", "model_ema"):
        assert all(torch.equal(value, other[part][key]) for key, value in one[part].items())
    tested = ["test_acc1" in line for line in read_log(tmp_path / "timed" / "log.txt")]
    assert tested == [False, True, True]

    monkeypatch.setattr(Seconds, "fit", lambda self, budget: {"epochs": 9, "val_interval": 9})
    result = run_inside(*flags, *timed)
    assert result.returncode == 0, result.stderr
    assert "3 epochs, as in the checkpoint" in result.stdout
    assert re.search("Nothing to train: 3 of 3", result.stdout)


def test_the_chosen_settings_follow_from_the_epochs_of_the_minutes(
    run_inside, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the printed --epochs give the same weights."""
    monkeypatch.setattr(time_budget, "process_age", lambda: 0.0)
    monkeypatch.setattr(Seconds, "fit", lambda self, budget: {"epochs": 3, "val_interval": 3})
    monkeypatch.setattr(auto_recipe, "MIX_EPOCHS", 5)
    model = ["--model", "deit_pico_distilled_patch8_32", "--data-path", str(image_folder)]
    found = []
    for name, flags in (("timed", ["--minutes", "0.001"]), ("fixed", ["--epochs", "3"])):
        folder = tmp_path / name
        more = ["--batch-size", "8", "--num-workers", "0", "--output-dir", str(folder)]
        result = run_inside(*model, *flags, *more)
        assert result.returncode == 0, result.stderr
        found.append(torch.load(folder / "checkpoint.pth", weights_only=True))
    assert found[0]["args"]["mixup"] == 0.0
    for key, value in found[0]["model"].items():
        assert torch.equal(value, found[1]["model"][key])


@pytest.mark.parametrize(
    "flags",
    [
        ["--minutes", "1", "--epochs", "3"],
        ["--minutes", "0"],
        ["--minutes", "1", "--teacher-cache", "there", "--distillation-type", "hard"],
        ["--sched", "plateau", "--val-interval", "2"],
    ],
)
def test_what_cannot_go_with_minutes_is_refused(run_inside, flags: list[str]) -> None:
    result = run_inside(*flags)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
