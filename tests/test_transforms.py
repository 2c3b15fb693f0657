"""Images to tensors, for training and for evaluation, and the mixing of batches."""

import random
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms

from base.errors import UserError
from data.transforms import (
    AnyBatchMixup,
    InputConfig,
    Mixup,
    Transform,
    augment_ops,
    build_mixup,
    build_transform,
    posterize,
    three_augment,
    train_transform,
)
from options import get_args_parser

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
WIDE = InputConfig((40, 56), **IMAGENET)
PLAIN = InputConfig((32, 32), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def settings(*flags: str) -> Namespace:
    return get_args_parser().parse_args(flags)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """An image of smooth noise: every operation of a policy changes it."""
    grid = np.random.default_rng(seed).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)


def seeded(transform: Transform, image: Image.Image, seed: int = 0) -> Tensor:
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    return transform(image)


# ---- the input ----


def test_the_input_is_described_with_its_crop() -> None:
    assert InputConfig((224, 224), **IMAGENET).describe() == (
        "224x224, crop 0.875 of 256, bicubic, mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)"
    )
    assert "40x56, crop 0.875 of 45x64, bicubic" in WIDE.describe()
    assert PLAIN.describe().startswith("32x32, no crop, bicubic")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": (0, 32)}, "input size"),
        ({"input_size": (32,)}, "height and width"),
        ({"crop_ratio": 0.0}, "--eval-crop-ratio 0.0"),
        ({"crop_ratio": 1.5}, "at most 1"),
        ({"std": (0.2, 0.0, 0.2)}, "std above 0"),
        ({"mean": (0.5,)}, "three of each"),
        ({"interpolation": "cubic"}, "interpolation cubic: not one of nearest"),
    ],
)
def test_an_input_no_image_can_be_brought_to_is_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(WIDE, **change)


# ---- evaluation ----


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("side", "crop_ratio"), [(64, 0.875), (48, 0.9), (40, 1.0)])
@pytest.mark.parametrize("shape", [(91, 70), (70, 91), (64, 64), (33, 20)])
def test_evaluation_of_squares_is_timms_in_every_pixel(
    side: int, crop_ratio: float, interpolation: str, shape: tuple[int, int]
) -> None:
    inputs = InputConfig(
        (side, side), **IMAGENET, interpolation=interpolation, crop_ratio=crop_ratio
    )
    ours = build_transform(False, settings(), inputs)
    timms = create_transform(
        (3, side, side), interpolation=interpolation, crop_pct=crop_ratio, **IMAGENET
    )
    image = noise(*shape)
    assert ours(image).equal(timms(image))


@pytest.mark.parametrize("image", [(91, 70), (30, 200), (45, 64), (8, 8)])
def test_evaluation_of_other_shapes_crops_the_middle_and_pads_nothing(
    image: tuple[int, int],
) -> None:
    transform = build_transform(False, settings(), replace(WIDE, mean=PLAIN.mean, std=PLAIN.std))
    tensor = transform(Image.new("RGB", image[::-1], "white"))
    assert tensor.shape == (3, 40, 56)
    assert tensor.min() == 1.0, "a padded border would be black"


def test_images_up_to_32_pixels_are_neither_cropped_nor_resized_at_evaluation() -> None:
    image = noise(32, 32)
    tensor = build_transform(False, settings(), PLAIN)(image)
    assert tensor.equal(transforms.functional.to_tensor(image))


def test_small_images_of_another_size_are_resized_as_a_whole() -> None:
    inputs = InputConfig((24, 32), **IMAGENET)
    for is_train in (False, True):
        assert build_transform(is_train, settings(), inputs)(noise(8, 8)).shape == (3, 24, 32)


# ---- training ----


@pytest.mark.parametrize("flags", [[], ["--ThreeAugment"], ["--ThreeAugment", "--src"]])
@pytest.mark.parametrize("image", [(91, 70), (30, 200), (8, 8)])
def test_training_gives_the_input_size_whatever_the_image(flags: list, image: tuple) -> None:
    tensor = seeded(build_transform(True, settings(*flags), WIDE), noise(*image))
    assert tensor.shape == (3, 40, 56)
    assert tensor.dtype == torch.float32


