"""Read what a checkpoint says about its noise: a config → betas → alphas."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diptych.errors import BadInput

__all__ = [
    "PREDICTION_TYPES",
    "SCHEDULES",
    "SPACINGS",
    "ScheduleConfig",
    "alphas_cumprod_of",
    "one_of",
]

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
SCHEDULES = ("normal", "karras", "exponential", "beta", "sgm_uniform", "simple", "kl_optimal")


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """Hold what a checkpoint says about its noise, in our words.

    `timestep_spacing` None is each sampler's own habit: leading for ddim and pndm, trailing for
    turbo, linspace for the others. `sampler` is the one the checkpoint names.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # linear, scaled_linear, squaredcos_cap_v2
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    rescale_betas_zero_snr: bool = False
    schedule: str = "normal"
    sampler: str = "ddim"
    interpolation_type: str = "linear"  # linear, log_linear (Euler only)
    final_sigmas_type: str = "zero"  # zero, sigma_min
    solver_order: int = 2
    solver_type: str = "midpoint"  # midpoint, heun; bh1, bh2 for UniPC
    lower_order_final: bool = True
    euler_at_final: bool = False
    original_inference_steps: int = 50  # LCM: the grid it was distilled on
    timestep_scaling: float = 10.0  # LCM: of its boundary condition
    clip_sample: bool = False  # of ddim and heun: the clean latent to ± clip_sample_range
    clip_sample_range: float = 1.0


def alphas_cumprod_of(config: ScheduleConfig) -> NDArray[np.float32]:
    """Return alpha_bar [T] of a config, in float32; raise BadInput for one that makes no sense.

    As the reference does: float32 alphas, multiplied in float64.
    """
    _check(config)
    betas = _betas(config)
    if config.rescale_betas_zero_snr:
        betas = _without_terminal_signal(betas)
    alphas = np.float32(1) - betas
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _betas(config: ScheduleConfig) -> NDArray[np.float32]:
    total = config.num_train_timesteps
    if config.trained_betas is not None:
        return np.array(config.trained_betas, np.float32)
    start, end = config.beta_start, config.beta_end
    if config.beta_schedule == "linear":
        return _linspace(start, end, total)
    if config.beta_schedule == "scaled_linear":
        return _linspace(math.sqrt(start), math.sqrt(end), total) ** 2
    if config.beta_schedule == "squaredcos_cap_v2":
        # Nichol & Dhariwal 2021, equation 17.
        bars = [math.cos((i / total + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(total + 1)]
        falls = [min(1 - bars[i + 1] / bars[i], 0.999) for i in range(total)]
        return np.array(falls, np.float32)
    choices = ("linear", "scaled_linear", "squaredcos_cap_v2")
    one_of("beta_schedule", config.beta_schedule, choices)
    raise AssertionError(config.beta_schedule)


def _linspace(start: float, end: float, count: int) -> NDArray[np.float32]:
    """Return evenly spaced float32 numbers, rounded as torch.linspace does: from both ends."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(count - 1))
    ramp = np.arange(count)
    line = np.where(ramp < count // 2, first + step * ramp, last - step * ramp[::-1])
    return line.astype(np.float32)


def _without_terminal_signal(betas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Shift and scale sqrt(alpha_bar) so that it ends at 0 (Lin et al. 2023, algorithm 1)."""
    alphas = np.float32(1) - betas
    roots = np.sqrt(np.cumprod(alphas, dtype=np.float64).astype(np.float32))
    first, last = roots[0], roots[-1]
    roots = (roots - last) * (first / (first - last))
    bars = roots**2
    return np.float32(1) - np.concatenate([bars[:1], bars[1:] / bars[:-1]])


def _check(config: ScheduleConfig) -> None:
    one_of("prediction_type", config.prediction_type, PREDICTION_TYPES)
    one_of("schedule", config.schedule, SCHEDULES)
    one_of("final_sigmas_type", config.final_sigmas_type, ("zero", "sigma_min"))
    if config.timestep_spacing is not None:
        one_of("timestep_spacing", config.timestep_spacing, SPACINGS)
    betas = config.trained_betas
    if betas is not None and len(betas) != config.num_train_timesteps:
        raise BadInput(
            f"trained_betas holds {len(betas)} numbers for {config.num_train_timesteps} timesteps: "
            "give one for each"
        )


def one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    """Return `value` if it is one of the `choices`, else raise BadInput."""
    if value not in choices:
        raise BadInput(f"{name} is {value!r}: give {', '.join(choices[:-1])} or {choices[-1]}")
    return value
