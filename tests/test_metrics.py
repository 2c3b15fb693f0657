"""Numbers: counts, means, the printed line, log.txt."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
import yaml

from base import distributed
from base.errors import UserError
from base.text import printable
from training import metrics


def test_accuracy_counts_images_and_clamps_k() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0], [5.0, 1.0, 0.0]])
    labels = torch.tensor([0, 0, 1])
    top1, top2, top5 = metrics.accuracy(logits, labels, topk=(1, 2, 5))
    assert (top1.item(), top2.item(), top5.item()) == (1, 2, 3)


def test_a_meter_averages_what_came_since_and_leaves_out_what_is_not_finite() -> None:
    meter = metrics.Meter(torch.device("cpu"))
    for value in (1.0, torch.tensor(3.0), math.nan, math.inf):
        meter.update(value)
    assert meter.recent() == 2
    meter.update(8.0)
    assert meter.recent() == 8 and meter.average() == 4
    assert math.isnan(meter.recent()), "nothing came"


def test_the_progress_line_has_step_eta_numbers_rate_and_wait(capsys) -> None:
    progress = metrics.ProgressLogger(3, "Epoch: [1/2]", interval=2)
    for step, _ in enumerate(progress([0, 1, 2])):
        if progress.due(step):
            progress.log(step, {"loss": 0.5, "lr": 1e-5}, images_per_step=4)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3, "every second step, the last one, and the end"
    for word in ("Epoch: [1/2]", "[2/3]", "eta 0:00:00", "loss 0.5000", "lr 1.00e-05", "images/s"):
        assert word in lines[0]
    assert "data wait" in lines[2]


def test_on_a_terminal_a_bar_overwrites_itself_within_the_width(
    capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    progress = metrics.ProgressLogger(4, "Epoch: [1/2]", interval=2)
    for step, _ in enumerate(progress(range(4))):
        if progress.due(step):
            progress.log(step, dict.fromkeys(("loss", "base", "distillation"), 0.5))
    _, half, whole, end = capsys.readouterr().out.split("\r")
    for line, step in ((half, "[######......] 2/4"), (whole, "[############] 4/4")):
        shown, cleared, rest = line.partition("\033[K")
        assert shown.startswith(f"Epoch: [1/2] {step}  eta 0:00:00  loss") and len(shown) <= 59
        assert cleared and not rest
    assert end.startswith("\033[KEpoch: [1/2] 4 steps in"), "the live line is removed"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (3725, "1:02:05"), (90000, "25:00:00")]
)
def test_a_clock_shows_hours_minutes_seconds(seconds: float, text: str) -> None:
    assert metrics.clock(seconds) == text


def epoch(log: metrics.RunLog, number: int) -> None:
    log.epoch(number, {"loss": 1.0, "lr": 0.1}, {"loss": 2.0, "acc1": 3.0}, {"acc1": 4.0}, 7, 100)


def test_a_log_is_read_without_the_line_that_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    assert metrics.read_log(path) == []
    path.write_text('{"epoch": 0}\n{"epoch": 1}\n{"epo')
    assert metrics.read_log(path) == [{"epoch": 0}, {"epoch": 1}]


def test_a_log_line_starts_with_deits_keys(tmp_path: Path) -> None:
    log = metrics.RunLog(str(tmp_path))
    epoch(log, 0)
    log.close()
    record = json.loads((tmp_path / "log.txt").read_text())
    assert record == {
        "train_loss": 1.0,
        "train_lr": 0.1,
        "test_loss": 2.0,
        "test_acc1": 3.0,
        "epoch": 0,
        "n_parameters": 7,
        "ema_acc1": 4.0,
    }


def test_no_epoch_comes_twice_and_a_half_written_line_goes(tmp_path: Path) -> None:
    log = metrics.RunLog(str(tmp_path))
    for number in range(3):
        epoch(log, number)
    log.close()
    with (tmp_path / "log.txt").open("ab") as file:
        file.write(b'{"epoch": 3, "train\xff\x00')
    assert len(metrics.read_log(tmp_path / "log.txt")) == 3
    again = metrics.RunLog(str(tmp_path), start_epoch=2)
    epoch(again, 2)
    again.close()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2]


def test_what_is_not_finite_is_null_in_the_log_which_stays_json(tmp_path: Path) -> None:
    log = metrics.RunLog(str(tmp_path))
    log.epoch(0, {"loss": math.nan}, {"loss": math.inf, "acc1": 3.0}, {}, 7, 8)
    log.close()
    line = (tmp_path / "log.txt").read_text()
    record = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert record["train_loss"] is None and record["test_loss"] is None
    assert record["test_acc1"] == 3.0


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    log = metrics.RunLog("")
    log.config({"a": 1})
    epoch(log, 0)
    log.close()
    assert not list(tmp_path.iterdir())


def test_names_are_printed_without_control_characters(capsys) -> None:
    name = "bird\x1b[31m\x07\u202egpj\udcff\r"
    assert printable(name) == r"bird\x1b[31m\x07\u202egpj\udcff\r"
    assert printable("Vögel 鳥") == "Vögel 鳥"
    distributed.print_once("data", f"class {name}\nsecond line")
    assert capsys.readouterr().out == f"data: class {printable(name)}\nsecond line\n"
    metrics.set_up_logging(0)
    logging.getLogger("x").warning("%s", name)
    assert capsys.readouterr().err == f"WARNING: {printable(name)}\n"
    assert UserError(f"{name} " + "x" * 9999).line().startswith(printable("bird\x1b[31m"))
    assert len(UserError("x" * 99999).line()) < 2100


def test_a_truncated_last_line_is_dropped_with_a_warning(tmp_path: Path, caplog) -> None:
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n[1]\n{"epo')
    assert metrics.read_log(tmp_path / "log.txt") == [{"epoch": 0}]
    assert caplog.text.count("dropped a line that is no epoch") == 2


def test_the_settings_of_a_run_name_existing_files_by_absolute_paths(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "one.pth").touch()
    log = metrics.RunLog(str(tmp_path / "run"))
    log.config(
        {"data_path": "data", "teacher_path": ["one.pth", "https://x/y.pth"], "finetune": ""}
    )
    log.close()
    found = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert found["data_path"] == str(tmp_path / "data")
    assert found["teacher_path"] == [str(tmp_path / "one.pth"), "https://x/y.pth"]
    assert found["finetune"] == ""
