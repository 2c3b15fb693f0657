"""timm's augmentations on batches of uint8 images, on any device, a sample at a time.

Shapes: B batch, S steps, H height, W width. A worker crops and flips an image. For the later steps
it only draws the random numbers and writes them into the sample's program (S, 8). A row of it is an
operation with its numbers. `Augment` applies a batch of programs. The random numbers are those of
the transform, so images are equal to a worker's within the tolerances of
`tests/test_device_augment.py`.
"""

import copy
import functools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms

from base.device import to_device
from base.errors import UserError
from data import image_ops
from data.image_ops import ImageLike
from data.transforms import Blur, Normalize, Solarize, augment_ops

COLUMNS = 8  # of a program's row: the operation, then its numbers
NOTHING, AFFINE, COLOR, SHARPNESS, BLUR, ERASE = range(6)
# Operations that replace every value by a table of its sample and channel
(INVERT, AUTOCONTRAST, EQUALIZE, POSTERIZE, SOLARIZE, SOLARIZE_ADD, BRIGHTNESS, CONTRAST) = range(
    10, 18
)
CHUNK = 64  # samples at a time, of what needs many times their memory
BLUR_PASSES = 3  # of a box: Pillow's Gaussian blur
BLUR_REACH = 4  # pixels to each side; enough for a radius of 3
# The steps of a transform that come after crop and flip
AFTER_CROP = (
    RandAugment,
    AutoAugment,
    AugMixAugment,
    transforms.RandomChoice,
    transforms.ColorJitter,
    Normalize,
)


# ---- in the worker: random numbers


class Tape:
    """Replaces an image (height, width) in a transform, and records the operations."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.rows: list[list[float]] = []

    def add(self, operation: int, *numbers: float) -> "Tape":
        self.rows.append([operation, *numbers] + [0.0] * (COLUMNS - 1 - len(numbers)))
        return self

    def affine(self, a: float, b: float, c: float, d: float, e: float, f: float, mode: Any):
        """Pixel (x, y) comes from (a x + b y + c, d x + e y + f), as in Pillow.

        mode: Pillow's, or several, of which one is drawn.
        """
        mode = random.choice(mode) if isinstance(mode, tuple | list) else mode
        return self.add(AFFINE, a, b, c, d, e, f, mode == Image.Resampling.BICUBIC)


def _rotate(tape: Tape, degrees: float, mode: Any) -> Tape:
    angle = -math.radians(degrees % 360)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = tape.width / 2, tape.height / 2
    return tape.affine(cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y, mode)


# timm's operations by name, without the endings that only choose the levels
OPERATIONS: dict[str, Callable[..., Tape]] = {
    "AutoContrast": lambda tape, mode: tape.add(AUTOCONTRAST),
    "Equalize": lambda tape, mode: tape.add(EQUALIZE),
    "Invert": lambda tape, mode: tape.add(INVERT),
    "Rotate": _rotate,
    "Posterize": lambda tape, bits, mode: tape.add(POSTERIZE, max(1, bits)),
    "Solarize": lambda tape, threshold, mode: tape.add(SOLARIZE, threshold),
    "SolarizeAdd": lambda tape, more, mode: tape.add(SOLARIZE_ADD, more),
    "Color": lambda tape, factor, mode: tape.add(COLOR, factor),
    "Contrast": lambda tape, factor, mode: tape.add(CONTRAST, factor),
    "Brightness": lambda tape, factor, mode: tape.add(BRIGHTNESS, factor),
    "Sharpness": lambda tape, factor, mode: tape.add(SHARPNESS, factor),
    "ShearX": lambda tape, factor, mode: tape.affine(1, factor, 0, 0, 1, 0, mode),
    "ShearY": lambda tape, factor, mode: tape.affine(1, 0, 0, factor, 1, 0, mode),
    "TranslateX": lambda tape, by, mode: tape.affine(1, 0, by, 0, 1, 0, mode),
    "TranslateY": lambda tape, by, mode: tape.affine(1, 0, 0, 0, 1, by, mode),
    "TranslateXRel": lambda tape, by, mode: tape.affine(1, 0, by * tape.width, 0, 1, 0, mode),
    "TranslateYRel": lambda tape, by, mode: tape.affine(1, 0, 0, 0, 1, by * tape.height, mode),
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


class _Jitter:
    def __init__(self, jitter: transforms.ColorJitter) -> None:
        self.ranges = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue

    def __call__(self, tape: Tape) -> Tape:
        order, *factors, _ = transforms.ColorJitter.get_params(*self.ranges)
        for which in order.tolist():
            if which < 3 and factors[which] is not None:
                tape.add((BRIGHTNESS, CONTRAST, COLOR)[which], factors[which])
        return tape


class _Erasing:
    """Records the boxes of timm's random erasing."""

    def __init__(self, erasing: RandomErasing) -> None:
        self.draw = copy.copy(erasing)
        self.draw.per_pixel = False  # a box of noise is drawn on the device, from a key
        self.noise = erasing.per_pixel

    def __call__(self, tape: Tape) -> Tape:
        self.tape = tape
        self.draw._erase(self, 3, tape.height, tape.width, torch.float32)
        return tape

    def __setitem__(self, index: tuple[slice, slice, slice], colour: Tensor) -> None:
        _, rows, columns = index
        if self.noise:
            colour = torch.randint(2**31, (3,))
        size = rows.stop - rows.start, columns.stop - columns.start
        self.tape.add(ERASE, rows.start, columns.start, *size, *colour.flatten().tolist())


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
        return _Jitter(step)
    if isinstance(step, RandomErasing):
        return _Erasing(step)
    raise UserError(
        f"--augment-on device: cannot do {type(step).__name__}; use --augment-on worker"
    )


