"""What the network is fed, what its answer stands for, and guidance, against closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from diptych.errors import BadInput
from diptych.text_to_image.denoiser import (
    Consistency,
    EpsDenoiser,
    Guided,
    KeepOutside,
    build_denoiser,
    guidance_embedding,
)
from diptych.text_to_image.noise import NoiseSource
from diptych.text_to_image.samplers import SAMPLERS
from diptych.text_to_image.schedules import SAMPLER_NAMES, NoiseSchedule, ScheduleConfig, Steps

SHAPE = (2, 4, 6, 5)
SIGMAS = (14.0, 1.3, 0.05)


def steps_of(sampler: str = "euler", count: int = 10) -> Steps:
    return NoiseSchedule(ScheduleConfig()).steps(sampler, count)


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def context(seed: int, length: int = 3) -> dict[str, Any]:
    return {
        "encoder_hidden_states": normal(seed, (2, length, 4)),
        "text_embeds": normal(seed, (2, 5)),
    }


class FakeUnet:
    """Answer with a function of all inputs, row by row, and remember the calls."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **inputs: Any) -> tuple[Any]:
        self.calls.append(inputs)
        latents, words = inputs["latents"], inputs["encoder_hidden_states"]
        assert len(latents) == len(words) == len(inputs["timestep"])
        push = words.sum(axis=(1, 2)).reshape(-1, 1, 1, 1)
        if "text_embeds" in inputs:
            push = push + inputs["text_embeds"].sum(axis=1).reshape(-1, 1, 1, 1)
        return (latents[:, :4] * 0.5 + push * 0.1 + latents[:, :4] * latents[:, :4] * push * 0.01,)


# What an answer stands for --------------------------------------------------------------------


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_perfect_network_gives_the_clean_latents(prediction_type: str, sigma: float) -> None:
    clean, eps = normal(0), normal(1)
    alpha = 1 / (sigma**2 + 1)
    answers = {
        "epsilon": eps,
        "v_prediction": math.sqrt(alpha) * eps - math.sqrt(1 - alpha) * clean,
        "sample": clean,
    }
    fed: dict[str, Any] = {}

    def unet(**inputs: Any) -> tuple[Any]:
        fed.update(inputs)
        return (answers[prediction_type],)

    denoise = EpsDenoiser(unet, steps_of(), context(2), prediction_type)
    denoised = denoise(clean + eps * sigma, sigma)
    assert np.abs(denoised - clean).max() < 1e-5
    # The network sees latents of variance one, and is told the timestep as float32.
    noisy = math.sqrt(alpha) * clean + math.sqrt(1 - alpha) * eps
    assert fed["latents"] == pytest.approx(noisy, abs=1e-5)
    assert fed["timestep"].shape == (2,) and fed["timestep"].dtype == np.float32
    assert fed["timestep"][0] == np.float32(steps_of().timestep(sigma))


def test_half_precision_answers_become_float32() -> None:
    def unet(**inputs: Any) -> tuple[Any]:
        return (inputs["latents"].to(torch.float16),)

    words = {"encoder_hidden_states": torch.zeros(2, 3, 4, dtype=torch.float16)}
    denoised = EpsDenoiser(unet, steps_of(), words)(torch.ones(SHAPE), 2.0)
    assert denoised.dtype == torch.float32
    answers = np.ones(SHAPE, np.float16)
    words = {"encoder_hidden_states": np.zeros((2, 3, 4), np.float16)}
    denoised = EpsDenoiser(lambda **_: (answers,), steps_of(), words)(np.ones(SHAPE, "f4"), 2.0)
    assert denoised.dtype == np.float32


def test_further_channels_follow_the_latents() -> None:
    mask, masked = normal(1, (2, 1, 6, 5)), normal(2)
    unet = FakeUnet()
    denoiser = EpsDenoiser(unet, steps_of(), context(3), extra=(mask, masked))
    guided = Guided(denoiser, context(4), 3.0)
    latents = normal(5)
    guided(latents, 2.0)
    (call,) = unet.calls
    assert call["latents"].shape == (4, 9, 6, 5)
    for half in (call["latents"][:2], call["latents"][2:]):
        assert half[:, :4] == pytest.approx(latents / math.sqrt(5), rel=1e-6)
        assert (half[:, 4:5] == mask).all()
        assert (half[:, 5:] == masked).all()


