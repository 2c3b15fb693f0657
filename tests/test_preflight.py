"""Before a run: sizes and costs without training, and what --check finds."""

from pathlib import Path

import pytest
import torch

import models
import preflight
from preflight import label_order, measure, teacher_findings


def test_sizes_by_hand() -> None:
    size = measure(lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 7)), 4, 4)
    assert size.parameters == 48 * 7 + 7
    assert size.flops == 2 * 48 * 7 and size.kept_bytes == 48 * 4
    assert "0.00 M parameters" in size.describe()


def test_deit_small_has_twice_the_papers_multiply_adds() -> None:
    size = measure(lambda: models.create_model("deit_small_patch16_224"), 224, 224)
    assert size.flops / 2e9 == pytest.approx(4.6, abs=0.05)


def test_a_good_teacher_raises_no_finding() -> None:
    labels = torch.arange(10).repeat(6)
    assert teacher_findings(torch.eye(10)[labels], labels, None) == []
    coin = teacher_findings(torch.eye(2)[torch.zeros(60, dtype=torch.long)], labels % 2, None)
    assert "50% right" in coin[0] and "at least 75%" in coin[0]


def test_a_shifted_label_order_is_told_from_a_bad_teacher() -> None:
    labels = torch.arange(10).repeat(6)
    shifted = teacher_findings(torch.eye(10)[(labels + 1) % 10], labels, None)
    assert len(shifted) == 1 and "label order" in shifted[0]
    constant = teacher_findings(torch.eye(10)[torch.zeros(60, dtype=torch.long)], labels, None)
    assert "at least 30%" in constant[0]
    few = teacher_findings(torch.eye(1000)[labels + 1], labels, 80.0)
    assert "at least 65%" in few[0]


def test_class_names_are_compared() -> None:
    assert label_order(["a", "b"], ["a", "b"]) == label_order(None, ["a"]) == []
    assert "another order" in label_order(["b", "a"], ["a", "b"])[0]
    assert "c where the data has b" in label_order(["a", "c"], ["a", "b"])[0]
    assert "3 where" in label_order(["a", "b", "c"], ["a", "b"])[0]


@pytest.mark.slow
def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(run_inside, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run_inside("--dry-run", "--distillation-type", "hard", "--output_dir", str(out))
    assert result.returncode == 0, result.stderr
    for word in ("model: deit_pico", "student: ", "teacher: resnet_pico", "GFLOPs", "memory: about",
                 "cache: 0.0 GiB with --teacher-cache-topk all", "26880 answers", "images/s",
                 "30 epochs"):  # fmt: skip
        assert word in result.stdout, word
    assert not out.exists()


@pytest.mark.slow
def test_a_dry_run_of_a_recipe_needs_no_data(run_inside) -> None:
    result = run_inside("--recipe", "deit_tiny_none", "--data-path", "nowhere", "--dry-run",
                        "--batch-size", "8", "--model", "deit_pico_patch8_32")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "ImageNet assumed" in result.stdout and "1281167 pictures" in result.stdout
    assert "--model deit_pico_patch8_32 instead of deit_tiny_patch16_224" in result.stdout


@pytest.mark.slow
def test_check_finds_few_patches_and_a_teacher_of_other_classes(
    run_inside, picture_folder: Path, tmp_path: Path
) -> None:
    result = run_inside("--check", "--distillation-type", "hard", "--input-size", "24")
    assert result.returncode == 0, result.stderr
    assert "as 9 patches only" in result.stdout
    teacher = models.create_model("resnet_pico", num_classes=2)
    torch.save({"model": teacher.state_dict(), "classes": ["two", "one"]}, tmp_path / "t.pth")
    result = run_inside(
        "--check", "--distillation-type", "hard", "--data-path", str(picture_folder),
        "--model", "deit_pico_distilled_patch4_32", "--teacher-model", "resnet_pico",
        "--teacher-path", str(tmp_path / "t.pth"), "--batch-size", "4", "--num_workers", "0",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "2 classes in another order" in result.stdout and "patches only" not in result.stdout
    assert preflight.classes_of("") is None
