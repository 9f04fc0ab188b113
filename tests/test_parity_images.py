"""Whole pictures against diffusers: its random pipelines, saved, loaded by us, the same noise.

Both sides start from the checkpoint on disk; the scheduler is swapped as diffusers' guide says,
`from_config` of the one that the checkpoint names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych import ImageGenerator
from reference_schedulers import SCHEDULERS, swap_scheduler
from tiny_pipelines import FAMILIES, make_pipeline, make_tokenizer
from traced import traced_once, untraced

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

# What diffusers 0.42 makes NumPy say.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 10  # more than any sampler remembers
HEIGHT, WIDTH = 64, 96  # not square; and torch refuses norms over a single pixel
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


@cache
@untraced()
def load_reference(folder: Path) -> Any:
    words: dict[str, Any] = {} if "xl" in folder.name else {"safety_checker": None}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False, **words)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@cache
def load(path: Path) -> ImageGenerator:
    return ImageGenerator.load(path, runtime="torch", device="cpu", dtype="float32")


def noise(count: int = 1) -> Any:
    shape = (count, 4, HEIGHT // 8, WIDTH // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(99))


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
    error = float(np.abs(np.asarray(ours) - theirs).max())
    assert error <= tolerance


def check_text(theirs: Any, ours: ImageGenerator) -> None:
    from diptych.text_to_image.prompts import encode_prompts

    encoder = theirs.text_encoder
    if not hasattr(encoder, "text_model"):
        # transformers 5 has no such part any more, and diffusers 0.42 asks for it at clip_skip.
        object.__setattr__(encoder, "text_model", encoder)
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
    sampler: str,
    guidance_scale: float,
    monkeypatch: pytest.MonkeyPatch,
    *,
    count: int = 1,
    steps: int = STEPS,
    ours: ImageGenerator | None = None,
    **words: Any,
) -> None:
    theirs, ours = load_reference(folder), ours or load(folder)
    seeds = list(range(5, 5 + count))
    swap_scheduler(theirs, sampler, seeds, monkeypatch)
    shared = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    with untraced():
        expected = theirs(
            [PROMPT] * count,
            negative_prompt=[NEGATIVE] * count,
            width=WIDTH,
            height=HEIGHT,
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
        **words,
    )
    for mine, reference in zip(found, expected, strict=True):
        assert np.asarray(reference).std() > 10  # a picture, not a plain field
        assert psnr(mine.image, reference) >= 40


# Each family with some samplers, so that every sampler is seen; all of them in the slow test.
SAMPLERS = tuple(SCHEDULERS)
FEW = [(FAMILIES[number % len(FAMILIES)], sampler, 7.5) for number, sampler in enumerate(SAMPLERS)]
FEW += [("sd1", "ddim", 1.0), ("sd2", "dpmpp_2m", 1.0), ("sdxl", "euler", 1.0)]
ALL = [case for case in product(FAMILIES, SAMPLERS, (7.5, 1.0)) if case not in FEW]


@pytest.mark.parametrize(
    ("family", "sampler", "guidance_scale"),
    # Coverage follows one of each family: the samplers have tests of their own.
    [*FEW[:3], *(pytest.param(*case, marks=pytest.mark.no_cover) for case in FEW[3:])],
)
def test_pictures(
    folder: Callable[[str], Path],
    family: str,
    sampler: str,
    guidance_scale: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compare(folder(family), sampler, guidance_scale, monkeypatch)


@pytest.mark.no_cover
def test_a_batch_with_fresh_noise_in_every_step(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Image i draws from seed + i on both sides."""
    compare(folder("sd1"), "euler_a", 7.5, monkeypatch, count=2)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "sampler", "guidance_scale"), ALL)
