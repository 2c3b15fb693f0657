"""The fidelity report: its numbers on hand-made logits, and the page of real runs."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import models
from tools import report
from tools.fidelity import (
    CLS,
    DIST,
    STUDENT,
    TEACHER,
    Answers,
    agreement,
    calibration,
    class_gaps,
    collect,
    divergence,
    numbers,
    top,
)


def logits_of(*rows: list[float]) -> Tensor:
    """Return logits whose softmax are these probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log()


def test_a_student_that_is_its_teacher_agrees_always_and_has_no_divergence() -> None:
    logits, labels = torch.randn(11, 7), torch.arange(11) % 7
    found = numbers(Answers(labels, {STUDENT: logits, TEACHER: logits}), list("abcdefg"))
    names = found["agreement"]["names"]
    assert found["agreement"]["matrix"][names.index(STUDENT)][names.index(TEACHER)] == 1
    assert found["kl_nats"][STUDENT] == 0
    assert {row["gap"] for row in found["class_gaps"]} == {0}


def test_divergence_by_hand() -> None:
    teacher, student = logits_of([0.5, 0.5]), logits_of([0.25, 0.75])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert divergence(teacher, student).tolist() == [pytest.approx(expected)]


def test_calibration_error_by_hand() -> None:
    logits = logits_of([0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.3, 0.7])
    found = calibration(logits, torch.tensor([0, 1, 1, 1]), bins=10)
    # (0.5,0.6]: 1 right of 1 at 0.6; (0.6,0.7]: 1 of 1 at 0.7; (0.8,0.9]: 1 of 2 at 0.9
    assert [one["count"] for one in found["bins"]] == [1, 1, 2]
    assert found["ece"] == pytest.approx(0.25 * 0.4 + 0.25 * 0.3 + 0.5 * 0.4)


def test_a_sure_and_right_network_is_calibrated() -> None:
    logits = torch.tensor([[100.0, 0.0], [0.0, 100.0]])
    assert calibration(logits, torch.tensor([0, 1]))["ece"] == pytest.approx(0)


def test_the_agreement_matrix_is_symmetric_and_counts() -> None:
    matrix = agreement({"a": torch.tensor([0, 1, 2, 3]), "b": torch.tensor([0, 1, 2, 0]),
                        "c": torch.tensor([1, 1, 0, 0])})  # fmt: skip
    assert matrix == [[1, 0.75, 0.25], [0.75, 1, 0.5], [0.25, 0.5, 1]]


def test_accuracy_and_gaps_by_hand() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    assert top(torch.eye(3)[[0, 1, 1, 2]], labels) == {"acc1": 50, "acc5": 100}
    rows = class_gaps(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 1, 1]), labels, ["x", "y"])
    assert [(row["class"], row["gap"]) for row in rows] == [("x", -50), ("y", 50)]


def test_both_heads_and_their_mean_are_collected() -> None:
    torch.manual_seed(0)
    network = models.create_model("deit_pico_distilled_patch8_32", num_classes=7)
    teacher = models.create_model("resnet_pico", num_classes=7).eval()
    batches = [(torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])) for _ in range(3)]
    answers = collect(network, teacher, batches, torch.device("cpu"), limit=7, keep=2)
    heads = (answers.logits[CLS] + answers.logits[DIST]) / 2
    torch.testing.assert_close(answers.logits[STUDENT], heads)
    assert len(answers.labels) == 7 and len(answers.token_cosine) == 5
    assert len(answers.strange) == 2 and answers.strange[0][0] >= answers.strange[1][0]
    images = batches[0][0]
    with torch.no_grad():
        cls, dist = network.eval()(images, both=True)
    torch.testing.assert_close(answers.logits[DIST][:3], dist)
    assert not network.head._forward_hooks


@pytest.fixture(scope="module")
def made(run_inside, picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two runs of one epoch, one of them without a teacher of its own."""
    root = tmp_path_factory.mktemp("runs")
    base = [
        "--model",
        "deit_pico_distilled_patch8_32",
        "--data-path",
        str(picture_folder),
        "--epochs",
        "1",
        "--batch-size",
        "4",
        "--num_workers",
        "0",
        "--warmup-epochs",
        "0",
    ]
    teacher = ["--teacher-model", "resnet_pico",
               "--teacher-path", str(root / "teacher" / "checkpoint.pth")]  # fmt: skip
    for name, flags in (("teacher", ["--model", "resnet_pico"]), ("none", []),
                        ("hard", ["--distillation-type", "hard", *teacher])):  # fmt: skip
        run = run_inside(*base, *flags, "--output_dir", str(root / name))
        assert run.returncode == 0, run.stderr
    out = root / "report.html"
    assert report.main([str(root / "none"), str(root / "hard"), "--out", str(out), *teacher]) == 0
    return out


@pytest.mark.slow
def test_two_runs_make_one_page_that_loads_nothing(made: Path) -> None:
    page = made.read_text()
    assert not re.search(r"""(?:src|href)=['"]?(?!data:)\w""", page) and "http" not in page
    assert page.count("<svg") >= 8 and "data:image/jpeg;base64," in page
    assert "viewport" in page and "@media print" in page
    found = json.loads(made.with_suffix(".json").read_text())
    assert [run["distillation"] for run in found] == ["none", "hard"] and found[0]["curves"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("width", [412, 1280])
def test_a_browser_shows_the_curves(width: int, made: Path, screenshot, tmp_path: Path) -> None:
    colours = screenshot(made.as_uri(), width, tmp_path / "page.png")
    assert colours[(11, 99, 206)] > 20 and colours[(194, 65, 12)] > 20, "no curves"
