"""Style transfer: injection against one that records, identities, and what strength does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diptych import ImageGenerator
from diptych.errors import BadInput, UnsupportedModel
from diptych.text_to_image.style import adain, normalised
from diptych.text_to_image.style_options import StyleOptions
from fake_generator import make_generator

torch = pytest.importorskip("torch")

PHOTOS = Path(__file__).resolve().parents[2] / "examples" / "photos"


@pytest.fixture(scope="module")
def generator() -> ImageGenerator:
    return ImageGenerator.load(runtime="torch")


def psnr(one: Image.Image, other: Image.Image) -> float:
    difference = np.asarray(one, float) - np.asarray(other, float)
    error = float(np.mean(difference**2))
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


# The network ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_in_one_batch_are_what_recorded_features_would_be(seed: int) -> None:
    """Run content and style alone, keep queries, keys and values by hooks, and inject those."""
    from diptych.models.layers import MultiHeadAttention
    from diptych.models.unet import UNet, UNetConfig

    torch.manual_seed(seed)
    config = UNetConfig(
        block_out_channels=(16, 32), layers_per_block=1, down_attention=(True, True),
        transformer_layers_per_block=(1, 2), num_attention_heads=(2, 4), cross_attention_dim=12,
        norm_num_groups=8,
    )  # fmt: skip
    unet = UNet(config).eval()
    latents, words = torch.randn(3, 4, 8, 6), torch.randn(3, 5, 12)
    timestep = torch.full((3,), 400.0)
    layers = [block for up in unet.up_blocks for block in up.attentions]
    chosen, share, factor = (1, 2, 3), 0.7, 1.4

    def attentions(layer: int) -> list[MultiHeadAttention]:
        return [block.attn1 for block in layers[layer].transformer_blocks]

    known: dict[tuple[int, int, str, int], Any] = {}
    hooks = []
    for layer in chosen:
        for depth, attention in enumerate(attentions(layer)):
            for name in ("to_q", "to_k", "to_v"):

                def record(
                    module: Any, given: Any, made: Any, at: Any = (layer, depth, name)
                ) -> None:
                    known[(*at, row)] = made

                hooks.append(getattr(attention, name).register_forward_hook(record))
    with torch.no_grad():
        for row in (0, 1):
            one = slice(row, row + 1)
            unet(latents[one], timestep[one], words[one])
        for hook in hooks:
            hook.remove()
        hooks = []
        for layer in chosen:
            for depth, attention in enumerate(attentions(layer)):

                def query(module: Any, given: Any, made: Any, at: Any = (layer, depth)) -> Any:
                    return (share * known[(*at, "to_q", 0)] + (1 - share) * made) * factor

                hooks.append(attention.to_q.register_forward_hook(query))
                for name in ("to_k", "to_v"):

                    def take(
                        module: Any, given: Any, made: Any, at: Any = (layer, depth, name)
                    ) -> Any:
                        return known[(*at, 1)]

                    hooks.append(getattr(attention, name).register_forward_hook(take))
        expected = unet(latents[2:], timestep[2:], words[2:])
        for hook in hooks:
            hook.remove()
        keys = torch.arange(3).repeat(len(layers), 1)
        shares, factors = torch.zeros(len(layers), 3), torch.ones(len(layers), 3)
        keys[chosen, 2], shares[chosen, 2], factors[chosen, 2] = 1, share, factor
        together = unet(
            latents, timestep, words, key_rows=keys, query_rows=torch.tensor([0, 1, 0]),
            query_preservation=shares, attention_temperature=factors,
        )  # fmt: skip
        plain = unet(latents, timestep, words)
    assert torch.allclose(together[2:], expected, atol=1e-5)
    assert torch.allclose(together[:2], plain[:2], atol=1e-5)
    assert (expected - plain[2:]).abs().max() > 1e-3


def test_adain_takes_mean_and_deviation() -> None:
    random = np.random.default_rng(0)
    content = random.standard_normal((1, 4, 9, 7)).astype(np.float32)
    style = (random.standard_normal((1, 4, 9, 7)) * 3 + 2).astype(np.float32)
    for made in (adain(content, style), adain(torch.tensor(content), torch.tensor(style))):
        found = torch.as_tensor(made)
        assert torch.allclose(found.mean((2, 3)), torch.tensor(style).mean((2, 3)), atol=1e-4)
        assert torch.allclose(found.std((2, 3)), torch.tensor(style).std((2, 3)), atol=1e-4)


# Pictures ---------------------------------------------------------------------------------------


def test_its_own_style_is_the_plain_reconstruction(generator: ImageGenerator) -> None:
    photo = PHOTOS / "chelsea.jpg"
    neutral = {"query_preservation": 1.0, "attention_temperature": 1.0, "adain": False}
    few = {"num_inversion_steps": 3}
    own = generator.style_transfer(photo, photo, **neutral, **few)
    plain = generator.style_transfer(photo, PHOTOS / "coffee.jpg", style_strength=0, **few)
    assert psnr(own.image, plain.image) >= 40
    known = generator.image_to_image(photo, "", strength=0)
    assert psnr(plain.image, known.image) >= 40
    other = generator.style_transfer(photo, PHOTOS / "coffee.jpg", **few)
    assert psnr(other.image, plain.image) < 30


def round_trip(generator: ImageGenerator, photo: Path, steps: int) -> float:
    """Return the PSNR of DDIM there and back, beside what the autoencoder makes of the photo."""
    from dataclasses import replace

    from diptych.canvas import fit, to_pixel_values
    from diptych.images import open_image
    from diptych.text_to_image.denoiser import EpsDenoiser
    from diptych.text_to_image.noise import NoiseSource
    from diptych.text_to_image.prompts import encode_prompts
    from diptych.text_to_image.samplers import ddim, ddim_inversion

    latents = generator.encode(to_pixel_values(fit(open_image(photo), (128, 128), "crop"))[None])
    (pair,) = encode_prompts(generator.networks, generator.tokenizers, [""])
    told = {"encoder_hidden_states": pair.positive.encoder_hidden_states}
    there = generator.schedule.steps("ddim_inversion", steps)
    kind = generator.schedule.config.prediction_type
    denoise = EpsDenoiser(generator.networks["unet"], there, told, kind)
    start = latents * np.float32(there.initial_scale)
    *_, noise = ddim_inversion(denoise, start, there.sigmas, refinements=1)
    back = replace(there, sigmas=there.sigmas[::-1])
    *_, again = ddim(denoise, noise.latents, back.sigmas, NoiseSource([0]))
    (known,) = generator.decode(latents)
    (found,) = generator.decode(again.latents / np.float32(there.initial_scale))
    return psnr(found, known)


@pytest.mark.parametrize(
    ("photo", "counts"),
    [
        ("coffee", (6, 12, 25)),
        *(
            pytest.param(name, (12, 25, 50), marks=pytest.mark.slow)
            for name in ("coffee", "chelsea", "rocket", "astronaut")
        ),
    ],
)
def test_ddim_comes_back_the_nearer_the_more_steps(photo: str, counts: tuple[int, ...]) -> None:
    generator = ImageGenerator.load(runtime="onnxruntime")
    found = [round_trip(generator, PHOTOS / f"{photo}.jpg", steps) for steps in counts]
    assert found == sorted(found) and found[-1] >= 25, found


def test_onnx_draws_what_torch_draws(generator: ImageGenerator) -> None:
    words = {
        "num_inversion_steps": 5,
        "style_strength": 0.6,
        "prompt": "a red flower",
        "preset": "style",
        "style_weights": [2, 1],
    }
    styles = [PHOTOS / "rocket.jpg", PHOTOS / "coffee.jpg"]
    pictures = [
        each.style_transfer(PHOTOS / "chelsea.jpg", styles, **words).image
        for each in (generator, ImageGenerator.load(runtime="onnxruntime"))
    ]
    assert psnr(*pictures) >= 40


def gram(image: Image.Image) -> Any:
    """Return correlations of fixed random features, as a style network has them, and colours."""
    size = (96, 96)
    pixels = torch.tensor(np.asarray(image.resize(size), np.float32) / 127.5 - 1).permute(2, 0, 1)
    weights = torch.Generator().manual_seed(0)
    hidden, parts = pixels[None], []
    for channels in (16, 32):
        kernel = torch.randn(channels, hidden.shape[1], 3, 3, generator=weights)
        kernel = kernel / kernel.flatten(1).norm(dim=1)[:, None, None, None]
        hidden = torch.relu(torch.conv2d(hidden, kernel, padding=1, stride=2))
        flat = hidden.flatten(2)[0]
        parts.append((flat @ flat.T / flat.shape[1]).flatten())
    colours = pixels.flatten(1)
    return torch.cat([*parts, colours.mean(1), colours.std(1)])


def edges(image: Image.Image) -> Any:
    grey = np.asarray(image.convert("L"), float)
    return np.hypot(np.diff(grey, axis=0)[:, :-1], np.diff(grey, axis=1)[:-1]).ravel()


@pytest.mark.no_cover  # the lines are those of the tests above and below, many times
@pytest.mark.parametrize(
    ("content", "style", "steps", "strengths"),
    [
        ("coffee", "astronaut", 6, (0.0, 0.5, 1.0)),
        *(
            pytest.param(*names, 12, (0.0, 0.25, 0.5, 0.75, 1.0), marks=pytest.mark.slow)
            for names in (("coffee", "astronaut"), ("chelsea", "rocket"), ("rocket", "chelsea"))
        ),
    ],
)
def test_strength_moves_towards_style_and_away_from_content(
    generator: ImageGenerator,
    content: str,
    style: str,
    steps: int,
    strengths: tuple[float, ...],
) -> None:
    photo, other = PHOTOS / f"{content}.jpg", PHOTOS / f"{style}.jpg"
    pictures = [
        generator.style_transfer(
            photo, other, style_strength=strength, num_inversion_steps=steps
        ).image
        for strength in strengths
    ]
    from diptych.canvas import fit
    from diptych.images import open_image

    aim = gram(fit(open_image(other), pictures[0].size, "crop"))
    distances = [float((gram(each) - aim).norm()) for each in pictures]
    likeness = [np.corrcoef(edges(each), edges(pictures[0]))[0, 1] for each in pictures]
    assert distances == sorted(distances, reverse=True), distances
    assert likeness == sorted(likeness, reverse=True), likeness
    assert distances[-1] < 0.8 * distances[0] and likeness[-1] < 0.98


def test_presets_and_what_overrules_them() -> None:
    ends = StyleOptions(preset="style").shares, StyleOptions(preset="content").shares
    assert ends == ((0.75, 0.375), (0.75, 0.75))
    assert StyleOptions(query_preservation=0.3).shares == (0.3, 0.3)
    assert StyleOptions(preset="style", query_preservation_end=0.1).shares == (0.75, 0.1)


def test_a_mask_says_where(generator: ImageGenerator) -> None:
    photo = Image.open(PHOTOS / "chelsea.jpg").resize((133, 90))
    mask = np.zeros((90, 133), np.uint8)
    mask[20:70, 60:] = 255
    made = generator.style_transfer(
        photo, PHOTOS / "rocket.jpg", mask_image=mask, num_inversion_steps=5
    )
    found, kept = np.asarray(made.image), np.asarray(photo)
    assert found.shape == kept.shape
    assert np.array_equal(found[mask == 0], kept[mask == 0])
    assert np.abs(found[mask > 0].astype(int) - kept[mask > 0]).mean() > 5
    words = {"mask_image": np.zeros_like(mask), "num_inversion_steps": 2}
    still = generator.style_transfer(photo, PHOTOS / "rocket.jpg", **words)
    assert np.array_equal(np.asarray(still.image), kept)
    assert "the mask is empty: the picture comes back as it was" in still.notes


def test_steps_lead_there_and_back(generator: ImageGenerator) -> None:
    events = generator.follow_style(
        [PHOTOS / "chelsea.jpg"], PHOTOS / "rocket.jpg", num_inversion_steps=3
    )
    *steps, made = events
    assert [step.index for step in steps] == list(range(6))
    assert {step.total for step in steps} == {6}
    sigmas = [step.sigma for step in steps]
    assert sigmas[:3] == sorted(sigmas[:3]) and sigmas[2:] == sorted(sigmas[2:], reverse=True)
    assert psnr(steps[-1].result().image, made.image) > 60


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"style": PHOTOS / "chelsea.jpg"}, "the style is the same picture as the content"),
        ({"query_preservation": 1.2}, "query_preservation is 1.2: give a number from 0 to 1"),
        ({"attention_temperature": 0.0}, "attention_temperature is 0.0: give a number from 0.1"),
        ({"style_strength": -1}, "style_strength is -1: give a number from 0 to 1"),
        ({"layers": "1,77"}, "layers is '1,77': give numbers from 0 to 8"),
        ({"style_weights": [1, 2]}, "style_weights is .* give 1 numbers"),
        ({"style": []}, "no style is given"),
        ({"gamma": 1}, "gamma is not an option of style_transfer"),
    ],
)
def test_mistakes_get_a_clear_sentence(
    generator: ImageGenerator, words: dict[str, Any], told: str
) -> None:
    given = {"content": PHOTOS / "chelsea.jpg", "style": PHOTOS / "rocket.jpg", **words}
    with pytest.raises(BadInput, match=told):
        generator.style_transfer(**given)


def test_a_model_without_attention_is_told() -> None:
    plain = make_generator(unet={"down_attention": (False,), "layers_per_block": 1})
    with pytest.raises(UnsupportedModel, match="no self-attention on its way up"):
        plain.style_transfer(PHOTOS / "chelsea.jpg", PHOTOS / "rocket.jpg")


def test_weights_add_up() -> None:
    assert normalised(None, 2) == (0.5, 0.5)
    assert normalised([3, 1], 2) == (0.75, 0.25)
    for wrong in ([1], [1, -1], [0, 0], [1, float("nan")]):
        with pytest.raises(BadInput):
            normalised(wrong, 2)