def test_training_is_timms_transform_in_almost_every_pixel() -> None:
    ours = build_transform(True, settings(), WIDE)
    timms = create_transform(
        (3, 40, 56),
        is_training=True,
        color_jitter=0.3,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
        **IMAGENET,
    )
    image = noise(80, 60)
    steps = [
        (seeded(ours, image, seed) - seeded(timms, image, seed)) * 0.224 * 255 for seed in range(20)
    ]
    far = torch.stack(steps).abs() > 3.5  # equalizing and posterizing enlarge a step of the crop
    assert far.float().mean() < 0.002


@pytest.mark.parametrize("policy", ["none", "original", "augmix-m3-w3", "rand-m9-inc1"])
def test_small_inputs_are_timms_in_every_pixel_after_the_crop(policy: str) -> None:
    inputs = InputConfig((32, 32), **IMAGENET)
    ours = train_transform(inputs, policy=policy)
    timms = create_transform(
        (3, 32, 32),
        is_training=True,
        color_jitter=0.3,
        interpolation="bicubic",
        auto_augment=None if policy == "none" else policy,
        re_prob=0.25,
        re_mode="pixel",
        **IMAGENET,
    )
    timms.transforms[0] = transforms.RandomCrop(32, padding=4)
    image = noise(32, 32)
    for seed in range(5):
        assert seeded(ours, image, seed).equal(seeded(timms, image, seed))


@pytest.mark.parametrize("policy", ["", "none", " None "])
def test_no_policy_leaves_crop_flip_and_colour_jitter(policy: str) -> None:
    transform = build_transform(True, settings("--aa", policy), WIDE)
    assert not list(augment_ops(transform))
    kinds = [type(step).__name__ for step in transform.transforms]
    wanted = ["RandomResizedCrop", "RandomHorizontalFlip", "function", "ColorJitter"]
    assert kinds[:4] == wanted


def test_small_inputs_are_padded_and_cropped_but_not_zoomed() -> None:
    flags = ["--aa", "", "--color-jitter", "0", "--reprob", "0"]
    transform = build_transform(True, settings(*flags), PLAIN, hflip=0)
    image = noise(32, 32)
    padded = transforms.functional.to_tensor(transforms.functional.pad(image, 4))
    crops = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    for seed in range(9):
        tensor = seeded(transform, image, seed)
        assert any(tensor.equal(crop) for crop in crops)


def test_erasing_and_flips_happen_only_when_asked_for() -> None:
    flags = ["--aa", "", "--color-jitter", "0"]
    image = Image.new("RGB", (32, 32), "white")
    off = build_transform(True, settings(*flags, "--reprob", "0"), PLAIN)
    on = build_transform(True, settings(*flags, "--reprob", "1", "--remode", "const"), PLAIN)
    assert [type(step).__name__ for step in off.transforms][-1] == "Normalize"
    assert seeded(on, image).eq(0).sum() > seeded(off, image).eq(0).sum()


@pytest.mark.parametrize("policy", ["rand-m9-x7", "original2", "magic", "v7"])
def test_an_unknown_policy_is_refused_in_one_line(policy: str) -> None:
    with pytest.raises(UserError) as caught:
        transform = build_transform(True, settings("--aa", policy), WIDE)
        raise AssertionError(f"{policy} gave {transform}")
    assert str(caught.value).startswith(f"--aa {policy}: not a policy of timm")
    assert "\n" not in str(caught.value)


def test_randaugment_survives_a_thousand_draws() -> None:
    transform = train_transform(replace(PLAIN, input_size=(16, 16)))
    image = noise(16, 16)
    for seed in range(1000):
        assert seeded(transform, image, seed).isfinite().all()


@pytest.mark.parametrize("policy", ["rand-m10-n4-inc1", "original", "v0", "augmix-m10-w2", "3a"])
def test_every_policy_survives_its_largest_magnitude(policy: str) -> None:
    transform = train_transform(replace(PLAIN, input_size=(16, 16)), policy=policy)
    for seed in range(60):
        assert seeded(transform, noise(16, 16), seed).shape == (3, 16, 16)


def test_posterizing_keeps_one_bit_at_least() -> None:
    image = Image.fromarray(np.array([[[0, 127, 128], [255, 200, 64]]], dtype=np.uint8))
    kept = [np.array(posterize(image, bits)).tolist() for bits in (0, 1, 2, 8)]
    one_bit = [[[0, 0, 128], [128, 128, 0]]]
    assert kept == [one_bit, one_bit, [[[0, 64, 128], [192, 192, 64]]], np.array(image).tolist()]
    for transform in (train_transform(WIDE), train_transform(WIDE, policy="v0")):
        ops = [op for op in augment_ops(transform) if op.name.startswith("Posterize")]
        assert ops and all(op.aug_fn is posterize for op in ops)


