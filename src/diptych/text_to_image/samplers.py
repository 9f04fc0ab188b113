"""Walk from noise to a picture: samplers as generator functions.

```
for step in sample(steps, denoise, latents, noise): …
```

A sampler takes (denoise, latents, sigmas, noise), all latents x0 + sigma · noise and float32, and
yields a `Step` for each pair of sigmas. It knows no model and no runtime: arrays are NumPy or
torch, used only in ways both share. Formulas are in terms of lambda = -ln sigma; each equals the
scheduler of the same name in diffusers 0.42.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import numpy as np

from diptych.text_to_image.denoiser import Array, Denoise
from diptych.text_to_image.noise import NoiseSource
from diptych.text_to_image.schedules import Steps

__all__ = ["SAMPLERS", "Sampler", "Step", "sample"]


@dataclass(frozen=True, slots=True)
class Step:
    """Hold one step done: `latents` after it, and the clean latent `denoised` seen during it."""

    index: int
    latents: Array
    denoised: Array


Sampler = Callable[..., Iterator[Step]]
"""(denoise, latents, sigmas, noise, **settings) → steps."""


def sample(steps: Steps, denoise: Denoise, latents: Array, noise: NoiseSource) -> Iterator[Step]:
    """Run the sampler that `steps` were laid out for.

    `latents` are noise · `steps.initial_scale`, or start at `steps.sigmas[0]`; the picture is the
    last step's latents · `steps.final_scale`.
    """
    sampler = SAMPLERS[steps.sampler]
    return sampler(denoise, latents, steps.sigmas, noise, **steps.settings)


def ddim(
    denoise: Denoise,
    latents: Array,
    sigmas: Sequence[float],
    noise: NoiseSource,
    *,
    eta: float = 0.0,
    targets: Sequence[float] | None = None,
    clip: float | None = None,
) -> Iterator[Step]:
    """Step along the predicted noise (Song et al. 2021); `eta` 1 renews it as DDPM does.

    `targets` are the sigmas each step goes to, where these are not those the next starts from.
    `clip` bounds the clean latent, and leaves the noise as it was predicted.
    """
    targets = sigmas[1:] if targets is None else targets
    for index, (sigma, target) in enumerate(zip(sigmas[:-1], targets, strict=True)):
        denoised = denoise(latents, sigma)
        down, up = _ancestral(sigma, target, eta)
        clean = _clipped(denoised, clip)
        latents = clean + (latents - denoised) * (down / sigma)
        if up:
            latents = latents + noise.like(latents) * up
        # The network will be told the next sigma: keep what it sees, as variance-one latents.
        latents = _told(latents, target, sigmas[index + 1])
        yield Step(index, latents, clean)


def ddim_inversion(
    denoise: Denoise,
    latents: Array,
    sigmas: Sequence[float],
    noise: NoiseSource | None = None,
    *,
    refinements: int = 0,
) -> Iterator[Step]:
    """Walk from a picture to its noise: DDIM over rising sigmas, predicting where it stands.

    `refinements` predict again where each step arrives, as DDIM will on its way back: one makes the
    way back much nearer, more need steps too small to be of use.
    """
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = denoise(latents, sigma)
        arrived = denoised + (latents - denoised) * (target / sigma)
        for _ in range(refinements):
            denoised = denoise(arrived, target)
            arrived = denoised + (latents - denoised) * (target / sigma)
        latents = arrived
        yield Step(index, latents, denoised)


def euler(
    denoise: Denoise, latents: Array, sigmas: Sequence[float], noise: NoiseSource
) -> Iterator[Step]:
    """Euler method (Karras et al. 2022, algorithm 2 without churn)."""
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = denoise(latents, sigma)
        latents = latents + (latents - denoised) / sigma * (target - sigma)
        yield Step(index, latents, denoised)


def euler_a(
    denoise: Denoise, latents: Array, sigmas: Sequence[float], noise: NoiseSource
) -> Iterator[Step]:
    """Euler steps that go too far and add fresh noise (k-diffusion's ancestral sampler)."""
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = denoise(latents, sigma)
        down, up = _ancestral(sigma, target)
        latents = latents + (latents - denoised) / sigma * (down - sigma)
        if up:
            latents = latents + noise.like(latents) * up
        yield Step(index, latents, denoised)


def heun(
    denoise: Denoise,
    latents: Array,
    sigmas: Sequence[float],
    noise: NoiseSource,
    *,
    clip: float | None = None,
) -> Iterator[Step]:
    """Heun's method (Karras et al. 2022, algorithm 1): two calls a step, one in a step to 0.

    `clip` bounds the clean latents.
    """
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = _clipped(denoise(latents, sigma), clip)
        slope = (latents - denoised) / sigma
        arrived = latents + slope * (target - sigma)
        if target:
            denoised = _clipped(denoise(arrived, target), clip)
            slope = (slope + (arrived - denoised) / target) / 2
            arrived = latents + slope * (target - sigma)
        latents = arrived
        yield Step(index, latents, denoised)


def lms(
    denoise: Denoise,
    latents: Array,
    sigmas: Sequence[float],
    noise: NoiseSource,
    *,
    order: int = 4,
) -> Iterator[Step]:
    """Linear multistep in sigma: integrate the polynomial through the last `order` slopes."""
    slopes: list[Array] = []  # the newest first
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = denoise(latents, sigma)
        slopes = [(latents - denoised) / sigma, *slopes[: order - 1]]
        nodes = [sigmas[index - back] for back in range(len(slopes))]
        latents = latents + _weighted(slopes, _lagrange_integrals(nodes, target))
        yield Step(index, latents, denoised)


# Adams-Bashforth: weights of the newest slope first, by how many there are.
_ADAMS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def pndm(
    denoise: Denoise,
    latents: Array,
    sigmas: Sequence[float],
    noise: NoiseSource,
    *,
    averages_velocity: bool = False,
    first: Sequence[float] | None = None,
    targets: Sequence[float] | None = None,
    starts: Sequence[float] | None = None,
) -> Iterator[Step]:
    """PLMS (Liu et al. 2022): Adams-Bashforth on the noise, N + 1 calls.

    The first step is Heun's; the slope at its end is not kept, the network is asked there again.
    `averages_velocity` averages what a v-predicting network says, as the reference does. `first`
    is for a run that diffusers cuts short: the sigmas its first step asks at, goes to and asks at
    again, then those it is taken from and to. `targets` are as for `ddim`, and `starts` the sigmas
    from which a step would come to where each call is asked: the first step's is the second of
    them.
    """
    said: list[Array] = []
    goals = sigmas[1:] if targets is None else targets
    if first is None and len(sigmas) > 2:
        start = sigmas[0] if starts is None else starts[1]
        first = (sigmas[0], goals[0], sigmas[1], start, sigmas[1])
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = denoise(latents, sigma)
        said = [_said(latents, denoised, sigma, averages_velocity), *said[:3]]
        mean = _weighted(said, _ADAMS[len(said) - 1])
        slope = _slope(mean, latents, sigma, averages_velocity)
        if index == 0 and first is not None:
            _, there, asked, start, end = first
            arrived = _told(latents + slope * (there - sigma), there, asked)
            denoised = denoise(arrived, asked)
            mean = (mean + _said(arrived, denoised, asked, averages_velocity)) / 2
            latents = _told(latents, sigma, start)
            slope = _slope(mean, latents, start, averages_velocity)
            latents = _told(latents + slope * (end - start), end, target)
        else:
            goal = goals[index]
            latents = _told(latents + slope * (goal - sigma), goal, target)
        yield Step(index, latents, denoised)


def _told(latents: Array, sigma: float, other: float) -> Array:
    """Return latents that the network sees alike when it is told another sigma."""
    if sigma == other:
        return latents
    return latents * (math.hypot(other, 1) / math.hypot(sigma, 1))


def _said(latents: Array, denoised: Array, sigma: float, is_velocity: bool) -> Array:
    """Return the noise or the velocity behind a prediction."""
    if not is_velocity:
        return (latents - denoised) / sigma
    return (latents - denoised * (sigma**2 + 1)) / (sigma * math.hypot(sigma, 1))


def _slope(said: Array, latents: Array, sigma: float, is_velocity: bool) -> Array:
    if not is_velocity:
        return said
    return said / math.hypot(sigma, 1) + latents * (sigma / (sigma**2 + 1))


def dpmpp_2m(
    denoise: Denoise,
    latents: Array,
    sigmas: Sequence[float],
    noise: NoiseSource,
    *,
    eta: float = 0.0,
    solver_order: int = 2,
    solver_type: str = "midpoint",
    lower_order_final: bool | None = None,
    euler_at_final: bool = False,
) -> Iterator[Step]:
    """DPM-Solver++ (2M): second order from the step before (Lu et al. 2022).

    `eta` 1 solves the reverse SDE instead of the ODE. `solver_order` is 1 to 3, with `eta` 1 or 2.
    With `lower_order_final` the last step is of first order, the one before of second; None says so
    for fewer than 15 steps.
    """
    is_few = len(sigmas) <= 15 if lower_order_final is None else lower_order_final
    most = min(solver_order, 2) if eta else solver_order
    seen: list[Array] = []  # what was denoised before, the newest first
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = denoise(latents, sigma)
        left = len(sigmas) - 1 - index
        order = min(most, len(seen) + 1, left if is_few else most)
        if left == 1 and euler_at_final:
            order = 1
        if target == 0:
            latents = denoised
        else:
            h = math.log(sigma / target)
            rate = (1 + eta) * h
            shrink = -math.expm1(-rate)
            latents = latents * math.exp(-rate) + denoised * shrink
            if order > 1:
                ratio = math.log(sigmas[index - 1] / sigma) / h
                slope = (denoised - seen[0]) / ratio
                is_exact = solver_type == "heun" or order == 3
                if order == 3:
                    older = math.log(sigmas[index - 2] / sigmas[index - 1]) / h
                    bend = (slope - (seen[0] - seen[1]) / older) / (ratio + older)
                    slope = slope + bend * ratio
                    latents = latents + bend * (0.5 - (rate - shrink) / rate**2)
                latents = latents + slope * (1 - shrink / rate if is_exact else shrink / 2)
            if eta:
                up = target * math.sqrt(-math.expm1(-2 * eta * h))
                latents = latents + noise.like(latents) * up
        seen = [denoised, *seen[:1]]
        yield Step(index, latents, denoised)


def dpmpp_2m_sde(
    denoise: Denoise,
    latents: Array,
    sigmas: Sequence[float],
    noise: NoiseSource,
    *,
    eta: float = 1.0,
    **settings: Any,
) -> Iterator[Step]:
    """SDE-DPM-Solver++ (2M): the same for the reverse SDE (Lu et al. 2022, appendix)."""
    yield from dpmpp_2m(denoise, latents, sigmas, noise, eta=eta, **settings)


def dpmpp_sde(
    denoise: Denoise, latents: Array, sigmas: Sequence[float], noise: NoiseSource
) -> Iterator[Step]:
    """DPM-Solver++ for the SDE by a half step: two calls and two draws a step."""
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = denoise(latents, sigma)
        if target == 0:
            latents = denoised
        else:
            middle = math.sqrt(sigma * target)
            first = noise.like(latents)
            halfway = _ancestral_step(latents, denoised, first, sigma, middle)
            denoised = denoise(halfway, middle)
            # One Brownian path: the whole step's noise is that of the half step, walked on.
            whole = first * math.sqrt((sigma - middle) / (sigma - target))
            rest = math.sqrt((middle - target) / (sigma - target))
            whole = whole + noise.like(latents) * rest
            latents = _ancestral_step(latents, denoised, whole, sigma, target)
        yield Step(index, latents, denoised)


def unipc(
    denoise: Denoise,
    latents: Array,
    sigmas: Sequence[float],
    noise: NoiseSource,
    *,
    solver_order: int = 2,
    solver_type: str = "bh2",
    lower_order_final: bool = True,
) -> Iterator[Step]:
    """UniPC (Zhao et al. 2023): each call corrects the step before, then predicts the next."""
    seen: list[tuple[float, Array]] = []  # (sigma, denoised), the newest first
    corrected, order = latents, 0
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = denoise(latents, sigma)
        if order:
            latents = _unipc_move(corrected, seen[:order], sigma, solver_type, denoised)
        seen = [(sigma, denoised), *seen[: solver_order - 1]]
        left = len(sigmas) - 1 - index
        order = min(len(seen), left) if lower_order_final else len(seen)
        corrected = latents
        if target == 0:
            latents = denoised
        else:
            latents = _unipc_move(latents, seen[:order], target, solver_type)
        yield Step(index, latents, denoised)


def lcm(
    denoise: Denoise, latents: Array, sigmas: Sequence[float], noise: NoiseSource
) -> Iterator[Step]:
    """Latent consistency (Luo et al. 2023): jump to the picture, add noise again, less each time.

    `denoise` has to keep LCM's boundary condition: `denoiser.Consistency`.
    """
    for index, (sigma, target) in enumerate(pairwise(sigmas)):
        denoised = denoise(latents, sigma)
        latents = denoised + noise.like(denoised) * target if target else denoised
        yield Step(index, latents, denoised)


def _clipped(denoised: Array, clip: float | None) -> Array:
    return denoised if clip is None else denoised.clip(-clip, clip)


def _ancestral(sigma: float, target: float, eta: float = 1.0) -> tuple[float, float]:
    """Return (down, up): step to `down`, then add noise of `up`, to arrive at `target`."""
    if not eta or not target:
        return target, 0.0
    up = min(target, eta * math.sqrt(max(target**2 * (sigma**2 - target**2), 0)) / sigma)
    return math.sqrt(target**2 - up**2), up


def _ancestral_step(
    latents: Array, denoised: Array, drawn: Array, sigma: float, target: float
) -> Array:
    down, up = _ancestral(sigma, target)
    return denoised + (latents - denoised) * (down / sigma) + drawn * up


def _weighted(arrays: Sequence[Array], weights: Sequence[float]) -> Array:
    total = arrays[0] * weights[0]
    for array, weight in zip(arrays[1:], weights[1:], strict=True):
        total = total + array * weight
    return total


def _lagrange_integrals(nodes: Sequence[float], target: float) -> list[float]:
    """Return the integral, from nodes[0] to `target`, of each node's Lagrange polynomial."""
    places = [node - nodes[0] for node in nodes]
    integrals = []
    for place in places:
        others = [other for other in places if other != place]
        polynomial = np.polynomial.Polynomial.fromroots(others) if others else _ONE
        whole = polynomial.integ()(target - nodes[0])
        integrals.append(float(whole / polynomial(place)))
    return integrals


_ONE = np.polynomial.Polynomial([1.0])


def _unipc_move(
    latents: Array,
    seen: Sequence[tuple[float, Array]],
    target: float,
    solver_type: str,
    arrived: Array = None,
) -> Array:
    """Return the latents at `target` from those at the newest sigma of `seen`, its order's number.

    With `arrived`, the denoised latents at `target`, this is the corrector, else the predictor.
    """
    (sigma, newest), *older = seen
    order = len(seen)
    h = math.log(sigma / target)
    shrink = math.expm1(-h)
    scale = -h if solver_type == "bh1" else shrink
    ratios = [math.log(sigma / other) / h for other, _ in older]
    differences = [
        (denoised - newest) / ratio for (_, denoised), ratio in zip(older, ratios, strict=True)
    ]
    if arrived is not None:
        ratios, differences = [*ratios, 1.0], [*differences, arrived - newest]
    latents = latents * (target / sigma) - newest * shrink
    if not differences:
        return latents
    # The published coefficients: those of the smallest systems are fixed at one half.
    if order == 1 or (order == 2 and arrived is None):
        weights = [0.5]
    else:
        weights = _unipc_weights(ratios, h, scale)
    return latents - _weighted(differences, weights) * scale


def _unipc_weights(ratios: Sequence[float], h: float, scale: float) -> list[float]:
    """Solve sum_k weight_k ratio_k^(i-1) = i! phi_(i+1)(-h) (-h) / scale for i = 1, 2, …"""  # noqa: D400
    wanted, phi, factorial = [], math.expm1(-h) / -h - 1, 1
    for i in range(1, len(ratios) + 1):
        wanted.append(phi * factorial / scale)
        factorial *= i + 1
        phi = phi / -h - 1 / factorial
    powers = np.vander(ratios, increasing=True).T
    return [float(weight) for weight in np.linalg.solve(powers, wanted)]


SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "ddim": ddim,
        "euler": euler,
        "euler_a": euler_a,
        "heun": heun,
        "dpmpp_2m": dpmpp_2m,
        "dpmpp_2m_sde": dpmpp_2m_sde,
        "dpmpp_sde": dpmpp_sde,
        "unipc": unipc,
        "lms": lms,
        "lcm": lcm,
        "pndm": pndm,
        # Distilled for one to four ancestral steps from the last timestep; `Steps` see to that.
        "turbo": euler_a,
        "ddim_inversion": ddim_inversion,
    }
)
