"""The generator around networks that are plain functions: seeds, batches, orders, errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diptych import DiptychError, GeneratedImage, GenerateOptions, ImageGenerator
from diptych.errors import BadInput, UnsupportedModel
from fake_generator import COLOURS, DOWN, SIDE, FakeNetwork, make_generator


@pytest.fixture
def generator() -> ImageGenerator:
    return make_generator()


def mean_colour(picture: GeneratedImage) -> list[float]:
    pixels = np.asarray(picture.image, np.float64) / 127.5 - 1
    return [round(float(value), 2) for value in pixels.mean((0, 1))]


SAMPLERS = GenerateOptions.__dataclass_fields__["sampler"].metadata["choices"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_what_the_network_says(generator: ImageGenerator, sampler: str) -> None:
    picture = generator.generate("a red door", seed=1, sampler=sampler, num_inference_steps=4)
    assert picture.image.size == (SIDE, SIDE)
    assert mean_colour(picture) == pytest.approx(COLOURS["red"], abs=0.03)
    assert picture.options.sampler == sampler


def test_guidance_pushes_away_from_the_negative_prompt(generator: ImageGenerator) -> None:
    # grey + 0.5 (blue - grey), from the other side: denoised = n + s (p - n).
    halfway = generator.generate(
        "grey", negative_prompt="blue", guidance_scale=1.5, seed=0, num_inference_steps=10
    )
    # 1.5 · 0 - 0.5 · (-1, -1, 1)
    assert mean_colour(halfway) == pytest.approx((0.5, 0.5, -0.5), abs=0.03)
    unguided = generator.generate("grey", negative_prompt="blue", guidance_scale=1.0, seed=0)
    assert mean_colour(unguided) == pytest.approx((0, 0, 0), abs=0.03)


def test_guidance_may_hold_for_a_part_of_the_way() -> None:
    generator = noisy()
    words = {"seed": 3, "guidance_scale": 4.0, "num_inference_steps": 10}
    plain = generator.generate("red", **words)
    whole = generator.generate("red", guidance_interval=(0, 1), **words)
    assert whole.options.guidance_interval == "0,1"
    assert whole.image.tobytes() == plain.image.tobytes()
    unet = generator.networks["unet"]
    unet.calls.clear()
    some = generator.generate("red", guidance_interval="0.3,0.6", **words)
    rows = [len(call["latents"]) for call in unet.calls]
    assert sorted(rows) == [1] * 7 + [2] * 3 and rows[:3] == [1] * 3 and rows[3:6] == [2] * 3
    assert some.image.tobytes() != plain.image.tobytes()
    with pytest.raises(BadInput, match="guidance_interval is not for style_transfer"):
        generator.style_transfer(some.image, some.image, guidance_interval="0.3,0.6")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"strength": 0.1}, "strength is not for style_transfer"),
        ({"num_images_per_prompt": 2}, "num_images_per_prompt is not for style_transfer"),
        ({"seed": 3}, "seed is not for style_transfer"),
        ({"sampler": "euler"}, "sampler is not for style_transfer"),
        ({"num_inference_steps": 3}, "num_inversion_steps"),
        ({"prompt": None}, "prompt is None: style_transfer takes one"),
        ({"prompt": ["a"]}, r"prompt is \['a'\]: style_transfer takes one"),
        ({"layers": 3}, "layers"),
    ],
)
def test_what_style_transfer_does_not_take(words: dict[str, Any], told: str) -> None:
    picture = Image.new("RGB", (32, 32), "red")
    with pytest.raises(BadInput, match=told):
        make_generator().style_transfer(picture, picture, **words)


def test_one_prompt_gives_one_picture_and_a_list_gives_a_list(generator: ImageGenerator) -> None:
    assert isinstance(generator.generate("red"), GeneratedImage)
    several = generator.generate(["red", "blue"])
    assert [mean_colour(each)[2] > 0 for each in several] == [False, True]
    assert isinstance(generator.generate(["red"]), list)
    copies = generator.generate("red", num_images_per_prompt=3, seed=5)
    assert [each.seed for each in copies] == [5, 6, 7]
    both = generator.generate(["red", "blue"], num_images_per_prompt=2, seed=0)
    assert [(each.prompt, each.seed) for each in both] == [
        ("red", 0), ("red", 1), ("blue", 2), ("blue", 3),
    ]  # fmt: skip


def noisy() -> ImageGenerator:
    """Return a generator whose pictures depend on every bit of noise and of the words."""

    def unet(latents: Any, timestep: Any, encoder_hidden_states: Any, **more: Any) -> Any:
        told = encoder_hidden_states.sum((1, 2))[:, None, None, None]
        wave = np.sin(latents + 0.1 * told) + 0.5 * np.roll(latents, 1, axis=3)
        return (wave.astype(np.float32),)

    return make_generator(networks={"unet": FakeNetwork(unet)})


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m_sde"])
def test_a_picture_is_the_same_alone_and_in_any_batch(sampler: str) -> None:
    generator = noisy()
    prompts = ["red", "a long prompt, " * 40 + "blue", "green", "red", "blue"]
    settings = {"seed": 11, "sampler": sampler, "guidance_scale": 3.0, "num_inference_steps": 6}
    alone = [
        generator.generate(prompt, **{**settings, "seed": 11 + place})
        for place, prompt in enumerate(prompts)
    ]
    assert len({picture.image.tobytes() for picture in alone}) == 5
    for batch_size in (1, 2, 3, 5, None):
        batch = generator.generate(prompts, batch_size=batch_size, **settings)
        assert [each.seed for each in batch] == [each.seed for each in alone]
        for one, other in zip(alone, batch, strict=True):
            assert psnr(one.image, other.image) >= 45


def psnr(one: Image.Image, other: Image.Image) -> float:
    error = np.mean((np.asarray(one, np.float64) - np.asarray(other, np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def test_eta_renews_noise() -> None:
    generator = noisy()
    plain = generator.generate("red", seed=0, sampler="ddim")
    zero = generator.generate("red", seed=0, sampler="ddim", eta=0.0)
    renewed = generator.generate("red", seed=0, sampler="ddim", eta=1.0)
    assert zero.image.tobytes() == plain.image.tobytes() != renewed.image.tobytes()


def test_seeds() -> None:
    generator = noisy()
    zero = generator.generate("red", seed=0)
    assert zero.seed == 0 and zero.options.seed == 0
    assert zero.image.tobytes() == generator.generate("red", seed=0).image.tobytes()
    drawn = generator.generate("red")
    assert drawn.image.tobytes() != generator.generate("red").image.tobytes()
    again = generator.generate("red", seed=drawn.seed)
    assert again.image.tobytes() == drawn.image.tobytes()
    assert generator.generate("red", drawn.options).image.tobytes() == drawn.image.tobytes()


def test_own_starting_noise() -> None:
    generator = noisy()
    noise = np.random.default_rng(0).standard_normal((2, 4, 2, 6)).astype(np.float32)
    one, two = generator.generate("red", num_images_per_prompt=2, latents=noise)
    assert one.image.size == (6 * DOWN, 2 * DOWN)
    assert one.image.tobytes() != two.image.tobytes()
    alone = generator.generate("red", latents=noise[1])
    assert psnr(alone.image, two.image) >= 45
    torch = pytest.importorskip("torch")
    as_tensor = generator.generate("red", latents=torch.from_numpy(noise[:1]))
    assert as_tensor.image.tobytes() == one.image.tobytes()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ({"latents": np.zeros((1, 3, 4, 4))}, "shape"),
        ({"latents": np.full((1, 4, 4, 4), np.nan)}, "finite"),
        ({"latents": "noise"}, "numbers"),
        ({"latents": np.zeros((2, 4, 4, 4))}, "1 are asked for"),
        ({"latents": np.zeros((1, 4, 4, 4)), "width": 64}, "64x32"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"sampler": "magic"}, "magic"),
        ({"width": 8}, "width"),
        ({"height": 10**6}, "height"),
        ({"batch_size": 0}, "batch_size"),
        ({"on_error": "ignore"}, "on_error"),
        ({"cfg_scale": 3}, "guidance_scale"),
        ({"options": {"seed": 1}}, "GenerateOptions"),
        ({"negative_prompt": ["a", "b"]}, "negative"),
        ({"seed": -1}, "seed"),
        ({"eta": 0.5, "sampler": "euler"}, "eta is for"),
    ],
)
def test_mistakes_get_a_clear_sentence(
    generator: ImageGenerator, words: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(BadInput, match=complaint):
        generator.generate("red", **words)


@pytest.mark.parametrize("prompt", [None, 3, b"red", {"red": 1}, []])
def test_what_is_no_prompt_is_refused(generator: ImageGenerator, prompt: Any) -> None:
    with pytest.raises(BadInput, match="prompt"):
        generator.generate(prompt)


def test_a_size_is_rounded_with_a_note(generator: ImageGenerator) -> None:
    picture = generator.generate("red", width=67, height=64)
    assert picture.image.size == (64, 64)
    assert len(picture.notes) == 1 and "67" in picture.notes[0]
    assert generator.generate("red", width=64, height=64).notes == ()


def test_a_failed_prompt_keeps_the_others(generator: ImageGenerator) -> None:
    enormous = "word " * 50_000
    made = generator.generate(["red", enormous, 7, "blue"], seed=3, batch_size=4)  # type: ignore[list-item]
    assert [each.error is None for each in made] == [True, False, False, True]
    assert [each.seed for each in made] == [3, 4, 5, 6]
    assert "100000" in str(made[1].error)
    with pytest.raises(DiptychError, match="100000"):
        made[1].save("never.png")
    with pytest.raises(BadInput):
        generator.generate(["red", enormous], on_error="raise")
    with pytest.raises(BadInput):
        generator.generate(enormous)


def test_a_broken_latent_names_the_step_and_spares_its_neighbours() -> None:
    calls = 0

    def unet(latents: Any, timestep: Any, encoder_hidden_states: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        predicted = latents * 0
        is_red = encoder_hidden_states[:, :, 0].sum(1) > 0
        if calls == 3:
            predicted[is_red] = np.inf
        return (predicted,)

    generator = make_generator(networks={"unet": FakeNetwork(unet)})
    first, second = generator.generate(["red", "blue"], batch_size=2, num_inference_steps=5)
    assert second.error is None
    assert "step 3 of 5" in str(first.error) and "'red'" in str(first.error)
    calls = 0
    with pytest.raises(DiptychError, match="step 3 of 5"):
        generator.generate("red", num_inference_steps=5)
    assert calls == 3  # no work for nothing


def test_a_broken_decode_is_never_a_black_picture() -> None:
    def vae_decoder(latents: Any) -> Any:
        return (np.full((len(latents), 3, SIDE, SIDE), np.nan, np.float32),)

    generator = make_generator(networks={"vae_decoder": FakeNetwork(vae_decoder)})
    with pytest.raises(DiptychError, match="not finite"):
        generator.generate("red")


def test_steps_are_yielded_with_previews(generator: ImageGenerator) -> None:
    steps = list(generator.denoising_steps("green", seed=2, num_inference_steps=4, sampler="euler"))
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert {step.total for step in steps} == {4}
    assert [step.is_last for step in steps] == [False, False, False, True]
    sigmas = [step.sigma for step in steps]
    assert sigmas == sorted(sigmas, reverse=True) and sigmas[-1] == 0
    preview = steps[0].preview()
    assert preview.size == (SIDE, SIDE)
    # The network knows the picture from the first step on, and so does the preview.
    assert np.asarray(preview, float).mean((0, 1)) == pytest.approx([0, 255, 0], abs=8)
    finished = generator.generate("green", seed=2, num_inference_steps=4, sampler="euler")
    assert steps[1].result().image.getpixel((0, 0)) == finished.image.getpixel((0, 0))
    assert steps[-1].result().image.tobytes() == finished.image.tobytes()
    assert generator.decode(steps[-1].latents)[0].tobytes() == finished.image.tobytes()
    assert steps[0].seeds == (2,) and steps[0].prompts == ("green",)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "pndm"])
def test_the_last_step_is_the_finished_picture(sampler: str) -> None:
    """DDIM ends short of no noise at all, and the picture is what its latents are then."""
    generator = noisy()
    *_, last = generator.denoising_steps("red", seed=2, sampler=sampler, num_inference_steps=3)
    finished = generator.generate("red", seed=2, sampler=sampler, num_inference_steps=3)
    assert last.is_last
    assert last.result().image.tobytes() == finished.image.tobytes()
    assert generator.decode(last.latents)[0].tobytes() == finished.image.tobytes()


def test_stopping_stops_the_work(generator: ImageGenerator) -> None:
    for step in generator.denoising_steps("red", num_inference_steps=50):
        if step.index == 2:
            break
    assert len(generator.networks["unet"].calls) == 3  # type: ignore[attr-defined]


def test_pictures_come_as_they_are_finished(generator: ImageGenerator) -> None:
    read = []

    def prompts() -> Any:
        for word in ("red", "green", "blue"):
            read.append(word)
            yield word

    pictures = generator.images(prompts(), batch_size=1)
    assert next(pictures).prompt == "red" and read == ["red"]
    assert [each.prompt for each in pictures] == ["green", "blue"]


def test_sdxl_is_told_sizes_and_pooled_words() -> None:
    seen: list[dict[str, Any]] = []

    def unet(latents: Any, timestep: Any, **more: Any) -> Any:
        seen.append(more)
        return (latents * 0,)

    names = ("latents", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")
    network = FakeNetwork(unet, dict.fromkeys(names, ""))
    generator = make_generator(networks={"unet": network}, force_zeros=True)
    generator.generate("red", width=64, height=32, guidance_scale=2.0, num_inference_steps=1)
    # Rows: negative, then positive.
    assert seen[0]["time_ids"].tolist() == [[32, 64, 0, 0, 32, 64]] * 2
    assert seen[0]["text_embeds"].tolist() == [[0, 0, 0, 0], [1, -1, -1, 0]]
    assert not seen[0]["encoder_hidden_states"][0].any()


def test_a_distilled_model_gets_its_guidance_as_an_input() -> None:
    seen: list[dict[str, Any]] = []

    def unet(latents: Any, timestep: Any, **more: Any) -> Any:
        seen.append(more)
        return (latents * 0,)

    names = ("latents", "timestep", "encoder_hidden_states", "timestep_cond")
    generator = make_generator(
        networks={"unet": FakeNetwork(unet, dict.fromkeys(names, ""))},
        unet={"time_cond_proj_dim": 6},
    )
    generator.generate("red", guidance_scale=8.5, num_inference_steps=2, sampler="lcm")
    # (w - 1) · 1000 · 10000^(-i / (half - 1)), sines first (Meng et al. 2023).
    angles = 7500 * 10000.0 ** -np.array([0, 0.5, 1])
    expected = np.concatenate([np.sin(angles), np.cos(angles)])
    assert seen[0]["timestep_cond"].shape == (1, 6)
    assert seen[0]["timestep_cond"][0] == pytest.approx(expected, abs=2e-3)
    assert len(seen[0]["encoder_hidden_states"]) == 1


def test_an_inpainting_network_repaints_everything() -> None:
    seen: list[Any] = []

    def unet(latents: Any, timestep: Any, **more: Any) -> Any:
        seen.append(latents)
        return (latents[:, :4] * 0,)

    generator = make_generator(networks={"unet": FakeNetwork(unet)}, unet={"in_channels": 9})
    generator.generate("red", num_inference_steps=1)
    assert seen[0].shape[1] == 9
    assert (seen[0][:, 4] == 1).all() and (seen[0][:, 5:] == 0).all()
    strange = make_generator(networks={"unet": FakeNetwork(unet)}, unet={"in_channels": 7})
    with pytest.raises(UnsupportedModel, match="7 channels"):
        strange.generate("red")


def test_adapters_need_torch(tmp_path: Path) -> None:
    generator = make_generator()
    with pytest.raises(UnsupportedModel, match="runtime='torch'"):
        generator.load_lora(tmp_path / "style.safetensors")
    with pytest.raises(UnsupportedModel, match="runtime='torch'"):
        generator.load_textual_inversion(tmp_path / "word.safetensors")
    generator.unload_lora()
    generator.unload_textual_inversion()
    with pytest.raises(BadInput, match="cat"):
        generator.unload_textual_inversion("<cat>")


def test_the_model_prefers_and_the_caller_decides() -> None:
    generator = make_generator(
        defaults={"width": 40, "height": 24, "sampler": "euler", "guidance_scale": 2.5}
    )
    options = generator.options
    assert (options.width, options.height, options.sampler) == (40, 24, "euler")
    picture = generator.generate("red", GenerateOptions(height=16), sampler="heun")
    assert picture.image.size == (40, 16)
    assert picture.options.sampler == "heun" and picture.options.guidance_scale == 2.5


def test_no_more_layers_are_left_out_than_there_are() -> None:
    """Counted from the end, a thirteenth of twelve would be the last one again."""
    generator = make_generator()
    generator.generate("red", clip_skip=12)
    with pytest.raises(BadInput, match="clip_skip is 13: give 0 to 12"):
        generator.generate("red", clip_skip=13)
    penultimate = {**generator.model.configs["text_encoder"], "output_layer": -2}
    object.__setattr__(
        generator.model, "configs", {**generator.model.configs, "text_encoder_2": penultimate}
    )
    with pytest.raises(BadInput, match="clip_skip is 12: give 0 to 11"):
        generator.generate("red", clip_skip=12)


@pytest.mark.parametrize(
    "words",
    [
        {"negative_prompt": ["x"]},
        {"negative_prompt": ["x", "y", "z"]},
        {"latents": np.zeros((1, 4, SIDE // DOWN, SIDE // DOWN), np.float32)},
    ],
)
def test_numbers_that_do_not_fit_are_told_before_any_work(words: dict[str, Any]) -> None:
    generator = make_generator()
    with pytest.raises(BadInput, match=r"for 2 prompts|2 are asked for"):
        generator.generate(["red", "blue"], batch_size=1, **words)
    assert not generator.networks["unet"].calls
