"""Read masks of every convention, and turn them into what inpainting needs: 1 is repaint."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from diptych.errors import BadInput
from diptych.images import ImageInput, open_image

__all__ = ["at_latents", "open_mask", "seam"]

Floats = NDArray[np.float32]


def open_mask(
    source: ImageInput, size: tuple[int, int], mask_from: str = "auto", *, invert: bool = False
) -> tuple[Floats, tuple[str, ...]]:
    """Return a mask [H, W] in 0..1 at `size` (width, height), and notes on what was changed.

    White is 1. Transparent is 1 with `mask_from="alpha"`, and with "auto" where all colours of a
    mask are the same and some of it is transparent. Raises `BadImage` for what cannot be read,
    `BadInput` for alpha that is asked for and not there.
    """
    image = open_image(source, alpha="keep")
    if mask_from == "alpha" and image.mode != "RGBA":
        raise BadInput(
            "mask_from is 'alpha', but the mask has no transparency: give a PNG with some, or "
            "mask_from='luminance'"
        )
    notes: tuple[str, ...] = ()
    values = _values(image, mask_from)
    if image.size != size:
        was, wanted = (f"{width}x{height}" for width, height in (image.size, size))
        notes = (f"the mask is {was}, the picture {wanted}: the mask was resized",)
        resized = Image.fromarray(values).resize(size, Image.Resampling.BILINEAR)
        values = np.asarray(resized, np.float32).clip(0, 1)
    return (1 - values if invert else values), notes


def _values(image: Image.Image, mask_from: str) -> Floats:
    if image.mode == "RGBA":
        levels = np.asarray(image)
        is_one_colour = bool((levels[..., :3] == levels[0, 0, :3]).all())
        alpha: Floats = levels[..., 3].astype(np.float32) / np.float32(255)
        is_cut_out = is_one_colour and bool((levels[..., 3] < 255).any())
        if mask_from == "alpha" or (mask_from == "auto" and is_cut_out):
            return np.float32(1) - alpha
        # What is seen on black: strokes on a transparent ground count, their ground does not.
        grey = np.asarray(image.convert("RGB").convert("L"), np.float32) / np.float32(255)
        return np.asarray(grey * alpha, np.float32)
    if image.mode == "I;16":
        return np.asarray(image).astype(np.float32) / np.float32(65535)
    return np.asarray(image.convert("L"), np.float32) / np.float32(255)


def at_latents(mask: Floats, downsampling: int, *, is_soft: bool = False) -> Floats:
    """Return `mask` [H, W] at the size of latents [h, w].

    Hard ones are picked as torch's nearest interpolation does, unless that loses most of a thin
    mask: then every latent it touches counts. Soft ones are averaged.
    """
    height, width = (side // downsampling for side in mask.shape)
    blocks = mask.reshape(height, downsampling, width, downsampling)
    if is_soft:
        return np.asarray(blocks.mean((1, 3)), np.float32)
    picked = np.asarray(blocks[:, 0, :, 0])
    if picked.sum() * downsampling**2 < 0.5 * mask.sum():
        return np.asarray(blocks.max((1, 3)))
    return picked


def seam(mask: NDArray[np.bool_], blur: int) -> Floats:
    """Return how much of what was painted shows, [H, W] in 0..1, by the distance from the edge.

    0 outside of `mask`; inside it rises over `blur` pixels, fewer where the mask is thin.
    """
    shown = np.zeros(mask.shape, np.float32)
    if not mask.any():
        return shown
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    # One pixel more than the mask: the edge of the picture is no seam, that of the mask is one.
    top, left = max(int(rows[0]) - 1, 0), max(int(columns[0]) - 1, 0)
    part = np.s_[top : int(rows[-1]) + 2, left : int(columns[-1]) + 2]
    left_over = Image.fromarray((mask[part] * 255).astype(np.uint8))
    distance = np.asarray(left_over, np.float32) / 255
    for _ in range(blur):
        # Grown by a pixel of its own edge first, for Pillow leaves the outermost pixels alone.
        padded = Image.fromarray(np.pad(np.asarray(left_over), 1, mode="edge"))
        shrunk = padded.filter(ImageFilter.MinFilter(3))
        left_over = shrunk.crop((1, 1, shrunk.width - 1, shrunk.height - 1))
        if left_over.getbbox() is None:
            break
        distance = distance + np.asarray(left_over, np.float32) / 255
    shown[part] = distance / distance.max()
    return shown
