"""Say what a picture may be given as, and how much of it is taken in."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from typing import Any, BinaryIO, Literal, TypeAlias

from numpy.typing import NDArray
from PIL import Image

from diptych.errors import BadInput

__all__ = ["DEFAULT_LIMITS", "FORMATS", "Alpha", "ImageInput", "ImageLimits"]

ImageInput: TypeAlias = (
    str | os.PathLike[str] | bytes | BinaryIO | Image.Image | NDArray[Any]  # one picture
)
Alpha: TypeAlias = Literal["white", "drop", "keep"]

# Decoders that run in this process, on memory we hold, and that people meet. Never EPS, WMF, PDF or
# the FITS, HDF5, GRIB and BUFR stubs: they start other programs, draw through the system or call
# plugins. TGA has no signature and stands last, so that it sees only what nobody else recognised.
FORMATS = (
    *("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF"),
    *("ICO", "JPEG2000", "QOI", "TGA"),
)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Say how much of a picture may be taken in; checked before anything is decoded.

    `max_side` bounds the filter tables of a resize; `max_slow_pixels` holds for decoders written in
    Python (QOI, plain PPM, run-length BMP: about a second per million); `max_scan_pixels` is pixels
    times scans of a progressive JPEG, which may ask for thousands; `timeout_s` is for URLs.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 64_000_000
    max_side: int = 65_535
    max_slow_pixels: int = 2_500_000
    max_scan_pixels: int = 1_000_000_000
    timeout_s: float = 10.0
    formats: tuple[str, ...] = FORMATS

    def __post_init__(self) -> None:
        for field in fields(self)[:6]:
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise BadInput(f"ImageLimits.{field.name} must be above 0, not {value!r}")
        if unknown := set(self.formats) - set(FORMATS):
            raise BadInput(f"ImageLimits.formats: {sorted(unknown)} not among {list(FORMATS)}")


DEFAULT_LIMITS = ImageLimits()
