"""Exports: each format answers as the student does, and one that does not is not written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
from tools import export

NAME = "deit_tiny_distilled_patch16_224"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run's folder with a checkpoint of a distilled student, as main.py leaves it."""
    torch.manual_seed(0)
    network = models.create_model("deit_pico_distilled_patch8_32", num_classes=7)
    settings = {"model": "deit_pico_distilled_patch8_32", "epochs": 3, "eval_crop_ratio": 0.9,
                "distillation_type": "hard", "teacher_model": "resnet_pico"}  # fmt: skip
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"model": network.state_dict(), "args": settings, "epoch": 2, "best_acc1": 71.25},
               folder / "checkpoint.pth")  # fmt: skip
    return folder


@pytest.mark.parametrize("form", ["safetensors", "torch_export", "onnx"])
def test_each_format_answers_as_the_student(
    form: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert export.main([str(run_folder), str(out), "--formats", form]) == 0
    shown = capsys.readouterr().out
    assert "logits differ by at most" in shown
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card, "a path of this machine"
    assert "71.25" in card and "resnet_pico" in card and "mean of its class" in card
    if form == "safetensors":
        config = json.loads((out / "config.json").read_text())
        assert config["num_classes"] == 7 and config["pretrained_cfg"]["crop_pct"] == 0.9


def test_plain_timm_loads_an_exported_student(tmp_path: Path) -> None:
    for name in (NAME, "deit_small_patch16_LS", "resmlp_12"):
        folder = tmp_path / name
        folder.mkdir()
        network = models.create_model(name, num_classes=7, img_size=(64, 96)).eval()
        settings = {"model": name, "input_size": [64, 96]}
        torch.save({"model": network.state_dict(), "args": settings}, folder / "checkpoint.pth")
        assert export.main([str(folder), str(folder / "out"), "--formats", "safetensors"]) == 0
        images = torch.randn(2, 3, 64, 96)
        with torch.no_grad():
            torch.save((images, network(images)), folder / "answer.pt")
    program = (
        "import timm, torch, sys\n"
        "for name in sys.argv[1:]:\n"
        "    images, wanted = torch.load(f'{name}/answer.pt')\n"
        "    network = timm.create_model(f'local-dir:{name}/out', pretrained=True).eval()\n"
        "    assert type(network).__module__.startswith('timm')\n"
        "    torch.testing.assert_close(network(images), wanted, rtol=0, atol=1e-5)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, NAME, "deit_small_patch16_LS",
                           "resmlp_12"], cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_an_export_that_answers_otherwise_is_not_kept(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    real = torch.export.load

    class Wrong:
        def __init__(self, path: Path) -> None:
            self.program = real(path)

        def module(self):  # type: ignore[no-untyped-def]
            return lambda images: self.program.module()(images) + 1e-3

    monkeypatch.setattr(torch.export, "load", Wrong)
    code = export.main([str(run_folder), str(tmp_path / "out"), "--formats", "torch_export"])
    assert code == 2 and "was not kept" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("model.*"))


def test_without_onnx_a_line_says_what_to_install(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(export.FORMATS, "torch_export")  # for speed
    assert export.main([str(run_folder), str(tmp_path / "out")]) == 0
    needs = "pip install onnx onnxscript onnxruntime"
    assert f"onnx: left out; it needs {needs}" in capsys.readouterr().out
    assert "onnx" not in (tmp_path / "out" / "README.md").read_text()
    assert export.main([str(run_folder), str(tmp_path / "out"), "--formats", "onnx"]) == 2
    assert needs in capsys.readouterr().err


def test_the_weights_alone_as_before(run_folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "weights.safetensors"
    assert export.main([str(run_folder / "checkpoint.pth"), str(out), "--half"]) == 0
    network = models.create_model("deit_pico_distilled_patch8_32", num_classes=7)
    models.load_weights(network, str(out))
    torch.save({"model": network.state_dict()}, tmp_path / "bare.pth")
    assert export.main([str(tmp_path / "bare.pth"), str(tmp_path / "out")]) == 2
    assert "give --model" in capsys.readouterr().err
