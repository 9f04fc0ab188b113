"""Prepare the pictures that others are made from: sizes, masks, and the way back.

Whatever a picture is drawn at, `Source.finish` brings what was drawn to where it belongs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.canvas import Box, crop_region, extend, fit, paste_back, to_pixel_values
from diptych.errors import BadInput, DiptychError
from diptych.images import ImageInput, open_image
from diptych.masks import Floats, open_mask, seam
from diptych.text_to_image.options import (
    GenerateOptions,
    ImageToImageOptions,
    InpaintOptions,
    parse_sides,
)
from diptych.text_to_image.orders import Source, Subject
from diptych.text_to_image.style_options import StyleOptions

__all__ = [
    "Native",
    "image_subjects",
    "inpaint_subjects",
    "is_one_picture",
    "spread",
    "style_subjects",
]

T = TypeVar("T")
Options = TypeVar("Options", bound=GenerateOptions)

_MOST_TIMES_NATIVE = 4  # pixels of a picture that is drawn in its own size, by those of training
_OVERLAP = 8  # pixels of the old picture that are painted anew beside what extends it


@dataclass(frozen=True, slots=True)
class Native:
    """Say what a model prefers, and how many pixels each way a latent stands for."""

    defaults: Mapping[str, Any]
    multiple_of: int

    @property
    def width(self) -> int:
        return int(self.defaults["width"])

    @property
    def height(self) -> int:
        return int(self.defaults["height"])

    def resolve(self, asked: Options) -> Options:
        """Fill every open choice of `asked`."""
        return asked.resolve(self.defaults, multiple_of=self.multiple_of)

    def resolve_all_but_size(self, asked: Options) -> Options:
        """Fill every open choice of `asked`, whose size is decided picture by picture."""
        return self.resolve(asked.replace(width=None, height=None))

    def size_for(
        self, picture: tuple[int, int], width: int | None, height: int | None
    ) -> tuple[int, int]:
        """Return (width, height) to draw a picture of (width, height) at, in whole latents.

        One side that is asked for decides the other. Down to whole latents, as in diffusers.
        """
        given, native = picture[0] * picture[1], self.width * self.height
        if width is not None and height is not None:
            wanted: tuple[float, float] = width, height
        elif width is not None:
            wanted = width, width * picture[1] / picture[0]
        elif height is not None:
            wanted = height * picture[0] / picture[1], height
        elif given <= _MOST_TIMES_NATIVE * native:
            wanted = picture
        else:
            factor = math.sqrt(native / given)
            wanted = picture[0] * factor, picture[1] * factor
        multiple = self.multiple_of
        return self._drawable([int(side) // multiple * multiple for side in wanted])

    def size_around(self, picture: tuple[int, int]) -> tuple[int, int]:
        """Return the least (width, height) in whole latents that hold a picture as it is."""
        multiple = self.multiple_of
        return self._drawable([-(-side // multiple) * multiple for side in picture])

    def _drawable(self, sides: Sequence[int]) -> tuple[int, int]:
        multiple = self.multiple_of
        lowest, highest = -(-16 // multiple) * multiple, 4096 // multiple * multiple
        width, height = (min(max(side, lowest), highest) for side in sides)
        return width, height


def image_subjects(
    images: Iterable[ImageInput], prompts: Iterable[str], asked: ImageToImageOptions, native: Native
) -> Iterator[Subject]:
    """Yield what is to be made of each picture; one that cannot be read carries its error."""
    for image, prompt in zip(images, prompts, strict=False):
        try:
            picture = open_image(image)
            size = native.size_for(picture.size, asked.width, asked.height)
            options, notes = _resolved(asked, size, native)
            if asked.width is None and asked.height is None and _is_less(size, picture.size):
                notes = (*notes, _smaller(picture.size, size))
            fitted = fit(picture, size, options.resize_mode)
            yield Subject(prompt, options, notes, Source(to_pixel_values(fitted)))
        except DiptychError as error:
            yield _impossible(prompt, asked, native, error)


def inpaint_subjects(
    images: Iterable[ImageInput],
    masks: Iterable[ImageInput | None],
    prompts: Iterable[str],
    asked: InpaintOptions,
    native: Native,
) -> Iterator[Subject]:
    """Yield what is to be repainted in each picture; one that cannot be read carries its error."""
    for image, mask, prompt in zip(images, masks, prompts, strict=False):
        try:
            yield _inpaint_subject(image, mask, prompt, asked, native)
        except DiptychError as error:
            yield _impossible(prompt, asked, native, error)


def _inpaint_subject(
    image: ImageInput,
    mask_image: ImageInput | None,
    prompt: str,
    asked: InpaintOptions,
    native: Native,
) -> Subject:
    original = open_image(image, alpha="keep")
    mask, notes = _mask_of(mask_image, original, asked)
    if asked.extend is not None:
        original, mask = _extended(original, mask, parse_sides(asked.extend))
    elif mask_image is None:
        raise BadInput("nothing says where to paint: give a mask, or sides to extend")
    if not asked.soft_mask:
        mask = (mask >= 0.5).astype(np.float32)
    region = mask > 0
    if not region.any():
        size = native.size_for(original.size, asked.width, asked.height)
        options, _ = _resolved(asked, size, native)
        # No step is taken: there is nothing to draw.
        still = options.replace(strength=0.0)
        pixels = to_pixel_values(fit(_opaque(original), size))
        source = Source(pixels, finish=lambda drawn: original)
        return Subject(prompt, still, (*notes, _EMPTY_MASK), source)
    frame = _Frame.around(region, asked, native, asked.padding_mask_crop)
    options, more = _resolved(asked, frame.size, native)
    pixels = to_pixel_values(frame.take(_opaque(original)))
    levels = frame.take(Image.fromarray((mask * 255).astype(np.uint8)))
    drawn_mask = np.asarray(levels, np.float32) / np.float32(255)
    if not asked.soft_mask:
        drawn_mask = (drawn_mask >= 0.5).astype(np.float32)
    weights = frame.within(seam(region, options.mask_blur))

    def finish(drawn: Image.Image) -> Image.Image:
        if not options.keep_unmasked and frame.is_whole(original.size):
            return frame.give_back(drawn)
        painted = Image.new("RGB", original.size)
        painted.paste(frame.give_back(drawn), frame.box[:2])
        return paste_back(original, painted, weights)

    source = Source(pixels, drawn_mask, asked.soft_mask, finish)
    return Subject(prompt, options, (*notes, *more), source)


_EMPTY_MASK = "the mask is empty: the picture comes back as it was"


def style_subjects(
    contents: Iterable[ImageInput],
    styles: Sequence[ImageInput],
    mask_image: ImageInput | None,
    prompt: str,
    asked: StyleOptions,
    native: Native,
) -> Iterator[Subject]:
    """Yield what takes on the styles; pixels are those of the content, then of each style.

    With a mask the content comes back in its own size, the same bit for bit outside of it.
    """
    opened = [open_image(style) for style in styles]
    for content in contents:
        try:
            yield _style_subject(content, opened, mask_image, prompt, asked, native)
        except DiptychError as error:
            yield _impossible(prompt, asked, native, error)


def _style_subject(
    content: ImageInput,
    styles: Sequence[Image.Image],
    mask_image: ImageInput | None,
    prompt: str,
    asked: StyleOptions,
    native: Native,
) -> Subject:
    original = open_image(content, alpha="keep")
    notes: tuple[str, ...] = ()
    if mask_image is None:
        mask = np.ones((original.height, original.width), np.float32)
        size = native.size_for(original.size, asked.width, asked.height)
        frame = _Frame((0, 0, *original.size), size, asked.resize_mode)
        if asked.width is None and asked.height is None and _is_less(size, original.size):
            notes = (_smaller(original.size, size),)
    else:
        mask, notes = open_mask(
            mask_image, original.size, asked.mask_from, invert=asked.invert_mask
        )
        mask = (mask >= 0.5).astype(np.float32)
        if not mask.any():
            notes = (*notes, _EMPTY_MASK)
        frame = _Frame.around(mask > 0, asked, native)
    options, more = _resolved(asked, frame.size, native)
    plain = _opaque(original)
    fitted = [frame.take(plain)]
    for each in styles:
        is_same = each.size == plain.size and each.tobytes() == plain.tobytes()
        if is_same and not asked.is_neutral:
            raise BadInput(
                "the style is the same picture as the content: there is no style to take; give "
                "another"
            )
        fitted.append(fitted[0] if is_same else fit(each, frame.size, "crop"))
    pixels = np.stack([to_pixel_values(each) for each in fitted])
    if mask_image is None:
        return Subject(prompt, options, (*notes, *more), Source(pixels))
    drawn_mask = np.asarray(frame.take(Image.fromarray((mask * 255).astype(np.uint8))))
    weights = frame.within(seam(mask > 0, options.mask_blur))

    def finish(drawn: Image.Image) -> Image.Image:
        painted = Image.new("RGB", original.size)
        painted.paste(frame.give_back(drawn), frame.box[:2])
        return paste_back(original, painted, weights)

    source = Source(pixels, (drawn_mask >= 128).astype(np.float32), False, finish)
    return Subject(prompt, options, (*notes, *more), source)


def _mask_of(
    mask_image: ImageInput | None, original: Image.Image, asked: InpaintOptions
) -> tuple[Floats, tuple[str, ...]]:
    if mask_image is None:
        return np.zeros((original.height, original.width), np.float32), ()
    return open_mask(mask_image, original.size, asked.mask_from, invert=asked.invert_mask)


def _extended(
    original: Image.Image, mask: Floats, sides: Mapping[str, int]
) -> tuple[Image.Image, Floats]:
    """Enlarge picture and mask; the new part is to be painted, and a little of the old one."""
    larger = extend(original, **sides)
    left, top = sides.get("left", 0), sides.get("top", 0)
    whole = np.ones((larger.height, larger.width), np.float32)
    kept = np.zeros((original.height, original.width), np.float32)
    if sides.get("left"):
        kept[:, :_OVERLAP] = 1
    if sides.get("top"):
        kept[:_OVERLAP] = 1
    if sides.get("right"):
        kept[:, -_OVERLAP:] = 1
    if sides.get("bottom"):
        kept[-_OVERLAP:] = 1
    inside = np.s_[top : top + original.height, left : left + original.width]
    whole[inside] = np.maximum(mask, kept)
    return larger, whole


@dataclass(frozen=True, slots=True)
class _Frame:
    """Know which part of a picture is drawn at which size.

    Under the mode "exact" no pixel is moved: the part lies at the left and the top of what is
    drawn, its edges repeated up to whole latents. The others are those of `fit`.
    """

    box: Box
    size: tuple[int, int]
    mode: str

    @classmethod
    def around(
        cls,
        region: NDArray[np.bool_],
        asked: ImageToImageOptions,
        native: Native,
        padding: int | None = None,
    ) -> _Frame:
        """Choose the part and the size for a `region` [H, W] that is to be painted.

        With a number of `padding` pixels the part is what lies around the region.
        """
        height, width = region.shape
        if padding is not None:
            aim = asked.width or native.width, asked.height or native.height
            size = native.size_for(aim, *aim)
            return cls(crop_region(region, padding, size), size, "pad")
        size = native.size_for((width, height), asked.width, asked.height)
        if asked.width is None and asked.height is None and not _is_less(size, (width, height)):
            around = native.size_around((width, height))
            if around[0] >= width and around[1] >= height:
                return cls((0, 0, width, height), around, "exact")
        if asked.resize_mode == "crop":
            inner = min(width, height * size[0] // size[1]), min(height, width * size[1] // size[0])
            left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
            return cls((left, top, left + inner[0], top + inner[1]), size, "resize")
        return cls((0, 0, width, height), size, asked.resize_mode)

    def is_whole(self, picture: tuple[int, int]) -> bool:
        return self.box == (0, 0, *picture)

    def take(self, picture: Image.Image) -> Image.Image:
        """Return what is drawn of `picture`, at `size`."""
        part = picture.crop(self.box)
        if self.mode != "exact":
            return fit(part, self.size, self.mode)
        right, bottom = self.size[0] - part.width, self.size[1] - part.height
        return extend(part, right=right, bottom=bottom)

    def give_back(self, drawn: Image.Image) -> Image.Image:
        """Return what was drawn at the size of the part it stands for."""
        part = self.box[2] - self.box[0], self.box[3] - self.box[1]
        if self.mode == "exact":
            return drawn.crop((0, 0, *part))
        return fit(drawn, part, "crop" if self.mode == "pad" else "resize")

    def within(self, weights: Floats) -> Floats:
        """Return `weights` [H, W] with nothing outside of the part."""
        left, top, right, bottom = self.box
        inside = np.zeros_like(weights)
        inside[top:bottom, left:right] = weights[top:bottom, left:right]
        return inside


def _opaque(picture: Image.Image) -> Image.Image:
    return picture if picture.mode == "RGB" else open_image(picture)


def _resolved(asked: Any, size: tuple[int, int], native: Native) -> tuple[Any, tuple[str, ...]]:
    """Return the options with the size that is drawn, and notes where it is not the one asked."""
    notes = tuple(
        f"{side} {wanted} became {made}: the model draws in steps of several pixels"
        for side, made in zip(("width", "height"), size, strict=True)
        if (wanted := getattr(asked, side)) not in (None, made)
    )
    resolved = native.resolve(asked.replace(width=size[0], height=size[1]))
    steps, strength = resolved.num_inference_steps, resolved.strength
    if 0 < strength < 1 and not int(steps * strength):
        note = (
            f"strength {strength:g} of {steps} steps is no step at all: the picture only passes "
            "through the autoencoder; raise one of them"
        )
        notes = (*notes, note)
    return resolved, notes


def _smaller(picture: tuple[int, int], size: tuple[int, int]) -> str:
    return (
        f"the picture of {picture[0]}x{picture[1]} is drawn at {size[0]}x{size[1]}, which the "
        "model was made for: give width and height for another size"
    )


def _is_less(size: tuple[int, int], picture: tuple[int, int]) -> bool:
    """Tell a size that was brought down from one that was rounded to whole latents."""
    return size[0] * size[1] < 0.5 * picture[0] * picture[1]


def _impossible(
    prompt: str, asked: GenerateOptions, native: Native, error: DiptychError
) -> Subject:
    return Subject(prompt, native.resolve_all_but_size(asked), error=error)


def is_one_picture(image: object) -> bool:
    """Tell one picture from a list of them; an open file is one, though it can be iterated."""
    return hasattr(image, "read") or not isinstance(image, list | tuple | Iterator)


def spread(
    value: T | Sequence[T] | None, is_one: bool, count: int | None, noun: str
) -> Iterable[T]:
    """Return one `value` for each picture: the same for all, or those of a list.

    Raises `BadInput` for a list of another length than `count` pictures; where they are not
    counted beforehand, as soon as a picture has none.
    """
    if is_one:
        return repeat(cast("T", value))
    each = list(cast("Sequence[T]", value))
    if count is not None and len(each) != count:
        raise BadInput(f"there are {count} pictures and {len(each)} {noun}: give one for each")
    return _until_more(each, noun)


def _until_more(each: Sequence[T], noun: str) -> Iterator[T]:
    yield from each
    raise BadInput(f"there are more pictures than the {len(each)} {noun}: give one for each")
