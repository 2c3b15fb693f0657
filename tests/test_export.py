"""Exports: each format returns the student's logits, and one that does not is not written."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

import models
from base import files
from models.deit import VITS
from models.released import NETWORKS
from tools import export

NAME = "deit_tiny_distilled_patch16_224"


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run's folder with a checkpoint of a distilled student, as main.py writes it."""
    torch.manual_seed(0)
    network = models.create_model("deit_pico_distilled_patch8_32", num_classes=7)
    settings = {
        "model": "deit_pico_distilled_patch8_32",
        "epochs": 3,
        "eval_crop_ratio": 0.9,
        "distillation_type": "hard",
        "teacher_model": "resnet_pico",
    }
    folder = tmp_path / "run"
    folder.mkdir()
    content = {
        "model": network.state_dict(),
        "args": settings,
        "epoch": 2,
        "best_acc1": 71.254321,
        "classes": list("abcdefg"),
        "projections": {"0.weight": torch.ones(2, 2)},
    }
    torch.save(content, folder / "best_checkpoint.pth")
    return folder


def change(folder: Path, args: dict | None = None, **content) -> Path:
    """Change what a run's checkpoint holds, its settings under `args`; return its path."""
    path = folder / "best_checkpoint.pth"
    held = torch.load(path, weights_only=True)
    torch.save(held | content | {"args": held["args"] | (args or {})}, path)
    return path


def card_of(folder: Path, *flags: str) -> str:
    out = folder.with_name("card")
    assert export.main([str(folder), str(out), "--formats", "safetensors", *flags]) == 0
    return (out / "README.md").read_text()


