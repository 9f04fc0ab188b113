"""Give a picture the style of another without training (StyleID: Chung et al. 2024).

Both pictures are walked back to noise by DDIM. The way forth starts from the content's noise with
the style's mean and spread, and lets the self-attentions on the way up look at the style: its keys
and values, asked by a blend of queries. No feature is stored: content and style run beside the
picture in one batch, each at its own latents of that same step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.errors import BadInput, UnsupportedModel
from diptych.masks import at_latents
from diptych.runtimes.network import Array, OpenNetworks
from diptych.text_to_image.autoencoder import Autoencoder
from diptych.text_to_image.batch import Conditioning
from diptych.text_to_image.denoiser import EpsDenoiser, concatenate
from diptych.text_to_image.noise import NoiseSource
from diptych.text_to_image.samplers import Step, ddim, ddim_inversion
from diptych.text_to_image.schedules import NoiseSchedule, Steps
from diptych.text_to_image.style_options import StyleOptions

__all__ = ["StyledDenoiser", "Stylist", "adain", "normalised", "style_layers"]

Floats = NDArray[np.float32]

# Round trip of the default generator at 50 steps: 20 to 33 dB without, 39 to 43 with one.
_REFINEMENTS = 1


def adain(content: Array, style: Array) -> Array:
    """Give latents [B, C, h, w] the mean and deviation that another's channels have.

    Huang and Belongie 2017, equation 8; deviations over space, unbiased.
    """
    axes = (2, 3)
    places = content.shape[2] * content.shape[3]

    def moments(latents: Array) -> tuple[Array, Array]:
        mean = latents.mean(axis=axes, keepdims=True)
        centred = latents - mean
        variance = (centred * centred).sum(axis=axes, keepdims=True) / max(places - 1, 1)
        return mean, variance**0.5

    mean, deviation = moments(content)
    wanted_mean, wanted_deviation = moments(style)
    return (content - mean) / (deviation + 1e-8) * wanted_deviation + wanted_mean


def style_layers(unet: Mapping[str, Any]) -> tuple[int, int]:
    """Return the self-attentions that each level on the way up has, and how many levels have some.

    Raises `UnsupportedModel` where there are none.
    """
    levels = sum(unet.get("up_attention") or unet["down_attention"])
    if not levels:
        raise UnsupportedModel(
            "this model has no self-attention on its way up, which style transfer works by: take "
            "another model, or image_to_image"
        )
    return int(unet["layers_per_block"]) + 1, levels


@dataclass(frozen=True, slots=True, eq=False)
class Walk:
    """Hold what a run knows: latents of every level, and what the network is told.

    `trajectories` are latents [1 + S, C, h, w] of content and styles at each of the sigmas of
    `steps`, which rise; `left` [1, C, h, w] what the content was taken for on the way up to the
    next of them. `empty` is the conditioning of no words; `prompt` and `negative` are those
    that guide the picture, None where there is no prompt or no guidance.
    """

    steps: Steps
    trajectories: Sequence[Array]
    left: Sequence[Array]
    empty: Conditioning
    prompt: Conditioning | None
    negative: Conditioning | None


class StyledDenoiser:
    """Predict the clean latent of one picture [1, C, h, w] that looks at styles.

    Rows of each call: content, the styles, then the picture once for each style and kind of words,
    and once without any style where the strength is below 1. `weights` add up to 1.

    DDIM does not come back on the way it went: what it misses of the content at each step is known,
    and added to the picture (direct inversion: Ju et al. 2024). So the content comes back exactly
    where nothing is styled.
    """

    def __init__(
        self,
        denoiser: EpsDenoiser,
        walk: Walk,
        options: StyleOptions,
        layers: Sequence[int],
        layer_count: int,
        weights: Sequence[float],
        array: Any,
    ) -> None:
        self.denoiser, self.walk, self.options = denoiser, walk, options
        self.weights = weights
        self._levels = {sigma: place for place, sigma in enumerate(walk.steps.sigmas)}
        guided = walk.negative is not None
        words = [walk.empty] * (1 + len(weights))
        keys, is_styled = list(range(1 + len(weights))), [False] * (1 + len(weights))
        for style in range(len(weights)):
            for told in ([walk.negative] if guided else []) + [walk.prompt or walk.empty]:
                assert told is not None
                words.append(told)
                keys.append(1 + style)
                is_styled.append(True)
        if options.blend < 1:
            words.append(walk.empty)
            keys.append(len(keys))
            is_styled.append(False)
        self._is_guided = guided
        count = len(words)
        own = np.tile(np.arange(count), (layer_count, 1))
        on = np.zeros((layer_count, 1), bool)
        on[list(layers)] = True
        styled = on & np.array(is_styled)
        self._styled = styled.astype(np.float32)
        queries = np.where(is_styled, 0, np.arange(count))
        self._rows = {
            "key_rows": array(np.where(styled, np.array(keys), own)),
            "query_rows": array(queries),
            "attention_temperature": array(
                np.where(styled, options.temperature, 1.0).astype(np.float32)
            ),
        }
        self._words = {
            name: array(np.concatenate([each[name] for each in words])) for name in words[0]
        }
        self._array = array

    def __call__(self, latents: Array, sigma: float) -> Array:
        place = self._levels[sigma]
        beside = self.walk.trajectories[place]
        own = len(self._words["encoder_hidden_states"]) - len(beside)
        told = {
            **self._words,
            **self._rows,
            "query_preservation": self._array(self._styled * np.float32(self._share(place))),
        }
        fed = concatenate([beside, *[latents] * own])
        output = self.denoiser.predict(fed, sigma, told)
        content = self.denoiser.to_denoised(beside[:1], sigma, output[:1])
        made = self.denoiser.to_denoised(latents, sigma, self._mixed(output[len(beside) :]))
        return made + (self.walk.left[place - 1] - content)

    def _share(self, place: int) -> float:
        """Return the share of the content's query at a level; the highest comes first."""
        first, last = self.options.shares
        total = len(self.walk.steps.timesteps)
        done = (total - place) / max(total - 1, 1)
        return first + (last - first) * (1 - math.cos(math.pi * done)) / 2

    def _mixed(self, output: Array) -> Array:
        each = 2 if self._is_guided else 1
        total: Array = None
        for style, weight in enumerate(self.weights):
            rows = output[style * each : (style + 1) * each]
            said = rows[-1:]
            if self._is_guided:
                scale = self.options.guidance_scale or 0.0
                said = rows[:1] + (rows[1:] - rows[:1]) * scale
            total = said * weight if total is None else total + said * weight
        blend = self.options.blend
        if blend == 1:
            return total
        plain = output[len(self.weights) * each :]
        return plain + (total - plain) * blend