# ---- 3-Augment ----


def test_three_augment_is_crop_flip_one_of_three_and_colour_jitter() -> None:
    def kinds(*flags: str) -> list[str]:
        transform = build_transform(True, settings("--ThreeAugment", *flags), WIDE)
        return [type(step).__name__ for step in transform.transforms]

    tail = ["RandomHorizontalFlip", "function", "RandomChoice", "ColorJitter", "Normalize"]
    assert kinds() == ["RandomResizedCrop", *tail]
    assert kinds("--src") == ["function", "Cover", "RandomCrop", *tail]
    assert "ColorJitter" not in kinds("--color-jitter", "0")


def test_three_augment_greys_solarizes_or_blurs_exactly_once() -> None:
    transform = three_augment(PLAIN, color_jitter=0, simple_crop=True, hflip=0)
    image = noise(32, 32)
    seen = set()
    for seed in range(30):
        tensor = seeded(transform, image, seed)
        grey = tensor[0].equal(tensor[1])
        dark = tensor.max() <= 127 / 255
        seen.add("grey" if grey else "solarized" if dark else "blurred")
        assert not (grey and dark)
    assert seen == {"grey", "solarized", "blurred"}


def test_a_simple_crop_mirrors_at_the_border_and_keeps_the_scale() -> None:
    transform = three_augment(PLAIN, color_jitter=0, simple_crop=True, hflip=0)
    tensor = seeded(transform, Image.new("RGB", (32, 32), "white"), seed=3)
    assert tensor.unique().numel() == 1, "no black border"


# ---- mixing ----


def mixing(*flags: str, classes: int = 5):
    return build_mixup(settings(*flags), classes)


def mix(mixup: AnyBatchMixup, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Mix images whose pixels all are one-hot in their own number; returns them and targets."""
    images = torch.eye(size)[:, :, None, None].expand(-1, -1, 8, 12).contiguous()
    np.random.seed(seed)
    return mixup(images, torch.arange(size))


def test_without_mixup_and_cutmix_there_is_nothing_to_mix() -> None:
    assert mixing("--mixup", "0", "--cutmix", "0") is None


def test_cutmix_minmax_alone_mixes() -> None:
    mixup = mixing("--mixup", "0", "--cutmix", "0", "--cutmix-minmax", "0.2", "0.8")
    assert mix(mixup, 5, seed=0)[0].shape == (5, 5, 8, 12)


@pytest.mark.parametrize("minmax", [["0.5"], ["0.8", "0.2"], ["-0.1", "0.5"], ["0.1", "2"]])
def test_impossible_cutmix_shares_are_refused(minmax: list[str]) -> None:
    with pytest.raises(UserError, match="--cutmix-minmax"):
        mixing("--cutmix-minmax", *minmax)


@pytest.mark.parametrize("size", [1, 4, 5])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("kind", [["--cutmix", "0"], ["--mixup", "0"], []])
def test_the_targets_are_the_shares_of_the_pixels_in_batches_of_any_size(
    size: int, mode: str, kind: list[str]
) -> None:
    mixup = mixing(
        "--mixup-mode", mode, "--smoothing", "0", "--mixup-prob", "0.9", *kind, classes=size
    )
    mixed = 0
    for seed in range(12):
        images, targets = mix(mixup, size, seed)
        assert torch.allclose(images.mean(dim=(2, 3)), targets, atol=1e-6)
        assert torch.allclose(targets.sum(1), torch.ones(size))
        mixed += int((targets.max(1).values < 1).any())
        if size % 2:
            assert torch.allclose(targets[size // 2], torch.eye(size)[size // 2])
    assert mixed > 0 or size == 1


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_even_batches_are_mixed_exactly_as_by_timm(mode: str) -> None:
    ours = mixing("--mixup-mode", mode, classes=4)
    timms = Mixup(0.8, 1.0, None, 1.0, 0.5, mode, True, 0.1, 4)
    for seed in range(6):
        for one, other in zip(mix(ours, 4, seed), mix(timms, 4, seed)):
            assert one.equal(other)


def test_targets_hold_the_label_smoothing() -> None:
    _, targets = mix(mixing("--smoothing", "0.1", "--mixup-prob", "0", classes=5), 3, seed=0)
    expected = torch.full((3, 5), 0.02) + 0.9 * torch.eye(3, 5)
    assert torch.allclose(targets, expected)
