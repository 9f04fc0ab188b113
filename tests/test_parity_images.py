"""Whole pictures against diffusers: its random pipelines, saved, loaded by us, the same noise.

Both sides start from the checkpoint on disk; the scheduler is swapped as diffusers' guide says,
`from_config` of the one that the checkpoint names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych import ImageGenerator
from reference_schedulers import SCHEDULERS, swap_scheduler
from tiny_pipelines import FAMILIES, make_pipeline

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# What diffusers 0.42 makes NumPy say.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 20
SIDE = 64
PROMPT, NEGATIVE = "a red fox, jumping over the lazy dog", "blurred, grey"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a family's pipeline, made when it is first asked for."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_pipeline(made[family], family, FAMILIES.index(family))  # type: ignore[arg-type]
        return made[family]

    return of


def load_reference(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load(path: Path) -> ImageGenerator:
    return ImageGenerator.load(path, runtime="torch", device="cpu", dtype="float32")


def noise(count: int = 1, side: int = SIDE) -> Any:
    return torch.randn(
        (count, 4, side // 8, side // 8), generator=torch.Generator().manual_seed(99)
    )


def psnr(ours: Any, theirs: Any) -> float:
    difference = np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)
    error = float(np.mean(difference**2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


# Networks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_networks(folder: Callable[[str], Path], family: str) -> None:
    theirs, ours = load_reference(folder(family)), load(folder(family))
    check_text(theirs, ours)
    check_unet(theirs, ours, side=8)
    check_vae(theirs, ours, side=4)


def close(ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
    theirs = theirs.detach().float().numpy()
    assert theirs.std() > 1e-2  # there is something to compare
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance


def check_text(theirs: Any, ours: ImageGenerator) -> None:
    from diptych.text_to_image.prompts import encode_prompts

    for clip_skip in (0, 1):
        expected = theirs.encode_prompt(
            PROMPT, negative_prompt=NEGATIVE, device="cpu", num_images_per_prompt=1,
            do_classifier_free_guidance=True, clip_skip=clip_skip or None,
        )  # fmt: skip
        (pair,) = encode_prompts(
            ours.networks, ours.tokenizers, [PROMPT], [NEGATIVE], clip_skip=clip_skip
        )
        assert pair.negative is not None
        close(pair.positive.encoder_hidden_states, expected[0])
        close(pair.negative.encoder_hidden_states, expected[1])
        if len(expected) == 4:
            close(pair.positive.pooled, expected[2])
            close(pair.negative.pooled, expected[3])


def check_unet(theirs: Any, ours: ImageGenerator, side: int) -> None:
    config = theirs.unet.config
    # One side odd after two halvings: the upsampler has to be told the size of the skip.
    latents = torch.randn(2, 4, side, side + 4)
    told = {"encoder_hidden_states": torch.randn(2, 77, config.cross_attention_dim)}
    added: dict[str, Any] = {}
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {
            "text_embeds": torch.randn(2, width),
            "time_ids": torch.tensor([[64.0, 96, 0, 0, 64, 96]] * 2),
        }
    for timestep in (999.0, 381.0, 1.0):
        times = torch.full((2,), timestep)
        with torch.no_grad():
            expected = theirs.unet(latents, times, **told, added_cond_kwargs=added or None).sample
        (found,) = ours.networks["unet"](latents=latents, timestep=times, **told, **added)
        close(found, expected)


def check_vae(theirs: Any, ours: ImageGenerator, side: int) -> None:
    latents = torch.randn(1, 4, side, side + 1)
    pixels = torch.rand(1, 3, 8 * side, 8 * side + 16) * 2 - 1
    with torch.no_grad():
        decoded = theirs.vae.decode(latents).sample
        encoded = theirs.vae.encode(pixels).latent_dist
    (found,) = ours.networks["vae_decoder"](latents=latents)
    close(found, decoded)
    mean, log_variance = ours.networks["vae_encoder"](pixel_values=pixels)
    close(mean, encoded.mean)
    close(log_variance, encoded.logvar)


# Pictures ---------------------------------------------------------------------------------------


def compare(
    folder: Path,
    path: Path,
    sampler: str,
    guidance_scale: float,
    monkeypatch: pytest.MonkeyPatch,
    *,
    count: int = 1,
    steps: int = STEPS,
    ours: ImageGenerator | None = None,
) -> None:
    theirs, ours = load_reference(folder), ours or load(path)
    seeds = list(range(5, 5 + count))
    swap_scheduler(theirs, sampler, seeds, monkeypatch)
    shared = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    expected = theirs(
        [PROMPT] * count,
        negative_prompt=[NEGATIVE] * count,
        width=SIDE,
        height=SIDE,
        latents=noise(count),
        **shared,
    ).images
    found = ours.generate(
        [PROMPT] * count,
        negative_prompt=NEGATIVE,
        latents=noise(count),
        seed=seeds[0],
        sampler=sampler,
        **shared,
    )
    for mine, reference in zip(found, expected, strict=True):
        assert np.asarray(reference).std() > 10  # a picture, not a plain field
        assert psnr(mine.image, reference) >= 40


# Each family with some samplers, so that every sampler is seen; all of them in the slow test.
SAMPLERS = tuple(SCHEDULERS)
FEW = [(FAMILIES[number % len(FAMILIES)], sampler, 7.5) for number, sampler in enumerate(SAMPLERS)]
FEW += [("sd1", "ddim", 1.0), ("sd2", "dpmpp_2m", 1.0), ("sdxl", "euler", 1.0)]
ALL = [case for case in product(FAMILIES, SAMPLERS, (7.5, 1.0)) if case not in FEW]


@pytest.mark.parametrize(("family", "sampler", "guidance_scale"), FEW)
def test_pictures(
    folder: Callable[[str], Path],
    family: str,
    sampler: str,
    guidance_scale: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compare(folder(family), folder(family), sampler, guidance_scale, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "sampler", "guidance_scale"), ALL)
def test_all_pictures(
    folder: Callable[[str], Path],
    family: str,
    sampler: str,
    guidance_scale: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compare(folder(family), folder(family), sampler, guidance_scale, monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sampler_of_the_checkpoint_is_the_default(
    folder: Callable[[str], Path], family: str
) -> None:
    theirs, ours = load_reference(folder(family)), load(folder(family))
    expected = theirs(PROMPT, num_inference_steps=8, width=SIDE, height=SIDE, latents=noise())
    scale = 5.0 if family == "sdxl" else 7.5  # what the pipelines of diffusers default to
    found = ours.generate(PROMPT, num_inference_steps=8, guidance_scale=scale, latents=noise())
    assert psnr(found.image, expected.images[0]) >= 40


def test_another_noise_is_another_picture(folder: Callable[[str], Path]) -> None:
    """Show that the comparisons above can fail."""
    ours = load(folder("sd1"))
    one = ours.generate(PROMPT, num_inference_steps=STEPS, seed=1, width=SIDE, height=SIDE)
    two = ours.generate(PROMPT, num_inference_steps=STEPS, seed=2, width=SIDE, height=SIDE)
    other_words = ours.generate("x", num_inference_steps=STEPS, seed=1, width=SIDE, height=SIDE)
    assert psnr(one.image, two.image) < 25
    assert psnr(one.image, other_words.image) < 40
