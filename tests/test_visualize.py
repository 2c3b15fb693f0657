"""Images for people: captions, grids, where a student looks, and what TensorBoard gets."""

from pathlib import Path

import pytest
import timm
import torch

import models
from checks import visualize
from data.transforms import InputConfig

INPUTS = InputConfig((32, 48), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", 1.0)


def test_a_image_looks_as_before_it_was_normalised() -> None:
    plain = torch.rand(2, 3, 5, 7)
    mean, std = (torch.tensor(v)[:, None, None] for v in (INPUTS.mean, INPUTS.std))
    shown = visualize.to_uint8((plain - mean) / std, INPUTS)
    assert (shown.float() - plain * 255).abs().max() <= 1


def test_an_opinion_names_what_weighs_most() -> None:
    shares = torch.tensor([0.04, 0.26, 0.7])
    assert visualize.top_classes(shares, ["a", "b", "c"]) == "c (70%), b (26%)"
    assert visualize.top_classes(torch.tensor([0.0, 1.0]), None) == "1 (100%)"


def test_a_grid_has_room_for_every_image_and_caption() -> None:
    sheet = visualize.grid(torch.zeros(5, 3, 32, 48, dtype=torch.uint8), [["x", "y"]] * 5)
    assert sheet.shape == (3, 2 * (128 + 2 * 19 + 6), 4 * 196) and sheet.dtype == torch.uint8
    assert sheet.float().mean() > 0 and (sheet[:, :128, :192] == 0).all()


def test_a_long_caption_stays_within_its_image() -> None:
    sheet = visualize.grid(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), [["m" * 60], ["m"]])
    assert (sheet[:, 192:, 192:196] == 255).all() and (sheet[:, 192:, :192] < 255).any()


def test_attention_is_shown_for_each_prefix_token_and_leaves_no_hook() -> None:
    network = models.create_model("deit_pico_distilled_patch8_32", img_size=(32, 48)).train()
    sheet = visualize.attention(network, torch.randn(2, 3, 32, 48), INPUTS)
    assert sheet.shape[2] == 6 * 196 and network.training
    assert not any(module._forward_hooks for module in network.modules())
    assert (
        visualize.attention(models.create_model("resnet_pico"), torch.randn(1, 3, 32, 32), INPUTS)
        is None
    )


def test_maps_are_named_by_their_token_and_registers_are_left_out() -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, reg_tokens=2, num_classes=3)
    images = torch.randn(2, 3, 32, 32)
    maps = visualize.attention_maps(network, images, (10, 12))
    assert list(maps) == ["class token"] and maps["class token"].shape == (2, 10, 12)
    student = models.create_model("deit_pico_distilled_patch8_32")
    assert list(visualize.attention_maps(student, images)) == ["class token", "distillation token"]


@pytest.mark.slow
def test_tensorboard_gets_numbers_images_text_and_settings(run_inside, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run_inside(
        "--distillation-type",
        "hard",
        "--epochs",
        "2",
        "--mixup",
        "0.8",
        "--distillation-alpha",
        "0.3",
        "--output_dir",
        str(tmp_path),
    )
    assert result.returncode == 0, result.stderr
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = board.Tags()
    accuracies = {
        f"{of}/{name}"
        for of in ("val", "val_ema", "val_teacher")
        for name in ("loss", "acc1", "acc5")
    }
    assert set(tags["scalars"]) == accuracies | {
        "train/loss",
        "train/base",
        "train/distillation",
        "train_weighted/base",
        "train_weighted/distillation",
        "train/lr",
        "train/grad_norm",
        "train/images_per_s",
        "train/data_wait",
        "train/memory_mib",
    }
    assert set(tags["images"]) == {"train/batch", "val/attention"}
    assert "config/text_summary" in tags["tensors"]
    hparams = str(board.summary_metadata["_hparams_/session_start_info"])
    assert "distillation_alpha" in hparams and "checkpoint_minutes" not in hparams

    def curve(tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in board.Scalars(tag)]

    updates = [640, 896, 1536, 1792]  # 14 of 64 images an epoch, a line every 10 and at the end
    assert [images for images, _ in curve("train/loss")] == updates, "images seen, not updates"
    assert [images for images, _ in curve("val/acc1")] == [896, 1792]
    assert [images for images, _ in curve("val_teacher/acc1")] == [0, 896, 1792]
    rows = zip(
        curve("train/loss"),
        curve("train/base"),
        curve("train_weighted/base"),
        curve("train_weighted/distillation"),
    )
    for (_, loss), (_, base), (_, weighted), (_, distillation) in rows:
        assert weighted == pytest.approx(0.7 * base)
        assert weighted + distillation == pytest.approx(loss, rel=1e-5)


def test_a_class_without_a_name_is_shown_by_its_number() -> None:
    shares = torch.zeros(1000)
    shares[1], shares[999] = 0.4, 0.6
    assert visualize.top_classes(shares, ["cat", "dog"]) == "999 (60%), dog (40%)"
