"""Turn pictures of every mode and depth into RGB, upright."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.errors import BadImage
from diptych.images.checks import check_size
from diptych.images.limits import Alpha, ImageLimits

__all__ = ["from_array", "to_rgb"]

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image, alpha: Alpha) -> Image.Image:
    """Decode, turn upright and convert; gives a new image that carries pixels and nothing else."""
    image.load()
    rgb = (_kept if alpha == "keep" else _converted)(_turned(image), alpha)
    # A copy lets go of the file's bytes and of the decoder, and leaves the caller's image alone.
    rgb = rgb.copy() if rgb is image else rgb
    rgb.info = {}
    return rgb


def _kept(image: Image.Image, alpha: Alpha) -> Image.Image:
    values = np.asarray(image) if image.mode == "I" or image.mode.startswith("I;16") else None
    if values is not None and (values.dtype.itemsize == 2 or image.format in ("PNG", "PPM")):
        return Image.fromarray(values.astype(np.uint16))
    if not _has_alpha(image):
        return _converted(image, "drop")
    return image if image.mode == "RGBA" else _straight(image).convert("RGBA")


def _converted(image: Image.Image, alpha: Alpha) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_grey(image, alpha).convert("RGB")
    if alpha == "white" and _has_alpha(image):
        return _on_white(image)
    if image.mode == "RGB":
        return image
    try:
        return image.convert("RGB")
    except ValueError:
        return _straight(image).convert("RGB")


def _turned(image: Image.Image) -> Image.Image:
    # ImageOps.exif_transpose also rewrites the EXIF block; a broken one must not cost a picture.
    try:
        method = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        method = None
    return image if method is None else image.transpose(method)


def _has_alpha(image: Image.Image) -> bool:
    key = image.info.get("transparency")
    if image.mode == "P":
        in_palette = image.palette is not None and image.palette.mode.endswith("A")
        return in_palette or isinstance(key, bytes | int)
    if image.mode in ("1", "L", "RGB"):
        return isinstance(key, tuple if image.mode == "RGB" else int)
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa")


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image if image.mode == "RGBA" else _straight(image).convert("RGBA")
    canvas = Image.new("RGB", rgba.size, "white")
    canvas.paste(rgba, (0, 0), rgba)
    return canvas


def _straight(image: Image.Image) -> Image.Image:
    """Undo premultiplied alpha, from which Pillow has few conversions."""
    return image.convert(image.mode.upper()) if image.mode in ("La", "RGBa") else image


def _deep_grey(image: Image.Image, alpha: Alpha) -> Image.Image:
    """Bring 16-bit, 32-bit and float greys to 8 bits; Pillow would clip them to white."""
    values = np.asarray(image)
    # In these formats mode I always means 16 bits, however dark the picture is.
    sixteen_bits = values.dtype.itemsize == 2 or image.format in ("PNG", "PPM")
    grey = _grey8(values, sixteen_bits and values.dtype.kind in "iu")
    key = image.info.get("transparency")
    if alpha == "white" and isinstance(key, int):
        grey[values == key] = 255
    return Image.fromarray(grey)


def _grey8(values: NDArray[Any], sixteen_bits: bool) -> NDArray[np.uint8]:
    """Scale numbers of any depth to 0..255; clip what lies outside, make NaN black."""
    low, high, _ = _value_range(values)
    offset, factor = 0.0, 1.0
    if values.dtype.kind == "f" and high <= 1:
        factor = 255.0
    elif sixteen_bits or (high > 255 and low >= 0 and high <= 65535):
        factor = 1 / 257
    elif high > 255:
        offset = min(low, 0.0)
        factor = 255 / (high - offset)

    white = offset + 255 / factor

    def scaled(rows: NDArray[Any]) -> NDArray[Any]:
        finite = np.nan_to_num(rows.astype(np.float64), nan=offset, posinf=white, neginf=offset)
        wide = (finite - offset) * factor
        # Pillow truncates floats that need no scaling.
        return np.clip(np.trunc(wide) if factor == 1 else np.rint(wide), 0, 255)

    return _by_rows(values, scaled)


def _row_blocks(values: NDArray[Any]) -> Iterator[slice]:
    """Yield slices of rows of about a million numbers, so that float copies stay small."""
    step = max(1, 2**20 * len(values) // max(1, values.size))
    return (slice(top, top + step) for top in range(0, len(values), step))


def _by_rows(
    values: NDArray[Any], convert: Callable[[NDArray[Any]], NDArray[Any]]
) -> NDArray[np.uint8]:
    result = np.empty(values.shape, np.uint8)
    for rows in _row_blocks(values):
        result[rows] = convert(values[rows])
    return result


def _value_range(values: NDArray[Any]) -> tuple[float, float, bool]:
    """Return the least and the greatest finite value, and whether all are finite."""
    low, high, all_finite = math.inf, -math.inf, True
    for rows in _row_blocks(values):
        block = values[rows]
        if values.dtype.kind == "f":
            finite = np.isfinite(block)
            all_finite = all_finite and bool(finite.all())
            block = block[finite]
        if block.size:
            low, high = min(low, float(block.min())), max(high, float(block.max()))
    return (low, high, all_finite) if low <= high else (0.0, 0.0, all_finite)


def from_array(array: NDArray[Any], limits: ImageLimits) -> Image.Image:
    """Wrap H W, H W C or C H W in an 8-bit image of mode L, RGB or RGBA."""
    values = np.asarray(array)
    shape = " x ".join(map(str, values.shape))
    if values.ndim == 3 and values.shape[2] not in (1, 3, 4) and values.shape[0] in (1, 3, 4):
        values = np.moveaxis(values, 0, 2)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim != 2 and not (values.ndim == 3 and values.shape[2] in (3, 4)):
        raise BadImage(
            "<array>", f"has shape {shape or '()'}; give one picture as H x W, H x W x 1, 3 or 4"
        )
    check_size((values.shape[1], values.shape[0]), "<array>", limits)
    return Image.fromarray(np.ascontiguousarray(_array_to_8_bits(values)))


def _array_to_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    kind = (values.dtype.kind, values.dtype.itemsize)
    if kind == ("u", 1):
        return values
    if kind == ("u", 2):
        return _grey8(values, sixteen_bits=True)
    if kind[0] == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if kind[0] != "f":
        raise BadImage(
            "<array>", f"has dtype {values.dtype}; give uint8, uint16, bool, or floats in 0..1"
        )
    low, high, all_finite = _value_range(values)
    # Resampling may leave the range by a rounding error.
    if not all_finite or low < -1e-5 or high > 1 + 1e-5:
        found = f"{low:g}..{high:g}" if all_finite else "NaN or infinity"
        raise BadImage("<array>", f"has floats in {found}; floats must lie in 0..1")
    return _by_rows(values, lambda rows: np.clip(np.rint(rows.astype(np.float64) * 255), 0, 255))
