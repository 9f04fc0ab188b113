"""Tables and steps against diffusers, and against laws that can be written down."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from diptych.errors import BadInput
from diptych.text_to_image import schedules
from diptych.text_to_image.schedules import (
    SAMPLER_NAMES,
    SCHEDULES,
    SPACINGS,
    NoiseSchedule,
    ScheduleConfig,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
COUNTS = (*range(1, 31), 49, 50, 99, 100, 333)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"rescale_betas_zero_snr": True},
        {"trained_betas": tuple(np.linspace(0.001, 0.02, 1000).tolist())},
    ],
)
def test_alphas_are_those_of_the_reference(config: dict[str, Any]) -> None:
    ours = NoiseSchedule(ScheduleConfig(**config)).alphas_cumprod
    theirs = DDIMScheduler(**{**STABLE_DIFFUSION, **config}).alphas_cumprod.numpy()
    assert ours.dtype == np.float32
    # Equal to the bit here; torch's products and roots may differ by processor in the last digit.
    most = 6e-7 if config.get("rescale_betas_zero_snr") else 6e-8
    assert np.abs(ours - theirs).max() <= most


def test_published_sigmas() -> None:
    schedule = NoiseSchedule()
    assert schedule.sigmas[0] == pytest.approx(0.0291675, rel=1e-5)
    assert schedule.sigmas[-1] == pytest.approx(14.6146, rel=1e-5)
    steps = schedule.steps("euler", 20, spacing="leading")
    assert steps.timesteps[0] == 951 and steps.timesteps[-1] == 1
    assert steps.initial_scale == pytest.approx(11.0736, rel=1e-4)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("ddim", DDIMScheduler),
        ("euler", EulerDiscreteScheduler),
        ("dpmpp_2m", DPMSolverMultistepScheduler),
        ("unipc", UniPCMultistepScheduler),
    ],
)
def test_timesteps_and_sigmas_equal_the_reference(
    sampler: str, scheduler: Any, spacing: str
) -> None:
    theirs = scheduler(**STABLE_DIFFUSION, timestep_spacing=spacing)
    ours = NoiseSchedule(ScheduleConfig(timestep_spacing=spacing))
    for count in COUNTS:
        theirs.set_timesteps(count)
        steps = ours.steps(sampler, count)
        assert list(steps.timesteps) == theirs.timesteps.tolist()[:count]
        if sampler != "ddim":
            expected = theirs.sigmas.numpy()[: count + 1]
            assert steps.sigmas[:count] == pytest.approx(expected[:count], rel=1e-6)
            assert steps.sigmas[-1] == 0


def test_pndm_lcm_and_inversion_timesteps_equal_the_reference() -> None:
    pndm = PNDMScheduler(**STABLE_DIFFUSION, skip_prk_steps=True)
    lcm = LCMScheduler(**STABLE_DIFFUSION)
    inverse = DDIMInverseScheduler(**STABLE_DIFFUSION)
    ours = NoiseSchedule()
    for count in range(1, 51):
        pndm.set_timesteps(count)
        told = list(ours.steps("pndm", count).timesteps)
        # Theirs names the second twice, since it is asked twice.
        assert told[:2] + told[1:] == pndm.timesteps.tolist() or count == 1
        lcm.set_timesteps(count)
        assert list(ours.steps("lcm", count).timesteps) == lcm.timesteps.tolist()
        inverse.set_timesteps(count)
        steps = ours.steps("ddim_inversion", count)
        assert list(steps.timesteps) == inverse.timesteps.tolist()
        assert steps.sigmas[-1] == pytest.approx(ours.sigmas[999], rel=1e-6)


def test_turbo_steps_are_multiples_from_the_top() -> None:
    schedule = NoiseSchedule(ScheduleConfig(timestep_spacing="leading"))
    assert schedule.steps("turbo", 1).timesteps == (999,)
    assert schedule.steps("turbo", 4).timesteps == (999, 749, 499, 249)


def test_zero_terminal_snr_starts_from_pure_noise() -> None:
    config = ScheduleConfig(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    schedule = NoiseSchedule(config)
    assert schedule.alphas_cumprod[-1] == 0
    assert schedule.alphas_cumprod[0] == NoiseSchedule().alphas_cumprod[0]
    assert schedule.steps("euler", 20).sigmas[0] == pytest.approx(4096, rel=1e-6)
    assert schedule.steps("ddim", 20).sigmas[0] > 1e7


# Laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_combination_falls_within_the_table(
    sampler: str, schedule: str, spacing: str
) -> None:
    table = NoiseSchedule()
    for count in (1, 2, 7, 20, 50):
        steps = table.steps(sampler, count, schedule, spacing)
        assert len(steps.sigmas) == len(steps.timesteps) + 1 == count + 1
        rising = sampler == "ddim_inversion"
        falling = steps.sigmas[::-1] if rising else steps.sigmas
        assert all(a > b for a, b in pairwise(falling[:-1]))
        assert falling[-2] >= falling[-1] >= 0
        assert table.sigmas[0] * 0.999 < min(steps.sigmas[:-1])
        assert max(steps.sigmas) < table.sigmas[-1] * 1.001
        assert all(0 <= t <= 999 for t in steps.timesteps)


def test_karras_exponential_and_kl_optimal_follow_their_law() -> None:
    table = NoiseSchedule()
    karras = np.array(table.steps("dpmpp_2m", 11, "karras").sigmas[:-1])
    assert np.diff(karras ** (1 / 7), 2) == pytest.approx(0, abs=1e-6)
    exponential = np.array(table.steps("dpmpp_2m", 11, "exponential").sigmas[:-1])
    assert np.diff(np.log(exponential), 2) == pytest.approx(0, abs=1e-5)
    kl_optimal = np.array(table.steps("dpmpp_2m", 11, "kl_optimal").sigmas[:-1])
    assert np.diff(np.arctan(kl_optimal), 2) == pytest.approx(0, abs=1e-6)
    for sigmas in (karras, exponential, kl_optimal):
        assert sigmas[[0, -1]] == pytest.approx([14.6146, 0.0291675], rel=1e-5)


def test_beta_quantiles() -> None:
    p = np.linspace(0, 1, 41)
    # Beta(1/2, 1/2) is the arcsine law, Beta(1, 1) the uniform one, Beta(2, 2) has 3 x² - 2 x³.
    arcsine = np.sin(math.pi * p / 2) ** 2
    assert schedules._beta_quantile(p, 0.5) == pytest.approx(arcsine, abs=1e-12)
    assert schedules._beta_quantile(p, 1.0) == pytest.approx(p, abs=1e-12)
    x = schedules._beta_quantile(p, 2.0)
    assert 3 * x**2 - 2 * x**3 == pytest.approx(p, abs=1e-12)


def test_timesteps_off_the_grid_are_read_in_log_sigma() -> None:
    table = NoiseSchedule()
    steps = table.steps("heun", 5, spacing="linspace")
    assert [steps.timestep(sigma) for sigma in steps.sigmas[:-1]] == list(steps.timesteps)
    between = math.sqrt(table.sigmas[400] * table.sigmas[401])
    assert steps.timestep(between) == pytest.approx(400.5, abs=1e-3)
    assert steps.timestep(1000.0) == 999
    assert steps.timestep(1e-9) == 0


# Where strength starts ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "strength", "left"),
    [(20, 1.0, 20), (20, 0.75, 15), (50, 0.58, 28), (20, 0.01, 0), (20, 0.0, 0), (3, 0.5, 1)],
)
def test_strength_leaves_as_many_steps_as_diffusers(count: int, strength: float, left: int) -> None:
    whole = NoiseSchedule().steps("euler", count)
    steps = whole.after(strength)
    assert len(steps.timesteps) == left
    assert steps.sigmas == whole.sigmas[count - left :]
    assert steps.timesteps == whole.timesteps[count - left :]


def test_strength_cuts_targets_too() -> None:
    config = ScheduleConfig(timestep_spacing="linspace")
    steps = NoiseSchedule(config).steps("ddim", 20).after(0.5)
    assert len(steps.settings["targets"]) == 10


# What cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -1, 1000, 2.0, True, "20"])
def test_steps_that_cannot_be_laid_out_are_refused(count: Any) -> None:
    with pytest.raises(BadInput, match="num_inference_steps is"):
        NoiseSchedule().steps("euler", count)


def test_lcm_has_no_more_steps_than_its_grid() -> None:
    with pytest.raises(BadInput, match="1 to 50 for the sampler lcm"):
        NoiseSchedule().steps("lcm", 51)


def test_unknown_words_are_refused() -> None:
    table = NoiseSchedule()
    with pytest.raises(BadInput, match="sampler is 'magic'"):
        table.steps("magic", 20)
    with pytest.raises(BadInput, match="schedule is 'magic'"):
        table.steps("euler", 20, "magic")
    with pytest.raises(BadInput, match="timestep_spacing is 'magic'"):
        table.steps("euler", 20, spacing="magic")
    for name in ("prediction_type", "beta_schedule", "schedule", "final_sigmas_type"):
        with pytest.raises(BadInput, match=name):
            NoiseSchedule(ScheduleConfig(**{name: "magic"}))
    with pytest.raises(BadInput, match="trained_betas holds 2 numbers"):
        NoiseSchedule(ScheduleConfig(trained_betas=(0.1, 0.2)))
    with pytest.raises(BadInput, match=r"strength is 1\.5"):
        table.steps("euler", 20).after(1.5)
