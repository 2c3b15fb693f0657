"""Images for TensorBoard: an augmented batch with its labels, and the attention of a student.

Shapes: B batch, C classes, H heads, N tokens. All results are uint8 tensors (3, height, width).
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from base.errors import UserError
from base.text import class_name
from data.loaders import ImageLoader
from data.transforms import InputConfig
from losses import UNLABELLED
from models.features import FeatureTaps, Tap, layout_of

SIDE, LINE, LETTERS = 192, 19, 15  # pixels of a tile, of a line of its caption, and of its letters
HEAT = (255, 140, 0)  # colour of attention
TOKENS = {"cls": "class token", "dist": "distillation token"}  # whose attention is shown


def to_uint8(images: Tensor, inputs: InputConfig) -> Tensor:
    """Return images (B, 3, height, width) before normalisation, values 0 to 255."""
    std, mean = (torch.tensor(v)[:, None, None] for v in (inputs.std, inputs.mean))
    return ((images.float().cpu() * std + mean).clamp(0, 1) * 255).byte()


def grid(images: Tensor, captions: Sequence[Sequence[str]], columns: int = 4) -> Tensor:
    """Return images (B, 3, height, width) uint8 in rows, each above the lines of its caption."""
    high = round(SIDE * images.shape[-2] / images.shape[-1])
    rows = -(-len(images) // columns)
    tall = high + LINE * max(len(lines) for lines in captions) + 6
    sheet = Image.new("RGB", (columns * (SIDE + 4), rows * tall), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LETTERS)
    for i, (image, lines) in enumerate(zip(images, captions)):
        x, y = i % columns * (SIDE + 4), i // columns * tall
        tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((SIDE, high))
        sheet.paste(tile, (x, y))
        for n, line in enumerate(lines):
            while draw.textlength(line, font) > SIDE:
                line = line.removesuffix("…")[:-1] + "…"
            draw.text((x, y + high + n * LINE), line, fill="black", font=font)
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)


def top_classes(shares: Tensor, classes: Sequence[str] | None, most: int = 2) -> str:
    """Return the most probable classes of one distribution (C,), with their percentages."""
    values, indices = shares.topk(min(most, len(shares)))
    return ", ".join(
        f"{class_name(classes, index)} ({100 * value:.0f}%)"
        for value, index in zip(values.tolist(), indices.tolist())
        if value >= 0.05
    )


@torch.no_grad()
def train_batch(
    loader: ImageLoader,
    inputs: InputConfig,
    classes: Sequence[str] | None,
    device: torch.device,
    *,
    mixup_fn: Callable | None = None,
    teacher: Callable[[Tensor], Tensor] | None = None,
    count: int = 8,
) -> Tensor | None:
    """Return images as the student gets them, with their labels and the teacher's prediction.

    They are the first of the epoch, read without the loader: no order and no random number of the
    run changes. None for streamed data, which can be read only once.
    """
    if not isinstance(loader.sampler, torch.utils.data.Sampler) or not hasattr(
        loader.sampler, "set_epoch"
    ):
        return None
    keys = list(itertools.islice(iter(loader.sampler), count))
    images, labels = (part.to(device) for part in loader.load(keys))
    if mixup_fn is not None:
        images, labels = mixup_fn(images, labels)
    width = len(classes) if classes else int(labels.max().clamp(min=0)) + 1
    shares = labels
    if labels.dim() == 1:
        shares = F.one_hot(labels.clamp(min=0), width) * (labels != UNLABELLED)[:, None]
    captions = [
        [top_classes(row.float(), classes) if row.any() else "no label"] for row in shares.cpu()
    ]
    if teacher is not None:
        for lines, row in zip(captions, teacher(images).softmax(1).cpu()):
            lines.append(f"teacher: {top_classes(row, classes)}")
    return grid(to_uint8(images, inputs), captions)


@torch.no_grad()
def attention_maps(
    network: nn.Module, images: Tensor, size: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Return the last block's attention of class and distillation token, (B, height, width) each.

    images: (B, 3, height, width) on the network's device. size: of the maps; default: the images'.
    The maps are means over the heads, scaled to their largest value. {} if the attention cannot
    be computed.
    """
    try:
        layout = layout_of(network)
        if not layout.attention or not layout.prefix or not layout.grid:
            return {}
        tap = Tap("attention", layout.attention - 1, "probabilities")
        taps = FeatureTaps(network, [tap])
    except UserError:
        return {}
    was_training = network.training
    try:
        maps = taps.forward(network.eval(), images).states[tap]  # (B, H, N, N)
    finally:
        taps.remove()
        network.train(was_training)
    prefix = len(layout.prefix)
    weights = maps.mean(1)[:, :prefix, prefix:].float()
    weights = weights.unflatten(2, layout.grid)  # (B, prefix tokens, height, width)
    weights = weights / weights.amax((2, 3), keepdim=True)
    weights = F.interpolate(weights, tuple(size or images.shape[-2:]), mode="bilinear").cpu()
    return {TOKENS[one]: weights[:, i] for i, one in enumerate(layout.prefix) if one in TOKENS}


def overlay(image: Tensor, weight: Tensor) -> Tensor:
    """Return an image (3, height, width) uint8 under a map (height, width) of weights 0 to 1."""
    heat = weight * torch.tensor(HEAT)[:, None, None]
    return (0.5 * image + 0.5 * heat).byte()  # visible on black images too


def attention(network: nn.Module, images: Tensor, inputs: InputConfig) -> Tensor | None:
    """Return images beside their `attention_maps`, or None if there are none.

    images: (B, 3, height, width) on the network's device.
    """
    maps = attention_maps(network, images)
    if not maps:
        return None
    tiles, captions = [], []
    for i, image in enumerate(to_uint8(images, inputs)):
        tiles += [image, *(overlay(image, weights[i]) for weights in maps.values())]
        captions += [["image"], *([name] for name in maps)]
    return grid(torch.stack(tiles), captions, columns=2 * (1 + len(maps)))