def _longest(step: Any) -> int:
    """Return the largest number of rows that a step can write."""
    if isinstance(step, RandomErasing):
        return step.max_count
    if isinstance(step, transforms.ColorJitter):
        return 3
    if isinstance(step, AutoAugment):
        return max(len(policy) for policy in step.policy)
    return getattr(step, "num_layers", 1)


class Recorded:
    """The crop and flip of a training transform, and a program of its other steps.

    Called with an image it returns its pixels (3, H, W) uint8 and its program (S, 8) float64;
    `carry_out` applies batches of them. Raises UserError for steps that only workers can do.
    """

    def __init__(self, transform: transforms.Compose) -> None:
        steps = list(transform.transforms)
        first = next(i for i, step in enumerate(steps) if isinstance(step, AFTER_CROP))
        self.crop, rest = steps[:first], steps[first:]
        if self.crop[-1] is image_ops.as_image:
            self.crop.pop()
        normalize = next(step for step in rest if isinstance(step, Normalize))
        rest.remove(normalize)
        operations = list(augment_ops(transform))
        self.length = max(1, sum(map(_longest, rest)))
        self.carry_out = Augment(
            normalize.mean,
            normalize.std,
            fill=operations[0].kwargs["fillcolor"] if operations else (128, 128, 128),
            noise=any(isinstance(step, RandomErasing) and step.per_pixel for step in rest),
        )
        self.steps = [_on_tape(step) for step in rest]

    def __call__(self, image: ImageLike) -> tuple[Tensor, Tensor]:
        for step in self.crop:
            image = step(image)
        if not isinstance(image, Tensor):
            image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        tape = Tape(*image.shape[1:])
        for step in self.steps:
            tape = step(tape)
        program = torch.zeros(self.length, COLUMNS, dtype=torch.float64)
        if tape.rows:
            program[: len(tape.rows)] = torch.tensor(tape.rows, dtype=torch.float64)
        return image.contiguous(), program


# ---- on the device: operations


