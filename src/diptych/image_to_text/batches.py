"""Take pictures as they come and put those together that can be stacked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.errors import BadInput
from diptych.images import ImageInput

__all__ = ["is_single", "same_size", "take"]


def is_single(images: object) -> bool:
    """Tell one picture from several, in any of the ways they are given."""
    if isinstance(images, np.ndarray):
        return images.ndim < 4  # a fourth axis is a batch
    if isinstance(images, Mapping):
        raise BadInput("a dictionary is no list of pictures: give its values")
    if isinstance(images, str | bytes | bytearray | memoryview | Path | Image.Image):
        return True
    if hasattr(images, "read"):
        return True
    return hasattr(images, "__fspath__") or not isinstance(images, Iterable)


def take(images: Iterator[ImageInput], count: int) -> list[ImageInput]:
    """Return the next `count` pictures, fewer at the end."""
    return [image for _, image in zip(range(count), images, strict=False)]


def same_size(
    read: list[tuple[int, NDArray[np.float32]]],
) -> list[list[tuple[int, NDArray[np.float32]]]]:
    """Group pictures that can be stacked: all of them, but for processors that keep the shape."""
    groups: dict[tuple[int, ...], list[tuple[int, NDArray[np.float32]]]] = {}
    for place, pixels in read:
        groups.setdefault(pixels.shape, []).append((place, pixels))
    return list(groups.values())