def test_unknown_prediction_types_are_refused() -> None:
    with pytest.raises(BadInput, match="prediction_type is 'magic'"):
        EpsDenoiser(FakeUnet(), steps_of(), context(0), "magic")


# Guidance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_is_that_of_the_reference(prediction_type: str, rescale: float) -> None:
    unet, sigma, latents = FakeUnet(), 3.0, normal(0)
    denoiser = EpsDenoiser(unet, steps_of(), context(1), prediction_type)
    guided = Guided(denoiser, context(2), 7.5, rescale)(latents, sigma)
    assert len(unet.calls) == 1

    fed = {"latents": latents / math.sqrt(10), "timestep": np.zeros(2)}
    (positive,), (negative,) = FakeUnet()(**fed, **context(1)), FakeUnet()(**fed, **context(2))
    output = torch.from_numpy(negative + 7.5 * (positive - negative))
    if rescale:
        output = rescale_noise_cfg(output, torch.from_numpy(positive), rescale)
    expected = denoiser.to_denoised(latents, sigma, output.numpy())
    assert guided == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_one_by_one_changes_nothing_but_the_calls() -> None:
    together, apart = FakeUnet(), FakeUnet()
    latents = normal(0)
    both = Guided(EpsDenoiser(together, steps_of(), context(1)), context(2), 7.5)
    single = Guided(EpsDenoiser(apart, steps_of(), context(1)), context(2), 7.5, one_by_one=True)
    assert both(latents, 3.0) == pytest.approx(single(latents, 3.0), rel=1e-5, abs=1e-5)
    assert [len(call["latents"]) for call in together.calls] == [4]
    assert [len(call["latents"]) for call in apart.calls] == [2, 2]


def test_prompts_of_different_lengths_run_one_by_one() -> None:
    unet = FakeUnet()
    denoiser = EpsDenoiser(unet, steps_of(), context(1, length=6))
    Guided(denoiser, context(2, length=3), 7.5)(normal(0), 3.0)
    assert [call["encoder_hidden_states"].shape[1] for call in unet.calls] == [3, 6]


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_without_guidance_the_negative_is_not_run(scale: float) -> None:
    unet = FakeUnet()
    denoiser = EpsDenoiser(unet, steps_of(), context(1))
    latents = normal(0)
    assert (Guided(denoiser, context(2), scale)(latents, 3.0) == denoiser(latents, 3.0)).all()
    assert [len(call["latents"]) for call in unet.calls] == [2, 2]


@pytest.mark.parametrize("sampler", ["euler", "ddim", "heun", "lcm"])
def test_outside_of_its_interval_nothing_is_guided(sampler: str) -> None:
    unet, steps = FakeUnet(), steps_of(sampler, 10)
    words = {"negative": context(2), "guidance_scale": 7.5}
    denoise = build_denoiser(unet, steps, context(1), guidance_interval=(0.25, 0.65), **words)
    guided = build_denoiser(FakeUnet(), steps, context(1), **words)
    plain = build_denoiser(FakeUnet(), steps, context(1))
    for sigma, timestep in zip(steps.sigmas[:-1], steps.timesteps, strict=True):
        is_inside = 0.25 <= 1 - (timestep + 1) / 1000 <= 0.65
        expected = (guided if is_inside else plain)(normal(0), sigma)
        assert np.array_equal(denoise(normal(0), sigma), expected)
        assert len(unet.calls[-1]["latents"]) == (4 if is_inside else 2)
    assert {len(call["latents"]) for call in unet.calls} == {2, 4}


@pytest.mark.parametrize("sampler", [n for n in SAMPLER_NAMES if n != "ddim_inversion"])
def test_the_whole_interval_is_every_step(sampler: str) -> None:
    for spacing in (None, "leading", "trailing", "linspace"):
        steps = NoiseSchedule(ScheduleConfig()).steps(sampler, 7, spacing=spacing)
        assert all(0 <= steps.done(sigma) <= 1 for sigma in steps.sigmas)


