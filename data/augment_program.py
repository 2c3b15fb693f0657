"""The random numbers of timm's augmentations, drawn in a worker and applied on the device.

A worker crops and flips an image. Of the later steps it only draws the random numbers, and writes
them into the sample's program (S, 8): in each row an operation and its numbers. The random numbers
are those of the transform. `device_augment` applies batches of programs.
Shapes: S steps, H height, W width.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment
from torch import Tensor
from torchvision import transforms

from base.errors import UserError
from data import image_ops
from data.image_ops import ImageLike
from data.transforms import Blur, Solarize, augment_ops

COLUMNS = 8  # of a program's row: the operation, then its numbers
NOTHING, AFFINE, ALONG_X, ALONG_Y = range(4)
AUTOCONTRAST, BLUR, BRIGHTNESS, COLOR, CONTRAST, EQUALIZE = range(4, 10)
INVERT, POSTERIZE, SHARPNESS, SOLARIZE, SOLARIZE_ADD = range(10, 15)
# The steps of a transform that come after crop and flip
AFTER_CROP = (
    RandAugment,
    AutoAugment,
    AugMixAugment,
    transforms.RandomChoice,
    transforms.ColorJitter,
)


class Tape:
    """Replaces an image (height, width) in a transform, and records the operations."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.rows: list[list[float]] = []

    def add(self, operation: int, *numbers: float) -> "Tape":
        self.rows.append([operation, *numbers] + [0.0] * (COLUMNS - 1 - len(numbers)))
        return self

    def warp(self, operation: int, *numbers: float, mode: Any) -> "Tape":
        """Record a warp with its numbers. mode: Pillow's, or several, of which one is drawn."""
        mode = random.choice(mode) if isinstance(mode, tuple | list) else mode
        return self.add(operation, *numbers, mode == Image.Resampling.BICUBIC)


def _rotate(tape: Tape, degrees: float, mode: Any) -> Tape:
    angle = -math.radians(degrees % 360)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = tape.width / 2, tape.height / 2
    shift = x - cos * x - sin * y, y + sin * x - cos * y
    return tape.warp(AFFINE, cos, sin, shift[0], -sin, cos, shift[1], mode=mode)


# timm's operations by name, without the endings that only choose the levels
OPERATIONS: dict[str, Callable[..., Tape]] = {
    "AutoContrast": lambda tape, mode: tape.add(AUTOCONTRAST),
    "Equalize": lambda tape, mode: tape.add(EQUALIZE),
    "Invert": lambda tape, mode: tape.add(INVERT),
    "Rotate": _rotate,
    "Posterize": lambda tape, bits, mode: tape.add(POSTERIZE, 256 - 2 ** (8 - max(1, bits))),
    "Solarize": lambda tape, threshold, mode: tape.add(SOLARIZE, threshold),
    "SolarizeAdd": lambda tape, more, mode: tape.add(SOLARIZE_ADD, more),
    "Color": lambda tape, factor, mode: tape.add(COLOR, factor),
    "Contrast": lambda tape, factor, mode: tape.add(CONTRAST, factor),
    "Brightness": lambda tape, factor, mode: tape.add(BRIGHTNESS, factor),
    "Sharpness": lambda tape, factor, mode: tape.add(SHARPNESS, factor),
    "ShearX": lambda tape, factor, mode: tape.warp(ALONG_X, factor, 0, mode=mode),
    "ShearY": lambda tape, factor, mode: tape.warp(ALONG_Y, factor, 0, mode=mode),
    "TranslateX": lambda tape, by, mode: tape.warp(ALONG_X, 0, by, mode=mode),
    "TranslateY": lambda tape, by, mode: tape.warp(ALONG_Y, 0, by, mode=mode),
    "TranslateXRel": lambda tape, by, mode: tape.warp(ALONG_X, 0, by * tape.width, mode=mode),
    "TranslateYRel": lambda tape, by, mode: tape.warp(ALONG_Y, 0, by * tape.height, mode=mode),
    "Desaturate": lambda tape, by, mode: tape.add(COLOR, min(1.0, max(0.0, 1.0 - by))),
    "GaussianBlur": lambda tape, radius, mode: tape.add(BLUR, radius),
    "GaussianBlurRand": lambda tape, by, mode: tape.add(BLUR, random.uniform(0.1, 2.0 * by)),
}


class _Operation:
    """Replaces the function of one of timm's `AugmentOp`s; records the operation."""

    def __init__(self, name: str) -> None:
        self.name = name.removesuffix("Increasing").removesuffix("Original")

    def __call__(self, tape: Tape, *level: float, resample: Any, **_: Any) -> Tape:
        return OPERATIONS[self.name](tape, *level, mode=resample)


def _jitter(tape: Tape, jitter: transforms.ColorJitter) -> Tape:
    ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    order, *factors = jitter.get_params(*ranges)
    for which in order.tolist():
        if which < 3 and factors[which] is not None:
            tape.add((BRIGHTNESS, CONTRAST, COLOR)[which], factors[which])
    return tape


def _on_tape(step: Any) -> Callable[[Tape], Tape]:
    """Return a step that records on a tape what `step` does to an image."""
    if isinstance(step, RandAugment | AutoAugment):
        for operation in augment_ops(transforms.Compose([step])):
            operation.aug_fn = _Operation(operation.name)
        return step
    if isinstance(step, transforms.RandomChoice):
        return transforms.RandomChoice([_on_tape(one) for one in step.transforms])
    if isinstance(step, transforms.Grayscale):
        return lambda tape: tape.add(COLOR, 0)
    if isinstance(step, Solarize):
        return lambda tape: tape.add(SOLARIZE, step.threshold)
    if isinstance(step, Blur):
        return lambda tape: tape.add(BLUR, random.uniform(step.low, step.high))
    if isinstance(step, transforms.ColorJitter):
        return lambda tape: _jitter(tape, step)
    raise UserError(
        f"--augment-on device: cannot do {type(step).__name__}; use --augment-on worker"
    )


def _longest(step: Any) -> int:
    """Return the largest number of rows that a step can write."""
    if isinstance(step, transforms.ColorJitter):
        return 3
    if isinstance(step, AutoAugment):
        return max(len(policy) for policy in step.policy)
    return step.num_layers if isinstance(step, RandAugment) else 1


class Recorder:
    """The crop and flip of a training transform, and a program of its other steps.

    Called with an image it returns its pixels (3, H, W) uint8 and its program (S, 8) float64.
    steps: those before the normalisation. fill: colour outside of a warped image.
    Raises UserError for steps that only workers can do.
    """

    def __init__(self, steps: Sequence[Any]) -> None:
        kinds = [isinstance(step, AFTER_CROP) for step in steps]
        first = kinds.index(True) if any(kinds) else len(steps)
        self.crop, rest = list(steps[:first]), list(steps[first:])
        if self.crop[-1] is image_ops.as_image:
            self.crop.pop()
        operations = list(augment_ops(transforms.Compose(rest)))
        self.fill = operations[0].kwargs["fillcolor"] if operations else (128, 128, 128)
        self.length = max(1, sum(map(_longest, rest)))
        self.steps = [_on_tape(step) for step in rest]

    def __call__(self, image: ImageLike) -> tuple[Tensor, Tensor]:
        for step in self.crop:
            image = step(image)
        pixels = image_ops.to_pixels(image)
        tape = Tape(*pixels.shape[1:])
        for step in self.steps:
            tape = step(tape)
        program = torch.zeros(self.length, COLUMNS, dtype=torch.float64)
        if tape.rows:
            program[: len(tape.rows)] = torch.tensor(tape.rows, dtype=torch.float64)
        return pixels, program
