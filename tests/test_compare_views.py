"""The comparison of cached views: epochs for a time, rows of the table, and a run of it all."""

import contextlib
from types import SimpleNamespace

import pytest

import engine
from experiments import compare, compare_views


def test_writing_is_paid_for_before_the_epochs() -> None:
    assert compare_views.epochs_in(10.0, 0.0, 3.0) == 3
    assert compare_views.epochs_in(10.0, 4.5, 3.0) == 1
    assert compare_views.epochs_in(10.0, 12.0, 3.0) == 0


def test_some_images_are_as_many_of_each_class_and_all_to_test_on(image_folder, tmp_path):
    found = compare_views.some_images(image_folder, 8, tmp_path)
    names = {
        split: sorted(path.name for path in (found / split).glob("*/*.png"))
        for split in ("train", "val")
    }
    assert names["train"] == sorted(2 * ["00.png", "01.png", "02.png", "03.png"])
    assert len(names["val"]) == 12
    assert (found / "train" / "one" / "00.png").stat().st_size
    assert compare_views.some_images(image_folder, 8, tmp_path) == found, "again"


def test_the_rows_fill_the_live_runs_time() -> None:
    logs = [{"test_acc1": 40.0, "train_loss": 1.5}, {"test_acc1": 42.0, "train_loss": 1.7}]
    rows = compare_views.rows_of(10, [1, 8], compare_views.BatchPlan(reading=0.4, writing=1.5))
    told = {row.name: logs if row.epochs else [] for row in rows}
    lines = compare_views.table(rows, told)[2:]
    assert lines[0] == "| live | 10 | 1.00 | 0.00 | 41.00 ± 1.41 | – | 1.60 ± 0.14 |"
    start = [" | ".join(line.split(" | ")[:4]) for line in lines[1:]]
    assert start == [
        "| none, labels alone | 25 | 1.00 | 0.00",
        "| 1 view, writing not counted | 25 | 1.00 | 0.15",
        "| 8 views, writing not counted | 25 | 1.00 | 1.20",
        "| 1 view, writing counted | 21 | 0.84 | 0.15",
        "| 8 views, writing counted | 0 | 0.00 | 1.20",
    ]
    assert lines[-1].endswith("| – | – | – |")


@pytest.mark.slow
def test_the_comparison_runs_from_the_teacher_to_the_table(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(engine, "train_one_epoch", engine.train_one_epoch)  # put back at the end
    monkeypatch.setattr(engine, "ask_teacher", engine.query_epoch)
    ran = []

    def here(folder, command, threads) -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        ran.append(str(folder.relative_to(tmp_path / "runs")))
        assert compare_views.timed(command[3:]) == 0
        return True

    in_turn = contextlib.nullcontext(SimpleNamespace(map=map))  # signals want the main thread
    monkeypatch.setattr(compare_views, "ThreadPoolExecutor", lambda jobs: in_turn)
    monkeypatch.setattr(compare, "run_once", here)
    words = f"--epochs 1 --views 1 --seeds 0 --batch-size 256 --runs {tmp_path}/runs \
        --write {tmp_path}/table.md"
    argv = [
        "compare_views.py",
        *words.split(),
        "--teacher-flags",
        "--epochs 1",
        "--",
        "--no-model-ema",
    ]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr(compare_views, "ROUNDS", 1)
    monkeypatch.setattr(compare_views, "EPOCHS", 1)
    monkeypatch.setattr(compare_views, "epochs_in", lambda budget_s, write_s, epoch_s: 1)
    assert compare_views.main() == 0
    assert ran[:4] == ["teacher", "pace0_live/seed0", "pace0_cache1/seed0", "pace0_read/seed0"]
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()]
    live, *_, cached = (row for row in rows if len(row) == 7 and row[1] == "1")
    assert live[0] == "| live" and cached[0] == "| 1 view, writing counted"
    assert live[4:] == cached[4:], "one epoch of one view is what the live run saw"
    assert live[6] != rows[3][6], "the labels alone have another loss"


def test_a_part_of_no_data_is_refused_before_anything_runs(monkeypatch, tmp_path) -> None:
    argv = ["compare_views.py", "--images", "10", "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr("sys.argv", argv)
    monkeypatch.setattr(compare, "run_once", None)
    with pytest.raises(SystemExit, match="--data, which is not given"):
        compare_views.main()
