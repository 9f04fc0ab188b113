"""Turn a network that predicts noise into one that predicts the clean latent, and guide it.

```
Guided(EpsDenoiser(unet, …), …)(latents, sigma) → denoised
```

Latents are x0 + sigma · noise. Arrays are NumPy or torch and stay what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.errors import BadInput
from diptych.runtimes.network import Network
from diptych.text_to_image.reuse import FeatureReuse
from diptych.text_to_image.schedules import PREDICTION_TYPES, Steps

__all__ = [
    "Consistency",
    "Denoise",
    "EpsDenoiser",
    "Guided",
    "KeepOutside",
    "build_denoiser",
    "concatenate",
    "guidance_embedding",
    "training_target",
    "training_weight",
]

Array = Any
"""A NumPy array or a torch tensor."""

Denoise = Callable[[Array, float], Array]
"""(latents `B C h w`, sigma) → denoised `B C h w`, float32."""


def build_denoiser(
    unet: Network,
    steps: Steps,
    conditioning: Mapping[str, Array],
    negative: Mapping[str, Array] | None = None,
    *,
    prediction_type: str = "epsilon",
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    one_by_one: bool = False,
    extra: Sequence[Array] = (),
    reuse: FeatureReuse | None = None,
    token_merging_ratio: float = 0.0,
) -> Denoise:
    """Compose the denoiser of an ordinary run: prediction, guidance, and LCM's boundary.

    A network that takes `timestep_cond` in `conditioning` is guided by it already: give no
    `negative`.
    """
    settings = {"token_merging_ratio": token_merging_ratio} if token_merging_ratio else {}
    eps = EpsDenoiser(unet, steps, conditioning, prediction_type, extra, reuse, settings)
    denoise: Denoise = eps
    if negative is not None and guidance_scale > 1:
        denoise = Guided(
            *(eps, negative, guidance_scale, guidance_rescale, guidance_interval),
            one_by_one=one_by_one,
        )
    return Consistency(denoise, steps) if steps.sampler == "lcm" else denoise


class EpsDenoiser:
    """Predict the clean latent by a network that predicts noise, velocity or the latent itself.

    `conditioning` holds the network's other inputs, `B …` each; `extra` are further channels
    `B c h w` of a 9-channel network, in order; `reuse` runs the network instead, where it is given;
    `settings` are numbers that it takes besides. Answers are float32 whatever the network runs in.
    """

    def __init__(
        self,
        unet: Network,
        steps: Steps,
        conditioning: Mapping[str, Array],
        prediction_type: str = "epsilon",
        extra: Sequence[Array] = (),
        reuse: FeatureReuse | None = None,
        settings: Mapping[str, float] | None = None,
    ) -> None:
        if prediction_type not in PREDICTION_TYPES:
            choices = ", ".join(PREDICTION_TYPES)
            raise BadInput(f"prediction_type is {prediction_type!r}: give one of {choices}")
        self.unet = unet
        self.steps = steps
        self.conditioning = dict(conditioning)
        self.prediction_type = prediction_type
        self.extra = tuple(extra)
        self.reuse = reuse
        self.settings = dict(settings or {})

    def __call__(self, latents: Array, sigma: float) -> Array:
        return self.to_denoised(latents, sigma, self.predict(latents, sigma))

    def predict(
        self, latents: Array, sigma: float, conditioning: Mapping[str, Array] | None = None
    ) -> Array:
        """Return what the network says, float32; `conditioning` may stand for more rows.

        With k times as many rows as `latents`, every latent is fed k times, and the answer has
        that many rows.
        """
        conditioning = self.conditioning if conditioning is None else conditioning
        context = conditioning["encoder_hidden_states"]
        fed = latents / math.hypot(sigma, 1)
        if self.extra:
            fed = concatenate([fed, *self.extra], 1)
        if len(context) > len(fed):
            fed = concatenate([fed] * (len(context) // len(fed)), 0)
        timestep = _filled(len(fed), self.steps.timestep(sigma), like=fed)
        inputs = {"latents": fed, "timestep": timestep, **conditioning, **self.settings}
        if self.reuse is not None:
            return _float32(self.reuse.predict(sigma, inputs))
        (output,) = self.unet(**inputs)
        return _float32(output)

    def to_denoised(self, latents: Array, sigma: float, output: Array) -> Array:
        """Return the clean latent that `output` stands for."""
        if self.prediction_type == "epsilon":
            return latents - output * sigma
        if self.prediction_type == "sample":
            return output
        # v = sqrt(abar) eps - sqrt(1 - abar) x0 (Salimans & Ho 2022)
        return latents / (sigma**2 + 1) - output * (sigma / math.hypot(sigma, 1))


def training_target(
    prediction_type: str, latents: Array, noise: Array, sigma: Array | float
) -> Array:
    """Return what a network should have said of `latents` + `sigma` · `noise`.

    It is what `EpsDenoiser.to_denoised` turns back into `latents`. `sigma` `B 1 1 1` or a number.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return latents
    return (noise - latents * sigma) / (sigma**2 + 1) ** 0.5


