"""Batches that are too small for a loss or a network: one line that says which batch works."""

from pathlib import Path

import pytest
import torch

import losses
import models

MODEL = "deit_pico_distilled_patch8_32"


@pytest.fixture(scope="module")
def flags(image_folder: Path, tmp_path_factory) -> list[str]:
    teacher = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({"model": models.create_model(MODEL, num_classes=2).state_dict()}, teacher)
    words = ["--data-path", str(image_folder), "--model", MODEL, "--epochs", "1"]
    words += ["--warmup-epochs", "0", "--num-workers", "0", "--no-model-ema", "--no-teacher-check"]
    return [*words, "--teacher-model", MODEL, "--teacher-path", str(teacher)]


def relation(state_S: torch.Tensor, state_T: torch.Tensor, mask: object = None) -> torch.Tensor:
    """A loss of the differences between images, which needs three of them."""
    if len(state_S) < 3:
        raise ValueError("relation: give 3 images or more")
    return (state_S.std(0) - state_T.std(0)).square().mean()


def test_a_loss_that_needs_three_images_is_tried_with_the_runs_batch(
    flags, run_inside, monkeypatch
) -> None:
    monkeypatch.setitem(losses.MATCH_LOSS_MAP, "relation", relation)
    match = ["--match", "feature=hidden,layer_S=1,layer_T=1,loss=relation"]
    found = run_inside(*flags, *match, "--batch-size", "4")
    assert found.returncode == 0, found.stderr
    for size in ("1", "2"):
        found = run_inside(*flags, *match, "--batch-size", size)
        assert found.returncode == 2
        assert f"3 images or more; it fails with --batch-size {size}, not with 8" in found.stderr


def test_a_loss_that_is_no_number_is_one_line(flags, run_inside, monkeypatch) -> None:
    rows = lambda state_S, state_T, mask=None: (state_S - state_T).mean((1, 2))  # noqa: E731
    monkeypatch.setitem(losses.MATCH_LOSS_MAP, "rows", rows)
    found = run_inside(
        *(*flags, "--batch-size", "5", "--match", "feature=hidden,layer_S=1,layer_T=1,loss=rows")
    )
    assert found.returncode == 2 and "the loss returned (5,), not one number" in found.stderr


@pytest.mark.parametrize(
    ("words", "advice", "enough"),
    [
        (["--distillation-type", "soft", "--kd-loss-type", "dist"], "give at least 2", "2"),
        (["--ranking-kl-weight", "1"], "ranking needs 3 images", "3"),
        (["--model", "resnet_pico", "--input-size", "8"], "use --batch-size 2 or more", "2"),
        (["--model", "resnet_pico", "--input-size", "8"], "or a larger --input-size", "32 px"),
    ],
)
def test_one_image_is_too_few_and_the_advice_works(words, advice, enough, flags, run_inside):
    found = run_inside(*flags, *words, "--batch-size", "1")
    assert found.returncode == 2 and "Traceback" not in found.stderr
    assert "--batch-size 1: " in found.stderr and advice in found.stderr
    change = ["--batch-size", enough]
    if enough.endswith("px"):
        change = ["--batch-size", "1", "--input-size", "32"]
    found = run_inside(*flags, *words, *change)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--distillation-type", "soft", "--mixup-mode", "pair"],
        ["--cosub"],
        ["--match", "feature=hidden,layer_S=1+2,layer_T=1+2,loss=nst"],
        ["--match", "feature=pooled,loss=vkd,proj=orthogonal", "--logit-standardization"]
        + ["--distillation-type", "soft"],
    ],
)
def test_one_image_is_enough_for_all_other_losses(words, flags, run_inside) -> None:
    found = run_inside(*flags, *words, "--batch-size", "1")
    assert found.returncode == 0, found.stderr