class Augment:
    """Applies programs to batches of images and normalises them.

    mean, std: (3, 1, 1), of values in [0, 1]. fill: (red, green, blue) outside of the
    image. noise: fill erased boxes with normal noise instead of a colour.
    Arguments of a call: images (B, 3, H, W) uint8, programs (B, S, 8) on the CPU, and a device.
    Returns (B, 3, H, W) float32 there; the input is not changed. No sample depends on another one.
    The indices of the samples are computed on the CPU and copied once, from pinned memory. With
    pinned images the host never waits for the device.
    """

    def __init__(
        self, mean: Tensor, std: Tensor, *, fill: Sequence[int] = (128,) * 3, noise: bool = True
    ) -> None:
        self.noise = noise
        self.mean, self.std, self.fill = (
            tuple(torch.as_tensor(values, dtype=torch.float32).flatten().tolist())
            for values in (mean, std, fill)
        )

    @torch.no_grad()
    def __call__(self, images: Tensor, programs: Tensor, device: torch.device) -> Tensor:
        jobs = plan(programs[..., 0].numpy())
        samples = np.concatenate([np.empty(0, np.int64), *jobs.values()])
        there = images.device.type == device.type
        images = images.clone() if there else to_device(images, device)
        numbers = to_device(programs, device, pin=True)[..., 1:]  # (B, S, 7)
        indices = to_device(torch.from_numpy(samples), device, pin=True)
        found = indices.split([*map(len, jobs.values())])
        mean, std, fill = (_constant(values, device) for values in (self.mean, self.std, self.fill))
        erased = []
        for (step, operation), which in zip(jobs, found):
            for here in which.split(CHUNK):
                row = numbers[:, step][here]
                if operation == ERASE:
                    erased.append((here, row))
                else:
                    images[here] = carried_out(operation, images[here], row, fill)
        floats = images.float().div_(255).sub_(mean).div_(std)
        for here, row in erased:
            floats[here] = erase(floats[here], row, self.noise)
        return floats