def test_torch_and_numpy_are_guided_alike() -> None:
    def as_torch(arrays: dict[str, Any]) -> dict[str, Any]:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    latents = normal(0)
    ours = Guided(EpsDenoiser(FakeUnet(), steps_of(), context(1)), context(2), 7.5, 0.7)
    other = EpsDenoiser(FakeUnet(), steps_of(), as_torch(context(1)))
    theirs = Guided(other, as_torch(context(2)), 7.5, 0.7)
    found = theirs(torch.from_numpy(latents), 3.0).numpy()
    assert found == pytest.approx(ours(latents, 3.0), rel=1e-5, abs=1e-5)


def test_the_usual_composition() -> None:
    def kind(sampler: str, **words: Any) -> type:
        steps = steps_of(sampler)
        return type(build_denoiser(FakeUnet(), steps, context(1), **words))

    assert kind("euler") is EpsDenoiser
    assert kind("euler", negative=context(2), guidance_scale=7.5) is Guided
    assert kind("euler", negative=context(2), guidance_scale=1.0) is EpsDenoiser
    assert kind("lcm", negative=context(2), guidance_scale=7.5) is Consistency


# LCM ------------------------------------------------------------------------------------------


def test_the_boundary_condition_is_that_of_the_reference() -> None:
    steps, latents = steps_of("lcm", 4), normal(0)
    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    clean = normal(1)
    denoise = Consistency(lambda *_: clean, steps)
    for sigma, timestep in zip(steps.sigmas[:-1], steps.timesteps, strict=True):
        of_input, of_output = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
        seen = latents / math.sqrt(sigma**2 + 1)
        expected = of_output * clean + of_input * seen
        assert denoise(latents, sigma) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_at_no_noise_the_input_is_the_answer() -> None:
    steps = steps_of("lcm", 4)
    object.__setattr__(steps, "_grid", {0.0: 0.0})
    latents = normal(0)
    assert (Consistency(lambda *_: normal(1), steps)(latents, 0.0) == latents).all()


@pytest.mark.parametrize(("scale", "size"), [(8.5, 256), (1.0, 256), (4.0, 33)])
def test_guidance_embedding_is_that_of_the_reference(scale: float, size: int) -> None:
    theirs = StableDiffusionPipeline.get_guidance_scale_embedding(
        None, torch.full((2,), scale - 1), embedding_dim=size
    )
    ours = guidance_embedding(scale, 2, size)
    assert ours.dtype == np.float32
    # Angles go up to thousands of radians: their last float32 digit shows.
    assert ours == pytest.approx(theirs.numpy(), abs=2e-3)


# Keeping what is outside ----------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [n for n in SAMPLER_NAMES if n != "ddim_inversion"])
def test_outside_the_mask_the_picture_stays(sampler: str) -> None:
    config = ScheduleConfig(set_alpha_to_one=True)
    steps = NoiseSchedule(config).steps(sampler, 6)
    picture, drawn = normal(0), normal(1)
    mask = np.zeros((2, 1, 6, 5), np.float32)
    mask[:, :, 2:4, 1:3] = 1
    inner = build_denoiser(FakeUnet(), steps, context(2))
    denoise = KeepOutside(inner, steps, mask, picture, drawn)
    start = picture + drawn * steps.sigmas[0]
    *_, last = SAMPLERS[sampler](denoise, start, steps.sigmas, NoiseSource([0, 1]))
    outside = np.broadcast_to(mask == 0, SHAPE)
    assert np.abs(last.latents - picture)[outside].max() < 1e-5
    assert np.abs(last.latents - picture)[~outside].max() > 0.1


def test_the_network_sees_the_picture_noised_alike_outside() -> None:
    picture, drawn = normal(0), normal(1)
    mask = np.zeros((2, 1, 6, 5), np.float32)
    seen: list[Any] = []

    def inner(latents: Any, sigma: float) -> Any:
        seen.append(latents)
        return latents

    steps = steps_of()
    denoise = KeepOutside(inner, steps, mask, picture, drawn)
    denoise(normal(2) * 9, 2.0)
    assert seen[0] == pytest.approx(picture + 2 * drawn, abs=1e-6)
    # The first call takes what it is given: a run may start from noise alone, as in diffusers.
    denoise(normal(2) * 9, steps.sigmas[0])
    assert np.array_equal(seen[1], normal(2) * 9)
