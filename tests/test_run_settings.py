"""What a run saves about itself: it is read from any folder, and repeats the run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import models
from tools import export, replay, report
from training import recipe, run_settings

MODEL = "deit_pico_distilled_patch8_32"


@pytest.fixture(scope="module")
def home(run_inside, image_folder: Path, tmp_path_factory) -> Path:
    """A folder with data, teacher, plugin and a run, which was given them by relative paths."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(image_folder, folder / "data")
    network = models.create_model(MODEL, num_classes=2)
    torch.save({"model": network.state_dict(), "classes": ["one", "two"]}, folder / "teacher.pth")
    flags = ["--data-path", "data", "--teacher-path", "teacher.pth", "--teacher-model", MODEL]
    flags += ["--model", MODEL, "--distillation-type", "soft", "--batch-size", "8", "--epochs", "2"]
    flags += ["--warmup-epochs", "0", "--num-workers", "0", "--input-size", "32"]
    flags += ["--opt-kwargs", "amsgrad=False", "--kd-loss-type", "ce", "--drop-path", "0.2"]
    flags += ["--match", "feature=hidden,layer_S=1,layer_T=2,loss=hidden_mse,proj=linear"]
    flags += ["--temperature-scheduler", "flsw:1:1", "--val-interval", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        found = run_inside(*flags, "--output_dir", "run")
        assert found.returncode == 0, found.stderr
        bad = ["--lr", "1e38", "--unscale-lr"]
        found = run_inside(*flags, *bad, "--max-bad-steps", "1", "--output_dir", "bad")
        assert (folder / "bad/bad_batch.pth").is_file(), found.stderr
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch) -> Path:
    """Another working folder, with nothing in it."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def test_a_run_saves_absolute_paths_in_all_its_files(home: Path) -> None:
    config = yaml.safe_load((home / "run/config.yaml").read_text())
    saved = torch.load(home / "run/checkpoint.pth", weights_only=True)["args"]
    batch = torch.load(home / "bad/bad_batch.pth", weights_only=True)["args"]
    for settings in (config, saved, batch):
        assert settings["data_path"] == str(home / "data")
        assert settings["teacher_path"] == str(home / "teacher.pth")
    assert "data" not in (home / "run/log.txt").read_text()


def test_a_report_is_made_from_another_folder(home: Path, elsewhere: Path) -> None:
    assert report.main([str(home / "run"), "--out", str(elsewhere / "report.html")]) == 0
    (run,) = json.loads((elsewhere / "report.json").read_text())["runs"]
    assert "teacher" in run["accuracy"]


def test_a_bad_batch_is_replayed_from_another_folder(home: Path, elsewhere: Path, capsys) -> None:
    assert replay.main([str(home / "bad/bad_batch.pth")]) == 0, capsys.readouterr().err


def test_an_export_is_made_from_another_folder(home: Path, elsewhere: Path) -> None:
    out = elsewhere / "export"
    assert export.main([str(home / "run"), str(out), "--formats", "safetensors"]) == 0
    assert "sha256 of the teacher" in (out / "README.md").read_text()


def test_a_run_is_resumed_from_another_folder(home: Path, elsewhere: Path, run_inside) -> None:
    shutil.copytree(home / "run", elsewhere / "run")
    flags = ["--recipe", str(home / "run/config.yaml"), "--output_dir", str(elsewhere / "run")]
    found = run_inside(*flags, "--epochs", "3", "--resume", "auto")
    assert found.returncode == 0, found.stderr
    assert "Epoch: [3/3]" in found.stdout and "Epoch: [2/3]" not in found.stdout


def test_a_run_with_a_relative_path_to_a_model_is_resumed(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "export").mkdir()
    monkeypatch.chdir(tmp_path)
    saved = run_settings.to_save({"model": "local-dir:export", "teacher_model": ["a", "b"]})
    assert saved == {"model": f"local-dir:{tmp_path / 'export'}", "teacher_model": ["a", "b"]}
    assert run_settings.is_same("local-dir:export", saved["model"])
    assert not run_settings.is_same("local-dir:other", saved["model"])
    (tmp_path / "a").mkdir()  # a folder with the name of a model
    assert run_settings.to_save({"model": "a"}) == {"model": "a"}


def files_of(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("has_folder", [True, False])
def test_the_config_of_a_run_repeats_it_bit_for_bit(
    has_folder: bool, home: Path, elsewhere: Path, run_inside
) -> None:
    before = files_of(home)
    out = ["--output_dir", str(elsewhere / "again")] if has_folder else []
    found = run_inside("--recipe", str(home / "run/config.yaml"), *out)
    assert found.returncode == 0, found.stderr
    assert "Epoch: [1/2]" in found.stdout, "it starts at the beginning"
    assert files_of(home) == before, "the earlier run is untouched"
    if has_folder:
        log = (home / "run/log.txt").read_text().splitlines()
        again = (elsewhere / "again/log.txt").read_text().splitlines()
        assert [losses_of(line) for line in log] == [losses_of(line) for line in again]
        one, other = (
            torch.load(folder / "checkpoint.pth", weights_only=True)
            for folder in (home / "run", elsewhere / "again")
        )
        for key in ("model", "model_ema", "projections"):
            assert all(torch.equal(one[key][name], other[key][name]) for name in one[key])


def losses_of(line: str) -> dict[str, float]:
    """Return an epoch of log.txt without the times."""
    return {k: v for k, v in json.loads(line).items() if k.startswith(("train_l", "test_", "ema_"))}


def test_flags_of_the_command_line_replace_those_of_the_run(home: Path, run_inside) -> None:
    flags = ["--recipe", str(home / "run/config.yaml"), "--lr", "0.01", "--dry-run"]
    found = run_inside(*flags)
    assert found.returncode == 0, found.stderr
    assert "recipe config: --lr 0.01 instead of 0.0005" in found.stdout


def test_the_plugins_of_a_run_must_be_given_again(home: Path, tmp_path: Path, run_inside) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    config = yaml.safe_load((home / "run/config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"plugin": [str(plugin)]}))
    flags = ["--recipe", str(tmp_path / "config.yaml"), "--dry-run"]
    found = run_inside(*flags)
    assert found.returncode == 2 and "give --plugin FILE.py" in found.stderr
    assert not (tmp_path / "executed").exists()
    found = run_inside(*flags, "--plugin", str(plugin))
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "executed").exists()


def test_the_epochs_of_a_run_with_minutes_are_those_that_it_chose(home: Path, tmp_path) -> None:
    config = yaml.safe_load((home / "run/config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"minutes": 2.0, "epochs": 7}))
    found = recipe.find(str(tmp_path / "config.yaml"))
    assert found.flags["epochs"] == 7 and "minutes" not in found.flags
