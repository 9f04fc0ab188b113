"""Denoise the pictures that are made at once, and notice when one of them breaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diptych.errors import DiptychError
from diptych.runtimes.network import Array, OpenNetworks
from diptych.text_to_image.denoiser import Denoise
from diptych.text_to_image.noise import NoiseSource
from diptych.text_to_image.orders import Order
from diptych.text_to_image.samplers import Step, sample
from diptych.text_to_image.schedules import Steps

__all__ = ["Batch", "Conditioning", "Row", "alike", "stacked"]

Conditioning = Mapping[str, NDArray[np.float32]]
"""What the UNet is told beside latents and timestep, for one picture: `1 …` each."""

_CHECK_EVERY = 8  # steps; on a GPU looking at the numbers means waiting for them


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """Hold one picture of a batch: its place, its order, and what the UNet is told.

    `image_latents` `1 C h w` are those of the picture it is made from. `mask` `1 1 h w` says where
    to repaint; a 9-channel network is told it, and `masked_latents`.
    """

    place: int
    order: Order
    positive: Conditioning
    negative: Conditioning | None
    image_latents: NDArray[np.float32] | None = None
    mask: NDArray[np.float32] | None = None
    masked_latents: NDArray[np.float32] | None = None


class Batch:
    """Run the sampler over some pictures at once, from `start` [B, C, h, w].

    `broken` tells, by row, after which step a picture held numbers that are not finite. `finish`
    is done to the latents of the end.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        steps: Steps,
        denoise: Denoise,
        networks: OpenNetworks,
        start: Array,
        noise: NoiseSource,
        *,
        finish: Callable[[Array], Array] | None = None,
    ) -> None:
        self.rows, self.steps = rows, steps
        self._denoise, self._networks, self._noise = denoise, networks, noise
        self._finish = finish
        self.broken: dict[int, int] = {}
        self._unseen: list[tuple[int, Array]] = []
        self.latents = start

    def run(self) -> Iterator[Step]:
        """Yield the steps; stop where no picture is left whole."""
        total = len(self.steps.timesteps)
        if total == 0:
            return
        for step in _quietly(sample(self.steps, self._denoise, self.latents, self._noise)):
            self.latents = step.latents
            self._watch(step, is_last=step.index == total - 1)
            if len(self.broken) == len(self.rows):
                return
            yield step

    @property
    def finished(self) -> Array:
        """Return the latents [B, C, h, w] that the last step left, at the scale of pictures."""
        if not self.steps.timesteps:
            return self.latents
        latents = self.latents * self.steps.final_scale
        return latents if self._finish is None else self._finish(latents)

    def error(self, row: int) -> DiptychError | None:
        """Return what befell a picture, None if it is whole."""
        if row not in self.broken:
            return None
        dtype = self._networks.dtype
        advice = (
            "load the model with dtype='float32', or bfloat16"
            if dtype == "float16"
            else "lower guidance_scale or take another sampler; the weights may be damaged"
        )
        return DiptychError(
            f"the latents of {self.rows[row].order.prompt[:60]!r} hold numbers that are not finite "
            f"after step {self.broken[row] + 1} of {len(self.steps.timesteps)} ({dtype}): {advice}"
        )

    def _watch(self, step: Step, *, is_last: bool) -> None:
        # 0 for finite numbers, NaN for all others, by means that arrays of all kinds have.
        with np.errstate(invalid="ignore"):
            flags = (step.latents * 0).reshape(len(self.rows), -1).sum(1)
        self._unseen.append((step.index, flags))
        is_near = self._networks.device == "cpu"
        if not (is_near or is_last or len(self._unseen) >= _CHECK_EVERY):
            return
        for index, seen in self._unseen:
            for row in np.flatnonzero(np.isnan(self._networks.numpy(seen))).tolist():
                self.broken.setdefault(row, index)
        self._unseen.clear()


def _quietly(steps: Iterator[Step]) -> Iterator[Step]:
    """Keep NumPy from warning of numbers that overflow: they are noticed, and reported."""
    while True:
        with np.errstate(invalid="ignore", over="ignore"):
            step = next(steps, None)
        if step is None:
            return
        yield step


def alike(rows: Sequence[Row]) -> list[list[Row]]:
    """Group the rows that run together: prompts of as many tokens, one size, the same steps."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        told = [each for each in (row.positive, row.negative) if each is not None]
        lengths = tuple(each["encoder_hidden_states"].shape[1] for each in told)
        options = row.order.options
        run = options.width, options.height, options.strength
        groups.setdefault((lengths, run), []).append(row)
    return list(groups.values())


def stacked(
    parts: Sequence[Conditioning], array: Callable[[NDArray[np.float32]], Array]
) -> dict[str, Array]:
    """Return the conditioning of several pictures as one, in the runtime's arrays."""
    return {name: array(np.concatenate([part[name] for part in parts])) for name in parts[0]}
