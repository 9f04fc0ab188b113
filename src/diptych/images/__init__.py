"""Open pictures of every kind, and turn them into the numbers a network reads.

Two steps, each with a reference: `open_image` gives the RGB picture of transformers' `load_image`
(`alpha="drop"`) or a kinder one; `to_pixels` gives the array of its `ViTImageProcessorPil`, bit for
bit. Whatever cannot be read raises `BadImage`, and nothing else.
"""

from __future__ import annotations

from diptych.images.limits import FORMATS, Alpha, ImageInput, ImageLimits
from diptych.images.opening import open_image
from diptych.images.pixel_values import Preprocessing, preprocess, to_pixels
from diptych.images.sheets import contact_sheet, overlay_heatmap

__all__ = [
    "FORMATS",
    "Alpha",
    "ImageInput",
    "ImageLimits",
    "Preprocessing",
    "contact_sheet",
    "open_image",
    "overlay_heatmap",
    "preprocess",
    "to_pixels",
]
