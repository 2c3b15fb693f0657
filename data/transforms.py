"""Transforms from images to tensors, for training and evaluation, and the mixing of batches.

Shapes: B batch, H height, W width, C classes. Sizes are (height, width) in pixels.
"""

import random
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data import Mixup, create_transform
from timm.data.mixup import one_hot
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from base.errors import UserError
from data import image_ops
from data.image_ops import ImageLike
from losses import UNLABELLED

SMALL = 32  # pixels; up to this size DeiT neither crops at evaluation nor rescales in training
Transform = Callable[[ImageLike], Tensor]


@dataclass(frozen=True)
class InputConfig:
    """The input of a network: (H, W) in pixels, mean and std per channel of images in [0, 1].

    interpolation: of the evaluation resize, by torchvision's name (`bicubic`).
    crop_ratio: evaluation resizes to input_size / crop_ratio and crops the middle; in (0, 1].
    Raises UserError for a value that no image can have.
    """

    input_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_ratio: float = 0.875

    def __post_init__(self) -> None:
        if len(self.input_size) != 2 or min(self.input_size) < 1:
            raise UserError(f"input size {self.input_size}: give height and width in pixels")
        if not 0 < self.crop_ratio <= 1:
            raise UserError(f"--eval-crop-ratio {self.crop_ratio}: must be above 0 and at most 1")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(
                f"mean {self.mean}, std {self.std}: give three of each, std above 0 (RGB)"
            )
        interpolation_mode(self.interpolation)

    @property
    def is_small(self) -> bool:
        """Whether images are used without a crop, as in DeiT up to 32 pixels."""
        return max(self.input_size) <= SMALL

    @property
    def resize_size(self) -> tuple[int, int]:
        """The (height, width) that an image must cover before evaluation crops its middle."""
        height, width = self.input_size
        return int(height / self.crop_ratio), int(width / self.crop_ratio)

    def describe(self) -> str:
        height, width = self.input_size
        if self.is_small:
            crop = "no crop"
        else:
            resized = [str(side) for side in dict.fromkeys(self.resize_size)]
            crop = f"crop {self.crop_ratio:g} of {'x'.join(resized)}"
        mean, std = (", ".join(f"{x:.4g}" for x in values) for values in (self.mean, self.std))
        return f"{height}x{width}, {crop}, {self.interpolation}, mean ({mean}), std ({std})"


def interpolation_mode(name: str) -> InterpolationMode:
    """Return torchvision's mode of that name. Raises UserError for an unknown one."""
    try:
        return InterpolationMode(name)
    except ValueError as error:
        known = ", ".join(mode.value for mode in InterpolationMode)
        raise UserError(f"interpolation {name}: not one of {known}") from error


def build_transform(
    is_train: bool, args: Namespace, inputs: InputConfig, *, hflip: float = 0.5
) -> Transform:
    """Return a transform from an image (RGB) to a normalised tensor (3, H, W), float32.

    hflip: probability of a mirrored image; 0 for data in which left and right differ in meaning.
    Raises UserError for an augmentation policy that timm does not know.
    """
    if not is_train:
        return eval_transform(inputs)
    if args.ThreeAugment:
        return three_augment(
            inputs, color_jitter=args.color_jitter, simple_crop=args.src, hflip=hflip
        )
    return train_transform(
        inputs,
        color_jitter=args.color_jitter,
        policy=args.aa,
        interpolation=args.train_interpolation,
        erase_prob=args.reprob,
        erase_mode=args.remode,
        erase_count=args.recount,
        hflip=hflip,
    )


def eval_transform(inputs: InputConfig) -> Transform:
    """Resize to input_size / crop_ratio and crop the middle; up to 32 pixels only resize."""
    mode = interpolation_mode(inputs.interpolation)
    if inputs.is_small:
        steps = [ResizeTo(inputs.input_size, mode)]
    else:
        steps = [Cover(inputs.resize_size, mode), transforms.CenterCrop(inputs.input_size)]
    return transforms.Compose([image_ops.as_image, *steps, Normalize(inputs.mean, inputs.std)])


def train_transform(
    inputs: InputConfig,
    *,
    color_jitter: float = 0.3,
    policy: str | None = "rand-m9-mstd0.5-inc1",
    interpolation: str = "bicubic",
    erase_prob: float = 0.25,
    erase_mode: str = "pixel",
    erase_count: int = 1,
    hflip: float = 0.5,
) -> Transform:
    """Return DeiT's training transform: timm's `create_transform`, with the same random numbers.

    Above 32 pixels `image_ops` crops, shears and shifts; its docstrings state the differences.
    policy: timm's AutoAugment, RandAugment or AugMix string; None, '' or 'none' for none.
        color_jitter (strength) acts only without a policy, as in timm.
    erase_prob: of random erasing. Up to 32 pixels, images are resized if
        necessary, padded by 4 and cropped at random, instead of the random resized crop.
    Raises UserError for a policy that timm does not know.
    """
    if policy is None or policy.strip().lower() in ("", "none"):
        policy = None
    try:
        transform = create_transform(
            input_size=inputs.input_size,
            is_training=True,
            color_jitter=color_jitter or None,
            auto_augment=policy,
            interpolation=interpolation,
            mean=inputs.mean,
            std=inputs.std,
            re_prob=erase_prob,
            re_mode=erase_mode,
            re_count=erase_count,
            hflip=hflip,
        )
    except (AssertionError, KeyError, ValueError, IndexError, TypeError) as error:
        if policy is None:
            raise
        raise UserError(
            f"--aa {policy}: not a policy of timm ({str(error) or 'unreadable'}); "
            "for example rand-m9-mstd0.5-inc1, original, augmix-m3-w3, or none"
        ) from error
    _use_faster_steps(transform, inputs)
    return transform


