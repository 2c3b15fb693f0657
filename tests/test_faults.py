"""What goes wrong around a run, through the whole program: as docs/troubleshooting.md says."""

import shutil
import time
from pathlib import Path

import pytest
import torch
from test_main import assert_one_line

import losses
from base import safe_load
from data import image_source
from tools import replay
from training.checkpointer import load_run

pytestmark = pytest.mark.slow


def taught_by(path: Path) -> list[str]:
    return [
        "--distillation-type",
        "soft",
        "--teacher-model",
        "resnet_pico",
        "--teacher-path",
        str(path),
        "--no-teacher-check",
    ]


# ---- the teacher's file


def test_a_teacher_that_vanishes_or_changes_between_two_starts_is_refused(
    run_inside, folder_flags: list[str], small_teacher: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(small_teacher, tmp_path / "teacher.pth"))
    own = [*folder_flags, "--num_workers", "0", "--output_dir", str(tmp_path / "out")]
    flags = [*own, *taught_by(path)]
    assert run_inside(*flags, "--epochs", "1").returncode == 0
    path.rename(tmp_path / "elsewhere.pth")
    assert_one_line(run_inside(*flags), "teacher.pth: not there")
    moved = run_inside(*own, *taught_by(tmp_path / "elsewhere.pth"), "--check")
    assert moved.returncode == 0, moved.stderr
    content = torch.load(small_teacher, weights_only=True)
    content["model"]["fc.bias"][0] += 1
    torch.save({"model": content["model"]}, path)
    assert_one_line(run_inside(*flags), "teacher: was [", safe_load.fingerprint(str(path))[:12])
    anyway = run_inside(*flags, "--resume-anyway", "--check")
    assert anyway.returncode == 0 and "resumed anyway: teacher" in anyway.stderr


# ---- the data


@pytest.mark.parametrize(
    ("listing", "words"),
    [
        ('{"images": [', "not readable as JSON"),
        ('{"images": [{"id": 1, "file_name": "a.png"}], "annotations": []}', "do not fit"),
    ],
)
def test_a_bad_label_file_is_one_line(
    listing: str, words: str, run_inside, folder_flags: list[str], tmp_path: Path
) -> None:
    (tmp_path / "train2018.json").write_text(listing)
    (tmp_path / "categories.json").write_text('[{"id": 0, "name": "one"}]')
    flags = [*folder_flags, "--data-set", "INAT", "--data-path", str(tmp_path), "--resume", ""]
    assert_one_line(run_inside(*flags), words, str(tmp_path))


def test_a_worker_that_brings_nothing_ends_the_run_in_one_line(
    run_inside, folder_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = image_source.Files.load

    def hang(source: image_source.Files, index: int) -> tuple:
        if index == 5:  # as on a network disk that does not respond
            time.sleep(600)
        return load(source, index)

    monkeypatch.setattr(image_source.Files, "load", hang)
    flags = [
        *folder_flags,
        "--no-repeated-aug",
        "--num_workers",
        "1",
        "--loader-timeout",
        "0.05",
        "--resume",
        "",
    ]
    result = run_inside(*flags)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.count("error: a DataLoader worker returns no batch") == 1
    assert "--loader-timeout" in result.stderr


# ---- a rank with a NaN

PLUGIN = """
import losses
from base import distributed

calls = [0]

def kd_loss(logits_S, logits_T, temperature=1):
    bad = distributed.rank() == 1 and calls[0] in (1, 3, 4)
    calls[0] += 1
    return (logits_S - logits_T).square().mean() * (float("nan") if bad else 1.0)

losses.KD_LOSS_MAP["odd"] = kd_loss
"""


def test_a_bad_batch_is_computed_again_to_the_bit(
    run_inside, folder_flags: list[str], small_teacher: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setitem(losses.KD_LOSS_MAP, "odd", None)  # and gone again after the test
    (tmp_path / "odd.py").write_text(PLUGIN.replace("== 1 and", "== 0 and"))
    out = tmp_path / "out"
    result = run_inside(
        *folder_flags,
        *taught_by(small_teacher),
        "--plugin",
        str(tmp_path / "odd.py"),
        "--kd-loss-type",
        "odd",
        "--num_workers",
        "0",
        "--max-bad-steps",
        "1",
        "--match",
        "feature=hidden,loss=hidden_mse,layer_S=4,layer_T=-1,proj=linear,tokens=patch,resize=avg",
        "--output_dir",
        str(out),
    )
    assert result.returncode == 2 and "bad_batch.pth" in result.stderr, result.stderr
    torch.manual_seed(1)  # of no consequence
    plugin = str(tmp_path / "odd.py")
    saved, again = replay.replay(out / "bad_batch.pth", plugins=[plugin])
    finite = {name for name, value in saved["terms"].items() if torch.isfinite(value)}
    assert len(finite) >= 2 and finite != set(saved["terms"])
    for name in finite:
        assert torch.equal(again[name], saved["terms"][name]), name
    assert replay.main([str(out / "bad_batch.pth"), "--plugin", plugin]) == 0
    assert "the run" in capsys.readouterr().out
    (tmp_path / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert replay.main([str(out / "bad_batch.pth")]) == 2 and not (tmp_path / "ran").exists()
    assert "what a file names is not run" in capsys.readouterr().err
    for key, value in (
        ("args", "words"),
        ("model", {}),
        ("labels", [1]),
        ("terms", {"loss": 0}),
        ("terms", {"loss": []}),
    ):
        torch.save({**saved, key: value}, tmp_path / "damaged.pth")
        assert replay.main([str(tmp_path / "damaged.pth"), "--plugin", plugin]) == 2, key
        assert capsys.readouterr().err.count("\n") == 1
    lists = {name: [] for name in saved["terms"]}
    torch.save({**saved, "terms": lists}, tmp_path / "damaged.pth")
    assert replay.main([str(tmp_path / "damaged.pth"), "--plugin", plugin]) == 2
    assert "damaged, or of another version" in capsys.readouterr().err
    assert replay.main([str(out / "checkpoint.pth")]) == 2
    assert "no bad_batch.pth" in capsys.readouterr().err


def test_a_rank_with_a_nan_is_skipped_by_all_and_named_when_it_comes_again(
    run_main, folder_flags: list[str], small_teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "odd.py").write_text(PLUGIN)
    out = tmp_path / "out"
    result = run_main(
        *folder_flags,
        *taught_by(small_teacher),
        "--plugin",
        str(tmp_path / "odd.py"),
        "--kd-loss-type",
        "odd",
        "--model",
        "resnet_pico",
        "--batch-size",
        "2",
        "--num_workers",
        "0",
        "--max-bad-steps",
        "2",
        "--output_dir",
        str(out),
        processes=2,
    )
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, result.stderr
    for words in ("2 updates in a row", "step 4, process 1", "loss nan", "bad_batch.pth"):
        assert words in errors[0]
    saved = safe_load.read_weights_file(out / "bad_batch.pth")
    assert saved["rank"] == 1 and saved["terms"]["loss"].isnan()
    content = load_run(out / "checkpoint.pth")
    assert content["tally"]["bad"].tolist() == [1, 2] and content["tally"]["micro_steps"] == 4
    for name in ("model", "model_ema"):  # BatchNorm's statistics included
        assert all(torch.isfinite(value).all() for value in content[name].values())


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["x.pth", "--amp", "half"], "invalid choice"), (["x.pth", "--nosuchflag"], "nosuchflag")],
)
def test_an_unknown_flag_of_replay_is_one_line(argv: list[str], words: str, capsys) -> None:
    assert replay.main(argv) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and words in line
