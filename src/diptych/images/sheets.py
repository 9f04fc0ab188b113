"""Draw maps over pictures, and join pictures to a sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.errors import BadInput
from diptych.images.modes import to_rgb
from diptych.images.opening import open_image

__all__ = ["contact_sheet", "overlay_heatmap"]

# Dark violet to pale yellow, lightness rising all the way, so that it also reads in grey.
_RAMP = ((12, 8, 60), (92, 18, 110), (168, 44, 96), (226, 92, 54), (250, 166, 40), (252, 252, 170))


def overlay_heatmap(image: Image.Image, heat: NDArray[Any], *, label: str = "") -> Image.Image:
    """Draw a map of non-negative weights [h, w] over a photo, with an optional label below.

    The map is stretched to its own least and greatest value and enlarged smoothly: bright is where
    it is strongest. Gives RGB of the photo's width, higher by the label's strip.
    """
    values = np.asarray(heat, dtype=np.float64)
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise BadInput(f"a heatmap must be finite numbers [h, w], not of shape {values.shape}")
    photo = image if image.mode == "RGB" else open_image(image)
    spread = float(np.ptp(values))
    scaled = (values - values.min()) / spread if spread > 0 else np.zeros_like(values)
    coarse = Image.fromarray((scaled * 255).astype(np.float32))
    level = coarse.resize(photo.size, Image.Resampling.BICUBIC).convert("L")
    stops = np.linspace(0, 255, len(_RAMP))
    ramp = [np.interp(np.arange(256), stops, channel) for channel in zip(*_RAMP, strict=True)]
    colour = level.copy()
    colour.putpalette(np.stack(ramp, axis=1).astype(np.uint8).tobytes())
    # A quarter even where the map is cold: the photo dims and the warm places stand out.
    mask = level.point([round(64 + 128 * (step / 255) ** 0.7) for step in range(256)])
    drawn = Image.composite(colour.convert("RGB"), photo, mask)
    return _labelled(drawn, label) if label else drawn


def _labelled(image: Image.Image, label: str) -> Image.Image:
    from PIL import ImageDraw, ImageFont

    text_height = min(48, max(10, image.width // 14))
    font = ImageFont.load_default(text_height)
    label = " ".join(label.split())[:200]
    dots = "…"
    if not isinstance(font, ImageFont.FreeTypeFont):
        # Pillow without FreeType has one bitmap font, which knows Latin-1 only.
        label, dots = label.encode("latin-1", "replace").decode("latin-1"), "."
    while len(label) > 1 and font.getlength(label) > image.width - 4:
        label = label[:-2].rstrip() + dots
    sheet = Image.new("RGB", (image.width, image.height + text_height * 3 // 2), "white")
    sheet.paste(image, (0, 0))
    left = max(0, (image.width - round(font.getlength(label))) // 2)
    ImageDraw.Draw(sheet).text((left, image.height + text_height // 8), label, "black", font)
    return sheet


def contact_sheet(
    panels: Sequence[Image.Image],
    columns: int,
    *,
    max_side: int = 640,
    labels: Sequence[str] = (),
) -> Image.Image:
    """Join pictures row by row on a white sheet; each is shrunk to at most `max_side` a side.

    `labels` are written below them, one for each.
    """
    if not panels or columns < 1 or max_side < 1:
        raise BadInput(f"a contact sheet needs panels and columns: {len(panels)}, {columns}")
    cells = []
    for index, panel in enumerate(panels):
        cell = to_rgb(panel, "white")
        cell.thumbnail((max_side, max_side))
        cells.append(_labelled(cell, labels[index]) if index < len(labels) else cell)
    columns = min(columns, len(cells))
    gap = 4
    width = max(cell.width for cell in cells) + gap
    height = max(cell.height for cell in cells) + gap
    rows = math.ceil(len(cells) / columns)
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for index, cell in enumerate(cells):
        left = gap + index % columns * width + (width - gap - cell.width) // 2
        sheet.paste(cell, (left, gap + index // columns * height))
    return sheet
