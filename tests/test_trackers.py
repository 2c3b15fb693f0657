"""The same curves, images and settings in TensorBoard, Weights & Biases and MLflow."""

import importlib.util
import json
import logging
import struct
import threading
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import options
from base.errors import UserError
from training import metrics, trackers

SETTINGS = {"lr": 0.1, "model": "m", "data_path": "x" * 600, "match": []}


def args_of(folder: Path, **flags: bool) -> Namespace:
    return Namespace(
        **{"output_dir": str(folder), "log_wandb": False, "log_mlflow": False, **flags}
    )


def write_epochs(folder: Path, start: int, end: int, **flags: bool) -> None:
    """Write epochs of 8 images, as a run does."""
    log = metrics.RunLog(
        str(folder), start, trackers.build_trackers(args_of(folder, **flags), 8 * start)
    )
    log.config(SETTINGS)
    log.image("val/attention", torch.zeros(3, 4, 5, dtype=torch.uint8), 8 * start)
    for epoch in range(start, end):
        seen = 8 * (epoch + 1)
        log.train({"loss": 2.0 - epoch, "base": 1.0}, {"base": 0.5}, seen)
        log.epoch(epoch, {"loss": 1.0}, {"acc1": 50.0 + epoch, "count": 8}, {"acc1": 4.0}, 7, seen)
    log.close()


TAGS = {"train/loss", "train/base", "train_weighted/base", "val/acc1", "val_ema/acc1"}


def test_mlflow_has_the_tags_of_tensorboard_and_a_resumed_run_continues(
    tmp_path: Path, monkeypatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="optional; pip install mlflow-skinny")
    pytest.importorskip("sqlalchemy", reason="optional; pip install sqlalchemy alembic")
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "student"
    write_epochs(folder, 0, 2, log_mlflow=True)
    write_epochs(folder, 2, 3, log_mlflow=True)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'vit-distillation'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert set(run.data.metrics) == TAGS and run.info.run_name == "student"
    points = client.get_metric_history(run.info.run_id, "val/acc1")
    assert [(point.step, point.value) for point in points] == [(8, 50), (16, 51), (24, 52)]
    assert run.data.params["lr"] == "0.1" and len(run.data.params["data_path"]) == 500
    assert run.info.status == "FINISHED"
    assert list((tmp_path / "mlruns").rglob("attention_16.png"))
    mlflow.set_tracking_uri(None)


def records_of(content: bytes) -> Iterator[bytes]:
    """Yield the records of an offline file of wandb: LevelDB's log format after 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        left = 2**15 - at % 2**15
        if left < 7:  # a header is never split
            at += left
            continue
        size, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        parts += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def test_wandb_has_the_tags_of_tensorboard_without_a_network(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("wandb", reason="wandb is optional; pip install wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    folder = tmp_path / "student"
    write_epochs(folder, 0, 2, log_wandb=True)
    (file,) = folder.rglob("*.wandb")
    rows, run = [], None
    for data in records_of(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
        elif record.WhichOneof("record_type") == "run":
            run = run or record.run
    assert (run.project, run.display_name) == ("vit-distillation", "student")
    assert run.run_id == (folder / "wandb_id").read_text()
    assert {tag for row in rows for tag in row if "/" in tag} >= {*TAGS, "val/attention/path"}
    points = [(row["images_seen"], row["val/acc1"]) for row in rows if "val/acc1" in row]
    assert points == [(8, 50), (16, 51)]


@pytest.mark.parametrize(
    ("flag", "package"),
    [("--log-wandb", "wandb"), ("--log-mlflow", "mlflow-skinny sqlalchemy alembic")],
)
def test_a_missing_package_is_one_line(flag: str, package: str, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{flag}: .* not installed; pip install {package}$"):
        options.parse_args([flag])


def test_a_tracker_that_cannot_start_is_one_line_and_one_that_fails_later_a_warning(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    class Fails:
        def __init__(self, folder: Path, images_seen: int) -> None:
            if folder.name == "bad":
                raise RuntimeError("no login")

        def scalars(self, values: dict, images_seen: int) -> None:
            raise RuntimeError("no network")

    row = ("wandb", "wandb", Fails, "do this")
    monkeypatch.setitem(trackers.OPTIONAL, "log_wandb", row)
    with pytest.raises(UserError, match=r"--log-wandb: cannot start \(no login\); do this"):
        trackers.build_trackers(args_of(tmp_path / "bad", log_wandb=True), 0)
    _, tracker = trackers.build_trackers(args_of(tmp_path, log_wandb=True), 0)
    with caplog.at_level(logging.WARNING):
        tracker.scalars({"val/acc1": 1.0}, 8)
    assert "--log-wandb: not written (no network)" in caplog.text


def test_what_tensorboards_thread_meets_is_told_by_the_next_call_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    board = trackers.TensorBoard(tmp_path, 0)
    writer = next(t for t in threading.enumerate() if "tensorboard" in type(t).__module__)
    for thread, speaks in ((writer, False), (threading.main_thread(), True)):
        error = OSError(28, "No space left on device")
        threading.excepthook(threading.ExceptHookArgs((OSError, error, None, thread)))
        assert bool(capsys.readouterr().err) == speaks
    board.close()