def test_all_pictures(
    folder: Callable[[str], Path],
    family: str,
    sampler: str,
    guidance_scale: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Over twenty guided steps of LCM these weights make differences large: noise times 1.000001
    # leaves 28 dB of ours itself (sd2). Eight are as many as LCM is used with.
    steps = 8 if sampler == "lcm" else 20
    compare(folder(family), sampler, guidance_scale, monkeypatch, steps=steps)


@pytest.mark.parametrize("family", traced_once(FAMILIES))
def test_the_sampler_of_the_checkpoint_is_the_default(
    folder: Callable[[str], Path], family: str
) -> None:
    theirs, ours = load_reference(folder(family)), load(folder(family))
    expected = theirs(PROMPT, num_inference_steps=8, width=WIDTH, height=HEIGHT, latents=noise())
    scale = 5.0 if family == "sdxl" else 7.5  # what the pipelines of diffusers default to
    found = ours.generate(PROMPT, num_inference_steps=8, guidance_scale=scale, latents=noise())
    assert psnr(found.image, expected.images[0]) >= 40


@pytest.mark.no_cover  # weights/test_diffusion.py reads such files, too
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_from_a_single_file(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ldm_files import write_single_file

    pipeline = make_pipeline(tmp_path / family, family, 3, full_vocabulary=True)  # type: ignore[arg-type]
    path = write_single_file(pipeline, family, tmp_path / "model.safetensors")
    ours = ImageGenerator.load(
        path,
        runtime="torch",
        device="cpu",
        dtype="float32",
        prediction_type=pipeline.scheduler.config.prediction_type,
    )
    compare(tmp_path / family, "euler", 7.5, monkeypatch, ours=ours, timestep_spacing="leading")


def test_another_noise_is_another_picture(folder: Callable[[str], Path]) -> None:
    """Show that the comparisons above can fail."""
    ours = load(folder("sd1"))
    one = ours.generate(PROMPT, num_inference_steps=STEPS, seed=1, width=WIDTH, height=HEIGHT)
    two = ours.generate(PROMPT, num_inference_steps=STEPS, seed=2, width=WIDTH, height=HEIGHT)
    other_words = ours.generate("x", num_inference_steps=STEPS, seed=1, width=WIDTH, height=HEIGHT)
    assert psnr(one.image, two.image) < 25
    assert psnr(one.image, other_words.image) < 40


@pytest.mark.parametrize("family", traced_once(FAMILIES))
def test_a_picture_is_the_same_in_any_batch(folder: Callable[[str], Path], family: str) -> None:
    """Alone on one row or between others: matrices of another shape add up in other orders."""
    ours = load(folder(family))
    words = {"width": WIDTH, "height": HEIGHT, "num_inference_steps": 4, "sampler": "euler_a"}
    prompts = [PROMPT, "x", "y " * 90]  # the last takes two chunks
    alone = [ours.generate(each, seed=7 + place, **words) for place, each in enumerate(prompts)]
    together = ours.generate(prompts, seed=7, batch_size=3, **words)
    for one, other in zip(alone, together, strict=True):
        assert psnr(one.image, other.image) >= 45


# Full size --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_networks_of_full_size(tmp_path: Path) -> None:
    """Hold the networks of Stable Diffusion 1.5 with random numbers: 860 M in the UNet alone."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    # Both sides in turn: two UNets of float32 would not fit next to each other everywhere.
    parts = {
        "unet": lambda: diffusers.UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            attention_head_dim=8,
        ),
        "vae": lambda: diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        ),
        "text_encoder": lambda: CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12, max_position_embeddings=77, hidden_act="quick_gelu",
                eos_token_id=49407,
            )
        ),
    }  # fmt: skip
    given = {
        "latents": torch.randn(1, 4, 32, 24),
        "words": torch.randn(1, 77, 768),
        "ids": torch.randint(0, 49406, (1, 77)).index_fill_(1, torch.tensor([40]), 49407),
    }
    expected: dict[str, Any] = {}
    for name, build in parts.items():
        module = build().eval()
        module.save_pretrained(tmp_path / name)
        if name == "unet":
            assert round(sum(p.numel() for p in module.parameters()) / 1e6, 1) == 859.5
        with torch.no_grad():
            expected[name] = full_size_answer(name, module, given)
        del module
    diffusers.DDIMScheduler(beta_schedule="scaled_linear").save_pretrained(tmp_path / "scheduler")
    make_tokenizer(full_vocabulary=True).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')

    networks = load(tmp_path).networks
    (found,) = networks["unet"](
        latents=given["latents"],
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=given["words"],
    )
    close(found, expected["unet"])
    (found,) = networks["vae_decoder"](latents=given["latents"])
    close(found, expected["vae"])
    found, _ = networks["text_encoder"](input_ids=given["ids"], clip_skip=0)
    close(found, expected["text_encoder"])


def full_size_answer(name: str, module: Any, given: dict[str, Any]) -> Any:
    if name == "unet":
        return module(given["latents"], torch.tensor([500.0]), given["words"]).sample
    if name == "vae":
        return module.decode(given["latents"]).sample
    return module(given["ids"]).last_hidden_state
