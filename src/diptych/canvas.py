"""Bring a picture to the size a model draws in, and what was drawn back into the picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = [
    "Box",
    "crop_region",
    "extend",
    "fit",
    "paste_back",
    "to_pixel_values",
]

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels, the last two outside."""


_MOST_SCALED = 1 << 26  # pixels


def fit(image: Image.Image, size: tuple[int, int], mode: str = "resize") -> Image.Image:
    """Return the picture at `size` (width, height): stretched, cropped, or padded at its edges.

    As diffusers' `VaeImageProcessor` does under the modes default, crop and fill (Lanczos).
    """
    if image.size == size:
        return image
    if mode == "resize":
        return image.resize(size, Image.Resampling.LANCZOS)
    width, height = size
    is_wider = image.width * height > width * image.height
    if is_wider == (mode == "pad"):
        inner = width, max(1, image.height * width // image.width)
    else:
        inner = max(1, image.width * height // image.height), height
    left, top = width // 2 - inner[0] // 2, height // 2 - inner[1] // 2
    if mode == "crop" and inner[0] * inner[1] > _MOST_SCALED:
        return _crop_scaled(image, size, inner, (-left, -top))
    scaled = image.resize(inner, Image.Resampling.LANCZOS)
    if mode == "crop":
        return scaled.crop((-left, -top, width - left, height - top))
    canvas = Image.new(scaled.mode, size)
    canvas.paste(scaled, (left, top))
    right, bottom = width - left - inner[0], height - top - inner[1]
    # What a resize makes of an edge alone: boxes without width or height.
    for strip, box, place in (
        ((left, height), (0, 0, 0, inner[1]), (0, 0)),
        ((right, height), (inner[0], 0, inner[0], inner[1]), (left + inner[0], 0)),
        ((width, top), (0, 0, inner[0], 0), (0, 0)),
        ((width, bottom), (0, inner[1], inner[0], inner[1]), (0, top + inner[1])),
    ):
        if min(strip) > 0:
            canvas.paste(scaled.resize(strip, box=box), place)
    return canvas


def _crop_scaled(
    image: Image.Image, size: tuple[int, int], inner: tuple[int, int], start: tuple[int, int]
) -> Image.Image:
    """Scale to `inner` and crop `size` from `start`; of a long and thin picture only what stays.

    The side that fits goes first: Pillow's boxes of both at once are not those of each alone.
    """
    lanczos, box = Image.Resampling.LANCZOS, (0.0, 0.0, 0.0, 0.0)
    if inner[0] > size[0]:
        each, fitted = image.width / inner[0], image.resize((image.width, size[1]), lanczos)
        box = (start[0] * each, 0, (start[0] + size[0]) * each, size[1])
    else:
        each, fitted = image.height / inner[1], image.resize((size[0], image.height), lanczos)
        box = (0, start[1] * each, size[0], (start[1] + size[1]) * each)
    return fitted.resize(size, lanczos, box)


def extend(
    image: Image.Image, *, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> Image.Image:
    """Return a picture that is larger by so many pixels a side, its edges repeated."""
    values = np.asarray(image)
    more = [(top, bottom), (left, right), (0, 0)][: values.ndim]
    return Image.fromarray(np.pad(values, more, mode="edge"))


def to_pixel_values(image: Image.Image) -> NDArray[np.float32]:
    """Return [3, H, W] in -1..1 of a picture in mode RGB."""
    values = np.asarray(image, np.float32) / 255
    return np.ascontiguousarray(2 * values.transpose(2, 0, 1) - 1)


def crop_region(mask: NDArray[Any], padding: int, size: tuple[int, int]) -> Box:
    """Return the region around all of `mask` [H, W] that is not 0, in the proportions of `size`.

    `padding` pixels are added, then what the proportions of (width, height) want, as far as the
    picture reaches: the arithmetic of diffusers' `get_crop_region`.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    left, right = max(int(columns[0]) - padding, 0), min(int(columns[-1]) + 1 + padding, width)
    top, bottom = max(int(rows[0]) - padding, 0), min(int(rows[-1]) + 1 + padding, height)
    wanted = size[0] / size[1]
    if (right - left) / (bottom - top) > wanted:
        top, bottom = _widened(top, bottom, (right - left) / wanted, height)
    else:
        left, right = _widened(left, right, (bottom - top) * wanted, width)
    return left, top, right, bottom


def paste_back(
    original: Image.Image, painted: Image.Image, weights: NDArray[np.floating]
) -> Image.Image:
    """Lay `painted` (RGB) over `original` (RGB, RGBA or I;16) by `weights` [H, W] in 0..1.

    Where a weight is 0 the pixel stays what it is, bit for bit; transparent ones that are painted
    become opaque.
    """
    kept = np.asarray(original)
    if original.mode == "I;16":
        over = np.asarray(painted.convert("L"), np.float64) * 257
    elif original.mode == "RGBA":
        over = np.asarray(painted.convert("RGBA"), np.float64)
    else:
        over = np.asarray(painted, np.float64)
    share = weights if kept.ndim == 2 else weights[:, :, None]
    mixed = np.rint(kept + (over - kept) * share).astype(kept.dtype)
    return Image.fromarray(np.where(share > 0, mixed, kept))


def _widened(low: int, high: int, wanted: float, most: int) -> tuple[int, int]:
    more = int(wanted - (high - low))
    low, high = low - more // 2, high + more - more // 2
    if high >= most:
        low, high = low - (high - most), most
    if low < 0:
        low, high = 0, high - low
    return low, min(high, most)
