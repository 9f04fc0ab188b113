"""Pictures made from pictures, against diffusers' pipelines for the same checkpoints on disk.

Its pipelines draw from the autoencoder's distribution and add noise of their own: both are set to
what we do, the mean and the noise that is given.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diptych import ImageGenerator
from reference_schedulers import swap_scheduler
from test_parity_images import HEIGHT, NEGATIVE, PROMPT, STEPS, WIDTH, load, noise, psnr
from tiny_pipelines import FAMILIES, make_pipeline
from traced import untraced

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]

SHARED: dict[str, Any] = {
    "num_inference_steps": STEPS,
    "guidance_scale": 5.0,
    "negative_prompt": NEGATIVE,
    "width": WIDTH,
    "height": HEIGHT,
}


class Folders(dict[tuple[str, int], Path]):
    """Make the pipeline of a family and a number of channels when it is first asked for."""

    def __init__(self, new: pytest.TempPathFactory) -> None:
        self.new = new

    def __missing__(self, key: tuple[str, int]) -> Path:
        self[key] = self.new.mktemp("-".join(map(str, key)))
        make_pipeline(self[key], key[0], FAMILIES.index(key[0]), key[1])  # type: ignore[arg-type]
        return self[key]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory)


def picture(size: tuple[int, int] = (WIDTH, HEIGHT), seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def box_mask(size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[size[1] // 4 : -size[1] // 4, size[0] // 3 : -size[0] // 5] = 255
    return Image.fromarray(mask)


@cache
@untraced()
def open_reference(folder: Path, task: str) -> Any:
    xl = "XL" if "sdxl" in folder.name else ""
    words: dict[str, Any] = {} if xl else {"safety_checker": None}
    kind = getattr(diffusers, f"StableDiffusion{xl}{task}Pipeline")
    pipeline = kind.from_pretrained(folder, low_cpu_mem_usage=False, **words)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference(folder: Path, task: str, sampler: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Open diffusers' pipeline of a task with our sampler, our noise, and no other chance."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    pipeline = open_reference(folder, task)
    swap_scheduler(pipeline, sampler, [5], monkeypatch)
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean
    )
    import sys

    module = sys.modules[type(pipeline).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise())
    return pipeline


# Image to image ---------------------------------------------------------------------------------

# Without lms: begun in the middle, diffusers' scheduler weighs slopes that it has not seen yet.
SAMPLERS = ("ddim", "euler", "euler_a", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "pndm")
FEW = [("sd1", "pndm", 0.8), ("sd2", "ddim", 0.33), ("sdxl", "euler_a", 0.8)]
ALL = [
    (family, sampler, strength)
    for family in FAMILIES
    for sampler in SAMPLERS
    for strength in (0.95, 0.8, 0.33)
]
CASES = [*FEW, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in FEW)]


@pytest.mark.parametrize(("family", "sampler", "strength"), CASES)
def test_image_to_image(
    folders: Folders, family: str, sampler: str, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = reference(folders[family, 4], "Img2Img", sampler, monkeypatch)
    shared = {key: SHARED[key] for key in SHARED if key not in ("width", "height")}
    with untraced():
        expected = theirs(PROMPT, image=picture(), strength=strength, **shared).images[0]
    found = load(folders[family, 4]).image_to_image(
        picture(), PROMPT, strength=strength, latents=noise(), seed=5, sampler=sampler, **shared
    )
    assert np.asarray(expected).std() > 10
    assert psnr(found.image, expected) >= 40


def test_strength_0_is_the_autoencoder_and_1_is_generation(folders: Folders) -> None:
    ours: ImageGenerator = load(folders["sd1", 4])
    pixels = (np.asarray(picture(), np.float32).transpose(2, 0, 1)[None] / 127.5) - 1
    (known,) = ours.decode(ours.encode(pixels))
    words = {"num_inference_steps": 6, "seed": 3}
    still = ours.image_to_image(picture(), PROMPT, strength=0, **words)
    assert psnr(still.image, known) >= 60
    free = ours.image_to_image(picture(), PROMPT, strength=1, **words)
    made = ours.generate(PROMPT, width=WIDTH, height=HEIGHT, **words)
    assert np.array_equal(np.asarray(free.image), np.asarray(made.image))


# Inpainting -------------------------------------------------------------------------------------


SOME = [
    ("sd1", 4, "pndm", 0.33),
    ("sd2", 4, "ddim", 0.17),
    ("sdxl", 4, "dpmpp_2m", 1.0),
    ("sd2", 9, "ddim", 1.0),
]
EVERY = [
    (family, channels, sampler, strength)
    for family in FAMILIES
    for channels in (4, 9)
    for sampler in SAMPLERS
    for strength in (1.0, 0.7, 0.33)
]
INPAINTINGS = [
    *SOME,
    *(pytest.param(*case, marks=pytest.mark.slow) for case in EVERY if case not in SOME),
]


@pytest.mark.parametrize(("family", "channels", "sampler", "strength"), INPAINTINGS)
def test_inpainting(
    folders: Folders,
    family: str,
    channels: int,
    sampler: str,
    strength: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = reference(folders[family, channels], "Inpaint", sampler, monkeypatch)
    mask = box_mask()
    with untraced():
        expected = theirs(PROMPT, image=picture(), mask_image=mask, strength=strength, **SHARED)
    words = {"strength": strength, "latents": noise(), "seed": 5, "sampler": sampler, **SHARED}
    ours = load(folders[family, channels])
    before = ours.inpaint(picture(), mask, PROMPT, keep_unmasked=False, **words)
    assert psnr(before.image, expected.images[0]) >= 40
    after = ours.inpaint(picture(), mask, PROMPT, **words)
    outside = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(after.image)[outside], np.asarray(picture())[outside])
    inside = np.asarray(mask) > 0
    changed = np.asarray(after.image, int)[inside] - np.asarray(picture(), int)[inside]
    assert np.abs(changed).mean() > 5


@pytest.mark.parametrize(("family", "channels"), [("sd1", 4), ("sd2", 9)])
def test_only_the_masked_part_in_full_size(
    folders: Folders, family: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The painted part, before it is pasted: what diffusers hands to its last step."""
    theirs = reference(folders[family, channels], "Inpaint", "ddim", monkeypatch)
    size = (150, 117)
    mask = Image.new("L", size)
    mask.paste(255, (40, 30, 71, 55))
    seen: list[Any] = []
    monkeypatch.setattr(
        theirs.image_processor, "apply_overlay", lambda m, o, image, c: seen.append(image) or image
    )
    theirs(
        PROMPT,
        image=picture(size),
        mask_image=mask,
        padding_mask_crop=8,
        strength=0.8,
        **SHARED,
    )
    ours = load(folders[family, channels])
    steps = list(
        ours.denoising_steps(
            PROMPT,
            image=picture(size),
            mask_image=mask,
            padding_mask_crop=8,
            strength=0.8,
            latents=noise(),
            seed=5,
            sampler="ddim",
            **SHARED,
        )
    )
    (found,) = ours.decode(steps[-1].latents)
    assert psnr(found, seen[0]) >= 40
    result = np.asarray(steps[-1].result().image)
    outside = np.asarray(mask) == 0
    assert result.shape == (117, 150, 3)
    assert np.array_equal(result[outside], np.asarray(picture(size))[outside])
