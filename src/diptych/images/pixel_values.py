"""Turn a picture into the numbers a network reads, as `ViTImageProcessorPil` does, bit for bit."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.errors import BadImage, UnsupportedModel
from diptych.images.limits import DEFAULT_LIMITS, Alpha, ImageInput, ImageLimits
from diptych.images.opening import open_image

__all__ = ["Preprocessing", "preprocess", "to_pixels"]

logger = logging.getLogger("diptych")

_MAX_SIZE = 4096
_MAX_RESIZED_PIXELS = 64_000_000

# What a missing key of the file means, by kind of processor (transformers 5.23).
_VIT = {"size": 224, "resample": int(Image.Resampling.BILINEAR)}
_DEIT = {
    "size": 256,
    "resample": int(Image.Resampling.BICUBIC),
    "do_center_crop": True,
    "crop_size": 224,
}
_COMMON = {
    "do_center_crop": False,
    "crop_size": None,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "image_mean": 0.5,
    "image_std": 0.5,
    "default_to_square": True,
}
_PROCESSORS = {
    "ViTImageProcessor": _VIT,
    "ViTFeatureExtractor": _VIT,
    "DeiTImageProcessor": _DEIT,
    "DeiTFeatureExtractor": _DEIT,
}
# Written by other processors; ignoring one of them would change the pixels in silence.
_CHANGES_PIXELS = frozenset({"crop_pct", "offset", "max_size", "keep_aspect_ratio", "size_divisor"})
_CHANGES_NOTHING = frozenset({"do_convert_rgb", "do_reduce_labels"})


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Say how an RGB picture becomes `pixel_values`; what `preprocessor_config.json` says.

    Resize to `height` x `width`, or to `shortest_edge` keeping the shape; then crop the centre
    (height, width), padding with black; then `(pixel * rescale_factor - mean) / std`.
    """

    height: int = 224
    width: int = 224
    resample: int = int(Image.Resampling.BILINEAR)
    rescale_factor: float = 1 / 255
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    do_resize: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    crop: tuple[int, int] | None = None
    shortest_edge: int | None = None

    def __post_init__(self) -> None:
        for key in ("height", "width"):
            _whole("size", getattr(self, key), 1, _MAX_SIZE)
        for side in self.crop or ():
            _whole("crop_size", side, 1, _MAX_SIZE)
        if self.shortest_edge is not None:
            _whole("size", self.shortest_edge, 1, _MAX_SIZE)
        _whole("resample", self.resample, 0, 5)
        _real("rescale_factor", self.rescale_factor, 1e-9, 1e6)
        if len(self.mean) != 3 or len(self.std) != 3:
            raise UnsupportedModel("image_mean and image_std must have one value a channel: 3")
        for value in self.mean:
            _real("image_mean", value, 0, 1e6)
        for value in self.std:
            _real("image_std", value, 1e-6, 1e6)

    @property
    def output_size(self) -> tuple[int, int] | None:
        """Give height and width of `pixel_values`; None where they depend on the picture."""
        if self.crop is not None:
            return self.crop
        fixed = self.do_resize and self.shortest_edge is None
        return (self.height, self.width) if fixed else None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocessing:
        """Read the content of a ViT or DeiT `preprocessor_config.json` of any transformers version.

        Raises `UnsupportedModel` naming the key that asks for something else.
        """
        if not isinstance(config, Mapping):
            raise UnsupportedModel("preprocessor_config.json does not hold a JSON object")
        known = _defaults(config)
        given = {key: value for key, value in config.items() if value is not None}
        _refuse_other_work(given, known)
        values = {**known, **{key: given[key] for key in known if key in given}}
        for key in [key for key in values if key.startswith("do_") or key == "default_to_square"]:
            if not isinstance(values[key], bool):
                raise UnsupportedModel(f"{key} must be true or false, not {values[key]!r}")
        height, width, shortest_edge = _size(values["size"], values["default_to_square"])
        crop = _size(values["crop_size"], True, "crop_size") if values["do_center_crop"] else None
        return cls(
            height=height,
            width=width,
            resample=values["resample"],
            rescale_factor=values["rescale_factor"],
            mean=_channels("image_mean", values["image_mean"]),
            std=_channels("image_std", values["image_std"]),
            do_resize=values["do_resize"],
            do_rescale=values["do_rescale"],
            do_normalize=values["do_normalize"],
            crop=crop and crop[:2],
            shortest_edge=shortest_edge,
        )

    def to_config(self) -> dict[str, Any]:
        """Write the dict that `from_config` and transformers' `ViTImageProcessor` read."""
        size = {"height": self.height, "width": self.width}
        config: dict[str, Any] = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": self.do_resize,
            "size": size if self.shortest_edge is None else {"shortest_edge": self.shortest_edge},
            "resample": self.resample,
            "do_center_crop": self.crop is not None,
            "do_rescale": self.do_rescale,
            "rescale_factor": self.rescale_factor,
            "do_normalize": self.do_normalize,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.crop is not None:
            config["crop_size"] = {"height": self.crop[0], "width": self.crop[1]}
        return config


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("image_processor_type", "feature_extractor_type"):
        kind = config.get(key)
        if kind is None:
            continue
        plain = kind.removesuffix("Fast").removesuffix("Pil") if isinstance(kind, str) else ""
        if plain not in _PROCESSORS:
            raise UnsupportedModel(f"{key} {kind!r} is not supported; ViT and DeiT are")
        return {**_COMMON, **_PROCESSORS[plain]}
    return {**_COMMON, **_VIT}