def training_weight(prediction_type: str, sigma: float, snr_gamma: float | None) -> float:
    """Return how much the squared error at `sigma` counts by min-SNR (Hang et al. 2023).

    As diffusers weighs it: min(snr, gamma) over snr for noise, over snr + 1 for v; for the sample
    itself min(snr, gamma).
    """
    if snr_gamma is None:
        return 1.0
    snr = min(1 / max(sigma, 1e-8) ** 2, 1e8)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}[prediction_type]
    return min(snr, snr_gamma) / divisor


class Guided:
    """Push the prediction away from `negative` (Ho & Salimans 2022).

    `negative` holds the same inputs as the denoiser's conditioning, for the negative prompt. Both
    run in one call of 2B rows; `one_by_one` needs half the memory, and rows of different lengths
    run that way too. `guidance_scale` <= 1 makes no call for the negative prompt.
    `guidance_rescale` > 0 takes the standard deviation back to that without guidance, by that
    part (Lin et al. 2023, section 3.4). Outside of `guidance_interval`, shares of the way from
    noise to picture with both ends included, there is no guidance and no call for it
    (Kynkäänniemi et al. 2024).
    """

    def __init__(
        self,
        denoiser: EpsDenoiser,
        negative: Mapping[str, Array],
        guidance_scale: float,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        *,
        one_by_one: bool = False,
    ) -> None:
        self.denoiser = denoiser
        self.guidance_interval = guidance_interval
        self.guidance_scale = guidance_scale
        self.guidance_rescale = guidance_rescale
        self._negative = dict(negative)
        self._both: dict[str, Array] | None = None
        positive = denoiser.conditioning
        alike = all(self._negative[name].shape == positive[name].shape for name in positive)
        if alike and not one_by_one and guidance_scale > 1:
            self._both = {
                name: concatenate([self._negative[name], positive[name]], 0) for name in positive
            }

    def __call__(self, latents: Array, sigma: float) -> Array:
        low, high = self.guidance_interval
        if self.guidance_scale <= 1 or not low <= self.denoiser.steps.done(sigma) <= high:
            return self.denoiser(latents, sigma)
        negative, positive = self._predict_both(latents, sigma)
        output = negative + (positive - negative) * self.guidance_scale
        if self.guidance_rescale:
            ratio = _spread(positive) / _spread(output)
            output = output * (ratio * self.guidance_rescale + (1 - self.guidance_rescale))
        return self.denoiser.to_denoised(latents, sigma, output)

    def _predict_both(self, latents: Array, sigma: float) -> tuple[Array, Array]:
        predict = self.denoiser.predict
        if self._both is None:
            return predict(latents, sigma, self._negative), predict(latents, sigma)
        output = predict(latents, sigma, self._both)
        return output[: len(latents)], output[len(latents) :]