def _use_faster_steps(transform: transforms.Compose, inputs: InputConfig) -> None:
    """Replace steps of timm's training transform in place by those of `image_ops`."""
    steps = transform.transforms
    at = next(i for i, step in enumerate(steps) if isinstance(step, transforms.Normalize))
    steps[at - 1 : at + 1] = [Normalize(inputs.mean, inputs.std)]  # and timm's MaybeToTensor
    if inputs.is_small:
        steps[0:1] = [
            image_ops.as_image,
            ResizeTo(inputs.input_size, interpolation_mode(inputs.interpolation)),
            transforms.RandomCrop(inputs.input_size, padding=4),
        ]
    else:
        steps[0] = RandomResizedCrop(steps[0])
        flipped = 1 + isinstance(steps[1], transforms.RandomHorizontalFlip)
        if not isinstance(steps[flipped], Normalize):
            steps.insert(flipped, image_ops.as_image)
    for op in augment_ops(transform):
        if op.name.startswith("Posterize"):
            op.aug_fn = posterize
        elif op.name in SHIFTS and not inputs.is_small:
            op.aug_fn = Shift(op.aug_fn, op.name)


def augment_ops(transform: transforms.Compose) -> Iterator[Any]:
    """Yield timm's `AugmentOp`s of an AutoAugment, RandAugment or AugMix step."""
    for step in transform.transforms:
        for op in getattr(step, "ops", None) or getattr(step, "policy", None) or ():
            yield from op if isinstance(op, list | tuple) else (op,)


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Keep the highest 1 to 8 bits of every channel.

    timm's policies ask for 0 bits at their largest magnitude (2 % of DeiT's posterized images).
    Pillow below 13 returned a black image, Pillow 13 raises; here one bit stays.
    """
    bits = max(1, bits_to_keep)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


def three_augment(
    inputs: InputConfig,
    *,
    color_jitter: float = 0.3,
    simple_crop: bool = False,
    hflip: float = 0.5,
) -> Transform:
    """Return 3-Augment: crop, flip, one of grey, solarized or blurred, then colour jitter.

    simple_crop: resize, pad by 4 (reflected) and crop at random, instead of zooming in.
    Source: DeiT III (arXiv 2204.07118), augment.py of its repository.
    """
    size = inputs.input_size
    if simple_crop:
        crop = [
            image_ops.as_image,
            Cover(size, InterpolationMode.BICUBIC),
            transforms.RandomCrop(size, padding=4, padding_mode="reflect"),
        ]
    else:
        zoom = RandomResizedCropAndInterpolation(size, scale=(0.08, 1.0), interpolation="bicubic")
        crop = [RandomResizedCrop(zoom)]
    steps: list[Callable] = [*crop, transforms.RandomHorizontalFlip(hflip), image_ops.as_image]
    steps.append(transforms.RandomChoice([transforms.Grayscale(3), Solarize(), Blur()]))
    if color_jitter:
        steps.append(transforms.ColorJitter(color_jitter, color_jitter, color_jitter))
    return transforms.Compose([*steps, Normalize(inputs.mean, inputs.std)])


class RandomResizedCrop:
    """timm's random resized crop with the same random numbers, to a tensor (3, H, W) uint8."""

    def __init__(self, crop: RandomResizedCropAndInterpolation) -> None:
        self.scale, self.ratio, self.size = crop.scale, crop.ratio, crop.size
        self.interpolation = crop.interpolation

    def __call__(self, image: ImageLike) -> Tensor:
        size = torch.empty(()).expand(*image_ops.size_of(image))  # get_params only reads the size
        box = RandomResizedCropAndInterpolation.get_params(size, self.scale, self.ratio)
        mode = self.interpolation
        if isinstance(mode, tuple | list):
            mode = random.choice(mode)
        return image_ops.crop_and_resize(image, box, tuple(self.size), mode.value)


