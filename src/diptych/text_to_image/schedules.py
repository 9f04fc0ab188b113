"""Lay out noise levels: betas of a checkpoint → sigmas and timesteps of one run.

A noisy latent is written x = x0 + sigma · noise everywhere in this room; the network sees
x / sqrt(sigma² + 1). Which sigmas a run visits, and what the network is told at each, follows the
scheduler of the same name in diffusers 0.42: published pictures depend on its habits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.errors import BadInput
from diptych.text_to_image.betas import (
    PREDICTION_TYPES,
    SCHEDULES,
    SPACINGS,
    ScheduleConfig,
    alphas_cumprod_of,
    one_of,
)

__all__ = [
    "PREDICTION_TYPES",
    "SAMPLER_NAMES",
    "SCHEDULES",
    "SPACINGS",
    "NoiseSchedule",
    "ScheduleConfig",
    "Steps",
]

Floats = NDArray[np.float64]

# Samplers that lay out their steps alike. The first kind was written for x0 + sigma · noise, the
# other two for latents of variance one, which start and may end with another scale.
_FEW_STEPS = 15  # below, the last step of DPM-Solver is of first order, as in diffusers
_SIGMA_KIND = ("euler", "euler_a", "heun", "lms", "dpmpp_sde", "turbo")
_SOLVER_KIND = ("dpmpp_2m", "dpmpp_2m_sde", "unipc")
_ALPHA_KIND = ("ddim", "pndm", "lcm", "ddim_inversion")
SAMPLER_NAMES = (*_SIGMA_KIND, *_SOLVER_KIND, *_ALPHA_KIND)

# With zero terminal SNR the last sigma is infinite. diffusers sets alpha_bar to the first of these
# for most samplers, and keeps 0 for DDIM and LCM: the second is 0 to float32 rounding.
_TERMINAL_ALPHA = 2.0**-24
_TERMINAL_ALPHA_EXACT = 2.0**-48


@dataclass(frozen=True, slots=True)
class Steps:
    """Hold the noise levels of one run.

    - `sigmas`: N + 1 levels as the sampler consumes them, falling (rising for ddim_inversion).
    - `timesteps`: what the network is told at the first N.
    - Start from noise · `initial_scale` (ddim_inversion: from latents · `initial_scale`), or from
      latents + noise · `sigmas[0]`; the result is the last latents · `final_scale`.
    - `settings`: keywords for the sampler function.
    """

    sampler: str
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    initial_scale: float
    final_scale: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    log_sigmas: Floats = field(default_factory=lambda: np.zeros(1), repr=False, compare=False)
    timestep_scaling: float = 10.0
    _grid: Mapping[float, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        grid = dict(zip(self.sigmas, self.timesteps, strict=False))
        object.__setattr__(self, "_grid", grid)

    def timestep(self, sigma: float) -> float:
        """Return the timestep of `sigma`: exact on the grid, else linear in log sigma."""
        found = self._grid.get(sigma)
        return _to_timestep(sigma, self.log_sigmas) if found is None else found

    def done(self, sigma: float) -> float:
        """Return the share of the trained timesteps that lie before `sigma`: 0 at pure noise."""
        return max(0.0, 1 - (self.timestep(sigma) + 1) / len(self.log_sigmas))

    def after(self, strength: float) -> Steps:
        """Return the last int(N · `strength`) steps: image-to-image starts there, as in diffusers.

        Raises BadInput unless 0 <= `strength` <= 1.
        """
        if not 0 <= strength <= 1:
            raise BadInput(f"strength is {strength}: give a number from 0 to 1")
        count = len(self.timesteps)
        return self.skip(count - min(int(count * strength), count))

    def skip(self, count: int) -> Steps:
        """Return these steps without the first `count`."""
        if self.sampler == "pndm" and 0 < count < len(self.timesteps):
            return self._skip_calls(count)
        settings = dict(self.settings)
        if "targets" in settings:
            settings["targets"] = settings["targets"][count:]
        return replace(
            self,
            sigmas=self.sigmas[count:],
            timesteps=self.timesteps[count:],
            settings=settings,
        )

    def _skip_calls(self, count: int) -> Steps:
        """Return the steps of PNDM without its first `count` calls, as diffusers cuts them.

        Two of its calls belong to the first step, which it does not think of: it begins one step
        earlier than other samplers, and takes what its first step leaves for one step further.
        """
        before, at, beyond = count - 1, count, count + 1
        whole, settings = self.sigmas, dict(self.settings)
        targets = settings.get("targets", whole[1:])
        starts = settings.pop("starts", (whole[0], *whole))
        asked = before
        sigmas = whole[before:at] + whole[beyond:]
        timesteps = self.timesteps[before:at] + self.timesteps[beyond:]
        goals = targets[before:at] + targets[beyond:]
        if count == 1:
            asked, sigmas, timesteps, goals = at, whole[1:], self.timesteps[1:], targets[1:]
        settings["first"] = (whole[asked], targets[asked], whole[at], starts[at], whole[at])
        if "targets" in settings:
            settings["targets"] = goals
        return replace(self, sigmas=sigmas, timesteps=timesteps, settings=settings)


class NoiseSchedule:
    """Turn a `ScheduleConfig` into tables and steps.

    `alphas_cumprod` [T] is float32, computed as the reference does (float32 alphas, multiplied in
    float64): near t = 0 its rounding is visible in sigma. `sigmas` [T] rises with t.
    Raises BadInput for a config that makes no sense.
    """

    def __init__(self, config: ScheduleConfig | None = None) -> None:
        self.config = config or ScheduleConfig()
        self.alphas_cumprod = alphas_cumprod = alphas_cumprod_of(self.config)
        floored = alphas_cumprod.copy()
        if self.config.rescale_betas_zero_snr:
            floored[-1] = _TERMINAL_ALPHA
        sigmas = np.sqrt((1 - floored) / floored)
        self.sigmas = sigmas.astype(np.float64)
        # In float32, since some timesteps are rounded down from just at a whole number.
        self._log_sigmas = np.log(sigmas).astype(np.float64)

    def steps(
        self,
        sampler: str,
        num_inference_steps: int,
        schedule: str | None = None,
        spacing: str | None = None,
    ) -> Steps:
        """Return the steps of one run; None takes `schedule` and `spacing` from the config.

        Raises BadInput for an unknown word and for a number of steps that cannot be laid out.
        """
        schedule = one_of("schedule", schedule or self.config.schedule, SCHEDULES)
        spacing = spacing or self._spacing(sampler)
        one_of("sampler", sampler, SAMPLER_NAMES)
        one_of("timestep_spacing", spacing, SPACINGS)
        self._check_count(sampler, num_inference_steps)
        if sampler == "ddim_inversion":
            steps = self._inversion_steps(num_inference_steps)
        elif sampler == "lcm":
            steps = self._lcm_steps(num_inference_steps)
        elif sampler in _ALPHA_KIND and schedule == "normal":
            steps = self._alpha_steps(sampler, num_inference_steps, spacing)
        elif sampler in _SOLVER_KIND:
            steps = self._solver_steps(sampler, num_inference_steps, schedule, spacing)
        else:
            steps = self._sigma_steps(sampler, num_inference_steps, schedule, spacing)
        if sampler == "pndm" and self.config.prediction_type == "v_prediction":
            steps = replace(steps, settings={**steps.settings, "averages_velocity": True})
        if sampler in ("ddim", "heun") and self.config.clip_sample:
            steps = replace(
                steps, settings={**steps.settings, "clip": self.config.clip_sample_range}
            )
        return replace(
            steps, log_sigmas=self._log_sigmas, timestep_scaling=self.config.timestep_scaling
        )

    def _spacing(self, sampler: str) -> str:
        if sampler == "turbo":
            return "trailing"  # These networks are distilled from the last timestep down.
        habit = "leading" if sampler in _ALPHA_KIND else "linspace"
        return self.config.timestep_spacing or habit

    def _sigma_steps(self, sampler: str, count: int, schedule: str, spacing: str) -> Steps:
        timesteps = self._spaced(count, spacing).astype(np.float32).astype(np.float64)
        sigmas = self._interpolated(timesteps)
        last = self._last_sigma() if sampler == "euler" else 0.0
        is_log_linear = self.config.interpolation_type == "log_linear" and sampler == "euler"
        if schedule != "normal":
            ends = self.sigmas[[-1, 0]] if is_log_linear else sigmas[[0, -1]]
            sigmas = self._scheduled(schedule, count, float(ends[0]), float(ends[1]))
            timesteps = np.interp(np.log(sigmas), self._log_sigmas, np.arange(len(self.sigmas)))
        elif is_log_linear:
            span = self._log_sigmas[-1], self._log_sigmas[0]
            *head, last = np.exp(np.linspace(*span, count + 1)).tolist()
            sigmas = np.array(head)
        first = float(np.float32(sigmas[0]))
        # A start of standard deviation sigma would lack the picture's own variance, which diffusers
        # makes up for only where the first sigma is not the largest of all.
        is_scaled = spacing == "leading" or sampler in _ALPHA_KIND
        return Steps(
            sampler=sampler,
            sigmas=_floats([*sigmas, last]),
            timesteps=_floats(timesteps),
            initial_scale=math.hypot(first, 1) if is_scaled else first,
        )

    def _solver_steps(self, sampler: str, count: int, schedule: str, spacing: str) -> Steps:
        timesteps = self._spaced_for_solver(count, spacing)
        sigmas = self._interpolated(timesteps)
        if schedule != "normal":
            # These take the range of the whole table, whatever the spacing, most whole timesteps.
            sigmas = self._scheduled(schedule, count, self.sigmas[-1], self.sigmas[0])
            timesteps = np.interp(np.log(sigmas), self._log_sigmas, np.arange(len(self.sigmas)))
            if schedule != "karras":
                timesteps = np.floor(timesteps)
            elif sampler == "unipc" or self.config.beta_schedule != "squaredcos_cap_v2":
                timesteps = np.round(timesteps)
        last = self._last_sigma()
        return Steps(
            sampler=sampler,
            sigmas=_floats([*sigmas, last]),
            timesteps=_floats(timesteps),
            initial_scale=math.hypot(float(np.float32(sigmas[0])), 1),
            final_scale=1 / math.hypot(last, 1),
            settings=self._solver_settings(sampler, count),
        )

    def _solver_settings(self, sampler: str, count: int) -> dict[str, Any]:
        config = self.config
        is_bh = config.solver_type in ("bh1", "bh2")
        if sampler == "unipc":
            return {
                "solver_order": config.solver_order,
                "solver_type": config.solver_type if is_bh else "bh2",
                "lower_order_final": config.lower_order_final,
            }
        return {
            "solver_order": config.solver_order,
            "solver_type": "midpoint" if is_bh else config.solver_type,
            # Of all steps, also where a strength leaves out the first of them.
            "lower_order_final": config.lower_order_final and count < _FEW_STEPS,
            "euler_at_final": config.euler_at_final,
        }

    def _alpha_steps(self, sampler: str, count: int, spacing: str) -> Steps:
        timesteps = np.round(self._spaced(count, spacing)).astype(int)
        sigmas = [self._exact_sigma(t) for t in timesteps.tolist()]
        stride = self.config.num_train_timesteps // count
        targets = tuple(self._previous_sigma(t - stride) for t in timesteps.tolist())
        # The reference goes `stride` back, which need not be where the next step starts from.
        is_even = targets[:-1] == tuple(sigmas[1:])
        settings: dict[str, Any] = {}
        if not is_even and sampler in ("ddim", "pndm"):
            settings["targets"] = targets
        if settings and sampler == "pndm":
            last = self.config.num_train_timesteps - 1
            before = (min(t + stride, last) for t in timesteps.tolist())
            settings["starts"] = tuple(self._exact_sigma(t) for t in before)
        return Steps(
            sampler=sampler,
            sigmas=(*sigmas, targets[-1]),
            timesteps=_floats(timesteps),
            initial_scale=math.hypot(sigmas[0], 1),
            final_scale=1 / math.hypot(targets[-1], 1),
            settings=settings,
        )

    def _lcm_steps(self, count: int) -> Steps:
        grid_size = self.config.original_inference_steps
        stride = self.config.num_train_timesteps // grid_size
        grid = np.arange(grid_size, 0, -1) * stride - 1
        picked = np.floor(np.linspace(0, grid_size, count, endpoint=False)).astype(int)
        timesteps = grid[picked]
        sigmas = [self._exact_sigma(t) for t in timesteps.tolist()]
        return Steps(
            sampler="lcm",
            sigmas=(*sigmas, 0.0),
            timesteps=_floats(timesteps),
            initial_scale=math.hypot(sigmas[0], 1),
        )

    def _inversion_steps(self, count: int) -> Steps:
        """Return rising steps: leading spacing upside down, then the last timestep of all."""
        last = self.config.num_train_timesteps - 1
        timesteps = np.round(self._spaced(count, "leading")).astype(int)[::-1]
        sigmas = [self._exact_sigma(t) for t in (*timesteps.tolist(), last)]
        return Steps(
            sampler="ddim_inversion",
            sigmas=tuple(sigmas),
            timesteps=_floats(timesteps),
            initial_scale=math.hypot(sigmas[0], 1),
            final_scale=1 / math.hypot(sigmas[-1], 1),
        )

    def _spaced(self, count: int, spacing: str) -> Floats:
        total = self.config.num_train_timesteps
        if spacing == "linspace":
            return np.linspace(0, total - 1, count)[::-1]
        if spacing == "leading":
            return (
                np.arange(count, dtype=np.float64)[::-1] * (total // count)
                + self.config.steps_offset
            )
        falling = np.arange(total, 0, -total / count, dtype=np.float64)
        return np.asarray(np.round(falling)[:count] - 1)

    def _spaced_for_solver(self, count: int, spacing: str) -> Floats:
        """Return N timesteps of N + 1 spaced ones: these solvers leave out the last."""
        if spacing == "trailing":
            return self._spaced(count, spacing)
        return np.round(self._spaced(count + 1, spacing)[:-1])

    def _scheduled(self, schedule: str, count: int, largest: float, smallest: float) -> Floats:
        """Return `count` falling sigmas by the name of their law."""
        ramp = np.linspace(0, 1, count)
        if schedule == "karras":
            ends = largest ** (1 / 7), smallest ** (1 / 7)
            return np.asarray((ends[0] + ramp * (ends[1] - ends[0])) ** 7, np.float64)
        if schedule == "exponential":
            return np.exp(np.linspace(math.log(largest), math.log(smallest), count))
        if schedule == "beta":
            return smallest + _beta_quantile(1 - ramp) * (largest - smallest)
        if schedule == "kl_optimal":
            ends = math.atan(largest), math.atan(smallest)
            return np.tan(ends[0] + ramp * (ends[1] - ends[0]))
        total = len(self.sigmas)
        if schedule == "sgm_uniform":
            return self._interpolated(np.linspace(total - 1, 0, count + 1)[:-1])
        picked = total - 1 - (np.arange(count) * (total / count)).astype(int)
        return np.asarray(self.sigmas[picked])

    def _interpolated(self, timesteps: NDArray[Any]) -> Floats:
        return np.asarray(np.interp(timesteps, np.arange(len(self.sigmas)), self.sigmas))

    def _exact_sigma(self, timestep: int) -> float:
        alpha = float(self.alphas_cumprod[timestep])
        if self.config.rescale_betas_zero_snr and timestep == len(self.sigmas) - 1:
            # Noise cannot be told from picture there: an epsilon network needs the milder value.
            is_epsilon = self.config.prediction_type == "epsilon"
            alpha = _TERMINAL_ALPHA if is_epsilon else _TERMINAL_ALPHA_EXACT
        return math.sqrt((1 - alpha) / alpha)

    def _previous_sigma(self, timestep: int) -> float:
        if timestep >= 0:
            return self._exact_sigma(timestep)
        return 0.0 if self.config.set_alpha_to_one else self._exact_sigma(0)

    def _last_sigma(self) -> float:
        return float(self.sigmas[0]) if self.config.final_sigmas_type == "sigma_min" else 0.0

    def _check_count(self, sampler: str, count: int) -> None:
        most = self.config.num_train_timesteps - 1
        if sampler == "lcm":
            most = self.config.original_inference_steps
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
            raise BadInput(
                f"num_inference_steps is {count}: give a whole number from 1 to {most} "
                f"for the sampler {sampler}"
            )


def _beta_quantile(probabilities: Floats, shape: float = 0.6) -> Floats:
    """Return the quantiles of the Beta(`shape`, `shape`) law, by bisection."""
    # The law is symmetric, and below one half its power series converges fast.
    mirrored = probabilities > 0.5
    wanted = np.where(mirrored, 1 - probabilities, probabilities)
    whole = 2 * _beta_integral(np.array(0.5), shape)
    low, high = np.zeros_like(wanted), np.full_like(wanted, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        is_low = _beta_integral(middle, shape) / whole < wanted
        low, high = np.where(is_low, middle, low), np.where(is_low, high, middle)
    return np.where(mirrored, 1 - high, np.where(wanted > 0, high, 0.0))


def _beta_integral(x: Floats, shape: float) -> Floats:
    """Return the integral of (t (1 - t))^(`shape` - 1) from 0 to x <= 1/2."""
    total, term = np.zeros_like(x), np.ones_like(x)
    for n in range(60):
        total = total + term / (shape + n)
        term = term * x * (n + 1 - shape) / (n + 1)
    return total * x**shape


def _to_timestep(sigma: float, log_sigmas: Floats) -> float:
    return float(np.interp(math.log(max(sigma, 1e-10)), log_sigmas, np.arange(len(log_sigmas))))


def _floats(values: Any) -> tuple[float, ...]:
    """Return Python floats of float32 precision, as the reference keeps its tables."""
    return tuple(np.asarray(values, np.float64).astype(np.float32).astype(np.float64).tolist())