class Consistency:
    """Blend the prediction with its input, as latent consistency models are trained to
    (Luo et al. 2023): all of the input at t = 0, nearly none of it later.
    """  # noqa: D205

    def __init__(self, denoise: Denoise, steps: Steps) -> None:
        self.denoise = denoise
        self.steps = steps

    def __call__(self, latents: Array, sigma: float) -> Array:
        scaled = self.steps.timestep(sigma) * self.steps.timestep_scaling
        of_input = 0.25 / (scaled**2 + 0.25)
        of_output = scaled / math.sqrt(scaled**2 + 0.25)
        kept = latents * (of_input / math.hypot(sigma, 1))
        return self.denoise(latents, sigma) * of_output + kept


class KeepOutside:
    """Keep a picture where the mask is 0: in front of the network and behind it.

    `mask` `B 1 h w` is 1 where to repaint; `image_latents` and `noise` `B C h w` are the picture
    and the noise it started with, the same at every step. The first call takes its latents as they
    are: they start from that noise, or from noise alone. With `is_soft` a mask of 0.3 frees its
    pixel for the last 0.3 of the steps (differential diffusion: Levin and Fried 2023).
    """

    def __init__(
        self,
        denoise: Denoise,
        steps: Steps,
        mask: Array,
        image_latents: Array,
        noise: Array,
        *,
        is_soft: bool = False,
    ) -> None:
        self.denoise = denoise
        self.steps = steps
        self.mask = mask
        self.image_latents = image_latents
        self.noise = noise
        self.is_soft = is_soft

    def __call__(self, latents: Array, sigma: float) -> Array:
        mask = self._mask_at(sigma)
        if sigma != self.steps.sigmas[0]:
            known = self.image_latents + self.noise * sigma
            latents = known + (latents - known) * mask
        denoised = self.denoise(latents, sigma)
        return self.image_latents + (denoised - self.image_latents) * mask

    def finish(self, latents: Array) -> Array:
        """Put the picture back into the latents [B, C, h, w] of the end: some samplers leave noise.

        As diffusers does after its last step.
        """
        mask = (self.mask > 0) * (self.mask * 0 + 1) if self.is_soft else self.mask
        return self.image_latents + (latents - self.image_latents) * mask

    def _mask_at(self, sigma: float) -> Array:
        if not self.is_soft:
            return self.mask
        levels = self.steps.sigmas[:-1]
        done = sum(level > sigma for level in levels) / len(levels)
        # By comparison, which NumPy and torch write alike; the rest is for rounding.
        return (self.mask + done > 1 - 1e-6) * (self.mask * 0 + 1)


def guidance_embedding(guidance_scale: float, rows: int, size: int = 256) -> NDArray[np.float32]:
    """Return `timestep_cond` [rows, size] of a fully distilled LCM, which has guidance built in."""
    half = size // 2
    frequencies = np.exp(np.arange(half, dtype=np.float32) * -(math.log(10000) / (half - 1)))
    angles = ((guidance_scale - 1) * 1000 * frequencies).astype(np.float32)
    row = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(size % 2)]).astype(np.float32)
    return np.tile(row, (rows, 1))


def _spread(output: Array) -> Array:
    """Return the standard deviation of each image, `B 1 1 1`."""
    axes = (1, 2, 3)
    centred = output - output.mean(axis=axes, keepdims=True)
    return (centred * centred).mean(axis=axes, keepdims=True) ** 0.5


def concatenate(arrays: Sequence[Array], axis: int = 0) -> Array:
    """Join arrays of one kind along `axis`."""
    if isinstance(arrays[0], np.ndarray):
        return np.concatenate(arrays, axis)
    import torch

    return torch.cat([array.to(arrays[0].dtype) for array in arrays], axis)


def _filled(rows: int, value: float, like: Array) -> Array:
    """Return float32 [rows] of `value`, where `like` is."""
    if isinstance(like, np.ndarray):
        return np.full(rows, value, np.float32)
    import torch

    return torch.full((rows,), value, dtype=torch.float32, device=like.device)


def _float32(array: Array) -> Array:
    if isinstance(array, np.ndarray):
        return array.astype(np.float32, copy=False)
    return array.float()