def _refuse_other_work(given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for key in given.keys() - known.keys() - _CHANGES_NOTHING:
        if given[key] and (key.startswith("do_") or key in _CHANGES_PIXELS):
            raise UnsupportedModel(f"{key}={given[key]!r} in the preprocessor is not supported")
        logger.debug("preprocessor_config.json: %s has no effect", key)


def _size(value: object, square: object, key: str = "size") -> tuple[int, int, int | None]:
    """Return height, width and shortest edge of an int, a (height, width) pair or a dict."""
    if isinstance(value, int):
        return value, value, None if square else value
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        return value[0], value[1], None
    if isinstance(value, Mapping):
        sides = {side: number for side, number in value.items() if number is not None}
        if sides.keys() == {"height", "width"}:
            return sides["height"], sides["width"], None
        if sides.keys() == {"shortest_edge"} and key == "size":
            edge = sides["shortest_edge"]
            return edge, edge, edge
    raise UnsupportedModel(f"{key}={value!r} in the preprocessor is not supported")


def _channels(key: str, value: object) -> tuple[float, float, float]:
    values = [value] * 3 if isinstance(value, int | float) else value
    if not isinstance(values, Sequence) or len(values) != 3:
        raise UnsupportedModel(f"{key}={value!r} in the preprocessor must be 3 numbers")
    return values[0], values[1], values[2]


def _whole(key: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UnsupportedModel(f"{key} must be a whole number in {least}..{most}, not {value!r}")


def _real(key: str, value: object, least: float, most: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= abs(cast("float", value)) <= most:
        raise UnsupportedModel(f"{key} must be a number of size {least:g}..{most:g}, not {value!r}")


def to_pixels(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Turn a picture into `pixel_values` without the batch axis: float32 [3, H, W].

    Bit-identical to transformers' `ViTImageProcessorPil` on the same RGB picture and config.
    """
    if image.mode != "RGB":
        image = open_image(image)
    if preprocessing.do_resize:
        image = image.resize(
            _resized(image, preprocessing), Image.Resampling(preprocessing.resample)
        )
    if preprocessing.crop is not None:
        image = _centre(image, preprocessing.crop)
    tables = _tables(preprocessing)
    pixels = np.asarray(image)
    result = np.empty((3, image.height, image.width), np.float32)
    for channel in range(3):
        result[channel] = tables[channel][pixels[:, :, channel]]
    return result


def preprocess(
    source: ImageInput,
    preprocessing: Preprocessing,
    *,
    alpha: Alpha = "white",
    limits: ImageLimits = DEFAULT_LIMITS,
    allow_urls: bool = False,
) -> NDArray[np.float32]:
    """Open a picture and turn it into float32 [3, H, W]: `to_pixels(open_image(…), …)`."""
    image = open_image(source, alpha=alpha, limits=limits, allow_urls=allow_urls)
    return to_pixels(image, preprocessing)


def _resized(image: Image.Image, preprocessing: Preprocessing) -> tuple[int, int]:
    """Return width and height after the resize, rounded as transformers rounds."""
    edge = preprocessing.shortest_edge
    if edge is None:
        return preprocessing.width, preprocessing.height
    width, height = image.size
    long = int(edge * max(image.size) / min(image.size))
    if edge * long > _MAX_RESIZED_PIXELS:
        raise BadImage("<image>", f"is too long and thin: {width} x {height} pixels")
    return (edge, long) if width <= height else (long, edge)


def _centre(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Crop the centre, or pad with black on both sides where the picture is smaller."""
    starts = []
    for have, want in zip((image.width, image.height), (size[1], size[0]), strict=True):
        # transformers pads the odd pixel in front, and crops it there too.
        starts.append((have - want) // 2 if have >= want else -math.ceil((want - have) / 2))
    left, top = starts
    return image.crop((left, top, left + size[1], top + size[0]))


def _tables(preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Give the float of every byte and channel, [3, 256]: 256 steps instead of one a pixel.

    The order and widths of the operations are transformers': the product in float64, rounded to
    float32, then subtraction and division in float32.
    """
    values = np.arange(256, dtype=np.float64)
    if preprocessing.do_rescale:
        values = values * preprocessing.rescale_factor
    tables = np.repeat(values.astype(np.float32)[None], 3, axis=0)
    if preprocessing.do_normalize:
        mean = np.array(preprocessing.mean, np.float32)[:, None]
        std = np.array(preprocessing.std, np.float32)[:, None]
        tables = (tables - mean) / std
    return tables
