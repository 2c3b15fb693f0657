"""timm's augmentations on batches of uint8 images, on any device, a sample at a time.

Shapes: B batch, S steps, H height, W width. `augment_program` draws the random numbers, and
`augment` applies them. They are those of the transform, so images are equal to a worker's within
the tolerances of `tests/test_device_augment.py`. Operations take images (B, 3, H, W) uint8 and
the numbers of each (B, 7) float64, and return new images.
A GPU spends its time on memory traffic here. So values stay in uint8 where that is exact, and
warps read whole pixels through int32 indices. `tests/test_device_augment.py` counts the bytes.
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from base.device import to_device
from data import augment_program as ops

CHUNK = 64  # samples at a time, because temporary values need many times their memory
BLUR_PASSES = 3  # of a box: Pillow's Gaussian blur
BLUR_REACH = 4  # pixels to each side; enough for a radius of 3


@torch.no_grad()
def augment(
    images: Tensor, programs: Tensor, fill: tuple[int, ...], device: torch.device
) -> Tensor:
    """Return augmented images (B, 3, H, W) uint8 on the device; the input is not changed.

    programs: (B, S, 8) on the CPU. fill: red, green and blue outside of a warped image.
    No sample depends on another one. The samples of an operation are sorted on the CPU, and the
    orders are copied from pinned memory. With pinned images the host never waits for the device.
    """
    orders, numbers, runs = plan(programs)
    images = to_device(images, device)
    orders, numbers = (to_device(values, device, pin=True) for values in (orders, numbers))
    outside = constant(tuple(fill), device)
    for order, rows, run in zip(orders, numbers, runs):
        sizes = [count for _, count in run]
        parts = zip(run, images[order].split(sizes), rows.split(sizes))
        images = torch.cat([_apply(op, part, row[:, 1:], outside) for (op, _), part, row in parts])
    return images[orders[-1]]


def plan(programs: Tensor) -> tuple[Tensor, Tensor, list[list[tuple[int, int]]]]:
    """Return for every step the order of the samples, their numbers, and the runs.

    Orders (S + 1, B) index the result of the step before; the last one restores the batch.
    Numbers: (S, B, 8). A run is an operation and its number of samples, at most `CHUNK`.
    """
    orders, numbers, runs = [], [], []
    position = torch.arange(len(programs))  # of each sample in the current order
    for rows in programs.unbind(1):
        order = rows[:, 0].argsort(stable=True)
        orders.append(position[order])
        numbers.append(rows[order])
        position = order.argsort()
        pieces = [same.split(CHUNK) for same in _groups(rows[order, 0])]
        runs.append([(int(piece[0]), len(piece)) for same in pieces for piece in same])
    return torch.stack([*orders, position]), torch.stack(numbers), runs


def _groups(operations: Tensor) -> tuple[Tensor, ...]:
    return operations.split(operations.unique(return_counts=True)[1].tolist())


def _apply(operation: int, images: Tensor, numbers: Tensor, fill: Tensor) -> Tensor:
    if operation == ops.NOTHING:
        return images
    if operation in WARPS:
        return WARPS[operation](images, numbers, fill)
    return OPERATIONS[operation](images, numbers[:, :1, None, None])


@functools.cache
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return a number for each channel on the device, (3, 1, 1), always the same tensor."""
    return torch.tensor(values).view(3, 1, 1).to(device)


# ---- values of single pixels. factor, threshold and the like: (B, 1, 1, 1) float64