@pytest.mark.parametrize("form", ["safetensors", "torch_export", "onnx"])
def test_each_format_returns_the_students_logits(
    form: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert export.main([str(run_folder), str(out), "--formats", form]) == 0
    shown = capsys.readouterr().out
    assert "logits differ by at most" in shown
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card, "a path of this machine"
    assert (
        "| top-1 | 71.25% after epoch 3 |" in card
        and "resnet_pico" in card
        and "mean of its class" in card
    )
    if form == "safetensors":
        config = json.loads((out / "config.json").read_text())
        assert config["num_classes"] == 7 and config["pretrained_cfg"]["crop_pct"] == 0.9
        assert config["label_names"] == list("abcdefg")
        network = models.create_model("deit_pico_distilled_patch8_32", num_classes=7)
        assert set(load_file(out / "model.safetensors")) == set(network.state_dict())


def test_an_export_returns_the_mean_of_both_heads(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export.main([str(run_folder), str(out), "--formats", "torch_export"]) == 0
    network = models.create_model("deit_pico_distilled_patch8_32", num_classes=7).eval()
    models.load_weights(network, str(run_folder / "best_checkpoint.pth"))
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        cls, dist = models.both_logits(network, images)
        found = torch.export.load(out / "model.pt2").module()(images)
    torch.testing.assert_close(found, (cls + dist) / 2, rtol=0, atol=1e-5)
    assert float((cls - dist).abs().max()) > 1e-3


SMALL = [
    "deit_pico_patch8_32",
    "deit_pico_distilled_patch4_32",
    "resnet_pico",
    NAME,
    "deit_small_patch16_LS",
    "cait_XXS24_224",
    "resmlp_12",
]


def run_outside(program: str, folder: Path, *argv: str) -> str:
    """Return what a program prints that finds no module of this repository."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program, *argv],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_lines_of_the_card_load_an_export_outside_the_repository(
    run_folder: Path, tmp_path: Path
) -> None:
    """Every format, in one program. It also builds every registered model with plain timm."""
    for form in ("torch_export", "onnx"):
        out = tmp_path / form
        assert export.main([str(run_folder), str(out), "--formats", form]) == 0
        (out / "lines.py").write_text(lines_of_the_card(out))
    (tmp_path / "wanted.json").write_text(json.dumps(tensors_of_every_model()))
    for name in SMALL:
        folder = tmp_path / name
        size = (32, 48) if "pico" in name else (64, 96)
        torch.manual_seed(0)
        network = models.create_model(name, num_classes=7, img_size=size).eval()
        folder.mkdir()
        settings = {"model": name, "input_size": list(size), "eval_crop_ratio": 1.0}
        torch.save({"model": network.state_dict(), "args": settings}, folder / "checkpoint.pth")
        assert export.main([str(folder), str(folder / "out"), "--formats", "safetensors"]) == 0
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            torch.save((images, network(images)), folder / "out" / "expected.pt")
        (folder / "out" / "lines.py").write_text(lines_of_the_card(folder / "out"))
    program = (
        "import json, os, pathlib, sys, timm, torch\n"
        "for name in sys.argv[1:]:\n"
        "    os.chdir(name + '/out')\n"
        "    found = {}\n"
        "    exec(pathlib.Path('lines.py').read_text(), found)\n"
        "    assert found['probabilities'].shape == (1, 7)\n"
        "    images, expected = torch.load('expected.pt')\n"
        "    assert type(found['network']).__module__.startswith('timm')\n"
        "    assert found['transform'](found['image']).shape == images.shape[1:]\n"
        "    torch.testing.assert_close(found['network'](images), expected, rtol=0, atol=1e-5)\n"
        "    os.chdir('../..')\n"
        "for name, (timms, options, shapes) in json.load(open('wanted.json')).items():\n"
        "    with torch.device('meta'):\n"
        "        network = timm.create_model(timms, num_classes=7, img_size=64, **options)\n"
        "    found = {key: list(value.shape) for key, value in network.state_dict().items()}\n"
        "    assert found == shapes, name\n"
        "for form in ('torch_export', 'onnx'):\n"
        "    os.chdir(form)\n"
        "    exec(pathlib.Path('lines.py').read_text(), {})\n"
        "    os.chdir('..')\n"
        "assert not {'models', 'tools', 'options'} & set(sys.modules)\n"
    )
    assert run_outside(program, tmp_path, *SMALL).count("7") >= 2, "the shapes of the logits"


def lines_of_the_card(folder: Path) -> str:
    return (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]


def tensors_of_every_model() -> dict[str, list]:
    """Return for every registered model timm's name, its options, and the shapes by name."""
    wanted = {}
    for name in [*VITS, *NETWORKS]:
        timms, options = models.released.plain_timm(name)
        if not options:  # for speed
            options = {} if "resmlp" in name else {"depth": 2}
        with torch.device("meta"):
            network = timm.create_model(name, num_classes=7, img_size=64, **options)
        shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
        wanted[name] = [timms, options, shapes]
    return wanted


def test_the_card_has_the_hubs_front_matter_with_both_licences(run_folder: Path) -> None:
    text = card_of(run_folder, "--license", "mit", "--data-license", "cc-by-4.0")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "mit" and front["data_license"] == "cc-by-4.0"
    assert front["library_name"] == "timm" and front["pipeline_tag"] == "image-classification"
    assert "| licence of the weights | mit |" in text
    assert "| licence of the training data | cc-by-4.0 |" in text
    assert "| licence of the weights | unknown |" in card_of(run_folder)


def test_names_with_markup_and_control_characters_are_escaped_on_the_card(run_folder: Path) -> None:
    change(run_folder, classes=["<b>a</b>", "x|y", "e\x1b[2J", *"defg"])
    text = card_of(run_folder)
    assert r"\<b\>a\</b\>" in text and r"x\|y" in text and "\x1b" not in text


class Hub:
    """A stand-in for huggingface_hub.HfApi that records its calls."""

    calls: list[tuple] = []

    def create_repo(self, name: str, **options: object) -> None:
        self.calls.append((name, options))

    def upload_folder(self, **options: object) -> None:
        self.calls.append(("upload", options))


def test_a_push_to_the_hub_prints_its_files_and_uploads_when_confirmed(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    flags = [str(run_folder), str(tmp_path / "out"), "--formats", "safetensors"]
    flags += ["--push-to-hub", "someone/digits"]
    assert export.main(flags) == 0
    printed = capsys.readouterr().out
    for name in ("README.md (", "config.json (", "model.safetensors ("):
        assert name in printed
    assert "someone/digits" in printed and "nothing was uploaded" in printed and not Hub.calls
    (tmp_path / "out" / "private.txt").write_text("not part of the export")
    assert export.main([*flags, "--yes"]) == 0
    (name, created), (_, uploaded) = Hub.calls
    assert name == "someone/digits" and created["private"] is True
    assert uploaded["allow_patterns"] == ["README.md", "config.json", "model.safetensors"]
    assert "hf-hub:someone/digits" in (tmp_path / "out" / "README.md").read_text()


def test_a_hub_that_refuses_is_one_line(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    class Refuses(Hub):
        def create_repo(self, name: str, **options: object) -> None:
            raise OSError("401 Client Error:\n no token")

    monkeypatch.setattr(huggingface_hub, "HfApi", Refuses)
    flags = ["--formats", "safetensors", "--push-to-hub", "a/b", "--yes"]
    assert export.main([str(run_folder), str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "nothing was uploaded (401 Client Error: no token)" in error
    assert export.main([str(run_folder), str(tmp_path / "x.safetensors"), *flags[2:]]) == 2
    assert "give a folder" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["taken", "taken/below", "/dev/full/x.safetensors"])
def test_a_path_that_cannot_be_written_is_one_line(
    out: str, run_folder: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "taken").write_text("a file")
    path = tmp_path / out
    assert export.main([str(run_folder), str(path), "--formats", "safetensors"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"error: {path}: cannot be written (" in error
    assert (tmp_path / "taken").read_text() == "a file"


@pytest.mark.parametrize("name", ["onnx", "safetensors", "torch_export"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    name: str, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def full(student, folder):  # type: ignore[no-untyped-def]
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RuntimeError("unexpected pos 64 vs 0") from error  # as torch does

    monkeypatch.setitem(export.FORMATS, name, full)
    assert export.main([str(run_folder), str(tmp_path / "out"), "--formats", name]) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_an_export_with_other_logits_is_not_kept(
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
    assert code == 2 and "nothing was written" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_files_of_an_earlier_export_do_not_stay_beside_a_new_card(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert export.main([str(run_folder), str(out), "--formats", "safetensors"]) == 0
    before = (out / "README.md").read_text()
    assert export.main([str(run_folder), str(out), "--formats", "torch_export"]) == 2
    assert "model.safetensors of an earlier export" in capsys.readouterr().err
    assert (out / "README.md").read_text() == before and not (out / "model.pt2").exists()
    assert export.main([str(run_folder), str(out), "--formats", "safetensors"]) == 0


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


def test_a_card_has_recipe_data_and_distillation(run_folder: Path) -> None:
    settings = {
        "recipe": "deit_tiny_token",
        "lr": 5e-4,
        "batch_size": 64,
        "grad_accum_steps": 2,
        "unscale_lr": False,
        "mixup": 0.8,
        "cutmix": 0.0,
        "aa": "rand-m9",
        "opt": "adamw",
        "data_set": "IMNET",
        "data_path": "/somewhere/flowers",
    }
    change(run_folder, settings, facts={"processes": 8, "data": "90 + 30 images, 0a1b"})
    card = card_of(run_folder)
    for row in (
        "recipe | deit_tiny_token",
        "data | IMNET (flowers)",
        "epochs | 3",
        "trained and evaluated on | 90 + 30 images",
        "learning rate | 0.001",
        "effective batch | 1024: --batch-size 64, processes 8, --grad-accum-steps 2",
        "augmentation and regularisation | aa rand-m9, mixup 0.8",
        "distillation | hard, alpha None",
    ):
        assert f"| {row} |" in card
    assert "/somewhere" not in card and "7 classes" in card and "logits: a, b, c" in card


def test_a_run_without_a_teacher_has_none_on_its_card(run_folder: Path) -> None:
    change(run_folder, {"distillation_type": "none", "teacher_path": __file__})
    assert "teacher" not in card_of(run_folder) and "tau" not in card_of(run_folder)


def test_the_teachers_hash_is_the_one_the_checkpoint_has(run_folder: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.pth"
    teacher.write_bytes(b"as it was")
    was = files.hash_of(teacher)
    change(run_folder, {"teacher_path": str(teacher)}, facts={"teacher": [was]})
    card = card_of(run_folder)
    assert f"| sha256 of the teacher | {was} |" in card and "| note |" not in card
    assert "| teacher | resnet_pico, teacher.pth |" in card
    teacher.write_bytes(b"trained on")
    now = files.hash_of(teacher)
    card = card_of(run_folder)
    assert f"| sha256 of the teacher | {was} |" in card
    assert f"| note | the file has changed since: its sha256 is {now} |" in card
    change(run_folder, facts={})  # as of DeiT
    assert f"| sha256 of the teacher's file today | {now} |" in card_of(run_folder)


def test_a_released_teacher_is_known_by_the_hash_in_its_name(run_folder: Path) -> None:
    change(run_folder, {"teacher_model": "regnety_160.deit_in1k"}, facts={"teacher": ["timm's"]})
    card = card_of(run_folder)
    assert "| teacher | regnety_160.deit_in1k, regnety_160-a5fe301d.pth |" in card
    assert "| sha256 of the teacher | begins with a5fe301d |" in card
    change(run_folder, {"teacher_model": "resnet50"})
    assert "| teacher | resnet50, timm's published weights |" in card_of(run_folder)


def test_the_accuracy_is_that_of_the_weights_exported(run_folder: Path) -> None:
    path = change(run_folder)
    average = torch.load(path, weights_only=True)["model"]
    change(run_folder, model_ema=average)
    assert "| top-1 | not known, after epoch 3 |" in card_of(run_folder, "--key", "model_ema")
    lines = [{"epoch": i, "test_acc1": 60.0 + i, "ema_acc1": 70.123 + i} for i in range(4)]
    (run_folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "| top-1 | 62.00% after epoch 3 |" in card_of(run_folder)
    assert "| top-1 | 72.12% after epoch 3 |" in card_of(run_folder, "--key", "model_ema")
    change(run_folder, tally={"micro_steps": 5})
    assert "| top-1 | not measured: stopped within epoch 4 |" in card_of(run_folder)


def test_half_is_stored_as_half_and_loads_everywhere(
    run_folder: Path, tmp_path: Path, capsys
) -> None:
    full, half = tmp_path / "full", tmp_path / "half"
    for out, flags in ((full, []), (half, ["--half"])):
        assert export.main([str(run_folder), str(out), "--formats", "safetensors", *flags]) == 0
    rounded = {k: v.half() for k, v in load_file(full / "model.safetensors").items()}
    torch.testing.assert_close(load_file(half / "model.safetensors"), rounded, rtol=0, atol=0)
    assert "rounded to float16" in (half / "README.md").read_text()
    network = timm.create_model(f"local-dir:{half}", pretrained=True)
    assert torch.equal(network.head.weight, rounded["head.weight"].float())
    large = torch.load(change(run_folder), weights_only=True)["model"]
    large["head.bias"] += 1e5
    change(run_folder, model=large)
    assert export.main([str(run_folder), str(half), "--half"]) == 2
    assert export.main([str(run_folder), str(tmp_path / "one.safetensors"), "--half"]) == 2
    assert capsys.readouterr().err.count("head.bias has values too large for float16") == 2


@pytest.mark.parametrize(
    ("args", "content"),
    [({"model": 7}, {}), ({"input_size": "x"}, {}), ({}, {"classes": 7}), ({}, {"facts": [1]})],
)
def test_a_damaged_checkpoint_is_one_line(
    args: dict, content: dict, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    change(run_folder, args, **content)
    assert export.main([str(run_folder), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {run_folder}: damaged") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_flag_is_one_line(capsys: pytest.CaptureFixture) -> None:
    assert export.main(["run", "out", "--format", "pt", "--halve"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_weights_alone_as_before(run_folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "weights.safetensors"
    assert export.main([str(run_folder / "best_checkpoint.pth"), str(out), "--half"]) == 0
    network = models.create_model("deit_pico_distilled_patch8_32", num_classes=7)
    models.load_weights(network, str(out))
    torch.save({"model": network.state_dict()}, tmp_path / "bare.pth")
    assert export.main([str(tmp_path / "bare.pth"), str(tmp_path / "out")]) == 2
    assert "give --model" in capsys.readouterr().err


def test_weights_alone_that_read_back_otherwise_are_not_kept(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    real = export.load_file
    monkeypatch.setattr(export, "load_file", lambda path: {k: v + 1 for k, v in real(path).items()})
    out = tmp_path / "new" / "weights.safetensors"
    assert export.main([str(run_folder / "best_checkpoint.pth"), str(out)]) == 2
    assert "nothing was written" in capsys.readouterr().err and not list(out.parent.iterdir())
