"""Decode, crop, resize and shear images as Pillow does, in less time.

An image is a Pillow image in RGB or an array (H, W, 3) uint8, which may be read-only. Functions
that differ from Pillow state by how much, in steps of 255; `tests/test_image_ops.py` checks it.
"""

import io
import struct
import zlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from torch import Tensor

try:
    import simplejpeg
except ImportError:  # optional; decoding is faster by a half with it
    simplejpeg = None

# Version of the pixels that a key (seed, view, index) and a position in a batch give. Raise it with
# any change that gives other pixels: here, in transforms, samplers, or in mixing.
# Caches of teacher logits with another version are refused.
VERSION = 2
DEVICE_VERSION = 3  # the same, of images that are augmented on the device
ImageLike = Image.Image | np.ndarray
JPEG_START = b"\xff\xd8"
# what Pillow raises for a file that is not a complete image
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB with 8 bits. 16-bit values are scaled; Pillow would clip them."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(
            f"mode {image.mode}, which has no defined largest value; save it with 8 or 16 bits"
        )
    return image.convert("RGB")


def decode(data: bytes) -> ImageLike:
    """Return the image in the bytes of a file, in RGB.

    simplejpeg's libjpeg-turbo gives the same pixels as Pillow. Pillow reads all other formats, CMYK
    JPEG, and files that simplejpeg refuses. Raises one of `UNREADABLE` for an incomplete image.
    """
    if simplejpeg is not None and data[:2] == JPEG_START:
        try:
            if simplejpeg.decode_jpeg_header(data)[2] in ("YCbCr", "RGB", "Gray"):
                return simplejpeg.decode_jpeg(data)
        except ValueError:
            pass
    return to_rgb(Image.open(io.BytesIO(data)))


def as_image(image: ImageLike | Tensor) -> Image.Image:
    """Return a Pillow image. image: may also be a tensor (3, H, W) uint8."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor):
        image = image.permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(image))


def size_of(image: ImageLike) -> tuple[int, int]:
    """Return (height, width) in pixels."""
    return image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]


def crop_and_resize(
    image: ImageLike, box: tuple[int, int, int, int], size: tuple[int, int], mode: str
) -> Tensor:
    """Return the pixels of `box` (top, left, height, width), resized, (3, H, W) uint8.

    size: (H, W); mode: "bilinear" or "bicubic", both with Pillow's antialiasing: first along the
    rows, then along the columns, as Pillow below 13. From that it differs by 2 steps at most, 0.01
    in the mean (torch rounds its weights to 16 bits). Pillow 13 begins with the columns if that
    is less work, and rounds and clips in between: 0.3 steps in the mean, 12 at sharp edges.
    """
    top, left, height, width = box
    if isinstance(image, np.ndarray):
        pixels = np.array(image[top : top + height, left : left + width])
    else:
        pixels = np.array(image.crop((left, top, left + width, top + height)))
    # (1, 3, h, w) with the strides of channels-last, for which torch is fastest
    batch = torch.from_numpy(pixels).view(1, height, width, 3).permute(0, 3, 1, 2)
    return F.interpolate(batch, size=size, mode=mode, antialias=True)[0]


def to_pixels(image: ImageLike | Tensor) -> Tensor:
    """Return the pixels of an image as a contiguous tensor (3, H, W) uint8."""
    if isinstance(image, Image.Image):  # splitting the bands is faster than permuting an array
        bands = b"".join(band.tobytes() for band in image.split())
        shape = (3, image.height, image.width)
        return torch.frombuffer(bytearray(bands), dtype=torch.uint8).view(shape)
    if not isinstance(image, Tensor):
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return image.contiguous()


def normalize(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return float32 images: torchvision's ToTensor and Normalize, bit for bit.

    pixels: (..., 3, H, W) uint8; mean, std: (3, 1, 1), of values in [0, 1].
    """
    return (pixels / 255).sub_(mean).div_(std)


def shift_rows(image: Image.Image, shifts: np.ndarray, fill: Any, *, cubic: bool) -> Image.Image:
    """Return the image with pixel (x, y) taken from (x + shifts[y], y), bicubic or bilinear.

    shifts: (H,) in pixels. Pixels from outside are `fill`. Differs from Pillow's affine transform
    by 1 step at most, in two values of a thousand. If the shift's fraction is a simple one, that is
    up to one in ten: many results are then integers, which Pillow often rounds down.
    """
    pixels = np.asarray(image)  # (H, W, 3)
    height, width = pixels.shape[:2]
    first = np.floor(shifts).astype(np.int64)  # the first source pixel of each row
    margin = int(np.abs(first).max()) + 2
    wide = np.empty((height, width + 2 * margin, 3), np.uint8)
    wide[:, margin:-margin] = pixels
    wide[:, margin - 2 : margin] = pixels[:, :1]  # the border is repeated as far as the
    wide[:, -margin : width + margin + 2] = pixels[:, -1:]  # taps of a pixel inside reach
    starts = np.arange(height) * (width + 2 * margin) + first + margin - 1
    taps = sliding_window_view(wide.reshape(-1), 3 * (width + 3))[3 * starts]
    part = torch.from_numpy(shifts - first)[:, None]  # (H, 1)
    values = torch.from_numpy(taps).float()  # (H, 3 (W + 3))
    steps = values[:, 3:] - values[:, :-3]  # differences of neighbouring pixels
    mixed = values[:, 3 : 3 * (width + 1)]
    # The cubic with a = -1 through four pixels, as the second plus shares of the three differences,
    # so that a uniform area stays exactly the same.
    shares = {0: part * (1 - part) ** 2, 1: part, 2: part**2 * (part - 1)} if cubic else {1: part}
    for i, share in shares.items():
        mixed.addcmul_(steps[:, 3 * i : 3 * (i + width)], share.float())
    found = mixed.clamp_(0, 255).to(torch.uint8).numpy().reshape(height, width, 3)
    filled = np.full((width, 3), fill, np.uint8)
    inside = np.clip(np.ceil([-0.5 - shifts, width - 0.5 - shifts]), 0, width).astype(np.int64)
    for row, start, end in zip(found, *inside.tolist()):
        row[:start], row[end:] = filled[:start], filled[end:]
    return Image.fromarray(found)