def blend(one: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Return one + factor * (other - one), clipped and cut to whole numbers as Pillow does.

    other: (B, 3, H, W) uint8; one: such a tensor, or one that is broadcast to it.
    """
    values = other - one.float()
    return values.mul_(factor.float()).add_(one).clamp_(0, 255).to(torch.uint8)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor.float()).clamp_(0, 255).to(torch.uint8)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    luma = grey(images)
    mean = luma.sum((1, 2, 3), keepdim=True).double() / luma[0].numel()
    return blend((mean + 0.5).floor(), images, factor)


def grey(images: Tensor) -> Tensor:
    """Return Pillow's luma, (B, 1, H, W) uint8."""
    red, green, blue = images.split(1, dim=1)
    total = red.int().mul_(19595).add_(green, alpha=38470).add_(blue, alpha=7471).add_(0x8000)
    return (total >> 16).to(torch.uint8)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(images < threshold.float(), images, ~images)


def solarize_add(images: Tensor, more: Tensor) -> Tensor:
    more = more.to(torch.uint8)
    return torch.where(images < 128, torch.minimum(images, ~more) + more, images)


# ---- tables and filters


def look_up(images: Tensor, table: Tensor) -> Tensor:
    """Return the entries of a table (B, 3, 256) at the values of every sample and channel."""
    return table.to(torch.uint8).gather(2, images.flatten(2).long()).view_as(images)


def autocontrast(images: Tensor, _: Tensor) -> Tensor:
    values = torch.arange(256, device=images.device)
    low, high = images.flatten(2).aminmax(dim=2, keepdim=True)  # (B, 3, 1)
    low, high = low.double(), high.double()
    scale = torch.full_like(low, 255) / (high - low)  # 255 / tensor would round twice
    stretched = (values * scale - low * scale).clamp(0, 255)
    return look_up(images, torch.where(high > low, stretched, values.double()))


def equalize(images: Tensor, _: Tensor) -> Tensor:
    values = images.flatten(2).long()
    one = torch.ones((), dtype=torch.long, device=images.device).expand_as(values)
    count = torch.zeros(*images.shape[:2], 256, dtype=torch.long, device=images.device)
    count.scatter_add_(2, values, one)  # bincount would copy the maximum to the host
    last = 255 - (count > 0).flip(2).int().argmax(2, keepdim=True)
    step = (count.sum(2, keepdim=True) - count.gather(2, last)) // 255
    before = count.cumsum(2) - count
    even = ((step // 2 + before) // step.clamp_min(1)).clamp(0, 255)
    return look_up(images, torch.where(step > 0, even, torch.arange(256, device=images.device)))


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with Pillow's SMOOTH (3x3, the middle five times), which leaves the border alone."""
    values = images.short()
    rows = values[..., :-2] + values[..., 1:-1] + values[..., 2:]
    total = rows[..., :-2, :] + rows[..., 1:-1, :] + rows[..., 2:, :]
    total.add_(values[..., 1:-1, 1:-1], alpha=4)
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = total.mul_(2).add_(13).div_(26, rounding_mode="floor")
    return blend(smooth, images, factor)


def blur(images: Tensor, radius: Tensor) -> Tensor:
    """Return Pillow's Gaussian blur, three box filters with soft ends; radius in pixels.

    Sums of Pillow's fixed-point numbers are exact in float64.
    Source: Gwosdek et al. 2011, extended box filters; libImaging/BoxBlur.c.
    """
    variance = radius.flatten() ** 2 / BLUR_PASSES
    whole = ((torch.sqrt(12 * variance + 1) - 1) / 2).floor()
    soft = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    box = (whole + soft / (6 * (variance - (whole + 1) ** 2))).float()[:, None]  # with a fraction
    offsets = torch.arange(-BLUR_REACH, BLUR_REACH + 1, device=images.device).abs()
    full = (2**24 / (2 * box + 1)).long()
    part = (2**24 - (2 * box.long() + 1) * full) // 2
    weights = full * (offsets <= box.long()) + part * (offsets == box.long() + 1)
    weights = weights.double().div_(2**24).repeat_interleave(3, dim=0)[:, None, None]  # (3B,1,1,9)
    half = weights.new_full((len(weights),), 0.5)
    for _ in range(2):
        width = images.shape[3]
        columns = torch.arange(-BLUR_REACH, width + BLUR_REACH, device=images.device)
        columns.clamp_(0, width - 1)
        for _ in range(BLUR_PASSES):
            wide = images.index_select(3, columns).flatten(0, 1)[None].double()
            found = F.conv2d(wide, weights, half, groups=len(weights))
            images = found.to(torch.uint8).view_as(images)
        images = images.transpose(2, 3)
    return images


OPERATIONS: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    ops.AUTOCONTRAST: autocontrast,
    ops.BLUR: blur,
    ops.BRIGHTNESS: brightness,
    ops.COLOR: lambda images, factor: blend(grey(images), images, factor),
    ops.CONTRAST: contrast,
    ops.EQUALIZE: equalize,
    ops.INVERT: lambda images, _: ~images,
    ops.POSTERIZE: lambda images, mask: images & mask.to(torch.uint8),
    ops.SHARPNESS: sharpness,
    ops.SOLARIZE: solarize,
    ops.SOLARIZE_ADD: solarize_add,
}


# ---- warps, bicubic (a = -1 as in Pillow, torch has -0.75) or bilinear, as in Pillow


def affine(images: Tensor, numbers: Tensor, fill: Tensor) -> Tensor:
    """Return images whose pixel (x, y) comes from (a x + b y + c, d x + e y + f).

    numbers: (B, 7), a to f, and 1 for bicubic or 0 for bilinear; fill: (3, 1, 1), for pixels from
    outside.
    """
    height, width = images.shape[2:]
    across, down = (torch.arange(n, device=images.device).double() + 0.5 for n in (width, height))
    a, b, c, d, e, f, cubic = numbers[..., None, None].unbind(1)  # (B, 1, 1) each
    x = a * across + b * down[:, None] + c  # (B, H, W)
    y = d * across + e * down[:, None] + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x.sub_(0.5), y.sub_(0.5)
    left, top = x.floor(), y.floor()
    along, below = _weights(x - left, cubic), _weights(y - top, cubic)
    columns = [(left.int() + i).clamp_(0, width - 1) for i in range(-1, 3)]
    pixels, first = _pixels(images)
    rows = [(top.int() + i).clamp_(0, height - 1).mul_(width).add_(first) for i in range(-1, 3)]
    lines = (_weighted_sum((pixels(row + column) for column in columns), along) for row in rows)
    return _filled(_weighted_sum(lines, below), inside, fill)


def along_x(images: Tensor, numbers: Tensor, fill: Tensor) -> Tensor:
    """Return images whose pixel (x, y) comes from (x + shear y + by, y).

    numbers: (B, 7), shear, by, and 1 for bicubic or 0 for bilinear. This is an `affine` in which
    a row is moved as a whole.
    """
    height, width = images.shape[2:]
    shear, by, cubic = numbers[:, :3, None, None].unbind(1)  # (B, 1, 1) each
    down = torch.arange(height, device=images.device)[:, None]
    across = torch.arange(-1, width + 2, device=images.device, dtype=torch.int32)
    shift = shear * (down + 0.5) + by  # (B, H, 1)
    whole = shift.floor()
    columns = (across + whole.int()).clamp_(0, width - 1)  # (B, H, W + 3)
    pixels, first = _pixels(images)
    moved = pixels(columns.add_(first + down * width))
    taps = (moved[:, :, i : i + width] for i in range(4))
    ends = ((end - 0.5 - shift).ceil().int() for end in (0, width))
    inside = (across[1:-2] >= next(ends)) & (across[1:-2] < next(ends))
    return _filled(_weighted_sum(taps, _weights(shift - whole, cubic)), inside, fill)


def along_y(images: Tensor, numbers: Tensor, fill: Tensor) -> Tensor:
    """Return images whose pixel (x, y) comes from (x, y + shear x + by)."""
    return along_x(images.transpose(2, 3), numbers, fill).transpose(2, 3)


def _pixels(images: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return a function of indices (B, ...) int32 to pixels (B, ..., 3), and each first index."""
    count, _, height, width = images.shape
    table = images.permute(0, 2, 3, 1).reshape(-1, 3)
    first = torch.arange(count, device=images.device, dtype=torch.int32) * (height * width)

    def pixels(index: Tensor) -> Tensor:
        return table.index_select(0, index.flatten()).view(*index.shape, 3)

    return pixels, first[:, None, None]


def _weights(part: Tensor, cubic: Tensor) -> list[Tensor]:
    """Return the float32 weights of the four pixels around a position, `part` after the second."""
    rest = 1 - part
    curve = cubic * part * rest
    before, after = -curve * rest, -curve * part
    return [w.float()[..., None] for w in (before, rest - before, part - after, after)]


def _weighted_sum(values: Iterable[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return the sum of values (B, H, W, 3) times weights (B, H, W or 1, 1)."""
    total = torch.empty(0)
    for i, (value, weight) in enumerate(zip(values, weights)):
        total = total.addcmul_(value, weight) if i else value * weight
    return total


def _filled(values: Tensor, inside: Tensor, fill: Tensor) -> Tensor:
    """Return images from values (B, H, W, 3), with `fill` where they are not inside (B, H, W)."""
    # Pillow truncates; rounding errors of the weights must not reduce a whole number
    found = values.add_(1e-3).clamp_(0, 255).to(torch.uint8).permute(0, 3, 1, 2)
    return torch.where(inside[:, None], found, fill.to(torch.uint8))


WARPS = {ops.AFFINE: affine, ops.ALONG_X: along_x, ops.ALONG_Y: along_y}