def plan(operations: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """Return the samples of each operation, by (step, operation), in order.

    operations: (B, S), the first column of the programs.
    """
    return {
        (step, int(operation)): np.flatnonzero(column == operation)
        for step, column in enumerate(operations.T)
        for operation in np.unique(column[column != NOTHING])
    }


def carried_out(operation: int, images: Tensor, numbers: Tensor, fill: Tensor) -> Tensor:
    """Return images (B, 3, H, W) uint8 after one operation. numbers: (B, 7); fill: (3, 1, 1)."""
    if operation == AFFINE:
        return affine(images, numbers, fill)
    if operation in PIXELWISE:
        return PIXELWISE[operation](images, numbers[:, 0])
    values = torch.arange(256, device=images.device).expand(len(images), 3, 256)
    table = TABLE_OF[operation](images, values, numbers[:, :1, None]).to(torch.uint8)
    return table.gather(2, images.flatten(2).long()).view_as(images)


@functools.cache
def _constant(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """Return a number for each channel on the device, (3, 1, 1) float32, always the same tensor."""
    return torch.tensor(values).view(3, 1, 1).to(device)


def blend(one: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Return one + factor * (other - one), clipped and cut to whole numbers as Pillow does.

    one, other: uint8, (B, ...); factor: (B,), 0 gives `one`.
    """
    share = factor.float().view(-1, *[1] * (other.dim() - 1))
    one = one.float()
    return (one + share * (other.float() - one)).clamp_(0, 255).to(torch.uint8)


def grey(images: Tensor) -> Tensor:
    """Return Pillow's luma, (B, 1, H, W) uint8, of (B, 3, H, W) uint8."""
    red, green, blue = images.int().unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).to(torch.uint8)[:, None]


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with Pillow's SMOOTH (3x3, the middle five times), which leaves the border alone."""
    values = images.int()
    rows = values[..., :-2] + values[..., 1:-1] + values[..., 2:]
    total = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :]
    smooth = images.clone()
    total += 4 * values[..., 1:-1, 1:-1]
    smooth[..., 1:-1, 1:-1] = ((2 * total + 13) // 26).to(torch.uint8)  # total / 13, rounded
    return blend(smooth, images, factor)


def blur(images: Tensor, radius: Tensor) -> Tensor:
    """Return Pillow's Gaussian blur, three box filters with soft ends; radius: (B,), pixels.

    Source: Gwosdek et al. 2011, extended box filters; libImaging/BoxBlur.c.
    """
    variance = radius.double() ** 2 / BLUR_PASSES
    whole = ((torch.sqrt(12 * variance + 1) - 1) / 2).floor()
    soft = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    box = (whole + soft / (6 * (variance - (whole + 1) ** 2))).float()[:, None]  # with a fraction
    offsets = torch.arange(-BLUR_REACH, BLUR_REACH + 1, device=images.device).abs()
    full = (2**24 / (2 * box + 1)).long()  # Pillow's fixed point
    part = (2**24 - (2 * box.long() + 1) * full) // 2
    weights = full * (offsets <= box.long()) + part * (offsets == box.long() + 1)
    for _ in range(2):
        for _ in range(BLUR_PASSES):
            wide = F.pad(images.float(), (BLUR_REACH, BLUR_REACH, 0, 0), mode="replicate").long()
            total = torch.full(images.shape, 2**23, device=images.device)
            for i in range(2 * BLUR_REACH + 1):
                shifted = wide[..., i : i + images.shape[-1]]
                total += shifted * weights[:, i, None, None, None]
            images = (total >> 24).to(torch.uint8)
        images = images.transpose(2, 3)
    return images


PIXELWISE = {
    COLOR: lambda images, factor: blend(grey(images).expand_as(images), images, factor),
    SHARPNESS: sharpness,
    BLUR: blur,
}


def histograms(images: Tensor) -> Tensor:
    """Return how often each value occurs, (B, C, 256), in (B, C, H, W) uint8."""
    values = images.flatten(2).long()
    one = torch.ones((), dtype=torch.long, device=images.device)
    count = torch.zeros(*images.shape[:2], 256, dtype=torch.long, device=images.device)
    return count.scatter_add_(
        2, values, one.expand_as(values)
    )  # bincount would copy the maximum to the host


def _autocontrast(images: Tensor, values: Tensor, _: Tensor) -> Tensor:
    there = histograms(images) > 0
    low = there.int().argmax(2, keepdim=True).double()
    high = 255 - there.flip(2).int().argmax(2, keepdim=True).double()
    scale = torch.full_like(low, 255) / (high - low)  # 255 / tensor would round twice
    stretched = (values * scale - low * scale).clamp(0, 255)
    return torch.where(high > low, stretched, values.double())


def _equalize(images: Tensor, values: Tensor, _: Tensor) -> Tensor:
    count = histograms(images)
    last = 255 - (count > 0).flip(2).int().argmax(2, keepdim=True)
    step = (count.sum(2, keepdim=True) - count.gather(2, last)) // 255
    before = count.cumsum(2) - count
    even = ((step // 2 + before) // step.clamp_min(1)).clamp(0, 255)
    return torch.where(step > 0, even, values)


def _posterize(images: Tensor, values: Tensor, bits: Tensor) -> Tensor:
    cut = 2 ** (8 - bits.long()).clamp_min(0)
    return values // cut * cut


def _contrast(images: Tensor, values: Tensor, factor: Tensor) -> Tensor:
    luma = grey(images).flatten(1)
    mean = (luma.sum(1).double() / luma.shape[1] + 0.5).floor()
    return blend(mean.view(-1, 1, 1), values, factor)


# Functions of images (B, 3, H, W) uint8, all values (B, 3, 256), and a number for each image
# (B, 1, 1). They return the new values (B, 3, 256), which are then cut to uint8.
TABLE_OF: dict[int, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    INVERT: lambda _, values, __: 255 - values,
    AUTOCONTRAST: _autocontrast,
    EQUALIZE: _equalize,
    POSTERIZE: _posterize,
    SOLARIZE: lambda _, values, least: torch.where(values < least, values, 255 - values),
    SOLARIZE_ADD: lambda _, values, more: torch.where(
        values < 128, (values + more.long()).clamp_max(255), values
    ),
    BRIGHTNESS: lambda _, values, factor: blend(torch.zeros_like(values), values, factor),
    CONTRAST: _contrast,
}


def affine(images: Tensor, numbers: Tensor, fill: Tensor) -> Tensor:
    """Return images whose pixel (x, y) comes from (a x + b y + c, d x + e y + f), as in Pillow.

    images: (B, 3, H, W) uint8; numbers: (B, 7), a to f, and 1 for bicubic (a = -1 as in Pillow,
    torch has -0.75) or 0 for bilinear; fill: (3, 1, 1), for pixels from outside.
    """
    height, width = images.shape[2:]
    across = torch.arange(width, device=images.device, dtype=torch.float64) + 0.5
    down = (torch.arange(height, device=images.device, dtype=torch.float64) + 0.5)[:, None]
    a, b, c, d, e, f, cubic = numbers.double()[..., None, None].unbind(1)  # (B, 1, 1) each
    x, y = a * across + b * down + c, d * across + e * down + f  # (B, H, W)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    left, top = (x - 0.5).floor(), (y - 0.5).floor()
    along, below = _taps(x - 0.5 - left, cubic), _taps(y - 0.5 - top, cubic)  # 4 of (B, H, W)
    columns = [(left.long() + i).clamp(0, width - 1) for i in range(-1, 3)]
    flat = images.flatten(2)
    total = torch.zeros(images.shape, device=images.device)
    for i, share in zip(range(-1, 3), below):
        first = (top.long() + i).clamp(0, height - 1) * width
        row = torch.zeros_like(total)
        for column, weight in zip(columns, along):
            pixels = (first + column).flatten(1)[:, None].expand(-1, 3, -1)
            row += flat.gather(2, pixels).view_as(images) * weight[:, None]
        total += row * share[:, None]
    # Pillow truncates; rounding errors of the weights must not reduce a whole number
    values = (total + 1e-3).clamp_(0, 255)
    return torch.where(inside[:, None], values, fill).to(torch.uint8)


def _taps(part: Tensor, cubic: Tensor) -> list[Tensor]:
    """Return the float32 weights of the four pixels around a position, `part` after the second."""
    ours = [
        -part * (1 - part) ** 2,
        1 - part**2 * (2 - part),
        part * (1 + part * (1 - part)),
        -(part**2) * (1 - part),
    ]
    linear = [0 * part, 1 - part, part, 0 * part]
    return [torch.where(cubic > 0, one, two).float() for one, two in zip(ours, linear)]


def erase(images: Tensor, boxes: Tensor, noise: bool) -> Tensor:
    """Return normalised images (B, 3, H, W) with a box filled in each.

    boxes: (B, 7): top, left, height, width, and a colour (3), or the key of the noise.
    """
    height, width = images.shape[2:]
    top, left, rows, columns = boxes[:, :4, None, None].unbind(1)  # (B, 1, 1) each
    down = torch.arange(height, device=images.device)[:, None]
    across = torch.arange(width, device=images.device)
    inside = (down >= top) & (down < top + rows) & (across >= left) & (across < left + columns)
    if noise:
        filling = normal_noise(boxes[:, 4:6].long(), images[0].numel()).view_as(images)
    else:
        filling = boxes[:, 4:, None, None].float()
    return torch.where(inside[:, None], filling, images)


def normal_noise(keys: Tensor, count: int) -> Tensor:
    """Return (B, count) standard normal numbers that depend on their keys (B, 2) alone.

    Counters are hashed and transformed by Box and Muller's method, so all devices draw the same.
    """
    counters = torch.arange(count, device=keys.device)
    first = (_hash(_hash(counters) ^ keys[:, :1]) + 0.5) / 2**32
    second = (_hash(_hash(counters + count) ^ keys[:, 1:]) + 0.5) / 2**32
    length = torch.sqrt(-2 * torch.log(first.float().clamp_min(1e-10)))
    return length * torch.cos(2 * math.pi * second.float())


def _hash(values: Tensor) -> Tensor:
    """Return 32 mixed bits of int64 values (lowbias32 of C. Wellons' hash prospector)."""
    low = 2**32 - 1
    values = values & low
    values = ((values ^ (values >> 16)) * 0x7FEB352D) & low
    values = ((values ^ (values >> 15)) * 0x846CA68B) & low
    return values ^ (values >> 16)