class Normalize:
    """An image, or its pixels (3, H, W) uint8, to (3, H, W) float32, normalised."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    def __call__(self, image: ImageLike | Tensor) -> Tensor:
        return image_ops.normalize(image_ops.to_pixels(image), self.mean, self.std)


# timm's operations that shift whole rows or columns, and by how many pixels, from the operation's
# argument and the image's (height, width)
SHIFTS: dict[str, tuple[str, Callable[[float, int, int], np.ndarray]]] = {
    "ShearX": ("rows", lambda level, height, width: level * (np.arange(height) + 0.5)),
    "ShearY": ("columns", lambda level, height, width: level * (np.arange(width) + 0.5)),
    "TranslateXRel": ("rows", lambda level, height, width: np.full(height, level * width)),
    "TranslateYRel": ("columns", lambda level, height, width: np.full(width, level * height)),
}


@dataclass(frozen=True)
class Shift:
    """One of timm's operations in `SHIFTS`, computed row by row if it is bicubic or bilinear."""

    exact: Callable[..., Image.Image]
    name: str

    def __call__(self, image: Image.Image, level: float, **options: Any) -> Image.Image:
        mode = options["resample"]
        if isinstance(mode, tuple | list):
            mode = random.choice(mode)
        cubic = mode == Image.Resampling.BICUBIC
        if not cubic and mode != Image.Resampling.BILINEAR:
            return self.exact(image, level, **(options | {"resample": mode}))
        along, shifts = SHIFTS[self.name]
        pixels_by = shifts(level, image.height, image.width)
        if along == "rows":
            return image_ops.shift_rows(image, pixels_by, options["fillcolor"], cubic=cubic)
        turned = image.transpose(Image.Transpose.TRANSPOSE)
        turned = image_ops.shift_rows(turned, pixels_by, options["fillcolor"], cubic=cubic)
        return turned.transpose(Image.Transpose.TRANSPOSE)


@dataclass(frozen=True)
class Solarize:
    """Invert the pixels from `threshold` (of 255) on."""

    threshold: int = 128

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image, self.threshold)


@dataclass(frozen=True)
class Blur:
    """Gaussian blur of a random radius in pixels."""

    low: float = 0.1
    high: float = 2.0

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(self.low, self.high)))


@dataclass(frozen=True)
class ResizeTo:
    """Resize to exactly (H, W), whatever the aspect ratio."""

    size: tuple[int, int]
    mode: InterpolationMode

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        if image.size == (width, height):
            return image
        return F.resize(image, [height, width], self.mode)


@dataclass(frozen=True)
class Cover:
    """Resize, keeping the shape, to the smallest image that covers (H, W).

    For a square this is torchvision's `Resize(side)`, in every pixel.
    """

    size: tuple[int, int]
    mode: InterpolationMode

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        if image.width * height <= image.height * width:
            new = (max(height, int(width * image.height / image.width)), width)
        else:
            new = (height, max(width, int(height * image.width / image.height)))
        return F.resize(image, list(new), self.mode)


class AnyBatchMixup(Mixup):
    """timm's Mixup for batches of any size, in which images may have no label.

    In a batch of odd size the middle image is mixed with itself.
    """

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images (B, 3, H, W), mixed in place, and targets (B, C).

        labels: (B,), `UNLABELLED` for images without one. A target has the label of each labelled
        part of the image with its share, and nothing for an unlabelled part: it adds up to the
        labelled part of the image.
        """
        if self.mode == "elem":
            lam = self._mix_elem(images)
        elif self.mode == "pair":
            lam = self._mix_pair(images)
            if len(images) % 2:  # lam is (B - 1, 1), without the middle image
                half = len(images) // 2
                lam = torch.cat([lam[:half], lam.new_ones(1, 1), lam[half:]])
        else:
            lam = self._mix_batch(images)
        has_label = (labels != UNLABELLED)[:, None]
        off = self.label_smoothing / self.num_classes
        on = 1 - self.label_smoothing + off
        targets = one_hot(labels.clamp(min=0), self.num_classes, on_value=on, off_value=off)
        targets = targets * has_label
        return images, targets * lam + targets.flip(0) * (1.0 - lam)


def is_mixing(mixup: float, cutmix: float, cutmix_minmax: list[float] | None) -> bool:
    """Return whether these settings mix images at all."""
    return mixup > 0 or cutmix > 0 or cutmix_minmax is not None


def build_mixup(args: Namespace, num_classes: int) -> AnyBatchMixup | None:
    """Return the function that mixes a batch, or None if neither Mixup nor CutMix is on.

    It is called with images (B, 3, H, W) and labels (B,), and mixes the images in place. It
    returns them with targets (B, C), label smoothing included. It uses NumPy's generator.
    Raises UserError for --cutmix-minmax values that would fail in a later batch.
    """
    minmax = args.cutmix_minmax
    if minmax is not None and not (len(minmax) == 2 and 0 <= minmax[0] < minmax[1] <= 1):
        raise UserError(f"--cutmix-minmax {minmax}: give two shares, 0 <= smallest < largest <= 1")
    if not is_mixing(args.mixup, args.cutmix, args.cutmix_minmax):
        return None
    return AnyBatchMixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )
