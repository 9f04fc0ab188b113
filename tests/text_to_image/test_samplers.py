"""Samplers against diffusers' schedulers of the same name, and against closed forms.

The reference loop is that of diffusers' pipelines, with a smooth stand-in for the network; both
sides get the same start and the same noise at each step.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler  # noqa: F401

from diptych.errors import BadInput
from diptych.text_to_image.denoiser import build_denoiser
from diptych.text_to_image.noise import NoiseSource
from diptych.text_to_image.samplers import SAMPLERS, sample
from diptych.text_to_image.schedules import (
    PREDICTION_TYPES,
    SAMPLER_NAMES,
    SCHEDULES,
    SPACINGS,
    NoiseSchedule,
    ScheduleConfig,
)

# What diffusers 0.42 makes NumPy say.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (2, 4, 8, 8)


@pytest.fixture(autouse=True)
def _one_thread(_seeds: None) -> None:
    torch.set_num_threads(1)


STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
# Ours: the module and class in diffusers, and what has to be said to it.
REFERENCES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ddim": ("ddim", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "euler": ("euler_discrete", "EulerDiscreteScheduler", {}),
    "euler_a": ("euler_ancestral_discrete", "EulerAncestralDiscreteScheduler", {}),
    "heun": ("heun_discrete", "HeunDiscreteScheduler", {}),
    "lms": ("lms_discrete", "LMSDiscreteScheduler", {}),
    "dpmpp_2m": ("dpmsolver_multistep", "DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": (
        "dpmsolver_multistep",
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++"},
    ),
    "dpmpp_sde": ("dpmsolver_sde", "DPMSolverSDEScheduler", {}),
    "unipc": ("unipc_multistep", "UniPCMultistepScheduler", {}),
    "lcm": ("lcm", "LCMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "pndm": ("pndm", "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
}
HAVE_SCHEDULES = {"euler", "heun", "lms", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "unipc"}
HAVE_ZERO_SNR = {"ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm"}
# diffusers has no such branch.
LACKING = {("euler_a", "sample"), ("dpmpp_sde", "sample"), ("pndm", "sample")}


# The reference --------------------------------------------------------------------------------


def reference(sampler: str, monkeypatch: pytest.MonkeyPatch, **config: Any) -> Any:
    """Build diffusers' scheduler, without the two packages it uses for one function each."""
    module_name, class_name, needed = REFERENCES[sampler]
    with monkeypatch.context() as patch:
        if sampler == "dpmpp_sde" and importlib.util.find_spec("torchsde") is None:
            patch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{module_name}")
    if sampler == "lms":
        monkeypatch.setattr(module, "integrate", SimpleNamespace(quad=_quad), raising=False)
    # Building one can take longer than running it; `set_timesteps` starts it afresh.
    key = (sampler, *sorted(config.items()))
    if key not in _BUILT:
        _BUILT[key] = getattr(module, class_name)(**{**STABLE_DIFFUSION, **needed, **config})
    return _BUILT[key]


_BUILT: dict[Any, Any] = {}


def _quad(function: Callable[[float], float], a: Any, b: Any, **_: Any) -> tuple[float]:
    """Integrate by Gauss and Legendre: exact for the cubic polynomials of LMS."""
    nodes, weights = np.polynomial.legendre.leggauss(3)
    middle, half = (float(a) + float(b)) / 2, (float(b) - float(a)) / 2
    values = [float(function(middle + half * node)) for node in nodes]
    return (half * float(np.dot(weights, values)),)


class Noises:
    """Hand out the same noise, draw by draw, to either side."""

    def __init__(self) -> None:
        self.count = 0

    def like(self, latents: Any) -> Any:
        self.count += 1
        drawn = NoiseSource([900 + self.count, 901 + self.count]).draw(SHAPE[1:])
        return drawn if isinstance(latents, np.ndarray) else torch.from_numpy(drawn)

    def as_randn_tensor(self, shape: Any, **_: Any) -> torch.Tensor:
        return self.like(torch.zeros(tuple(shape)))


class Brownian:
    """Stand for diffusers' Brownian tree: half steps and whole steps share a path."""

    def __init__(self, noises: Noises) -> None:
        self.noises = noises
        self.start: float | None = None

    def __call__(self, sigma: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        sigma, target = float(sigma), float(target)
        drawn = self.noises.like(torch.zeros(SHAPE))
        if self.start is None or abs(sigma - self.start) > 1e-4 * sigma:
            self.start, self.middle, self.first = sigma, target, drawn
            return drawn
        walked = self.first * math.sqrt(sigma - self.middle) + drawn * math.sqrt(
            self.middle - target
        )
        self.start = None
        return walked / math.sqrt(sigma - target)


def network(latents: Any, timestep: Any) -> Any:
    """Stand for a UNet: smooth, not linear, mixes channels and pixels, depends on the time."""
    library = np if isinstance(latents, np.ndarray) else torch
    mixed = library.roll(latents, 1, 1) * 0.3 + library.roll(latents, 3, 3) * 0.2 + latents * 0.6
    return library.tanh(mixed) * 0.9 + library.sin(timestep / 300) * 0.1


def unet(latents: Any, timestep: Any, **_: Any) -> tuple[Any]:
    return (network(latents, timestep.reshape(-1, 1, 1, 1)),)


def their_latents(
    scheduler: Any, start: torch.Tensor, count: int, noises: Noises, monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    module = sys.modules[type(scheduler).__module__]
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", noises.as_randn_tensor)
    scheduler.set_timesteps(count)
    latents = start * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        fed = scheduler.scale_model_input(latents, timestep).float()
        if "SDE" in type(scheduler).__name__:
            scheduler.noise_sampler = scheduler.noise_sampler or Brownian(noises)
        latents = scheduler.step(network(fed, timestep.float()), timestep, latents).prev_sample
    return latents


def our_latents(
    config: ScheduleConfig, sampler: str, start: Any, count: int, noises: Any, **words: Any
) -> Any:
    steps = NoiseSchedule(config).steps(sampler, count, **words)
    context = start[:, :1, 0]
    conditioning = {"encoder_hidden_states": context}
    denoise = build_denoiser(unet, steps, conditioning, prediction_type=config.prediction_type)
    for step in sample(steps, denoise, start * steps.initial_scale, noises):
        latents = step.latents
    return latents * steps.final_scale


def start_noise() -> torch.Tensor:
    return torch.from_numpy(NoiseSource([7, 8]).draw(SHAPE[1:]))


def deviation(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference by the largest value; both have to be numbers."""
    assert torch.isfinite(theirs).all()
    return float((ours - theirs).abs().max() / theirs.abs().max())


def check(
    sampler: str, count: int, monkeypatch: pytest.MonkeyPatch, *, most: float = 1e-5, **config: Any
) -> float:
    theirs = their_latents(
        reference(sampler, monkeypatch, **config), start_noise(), count, Noises(), monkeypatch
    )
    switches = [name for name in SCHEDULES if config.pop(f"use_{name}_sigmas", False)]
    ours = our_latents(
        ScheduleConfig(schedule=(*switches, "normal")[0], **config),
        sampler,
        start_noise(),
        count,
        Noises(),
    )
    found = deviation(ours, theirs)
    assert found < most, f"{sampler}: {found:.1e}"
    return found


# Equality with diffusers ----------------------------------------------------------------------


@pytest.mark.parametrize("sampler", REFERENCES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_latents_equal_the_reference_for_every_spacing_prediction_and_count(
    sampler: str, spacing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for prediction_type in PREDICTION_TYPES:
        for count in (1, 4, 20, 30) if prediction_type == "epsilon" else (20,):
            if (sampler, prediction_type) in LACKING:
                continue
            check(
                sampler,
                count,
                monkeypatch,
                timestep_spacing=spacing,
                prediction_type=prediction_type,
            )


@pytest.mark.parametrize("sampler", sorted(HAVE_SCHEDULES))
@pytest.mark.parametrize("schedule", ["karras", "exponential"])
def test_latents_equal_the_reference_for_other_schedules(
    sampler: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for spacing in SPACINGS:
        for count in (4, 20):
            words = {f"use_{schedule}_sigmas": True, "timestep_spacing": spacing}
            check(sampler, count, monkeypatch, **words)


@pytest.mark.parametrize("sampler", sorted(HAVE_ZERO_SNR))
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_latents_equal_the_reference_with_zero_terminal_snr(
    sampler: str, prediction_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (sampler, prediction_type) in LACKING:
        pytest.skip("diffusers lacks it")
    for spacing in ("trailing", "leading"):
        words = {"timestep_spacing": spacing, "prediction_type": prediction_type}
        check(sampler, 20, monkeypatch, rescale_betas_zero_snr=True, most=2e-5, **words)


@pytest.mark.parametrize(
    ("sampler", "config"),
    [
        ("dpmpp_2m", {"solver_type": "heun"}),
        ("dpmpp_2m_sde", {"solver_type": "heun"}),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min"}),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("dpmpp_2m_sde", {"final_sigmas_type": "sigma_min"}),
        ("dpmpp_2m", {"solver_order": 1}),
        ("dpmpp_2m", {"solver_order": 3}),
        ("dpmpp_2m", {"solver_order": 3, "final_sigmas_type": "sigma_min"}),
        ("dpmpp_2m", {"solver_order": 3, "beta_schedule": "squaredcos_cap_v2"}),
        ("dpmpp_2m_sde", {"solver_order": 1}),
        ("ddim", {"clip_sample": True}),
        ("ddim", {"clip_sample": True, "clip_sample_range": 0.5}),
        ("heun", {"clip_sample": True}),
        ("unipc", {"solver_order": 3}),
        ("unipc", {"solver_order": 1}),
        ("unipc", {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
        ("unipc", {"final_sigmas_type": "sigma_min"}),
        ("unipc", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("euler", {"final_sigmas_type": "sigma_min"}),
        ("euler", {"interpolation_type": "log_linear"}),
        ("ddim", {"set_alpha_to_one": True}),
        ("pndm", {"set_alpha_to_one": True}),
        ("ddim", {"steps_offset": 0}),
        ("euler", {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}),
        ("ddim", {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_latents_equal_the_reference_for_the_rarer_settings(
    sampler: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in (5, 20):
        spacing = "leading" if sampler in ("ddim", "pndm") else "linspace"
        check(sampler, count, monkeypatch, timestep_spacing=spacing, **config)


def test_karras_sigmas_of_a_log_linear_table_span_all_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = {"use_karras_sigmas": True, "interpolation_type": "log_linear"}
    for count in (5, 20):
        check("euler", count, monkeypatch, timestep_spacing="leading", **words)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_noise_equals_the_reference(eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = reference("ddim", monkeypatch)
    step, noises = scheduler.step, Noises()
    monkeypatch.setattr(scheduler, "step", lambda *inputs: step(*inputs, eta=eta))
    theirs = their_latents(scheduler, start_noise(), 20, noises, monkeypatch)
    steps = NoiseSchedule(ScheduleConfig()).steps("ddim", 20)
    denoise = build_denoiser(unet, steps, {"encoder_hidden_states": start_noise()})
    start = start_noise() * steps.initial_scale
    *_, last = SAMPLERS["ddim"](denoise, start, steps.sigmas, Noises(), eta=eta)
    assert deviation(last.latents * steps.final_scale, theirs) < 1e-5


def test_turbo_is_ancestral_euler_from_the_last_timestep(monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (1, 2, 4):
        scheduler = reference("euler_a", monkeypatch, timestep_spacing="trailing")
        theirs = their_latents(scheduler, start_noise(), count, Noises(), monkeypatch)
        ours = our_latents(ScheduleConfig(), "turbo", start_noise(), count, Noises())
        assert deviation(ours, theirs) < 1e-5


@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_a_start_in_the_middle_equals_the_reference(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, drawn = start_noise() * 0.5, torch.from_numpy(NoiseSource([1, 2]).draw(SHAPE[1:]))
    every = ("ddim", "euler", "euler_a", "heun", "dpmpp_2m", "unipc")
    for sampler in every if end == "zero" else ("euler", "dpmpp_2m", "unipc"):
        spacing = "leading" if sampler == "ddim" else "linspace"
        ends = {} if end == "zero" else {"final_sigmas_type": end}
        scheduler = reference(sampler, monkeypatch, timestep_spacing=spacing, **ends)
        scheduler.set_timesteps(20)
        first = 5 * scheduler.order  # strength 0.75
        timesteps = scheduler.timesteps[first:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        latents = scheduler.add_noise(picture, drawn, timesteps[:1])
        noises = Noises()
        module = sys.modules[type(scheduler).__module__]
        monkeypatch.setattr(module, "randn_tensor", noises.as_randn_tensor, raising=False)
        for t in timesteps:
            fed = scheduler.scale_model_input(latents, t).float()
            latents = scheduler.step(network(fed, t.float()), t, latents).prev_sample

        steps = NoiseSchedule(ScheduleConfig(**ends)).steps(sampler, 20).after(0.75)
        denoise = build_denoiser(unet, steps, {"encoder_hidden_states": picture})
        *_, last = sample(steps, denoise, picture + drawn * steps.sigmas[0], Noises())
        assert deviation(last.latents * steps.final_scale, latents) < 1e-5, sampler


# Closed forms: normal data --------------------------------------------------------------------

MEAN, SPREAD = 0.7, 0.5


def ideal(latents: Any, sigma: float) -> Any:
    """Return the best guess of the clean value where the data are normal."""
    return MEAN + (latents - MEAN) * (SPREAD**2 / (SPREAD**2 + sigma**2))


def ideal_end(latents: Any, first: float, last: float) -> Any:
    """Return where the ODE leads from `first` to `last`."""
    ratio = (SPREAD**2 + last**2) / (SPREAD**2 + first**2)
    return MEAN + (latents - MEAN) * math.sqrt(ratio)


def levels(count: int, first: float = 14.6, last: float = 0.03) -> list[float]:
    ramp = np.linspace(first ** (1 / 7), last ** (1 / 7), count + 1)
    return (ramp**7).tolist()


@pytest.mark.parametrize(
    ("sampler", "order", "settings"),
    [
        ("ddim", 1, {}),
        ("euler", 1, {}),
        ("heun", 2, {}),
        ("pndm", 2, {}),
        ("lms", 2, {}),
        ("dpmpp_2m", 2, {"lower_order_final": False}),
        ("dpmpp_2m", 2, {"lower_order_final": False, "solver_type": "heun"}),
        ("unipc", 2, {"lower_order_final": False}),
        ("unipc", 3, {"lower_order_final": False, "solver_order": 3}),
    ],
)
def test_the_error_falls_with_the_order_of_the_method(
    sampler: str, order: int, settings: dict[str, Any]
) -> None:
    start = np.linspace(-30, 30, 7).reshape(1, 7, 1, 1)
    errors = []
    for count in (50, 100, 200):
        sigmas = levels(count)
        *_, last = SAMPLERS[sampler](ideal, start, sigmas, NoiseSource([0]), **settings)
        exact = ideal_end(start, sigmas[0], sigmas[-1])
        errors.append(float(np.abs(last.latents - exact).max()))
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert errors[-1] < 0.1
    assert order - 0.25 < rates[-1], rates
    assert order > 1 or rates[-1] < 1.25, rates


def test_inversion_and_sampling_meet() -> None:
    start = np.linspace(-1, 2, 7).reshape(1, 7, 1, 1)
    sigmas = levels(400)
    *_, noisy = SAMPLERS["ddim_inversion"](ideal, start, sigmas[::-1], None)
    assert noisy.latents == pytest.approx(ideal_end(start, sigmas[-1], sigmas[0]), rel=0.05)
    *_, back = SAMPLERS["ddim"](ideal, noisy.latents, sigmas, NoiseSource([0]))
    assert np.abs(back.latents - start).max() < 0.02


@pytest.mark.parametrize(
    ("sampler", "settings", "tolerance"),
    [
        ("ddim", {"eta": 1.0}, 0.05),
        ("euler_a", {}, 0.05),
        ("dpmpp_2m_sde", {}, 0.02),
        ("dpmpp_sde", {}, 0.02),
    ],
)
def test_samplers_with_noise_end_in_the_right_law(
    sampler: str, settings: dict[str, Any], tolerance: float
) -> None:
    noise, sigmas = NoiseSource([3]), [*levels(120), 0.0]
    start = MEAN + noise.draw((4, 64, 64)) * math.hypot(SPREAD, sigmas[0])
    *_, last = SAMPLERS[sampler](ideal, start, sigmas, noise, **settings)
    assert last.latents.mean() == pytest.approx(MEAN, abs=0.02)
    assert last.latents.std() == pytest.approx(SPREAD, rel=tolerance)
    # The noise is really renewed: nothing is left of where it started.
    assert abs(np.corrcoef(start.ravel(), last.latents.ravel())[0, 1]) < 0.05


def test_lcm_with_an_ideal_jump_ends_in_the_right_law() -> None:
    noise, sigmas = NoiseSource([4]), [14.6, 5.0, 1.0, 0.3, 0.0]
    start = MEAN + noise.draw((4, 100, 100)) * math.hypot(SPREAD, sigmas[0])

    def jump(latents: Any, sigma: float) -> Any:
        return ideal_end(latents, sigma, 0.0)

    *_, last = SAMPLERS["lcm"](jump, start, sigmas, noise)
    assert last.latents.mean() == pytest.approx(MEAN, abs=0.01)
    assert last.latents.std() == pytest.approx(SPREAD, rel=0.02)


def test_calls_are_as_many_as_the_method_says() -> None:
    calls: list[float] = []

    def counted(latents: Any, sigma: float) -> Any:
        calls.append(sigma)
        return ideal(latents, sigma)

    found = {}
    for sampler in SAMPLER_NAMES:
        calls.clear()
        steps = NoiseSchedule().steps(sampler, 10)
        start, noise = np.ones((1, 1, 2, 2)), NoiseSource([0])
        taken = list(SAMPLERS[sampler](counted, start, steps.sigmas, noise))
        assert [step.index for step in taken] == list(range(10))
        found[sampler] = len(calls)
    more = {"heun": 19, "dpmpp_sde": 19, "pndm": 11}
    assert found == {sampler: more.get(sampler, 10) for sampler in SAMPLER_NAMES}


# Seeds, kinds of arrays -----------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_an_image_does_not_depend_on_its_batch(sampler: str) -> None:
    def run(seeds: Sequence[int]) -> Any:
        noise = NoiseSource(seeds)
        return our_latents(ScheduleConfig(), sampler, noise.draw(SHAPE[1:]), 8, noise)

    batch = run([5, 6, 7])
    for row, seed in enumerate([5, 6, 7]):
        assert (batch[row] == run([seed])[0]).all()
    assert np.abs(batch[0] - batch[1]).max() > 0.1


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_numpy_and_torch_agree(sampler: str) -> None:
    start = NoiseSource([5, 6]).draw(SHAPE[1:])
    ours = our_latents(ScheduleConfig(), sampler, start, 8, NoiseSource([5, 6]))
    theirs = our_latents(ScheduleConfig(), sampler, torch.from_numpy(start), 8, NoiseSource([5, 6]))
    assert isinstance(ours, np.ndarray) and ours.dtype == np.float32
    assert theirs.dtype == torch.float32
    assert deviation(torch.from_numpy(ours), theirs) < 2e-6


def test_noise_is_that_of_cuda() -> None:
    # torch.randn(4, device="cuda") with seed 0, as published.
    known = [-0.92466259, -0.42534415, -2.6438457, 0.14518388]
    assert NoiseSource([0]).draw((4,))[0] == pytest.approx(known, abs=1e-6)


def test_noise_is_normal_and_never_repeats() -> None:
    noise = NoiseSource([0, 1, 2**64 - 1])
    first, second = noise.draw((4, 64, 64)), noise.draw((4, 64, 64))
    rows = np.stack([*first, *second]).reshape(6, -1).astype(np.float64)
    assert np.abs(rows.mean(1)).max() < 0.03
    assert np.abs(rows.std(1) - 1).max() < 0.02
    assert np.abs((rows**4).mean(1) - 3).max() < 0.3
    assert np.abs(np.corrcoef(rows) - np.eye(6)).max() < 0.03
    inner = [np.corrcoef(row[:-1], row[1:])[0, 1] for row in rows]
    assert np.abs(inner).max() < 0.03


def test_torch_noise_is_that_of_one_generator_per_image() -> None:
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (0, 5)]
    noise = NoiseSource([0, 5], "torch")
    for _ in range(2):
        theirs = [torch.randn(1, *SHAPE[1:], generator=generator) for generator in generators]
        assert (noise.like(torch.zeros(SHAPE)) == torch.cat(theirs)).all()


def test_bad_seeds_are_refused() -> None:
    with pytest.raises(BadInput, match="seed is -1"):
        NoiseSource([0, -1])
    with pytest.raises(BadInput, match="philox or torch"):
        NoiseSource([0], "dice")
