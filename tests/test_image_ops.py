"""What is done in less time than Pillow takes, held against Pillow."""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torchvision.transforms import functional as F

from data import image_ops, transforms


def scene(width: int, height: int, seed: int = 0) -> Image.Image:
    """Edges, areas and noise: worse for an interpolation than most photographs."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8))
    image = np.array(coarse.resize((width, height), Image.Resampling.BILINEAR)).astype(int)
    image[: height // 3, : width // 2] = (250, 3, 128)
    image += rng.integers(-20, 20, image.shape)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


@pytest.fixture(params=["made", "real"])
def photographs(request: pytest.FixtureRequest) -> list[Image.Image]:
    if request.param == "made":
        return [scene(120, 90), scene(70, 110, 1)]
    folder = request.getfixturevalue("imagenet_sample") / "val"
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*/*"))[::200]]


def steps(ours: object, theirs: Image.Image) -> np.ndarray:
    """Return how far each value is from Pillow's, in steps of 255."""
    return np.abs(np.asarray(image_ops.as_image(ours)).astype(int) - np.asarray(theirs).astype(int))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_crops_are_resized_as_by_pillow_within_two_steps(
    photographs: list[Image.Image], mode: str
) -> None:
    for image in photographs:
        width, height = image.size
        for box in ((0, 0, height, width), (9, 5, 31, 47), (3, 2, height - 8, width // 2)):
            directly = F.resized_crop(image, *box, [64, 80], transforms.interpolation_mode(mode))
            filter_ = Image.Resampling[mode.upper()]
            part = F.crop(image, *box)
            rows_first = part.resize((80, part.height), filter_).resize((80, 64), filter_)
            for form in (image, np.asarray(image)):
                ours = image_ops.crop_and_resize(form, box, (64, 80), mode)
                assert steps(ours, rows_first).max() <= 2
                assert steps(ours, rows_first).mean() < 0.01
                assert steps(ours, directly).mean() < 0.3


@pytest.mark.parametrize("mode", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
@pytest.mark.parametrize("name", sorted(transforms.SHIFTS))
def test_shears_and_shifts_are_pillows_within_a_step(
    photographs: list[Image.Image], name: str, mode: Image.Resampling
) -> None:
    exact = auto_augment.NAME_TO_OP[name]
    ours = transforms.Shift(exact, name)
    options = {"resample": mode, "fillcolor": (128, 9, 200)}
    for image in photographs:
        for level, share in ((-0.4519, 2e-3), (0.0, 0), (0.0311, 2e-3), (0.967, 2e-3), (0.2, 0.1)):
            far = steps(ours(image, level, **options), exact(image, level, **options))
            assert far.max() <= 1 and (far > 0).mean() <= share


def test_shifts_by_the_nearest_pixel_are_pillows() -> None:
    exact = auto_augment.NAME_TO_OP["ShearX"]
    options = {"resample": Image.Resampling.NEAREST, "fillcolor": (128, 9, 200)}
    image = scene(40, 30)
    assert not steps(
        transforms.Shift(exact, "ShearX")(image, 0.2, **options), exact(image, 0.2, **options)
    ).any()


def test_shifts_give_the_pixels_of_this_version() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
    by = np.arange(24) / 4 - 2  # quarters, in which every machine reckons exactly
    moved = [
        image_ops.shift_rows(Image.fromarray(noise), by, (128, 9, 200), cubic=cubic)
        for cubic in (False, True)
    ]
    found = [image_ops.VERSION, *(zlib.crc32(np.asarray(each).tobytes()) for each in moved)]
    assert found == [2, 1782900816, 2445857807], "other pixels: raise pixels.VERSION"


def test_normalising_is_torchvisions_bit_for_bit() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    image = scene(48, 36)
    theirs = F.normalize(F.to_tensor(image), mean, std)
    normalize = transforms.Normalize(mean, std)
    array = np.asarray(image)
    for form in (image, array, torch.from_numpy(array.copy()).permute(2, 0, 1)):
        assert normalize(form).equal(theirs)


def encoded(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, **{"format": "JPEG", **options})
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_decodes_to_pillows_pixels(mode: str) -> None:
    for options in ({}, {"quality": 30, "progressive": True}, {"subsampling": 0}):
        data = encoded(scene(61, 45).convert(mode), **options)
        theirs = Image.open(io.BytesIO(data)).convert("RGB")
        assert not steps(image_ops.decode(data), theirs).any()


def test_real_jpeg_decodes_to_pillows_pixels(imagenet_sample: Path) -> None:
    for path in sorted((imagenet_sample / "val").glob("*/*"))[::37]:
        assert not steps(image_ops.decode(path.read_bytes()), Image.open(path).convert("RGB")).any()


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_half_a_image_is_none(kind: str) -> None:
    data = encoded(scene(61, 45), format=kind)
    for part in (data[: len(data) // 2], data[:10], b""):
        with pytest.raises((OSError, SyntaxError)):
            image_ops.decode(part)


def test_without_simplejpeg_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_ops, "simplejpeg", None)
    data = encoded(scene(61, 45))
    assert isinstance(image_ops.decode(data), Image.Image)
