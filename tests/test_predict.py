"""The most probable classes of images, from a run and from its export."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import models
from tools import export, predict


@pytest.fixture(scope="module")
def exported(small_run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "out"
    assert export.main([str(small_run[0]), str(folder), "--formats", "safetensors"]) == 0
    return folder


def rows_of(capsys: pytest.CaptureFixture, *argv: object) -> list[dict]:
    capsys.readouterr()
    assert predict.main([*map(str, argv), "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_share_of_right_predictions_is_the_accuracy_of_eval(
    small_run, exported: Path, image_folder: Path, run_inside, capsys
) -> None:
    run, flags = small_run
    checkpoint = str(run / "best_checkpoint.pth")
    result = run_inside(*flags, "--eval", "--resume", checkpoint)
    wanted = re.search(r"\* Acc@1 ([0-9.]+)", result.stdout)
    assert wanted is not None, result.stderr
    rows = rows_of(capsys, run, image_folder / "val")
    right = [row["predictions"][0]["class"] == Path(row["image"]).parent.name for row in rows]
    assert len(rows) == 12 and f"{100 * sum(right) / 12:.3f}" == wanted[1]
    assert rows == rows_of(capsys, checkpoint, image_folder / "val")
    for row, other in zip(rows, rows_of(capsys, exported, image_folder / "val")):
        assert row["image"] == other["image"]
        for one, two in zip(row["predictions"], other["predictions"]):
            assert one["class"] == two["class"]
            assert one["probability"] == pytest.approx(two["probability"], abs=1e-5)


def test_batches_do_not_change_the_probabilities_and_they_sum_to_one(
    small_run, image_folder: Path, capsys
) -> None:
    words = (small_run[0], image_folder / "val")
    for row, other in zip(rows_of(capsys, *words), rows_of(capsys, *words, "--batch-size", "5")):
        shares = [each["probability"] for each in row["predictions"]]
        assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
        assert shares == pytest.approx([p["probability"] for p in other["predictions"]], abs=1e-5)


def test_text_has_a_bar_for_each_class_and_fits_in_80_columns(
    small_run, image_folder: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(image_folder)
    assert predict.main([str(small_run[0]), "val/one/00.png", "val/t*/*.png", "--top-k", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "val/one/00.png" and lines[2] == "val/two/00.png"
    assert len(lines) == 2 * (1 + 6) and max(map(len, lines)) < 80
    assert all(re.fullmatch(r"  (one|two)  +\d+\.\d%  \[#*\.*\]", line) for line in lines[1::2])


def test_csv_has_a_row_for_each_image_and_class(small_run, image_folder: Path, capsys) -> None:
    argv = [str(small_run[0]), str(image_folder / "val"), "--format", "csv", "--top-k", "9"]
    assert predict.main(argv) == 0
    table = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(table) == 12 * 2 and [row["rank"] for row in table[:2]] == ["1", "2"]
    assert {row["class"] for row in table} == {"one", "two"}


def test_an_unreadable_image_is_left_out_and_the_code_is_2(
    small_run, image_folder: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    Image.open(first(image_folder)).save(tmp_path / "good.png")
    assert predict.main([str(small_run[0]), str(tmp_path), "--format", "csv"]) == 2
    out, err = capsys.readouterr()
    assert {line.split(",")[0] for line in out.splitlines()[1:]} == {str(tmp_path / "good.png")}
    lines = err.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'bad.jpg'}: left out, not readable")
    assert lines[-1].startswith("error: 1 of 2 images are not readable")


def first(image_folder: Path) -> Path:
    return sorted((image_folder / "val/one").iterdir())[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["{run}"], "IMAGE"),
        (["{run}", "missing.jpg"], "missing.jpg: not there; give image files, folders or patterns"),
        (["{run}", "*.nothing"], "*.nothing: not there"),
        (["{run}", "{empty}"], "no images in it"),
        (["missing_run", "{image}"], "missing_run"),
        (["{empty}", "{image}"], "has no checkpoint.pth"),
        (["{image}", "{image}"], ""),
        (["{run}", "{image}", "--top-k", "0"], "give a whole number of at least 1"),
        (["{run}", "{image}", "--format", "xml"], "--format"),
        (["{run}", "{image}", "--device", "tpu"], "--device tpu"),
        (["{run}/model.onnx", "{image}"], "give its folder"),
    ],
)
def test_a_user_error_is_one_line_and_code_2(
    argv: list[str], words: str, small_run, image_folder: Path, tmp_path: Path, capsys
) -> None:
    names = {"run": small_run[0], "image": first(image_folder), "empty": tmp_path}
    capsys.readouterr()
    assert predict.main([word.format(**names) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_classes_without_names_are_numbers(small_run, image_folder: Path, tmp_path, capsys) -> None:
    content = torch.load(small_run[0] / "checkpoint.pth", weights_only=True)
    torch.save({"model": content["model"], "args": content["args"]}, tmp_path / "plain.pth")
    (row,) = rows_of(capsys, tmp_path / "plain.pth", first(image_folder))
    assert {each["class"] for each in row["predictions"]} == {"0", "1"}


PLUGIN = """
import timm
from timm.models import register_model

@register_model
def plugin_cnn(pretrained=False, **options):
    return timm.create_model("resnet_pico", **options)
"""


def test_the_plugin_of_a_run_must_be_given_and_is_then_run(
    small_run, image_folder: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    content = torch.load(small_run[0] / "checkpoint.pth", weights_only=True)
    content["model"] = models.create_model("resnet_pico", num_classes=2).state_dict()
    content["args"] |= {"model": "plugin_cnn", "plugin": ["/elsewhere/mine.py"]}
    run = tmp_path / "plugin.pth"
    torch.save(content, run)
    flags = ["--plugin", str(tmp_path / "mine.py")]
    image, out = str(first(image_folder)), str(tmp_path / "out")
    for tool, words in ((predict, [str(run), image]), (export, [str(run), out])):
        assert tool.main(words) == 2
        error = capsys.readouterr().err
        assert "--plugin /elsewhere/mine.py" in error and error.count("\n") == 1
    assert predict.main([str(run), image, *flags]) == 0, capsys.readouterr().err
