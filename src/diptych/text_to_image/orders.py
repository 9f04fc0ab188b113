"""Spell out a call: one order for each picture, with its own seed, words and starting noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.errors import BadInput, DiptychError
from diptych.text_to_image.options import GenerateOptions

__all__ = [
    "Order",
    "Source",
    "Subject",
    "as_noise",
    "check_numbers",
    "is_single",
    "take_orders",
]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Hold the picture that another is made from, at the size it is drawn in.

    `pixel_values` are float32 [3, H, W] in -1..1, or [1 + S, 3, H, W] of content and styles;
    `mask` float32 [H, W] is 1 where to repaint, None for everywhere; with `is_soft` its greys say
    how much may change. `finish` makes the result out of what was drawn.
    """

    pixel_values: NDArray[np.float32]
    mask: NDArray[np.float32] | None = None
    is_soft: bool = False
    finish: Callable[[Image.Image], Image.Image] = lambda drawn: drawn


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """Ask for one picture: `options` are decided in full, `noise` is `C h w` if it was given.

    `error` says why it cannot even be begun.
    """

    prompt: str
    options: GenerateOptions
    noise: NDArray[np.float32] | None = None
    notes: tuple[str, ...] = ()
    source: Source | None = None
    error: DiptychError | None = None

    @property
    def seed(self) -> int:
        assert self.options.seed is not None
        return self.options.seed


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """Hold what a call names once and makes `num_images_per_prompt` pictures of.

    `options` are those of the call, with a size that fits the `source`.
    """

    prompt: str
    options: GenerateOptions
    notes: tuple[str, ...] = ()
    source: Source | None = None
    error: DiptychError | None = None


def take_orders(
    subjects: Iterable[Subject],
    negatives: str | Sequence[str] | None = None,
    noise: NDArray[np.float32] | None = None,
) -> Iterator[Order]:
    """Yield the orders of a call, picture i with seed + i, those of one subject side by side.

    Options are resolved; `negatives` is one text for all, or one for each subject; `noise`
    [N, C, h, w] a start for each picture. Raises `BadInput` where the numbers do not fit.
    """
    place, number = 0, -1
    for number, subject in enumerate(subjects):
        options = subject.options
        negative = options.negative_prompt
        if isinstance(negatives, str):
            negative = negatives
        elif negatives is not None:
            if number >= len(negatives):
                raise BadInput(
                    f"there are more prompts than the {len(negatives)} negative ones: give one "
                    "text for all, or one for each"
                )
            negative = negatives[number]
        for _ in range(options.num_images_per_prompt):
            if noise is not None and place >= len(noise):
                raise BadInput(
                    f"latents hold the noise of {len(noise)} pictures, and more are asked for: "
                    "give one for each"
                )
            own = options.replace(  # what belongs to a picture alone
                seed=(options.seed or 0) + place,
                negative_prompt=negative,
                num_images_per_prompt=1,
            )
            own_noise = None if noise is None else noise[place]
            yield Order(
                subject.prompt, own, own_noise, subject.notes, subject.source, subject.error
            )
            place += 1
    check_numbers(number + 1, place, negatives, noise)


def check_numbers(
    subjects: int,
    pictures: int,
    negatives: str | Sequence[str] | None,
    noise: NDArray[np.float32] | None,
) -> None:
    """Raise `BadInput` where there are not as many negative prompts, or noises, as are wanted."""
    if negatives is not None and not isinstance(negatives, str) and len(negatives) != subjects:
        raise BadInput(
            f"there are {len(negatives)} negative prompts for {subjects} prompts: give one text "
            "for all, or one for each"
        )
    if noise is not None and len(noise) != pictures:
        raise BadInput(
            f"latents hold the noise of {len(noise)} pictures, and {pictures} are asked for: give "
            "one for each"
        )


def is_single(prompt: object) -> bool:
    """Tell one prompt from a list; raises `BadInput` for what is neither."""
    if isinstance(prompt, str):
        return True
    if isinstance(prompt, Mapping | bytes) or not isinstance(prompt, Iterable):
        raise BadInput(f"a prompt is a text or a list of texts, not {prompt!r:.80}")
    return False


def as_noise(latents: Any, channels: int) -> NDArray[np.float32]:
    """Return someone's own starting noise [B, C, h, w] as NumPy; raises `BadInput` if it is none.

    Takes a NumPy array or a torch tensor, on any device.
    """
    if hasattr(latents, "detach"):
        latents = latents.detach().float().cpu().numpy()
    try:
        noise = np.asarray(latents, np.float32)
    except (TypeError, ValueError) as error:
        raise BadInput(f"latents are no array of numbers ({error})") from error
    if noise.ndim == 3:
        noise = noise[None]
    if noise.ndim != 4 or noise.shape[1] != channels or not noise.size:
        raise BadInput(
            f"latents have the shape {list(noise.shape)}: give [pictures, {channels}, height, "
            "width], standard normal noise at the size of latents"
        )
    if not np.isfinite(noise).all():
        raise BadInput("latents hold numbers that are not finite: give standard normal noise")
    return noise
