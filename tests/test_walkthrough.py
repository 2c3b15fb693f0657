"""What a newcomer does: the commands of docs/own-data.md in order, and every recipe, made small."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import models
from data import sources
from tools import export, predict, prepare_data, report
from training import recipe

ROOT = Path(__file__).resolve().parents[1]
STUDENT, TEACHER = "deit_pico_distilled_patch8_32", "resnet_pico"
TOOLS = {
    "tools/report.py": report,
    "tools/export.py": export,
    "tools/prepare_data.py": prepare_data,
    "tools/predict.py": predict,
}
SMALL = ["--epochs", "1", "--batch-size", "12", "--num_workers", "0", "--warmup-epochs", "0"]

pytestmark = pytest.mark.slow


def commands(page: Path) -> list[list[str]]:
    text = "\n".join(page.read_text().split("```")[1::2]).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("python ")]


def test_the_commands_for_own_images_work_in_their_order(
    run_inside, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    small = {
        "my_images": str(image_folder),
        "my_images/val": str(image_folder / "val"),
        "resnet50": TEACHER,
        "deit_tiny_distilled_patch16_224": STUDENT,
        "exported": str(tmp_path / "exported"),
        "local-dir:exported": f"local-dir:{tmp_path / 'exported'}",
        "report.html": str(tmp_path / "report.html"),
        "prepared": str(tmp_path / "prepared"),
    }
    done, evaluated = [], []
    for words in commands(ROOT / "docs" / "own-data.md"):
        if "my_images-distil" in " ".join(words) or words[1] == "tools/distil.py":
            continue  # tests/test_distil.py runs it
        words = [small.get(word, word.replace("runs/", f"{tmp_path}/")) for word in words]
        if "local-dir:" not in " ".join(words):  # no network here
            words = [word for word in words if word != "--pretrained"]
        program, flags = words[1], words[2:]
        done.append(program)
        if program == "main.py":
            model = [] if "--model" in flags else ["--model", STUDENT]
            result = run_inside(*flags, *model, *SMALL)
            assert result.returncode == 0, (words, result.stderr)
            if "--eval" in flags:
                assert "published" not in result.stdout
                evaluated.append(re.findall(r"^\* Acc@1 .*", result.stdout, re.MULTILINE)[0])
        else:
            tool = TOOLS[program]
            if tool is export:
                flags += ["--formats", "safetensors", "torch_export"]
            assert tool.main(flags) == 0, capsys.readouterr().err
    assert done == ["main.py"] * 6 + [
        "tools/report.py",
        "tools/export.py",
        "main.py",
        "tools/predict.py",
    ] + ["tools/prepare_data.py"] * 2 + ["main.py"]
    assert (tmp_path / "exported" / "model.pt2").exists() and (tmp_path / "report.html").exists()
    assert len(evaluated) == 2 and evaluated[0] == evaluated[1]  # the student, and what it became


@pytest.mark.parametrize("page", ["results/quickstart.md", "docs/cached-teacher.md"])
def test_the_commands_on_the_embedded_digits_work_in_their_order(
    page: str, run_inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "DIGITS_ROWS", {"train": (0, 24), "test": (1197, 1213)})
    monkeypatch.chdir(tmp_path)
    ran = []
    for _, program, *flags in commands(ROOT / page):
        if program == "main.py" and not {"--data-path", "--list-models"} & set(flags):
            result = run_inside(*flags, *SMALL)
            assert result.returncode == 0, (flags, result.stderr)
            ran.append(result.stdout)
        elif program == "tools/export.py" and flags[0].endswith("teacher/checkpoint.pth"):
            assert export.main(flags) == 0
    if page == "results/quickstart.md":
        assert len(ran) == 2 and "teacher: resnet_pico" in ran[0] and "quickstart expects" in ran[0]
        assert (tmp_path / "resnet_pico_digits.safetensors").exists()
    else:
        assert len(ran) == 2 and "Training time" in ran[1] and "Training time" not in ran[0]


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_runs_on_a_few_images(
    name: str, run_inside, image_folder: Path, tmp_path: Path
) -> None:
    asked = recipe.find(name).flags
    student = STUDENT if "distilled" in asked["model"] else "deit_pico_patch8_32"
    for model in (student, TEACHER):
        network = models.create_model(model, num_classes=2)
        torch.save({"model": network.state_dict()}, tmp_path / f"{model}.pth")
    flags = [
        "--data-set",
        "IMNET",
        "--data-path",
        str(image_folder),
        "--model",
        student,
        "--input-size",
        "32",
        "--grad-accum-steps",
        "1",
        "--finetune",
        str(tmp_path / f"{student}.pth"),
    ]
    if asked.get("distillation_type", "none") != "none":
        weights = str(tmp_path / f"{TEACHER}.pth")
        flags += ["--teacher-model", TEACHER, "--teacher-path", weights]
    result = run_inside("--recipe", name, *flags, *SMALL, "--output_dir", "")
    assert result.returncode == 0, result.stderr
    assert "2 updates" in result.stdout
    if recipe.find(name).acc1 is not None:
        assert f"{name} expects" in result.stdout and "outside" in result.stdout


def test_a_recipe_of_deit_3_runs_its_own_network(run_inside, image_folder: Path) -> None:
    flags = ["--data-set", "IMNET", "--data-path", str(image_folder), "--input-size", "32"]
    result = run_inside("--recipe", "deit3_small", *flags, *SMALL, "--output_dir", "")
    assert result.returncode == 0, result.stderr
    assert "student: deit_small_patch16_LS" in result.stdout