class Stylist:
    """Run style transfers with the networks of one model."""

    def __init__(
        self,
        networks: OpenNetworks,
        unet: Mapping[str, Any],
        schedule: NoiseSchedule,
        autoencoder: Autoencoder,
    ) -> None:
        self._networks, self._unet = networks, unet
        self._schedule, self._autoencoder = schedule, autoencoder

    def run(
        self,
        pixels: Floats,
        weights: Sequence[float],
        options: StyleOptions,
        words: tuple[Conditioning, Conditioning | None, Conditioning | None],
        mask: Floats | None = None,
    ) -> Iterator[tuple[int, int, float, Step]]:
        """Yield (index, total, sigma, step) on the way to noise and back.

        `pixels` [1 + S, 3, H, W] are content and styles; `words` what the network is told without
        words, for the prompt and for the negative one; `mask` [H, W] is 1 where style goes.
        """
        per_level, levels = style_layers(self._unet)
        layers = options.chosen_layers(per_level, levels)
        steps = self._schedule.steps("ddim_inversion", options.num_inversion_steps)
        array, total = self._networks.array, 2 * len(steps.timesteps)
        latents = [self._autoencoder.encode(each[None]) for each in pixels]
        start = array(np.concatenate(latents) * np.float32(steps.initial_scale))
        empty, prompt, negative = words
        told = {name: array(np.repeat(value, len(pixels), axis=0)) for name, value in empty.items()}
        prediction_type = self._schedule.config.prediction_type
        denoiser = EpsDenoiser(self._networks["unet"], steps, told, prediction_type)
        trajectory, left = [start], []
        for step in ddim_inversion(denoiser, start, steps.sigmas, refinements=_REFINEMENTS):
            trajectory.append(step.latents)
            left.append(step.denoised[:1])
            yield step.index, total, steps.sigmas[step.index + 1], _of_content(step)
        walk = Walk(steps, trajectory, left, empty, prompt, negative)
        denoise = StyledDenoiser(
            denoiser, walk, options, layers, per_level * levels, weights, array
        )
        falling = replace(steps, sigmas=steps.sigmas[::-1])
        kept = None if mask is None else array(self._small(mask))
        back = _Masked(denoise, walk, kept) if kept is not None else denoise
        no_chance = NoiseSource([0])
        undo = 1 / steps.initial_scale
        for step in ddim(back, self._start(walk, options, weights), falling.sigmas, no_chance):
            index = len(steps.timesteps) + step.index
            if index == total - 1:
                step = Step(step.index, step.latents * undo, step.denoised)
            yield index, total, falling.sigmas[step.index + 1], step

    def _small(self, mask: Floats) -> Floats:
        return at_latents(mask, self._autoencoder.downsampling)[None, None]

    def _start(self, walk: Walk, options: StyleOptions, weights: Sequence[float]) -> Array:
        last = walk.trajectories[-1]
        content = last[:1]
        styled = adain(content, last[1:2]) * weights[0]
        for style, weight in enumerate(weights[1:], 1):
            styled = styled + adain(content, last[1 + style : 2 + style]) * weight
        return content + (styled - content) * (options.adain * options.blend)


class _Masked:
    """Keep to the content's way where the mask is 0."""

    def __init__(self, denoise: StyledDenoiser, walk: Walk, mask: Array) -> None:
        self._denoise, self._mask = denoise, mask
        levels = zip(walk.steps.sigmas, walk.trajectories, strict=True)
        self._known = {sigma: latents[:1] for sigma, latents in levels}

    def __call__(self, latents: Array, sigma: float) -> Array:
        known = self._known[sigma]
        return self._denoise(known + (latents - known) * self._mask, sigma)


def _of_content(step: Step) -> Step:
    return Step(step.index, step.latents[:1], step.denoised[:1])


def normalised(weights: Sequence[float] | None, styles: int) -> tuple[float, ...]:
    """Return how much each style counts, adding up to 1; raises `BadInput` for what cannot be."""
    given = [1.0] * styles if weights is None else list(weights)
    fits = all(
        isinstance(each, int | float) and math.isfinite(each) and each >= 0 for each in given
    )
    if len(given) != styles or not fits or not sum(given):
        raise BadInput(
            f"style_weights is {given}: give {styles} numbers of 0 or more, one for each style"
        )
    return tuple(each / sum(given) for each in given)
