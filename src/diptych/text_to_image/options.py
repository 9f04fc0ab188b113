"""Settings of a picture: what the caller asks for, and what one run is made with."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

from diptych.errors import BadInput
from diptych.option_fields import (
    check_value,
    check_values,
    library,
    option,
    plain,
    replace,
    setting,
    values,
)

__all__ = [
    "MASK_SOURCES",
    "NOISE_SOURCES",
    "RESIZE_MODES",
    "SAMPLERS",
    "SCHEDULES",
    "SIDES",
    "SPACINGS",
    "GenerateOptions",
    "ImageToImageOptions",
    "InpaintOptions",
    "MaskedOptions",
    "parse_interval",
    "parse_sides",
    "size_notes",
]

logger = logging.getLogger("diptych")

# The words of `samplers.py` and `schedules.py`, spelled out so that doors can list them without
# loading NumPy; a test holds the two together.
SAMPLERS = (
    *("ddim", "euler", "euler_a", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde"),
    *("unipc", "lms", "lcm", "pndm", "turbo"),
)
SCHEDULES = ("normal", "karras", "exponential", "beta", "sgm_uniform", "simple", "kl_optimal")
SPACINGS = ("leading", "trailing", "linspace")
NOISE_SOURCES = ("philox", "torch")
RESIZE_MODES = ("resize", "crop", "pad")
MASK_SOURCES = ("auto", "luminance", "alpha")
SIDES = ("left", "top", "right", "bottom")
_MOST_ADDED = 8192  # pixels a side

# Words of other programs, each with ours.
_FOREIGN = {
    "batch_size": "num_images_per_prompt",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "denoising_strength": "strength",
    "generator": "seed",
    "n": "num_images_per_prompt",
    "n_iter": "num_images_per_prompt",
    "num_images": "num_images_per_prompt",
    "num_steps": "num_inference_steps",
    "sampler_name": "sampler",
    "scheduler": "sampler",
    "steps": "num_inference_steps",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """Say how to make a picture; None leaves the choice to the model.

    Precedence: what is set here, then what the model prefers, then `metadata["default"]`. Every
    field's metadata holds `kind`, `help`, `default`, `low` and `high` (inclusive), `choices`,
    `hint` and `from_model`; doors build their flags and schemas from it. Words and meanings are
    those of diffusers' pipelines, except that `seed` is an option and that a diffusers *scheduler*
    is `sampler` and `schedule` here. Raises BadInput when a value cannot be used.
    """

    negative_prompt: str | None = setting(
        str,
        "What the picture should not show; an empty text is not none.",
        default=None,
    )
    num_inference_steps: int | None = option(
        int, "Denoising steps: more are slower and finer.", library=20, low=1, high=1000
    )
    guidance_scale: float | None = option(
        float,
        "How strongly the words pull; 1 or less leaves the negative prompt out.",
        library=7.5,
        low=0.0,
        high=100.0,
    )
    width: int | None = option(
        int, "Pixels across, rounded to what the model can draw.", library=512, low=16, high=4096
    )
    height: int | None = option(
        int, "Pixels down, rounded to what the model can draw.", library=512, low=16, high=4096
    )
    seed: int | None = setting(
        int,
        "Image i of a run draws its noise from seed + i; none draws a seed.",
        default=None,
        low=0,
        high=2**64 - 1,
    )
    num_images_per_prompt: int = setting(
        int, "Pictures made of each prompt.", default=1, low=1, high=1000
    )
    sampler: str | None = option(
        str, "How a step is taken from noise to picture.", library="ddim", choices=SAMPLERS
    )
    schedule: str | None = option(
        str, "How the noise levels are spread over the steps.", library="normal", choices=SCHEDULES
    )
    timestep_spacing: str | None = option(
        str, "Which of the trained timesteps a run visits; none is the sampler's habit.",
        choices=SPACINGS,
    )  # fmt: skip
    clip_skip: int | None = option(
        int,
        "Layers of the text encoder left out at its end: A1111's Clip skip less one.",
        library=0,
        low=0,
        high=30,
    )
    guidance_rescale: float | None = option(
        float, "How far guidance may not raise the contrast; 0 is off.",
        library=0.0, low=0.0, high=1.0,
    )  # fmt: skip
    guidance_interval: str | None = option(
        str, "Part of the way from noise to picture that is guided, as in 0.2,0.8; none is all.",
    )  # fmt: skip
    eta: float | None = option(
        float, "Noise renewed at each step; none is the sampler's own.", low=0.0, high=2.0
    )
    strength: float | None = option(
        float,
        "How far to leave a picture that is given: 0 keeps it, 1 is free of it.",
        low=0.0,
        high=1.0,
    )
    parse_weights: bool = setting(
        bool, "Read (word:1.3), [word] and BREAK in prompts as instructions.", default=True
    )
    reuse_interval: int = setting(
        int,
        "Steps of which only the first computes the deep layers of the UNet; 1 is every step.",
        default=1,
        low=1,
        high=100,
    )
    token_merging_ratio: float = setting(
        float,
        "Share of points that self-attention in the finest maps does without; 0 is none.",
        default=0.0,
        low=0.0,
        high=0.75,
    )
    noise_source: str = setting(
        str,
        "Where noise comes from: philox draws as a CUDA device does, torch as its CPU generator.",
        default="philox",
        choices=NOISE_SOURCES,
    )

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise BadInput for a value out of range; those still None wait for `resolve`."""
        check_values(self)
        if self.guidance_interval is not None:
            parse_interval(self.guidance_interval)
        if self.seed is not None and self.seed + self.num_images_per_prompt > 2**64:
            raise BadInput(
                f"seed is {self.seed}, and {self.num_images_per_prompt} pictures count up from it "
                f"beyond {2**64 - 1}: give a lower seed."
            )

    @classmethod
    def of(cls, options: GenerateOptions | None) -> Self:
        """Return `options` as options of this kind: what both know is taken over."""
        if isinstance(options, cls):
            return options
        names = {field.name for field in fields(cls)}
        known = {} if options is None else values(options)
        return cls(**{name: value for name, value in known.items() if name in names})

    def replace(self, **overrides: object) -> Self:
        """Return a copy with these options changed; BadInput for a word that is no option."""
        return replace(self, overrides, f"an option of {self._verb()}", _FOREIGN)

    @classmethod
    def _verb(cls) -> str:
        return "generate"

    def resolve(
        self, defaults: Mapping[str, object] | None = None, *, multiple_of: int = 8
    ) -> Self:
        """Fill every open choice from what the model prefers, then from the library.

        Width and height are rounded to a multiple of `multiple_of` (pixels to a latent), with a
        note in the log; a seed left open is drawn. Only `negative_prompt`, `timestep_spacing`,
        `guidance_interval`, `eta`, `strength`, `padding_mask_crop` and `extend` may still be None,
        which has a meaning there. Resolving again changes nothing.
        Raises BadInput where a default cannot be used.
        """
        asked = {name: value for name, value in values(self).items() if value is not None}
        known = {f.name: f for f in fields(self) if f.metadata["from_model"]}
        given = {
            name: value
            for name, value in (defaults or {}).items()
            if name in known and name not in asked and value is not None
        }
        for name, value in given.items():
            check_value(known[name], value, "in the model's defaults ")
        merged = {**library(self), **given, **asked}
        for side in ("width", "height"):
            merged[side] = _rounded(merged[side], multiple_of)
        if merged["seed"] is None:
            merged["seed"] = secrets.randbelow(2**32)
        resolved = type(self)(**{name: plain(value) for name, value in merged.items()})
        for note in size_notes(self, resolved):
            logger.warning("%s", note)
        return resolved


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageToImageOptions(GenerateOptions):
    """Say how to make a picture out of another.

    Width and height left open follow from the picture: its own size, or where that is more than
    four times the pixels the model was trained with, its proportions at that number of pixels.
    """

    strength: float | None = option(
        float, "How far to leave the picture given: 0 keeps it, 1 is free of it.",
        library=0.8, low=0.0, high=1.0,
    )  # fmt: skip
    resize_mode: str = setting(
        str,
        "How a picture of other proportions is brought to width and height.",
        default="resize",
        choices=RESIZE_MODES,
    )

    @classmethod
    def _verb(cls) -> str:
        return "image_to_image"


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskedOptions(ImageToImageOptions):
    """Say how a mask is read that tells which part of a picture may change."""

    mask_from: str = setting(
        str,
        "What in the mask says where: luminance (white is changed) or alpha (transparent is).",
        default="auto",
        choices=MASK_SOURCES,
    )
    invert_mask: bool = setting(
        bool, "Keep what the mask says to change, and change the rest.", default=False
    )
    mask_blur: int = setting(
        int,
        "Pixels inside the edge of the mask over which old and new are blended.",
        default=4,
        low=0,
        high=256,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class InpaintOptions(MaskedOptions):
    """Say how to repaint a part of a picture; the others come back as they were, bit for bit.

    Width and height are those it is painted at; the picture comes back in its own size.
    """

    strength: float | None = option(
        float, "How far to leave what is there: 0 keeps it, 1 is free of it.",
        library=1.0, low=0.0, high=1.0,
    )  # fmt: skip
    soft_mask: bool = setting(
        bool, "Read greys of the mask as how much a pixel may change.", default=False
    )
    padding_mask_crop: int | None = setting(
        int,
        "Paint the surroundings of the mask alone, with this many pixels more, in full size.",
        default=None,
        low=0,
        high=4096,
    )
    extend: str | None = setting(
        str, "Enlarge the picture and paint what is new, as in left=128,bottom=64.", default=None
    )
    keep_unmasked: bool = setting(
        bool, "Bring back every pixel outside of the mask as it was.", default=True
    )

    @classmethod
    def _verb(cls) -> str:
        return "inpaint"

    def check(self) -> None:
        """Raise BadInput for a value out of range, and for sides that cannot be read."""
        # Spelled out: dataclasses with slots are made anew, which `super()` would not notice.
        MaskedOptions.check(self)
        if self.extend is not None:
            parse_sides(self.extend)


def size_notes(asked: GenerateOptions, resolved: GenerateOptions) -> tuple[str, ...]:
    """Return one sentence for each side that was not made as asked."""
    return tuple(
        f"{side} {wanted} became {made}: the model draws in steps of several pixels"
        for side in ("width", "height")
        if (wanted := getattr(asked, side)) not in (None, made := getattr(resolved, side))
    )


def parse_interval(text: str) -> tuple[float, float]:
    """Read `0.2,0.8`, two shares from 0 to 1 that rise; raises BadInput for anything else."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise BadInput(
            f"guidance_interval is {text!r}: give two numbers from 0 to 1 that rise, as in 0.2,0.8"
        )
    return low, high


def parse_sides(text: str) -> dict[str, int]:
    """Read `left=128,bottom=64`; raises BadInput for anything else."""
    sides: dict[str, int] = {}
    for part in text.split(","):
        side, _, pixels = (each.strip() for each in part.partition("="))
        if side not in SIDES or side in sides or not (pixels.isascii() and pixels.isdigit()):
            raise BadInput(f"extend is {text!r}: give sides and pixels, as in left=128,right=64")
        sides[side] = int(pixels)
        if sides[side] > _MOST_ADDED:
            raise BadInput(f"extend is {text!r}: give at most {_MOST_ADDED} pixels a side")
    if not any(sides.values()):
        raise BadInput(f"extend is {text!r}: give at least one side more than 0 pixels")
    return sides


def _rounded(pixels: int, multiple_of: int) -> int:
    """Return the nearest multiple within the range; the upper one of two."""
    lowest = -(-16 // multiple_of) * multiple_of
    nearest = (pixels + multiple_of // 2) // multiple_of * multiple_of
    return min(max(nearest, lowest), 4096 // multiple_of * multiple_of)
