"""Fine-tuned generators beside the references: the same loss, the same steps, files they load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diptych.errors import BadInput, UnsupportedModel
from diptych.text_to_image.generator import ImageGenerator
from diptych.training.finetune import finetune_generator
from diptych.training.generator import GeneratorTask
from tiny_pipelines import make_pipeline
from traced import traced_once, untraced
from training_tasks import SMALL, make_task


def shown(task: GeneratorTask, number: int) -> list[dict[str, Any]]:
    """Return what batch `number` shows: latents, noise, timestep and caption of each row."""
    rows = []
    for draw in task._draws(number, task._plan, task._train, 0, slice(None)):
        latents = task._shown(draw).latents
        noise = task._noise(draw, latents.shape)
        rows.append(
            {
                "latents": latents,
                "noise": noise,
                "timestep": draw.timestep,
                "caption": draw.caption,
                "item": draw.item,
            }
        )
    return rows


@untraced()
def reference_losses(
    pipeline: Any, rows: Sequence[Mapping[str, Any]], snr_gamma: float | None
) -> torch.Tensor:
    """Return each row's loss as diffusers' train_text_to_image computes it."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    latents = torch.stack([row["latents"] for row in rows])
    noise = torch.stack([row["noise"] for row in rows])
    timesteps = torch.tensor([row["timestep"] for row in rows])
    tokens = pipeline.tokenizer(
        [row["caption"] for row in rows],
        padding="max_length",
        truncation=True,
        max_length=77,
        return_tensors="pt",
    ).input_ids
    states = pipeline.text_encoder(tokens)[0]
    noisy = scheduler.add_noise(latents, noise, timesteps)
    found = pipeline.unet(noisy, timesteps, states).sample
    is_v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if is_v else noise
    losses = (found - target).square().mean((1, 2, 3))
    if snr_gamma is None:
        return losses
    snr = compute_snr(scheduler, timesteps)
    return losses * snr.clamp(max=snr_gamma) / (snr + 1 if is_v else snr)


@pytest.mark.parametrize(
    ("family", "snr_gamma", "noise_offset"),
    [("sd1", None, 0.0), ("sd1", 5.0, 0.1), ("sd2", 5.0, 0.0)],
)
def test_the_loss_is_that_of_diffusers(
    tmp_path: Path, pictures: Path, family: Any, snr_gamma: float | None, noise_offset: float
) -> None:
    pipeline = make_pipeline(tmp_path / "model", family, seed=8)
    task = make_task(
        tmp_path / "model",
        pictures,
        tmp_path / "run",
        snr_gamma=snr_gamma,
        noise_offset=noise_offset,
        caption_dropout=0.3,
    )
    for number in range(3):
        with torch.no_grad():
            ours = task.losses(number, slice(None))
            theirs = reference_losses(pipeline, shown(task, number), snr_gamma)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_latents_are_drawn_from_what_diffusers_encodes(
    tmp_path: Path, sd1: Path, pictures: Path
) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(sd1, subfolder="vae")
    task = make_task(sd1, pictures, tmp_path)
    pixels, found = [], []
    for item in task._train:
        draws = [task._encoder.latents(item, (64, 64), (seed, 1)).latents for seed in range(200)]
        found.append(torch.stack(draws))
        values = np.asarray(item.open(), np.float32) / 127.5 - 1
        pixels.append(torch.from_numpy(values.transpose(2, 0, 1)))
    with torch.no_grad():
        spread = vae.encode(torch.stack(pixels)).latent_dist
    for index, draws in enumerate(found):
        mean, std = spread.mean[index] * 0.18215, spread.std[index] * 0.18215
        assert ((draws.mean(0) - mean).abs() < 6 * std / 200**0.5 + 1e-6).all()
        assert abs(float((draws.std(0) / std).mean()) - 1) < 0.05


def assert_same_way(
    found: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    start: Mapping[str, torch.Tensor],
) -> None:
    """Compare where two trainings went from one start.

    Adam divides by the gradient's size: where that is nearly 0, rounding decides the sign of a
    step, so single numbers may differ.
    """
    assert set(found) == set(wanted)
    way = sum(float((wanted[name] - start[name]).square().sum()) for name in wanted)
    gap = sum(float((wanted[name] - found[name]).square().sum()) for name in wanted)
    assert way > 0
    assert gap**0.5 < 0.02 * way**0.5


@pytest.mark.no_cover
def test_lora_steps_are_those_of_peft(tmp_path: Path, pictures: Path) -> None:
    """Both begin alike and see the same: after five steps of AdamW they are alike."""
    from peft import LoraConfig

    pipeline = make_pipeline(tmp_path / "model", "sd1", seed=9)
    words = {"max_train_steps": 5, "rank": 3, "alpha": 6.0, "learning_rate": 1e-3, "seed": 4}
    task = make_task(tmp_path / "model", pictures, tmp_path / "probe", **words)
    unet = pipeline.unet
    unet.requires_grad_(False)
    modules = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=modules))
    named = {
        name.replace(".default.weight", ""): each
        for name, each in unet.named_parameters()
        if each.requires_grad
    }
    ours = {name.removeprefix("unet."): each for name, each in task.groups[0].parameters.items()}
    assert set(named) == set(ours)
    with torch.no_grad():
        for name, each in named.items():
            each.copy_(ours[name])
    start = {name: each.detach().clone() for name, each in named.items()}
    optimizer = torch.optim.AdamW(named.values(), lr=1e-3, weight_decay=1e-2)
    for number in range(5):
        optimizer.zero_grad()
        reference_losses(pipeline, shown(task, number), None).mean().backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
    finetune_generator(
        pictures,
        tmp_path / "run",
        tmp_path / "model",
        **{**SMALL, **words, "validation_fraction": 0.25},
    )
    written = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    found = {
        # alpha / rank is multiplied into the second matrix
        name: written[f"unet.{name}.weight"] / (2.0 if name.endswith("lora_B") else 1.0)
        for name in named
    }
    assert len(written) == len(named)
    assert_same_way(found, {name: each.detach() for name, each in named.items()}, start)


def test_full_steps_are_those_of_diffusers(tmp_path: Path, pictures: Path) -> None:
    pipeline = make_pipeline(tmp_path / "model", "sd2", seed=10)
    words = {
        "method": "full",
        "learning_rate": 1e-4,
        "train_text_encoder": True,
        "gradient_accumulation_steps": 2,
    }
    task = make_task(tmp_path / "model", pictures, tmp_path / "probe", **words)
    parameters = [*pipeline.unet.parameters(), *pipeline.text_encoder.parameters()]
    for each in parameters:
        each.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        for part in range(2):
            rows = shown(task, 2 * step + part)
            (reference_losses(pipeline, rows, None).mean() / 2).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    finished = finetune_generator(
        pictures,
        tmp_path / "run",
        tmp_path / "model",
        **{**SMALL, **words, "validation_fraction": 0.25},
    )
    from diffusers import UNet2DConditionModel

    (folder,) = finished.files
    written = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()
    before = load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert_same_way(written, pipeline.unet.state_dict(), before)


def picture_of(image: Any) -> np.ndarray[Any, Any]:
    return np.asarray(image, np.float64)


def psnr(one: Any, other: Any) -> float:
    error = np.mean((picture_of(one) - picture_of(other)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


@untraced()
def drawn_by_diffusers(pipeline: Any, prompt: str, noise: np.ndarray[Any, Any]) -> Any:
    from diffusers import DDIMScheduler

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt,
        num_inference_steps=3,
        guidance_scale=3.0,
        height=64,
        width=64,
        latents=torch.from_numpy(noise),
    ).images[0]


@pytest.mark.parametrize("family", traced_once(["sdxl", "sd1"]))
def test_diffusers_draws_the_same_picture_with_the_lora(
    tmp_path: Path, pictures: Path, family: Any, request: pytest.FixtureRequest
) -> None:
    import diffusers

    model = request.getfixturevalue(family)
    finetune_generator(
        pictures,
        tmp_path,
        model,
        **SMALL,
        learning_rate=0.05,
        rank=4,
        alpha=8.0,
        lora_layers="attention,feed-forward",
        train_text_encoder=True,
        save_kohya=True,
    )
    noise = np.random.default_rng(2).standard_normal((1, 4, 8, 8), np.float32)
    words: dict[str, Any] = {
        "latents": noise,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "sampler": "ddim",
        "width": 64,
        "height": 64,
    }
    generator = ImageGenerator.load(model, runtime="torch")
    plain = generator.generate("a red bird", **words).image
    xl = "XL" if family == "sdxl" else ""
    pipeline = getattr(diffusers, f"StableDiffusion{xl}Pipeline").from_pretrained(model)
    for layout in ("pytorch_lora_weights", "kohya_lora"):
        lora = tmp_path / f"{layout}.safetensors"
        generator.load_lora(lora)
        ours = generator.generate("a red bird", **words).image
        pipeline.load_lora_weights(str(tmp_path), weight_name=lora.name)
        theirs = drawn_by_diffusers(pipeline, "a red bird", noise)
        assert psnr(ours, theirs) >= 40, layout
        assert psnr(plain, ours) < 35, "the LoRA changes the picture"
        generator.unload_lora()
        pipeline.unload_lora_weights()


def test_a_learned_word_is_loaded_by_diffusers(tmp_path: Path, sd1: Path, pictures: Path) -> None:
    import diffusers

    finished = finetune_generator(
        pictures,
        tmp_path,
        sd1,
        **{**SMALL, "max_train_steps": 8},
        method="textual-inversion",
        placeholder_token="<thing>",
        initializer_token="bird",
        num_vectors=1,
        learning_rate=0.3,
    )
    assert [path.name for path in finished.files] == ["learned_embeds.safetensors"]
    ((token, vectors),) = load_file(finished.files[0]).items()
    assert token == "<thing>"
    assert vectors.shape == (1, 32)
    generator = ImageGenerator.load(sd1, runtime="torch")
    assert generator.load_textual_inversion(finished.files[0]) == "<thing>"
    noise = np.random.default_rng(2).standard_normal((1, 4, 8, 8), np.float32)
    words: dict[str, Any] = {"latents": noise, "num_inference_steps": 3, "guidance_scale": 3.0}
    ours = generator.generate("a <thing>", sampler="ddim", **words).image
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(sd1)
    pipeline.load_textual_inversion(str(tmp_path), weight_name="learned_embeds.safetensors")
    assert psnr(ours, drawn_by_diffusers(pipeline, "a <thing>", noise)) >= 40


def test_only_the_new_word_learns(tmp_path: Path, sd1: Path, pictures: Path) -> None:
    task = make_task(
        sd1,
        pictures,
        tmp_path,
        method="textual-inversion",
        placeholder_token="<thing>",
        num_vectors=2,
        cache_latents=False,  # so that the autoencoder is there all the time
    )
    before = {
        f"{name}.{key}": value.clone()
        for name, module in task.modules.items()
        for key, value in module.state_dict().items()
    }
    (group,) = task.groups
    optimizer = torch.optim.AdamW(group.parameters.values(), lr=0.1)
    task.losses(0, slice(None)).sum().backward()
    optimizer.step()
    for name, module in task.modules.items():
        for key, value in module.state_dict().items():
            is_word = key.endswith("token_embedding.vectors")
            assert torch.equal(value, before[f"{name}.{key}"]) != is_word, key


def test_sdxl_learns_a_word_for_both_encoders(tmp_path: Path, sdxl: Path, pictures: Path) -> None:
    finished = finetune_generator(
        pictures, tmp_path, sdxl, **SMALL, method="textual-inversion", placeholder_token="<thing>"
    )
    assert set(load_file(finished.files[0])) == {"clip_l", "clip_g"}
    generator = ImageGenerator.load(sdxl, runtime="torch")
    assert generator.load_textual_inversion(finished.files[0], token="<thing>") == "<thing>"


def test_sdxl_is_told_sizes_and_crops(tmp_path: Path, sdxl: Path) -> None:
    from training_pictures import draw_pictures

    data = draw_pictures(tmp_path / "data", 4, seed=2, size=(96, 48))
    task = make_task(sdxl, data, tmp_path / "run", buckets=False)
    draws = task._draws(0, task._plan, task._train, 0, slice(None))
    seen = [task._shown(draw) for draw in draws]
    told = task._told(draws, seen)
    # 96x48 is scaled to 128x64, and its middle 64x64 begins at column 32.
    assert told["time_ids"].tolist() == [[48, 96, 0, 32, 64, 64]] * 2


def test_a_fresh_lora_changes_nothing(tmp_path: Path, sd1: Path, pictures: Path) -> None:
    with_lora = make_task(sd1, pictures, tmp_path / "a", lora_layers="all", rank=5)
    without = make_task(sd1, pictures, tmp_path / "b", method="full")
    with torch.no_grad():
        found = with_lora.losses(0, slice(None))
        assert torch.equal(found, without.losses(0, slice(None)))


@pytest.mark.no_cover  # the lines of a short run, again and again
def test_one_batch_is_learned_by_heart(tmp_path: Path, sd1: Path) -> None:
    from training_pictures import draw_pictures

    data = draw_pictures(tmp_path / "data", 2, seed=5)
    finished = finetune_generator(
        data,
        tmp_path / "run",
        sd1,
        resolution=64,
        max_train_steps=30,
        num_sample_images=0,
        train_batch_size=2,
        rank=8,
        lora_layers="all",
        learning_rate=0.01,
        validation_fraction=0.0,
        logging_steps=5,
    )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert finished.start is None, "nothing was held out"
    assert np.mean(losses[-3:]) < 0.6 * losses[0]


def test_gradient_checkpointing_changes_no_bit(tmp_path: Path, sd1: Path, pictures: Path) -> None:
    found = []
    for is_on in (False, True):
        folder = tmp_path / str(is_on)
        words = {**SMALL, "gradient_checkpointing": is_on, "train_text_encoder": True}
        finetune_generator(pictures, folder, sd1, **words)
        found.append((folder / "pytorch_lora_weights.safetensors").read_bytes())
    assert found[0] == found[1]


def test_dreambooth_keeps_what_the_class_looks_like(
    tmp_path: Path, sd1: Path, pictures: Path
) -> None:
    words: dict[str, Any] = {
        **SMALL,
        "method": "dreambooth",
        "instance_prompt": "a photo of sks bird",
        "class_prompt": "a photo of a bird",
        "num_class_images": 2,
        "rank": 2,
    }
    finished = finetune_generator(pictures, tmp_path / "a", sd1, **words)
    drawn = sorted((tmp_path / "a" / "class_images").glob("*.png"))
    assert len(drawn) == 2
    expected = ImageGenerator.load(sd1, runtime="torch").generate(
        "a photo of a bird", seed=0, width=64, height=64
    )
    assert psnr(Image.open(drawn[0]), expected.image) > 50  # kernels lie otherwise in memory
    # Those that are there already are not drawn again.
    shutil.copytree(tmp_path / "a" / "class_images", tmp_path / "b" / "class_images")
    finetune_generator(pictures, tmp_path / "b", sd1, **{**words, "prior_loss_weight": 0.0})
    names = [
        folder / "pytorch_lora_weights.safetensors" for folder in (tmp_path / "a", tmp_path / "b")
    ]
    assert finished.files == (names[0],)
    assert names[0].read_bytes() != names[1].read_bytes()
    times = [path.stat().st_mtime_ns for path in drawn]
    kept = sorted((tmp_path / "b" / "class_images").glob("*.png"))
    assert [path.stat().st_mtime_ns for path in kept] == times
    # Those of another class are.
    shutil.copytree(tmp_path / "a" / "class_images", tmp_path / "c" / "class_images")
    other = {**words, "class_prompt": "a photo of a cat"}
    finetune_generator(pictures, tmp_path / "c", sd1, **other)
    others = sorted((tmp_path / "c" / "class_images").glob("*.png"))
    assert len(others) == 2
    with Image.open(others[0]) as picture:
        assert "a photo of a cat" in picture.info["parameters"]


def test_half_precision_stays_near(tmp_path: Path, sd1: Path, pictures: Path) -> None:
    exact = make_task(sd1, pictures, tmp_path / "a")
    half = make_task(sd1, pictures, tmp_path / "b", mixed_precision="bf16")
    assert next(half.modules["unet"].parameters()).dtype == torch.bfloat16
    assert all(each.dtype == torch.float32 for each in half.groups[0].parameters.values())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = half.losses(0, slice(None))
    with torch.no_grad():
        torch.testing.assert_close(found, exact.losses(0, slice(None)), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    "method",
    ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("full", "textual-inversion"))],
)
def test_half_precision_runs_to_the_end(
    tmp_path: Path, sd1: Path, pictures: Path, method: str
) -> None:
    words = {**SMALL, "num_sample_images": 1, "mixed_precision": "bf16", "method": method}
    words |= {"sample_steps": 3}
    if method == "textual-inversion":
        words |= {"placeholder_token": "<thing>", "validation_fraction": 0.25}
    finished = finetune_generator(pictures, tmp_path, sd1, **words)
    assert finished.start is not None
    assert np.isfinite(finished.start)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 2


def test_validation_is_the_same_every_time(tmp_path: Path, sd1: Path, pictures: Path) -> None:
    task = make_task(sd1, pictures, tmp_path)
    with torch.no_grad():
        first, second = task.validate(), task.validate()
    assert first == second
    assert first is not None
    assert first.loss == pytest.approx(np.mean([*first.parts.values()]))
    assert list(first.parts) == ["t0-250", "t250-500", "t500-750", "t750-1000"]


@pytest.mark.no_cover
def test_samples_are_what_the_finished_model_draws(
    tmp_path: Path, sd1: Path, pictures: Path
) -> None:
    words = {**SMALL, "sample_prompts": ("a bird",), "learning_rate": 0.05, "sample_steps": 3}
    finished = finetune_generator(pictures, tmp_path, sd1, **words)
    generator = ImageGenerator.load(sd1, runtime="torch")
    first = generator.generate("a bird", seed=0, width=64, height=64).image
    generator.load_lora(finished.files[0])
    last = generator.generate("a bird", seed=0, width=64, height=64).image
    seen = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "samples").glob("*.png"))]
    assert psnr(seen[0], first) > 50
    assert psnr(seen[-1], last) > 45
    assert psnr(seen[0], seen[-1]) < 45


def test_networks_for_inpainting_are_refused(tmp_path: Path, pictures: Path) -> None:
    make_pipeline(tmp_path / "model", "sd1", seed=1, in_channels=9)
    with pytest.raises(UnsupportedModel, match="channels"):
        finetune_generator(pictures, tmp_path / "run", tmp_path / "model", **SMALL)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"lora_layers": "to_quux"}, "'to_quux' names no layer"),
        ({"rank": 0}, "rank is 0"),
        ({"method": "dreambooth"}, "instance_prompt"),
        ({"method": "textual-inversion"}, "placeholder_token"),
        ({"learning_rte": 1.0}, "did you mean learning_rate"),
        ({"network_dim": 4}, "did you mean rank"),
        ({"method": "textual-inversion", "placeholder_token": "a"}, "token already"),
        ({"center_crop": False}, "cache_latents"),
        ({"optimizer": "adamw_8bit"}, "bitsandbytes"),
        ({"save_single_file": True}, "save_single_file is for all weights"),
        ({"method": "full", "save_kohya": True}, "save_kohya is for a LoRA"),
        ({"method": "full", "rank": 4}, "rank is of a LoRA, and method is 'full'"),
        ({"placeholder_token": "<a>"}, "placeholder_token is for method='textual-inversion'"),
        ({"class_prompt": "a dog"}, "class_prompt is for method='dreambooth'"),
    ],
)
def test_options_that_cannot_be_used(
    tmp_path: Path, sd1: Path, pictures: Path, words: dict[str, Any], told: str
) -> None:
    with pytest.raises(BadInput, match=told):
        finetune_generator(pictures, tmp_path, sd1, **{**SMALL, **words})


def test_the_default_generator_learns_a_lora(tmp_path: Path) -> None:
    from training_pictures import draw_pictures

    data = draw_pictures(tmp_path / "data", 4, seed=2, size=(128, 128))
    words = {"max_train_steps": 2, "train_batch_size": 2, "num_sample_images": 0}
    finished = finetune_generator(data, tmp_path / "run", **words)
    generator = ImageGenerator.load(runtime="torch")
    generator.load_lora(finished.files[0])
    drawn = generator.generate("a red circle", seed=1, num_inference_steps=2).image
    assert drawn.size == (128, 128)


def test_all_weights_are_written_as_one_file_too(tmp_path: Path, pictures: Path) -> None:
    make_pipeline(tmp_path / "model", "sd1", seed=6, full_vocabulary=True)
    words = {**SMALL, "max_train_steps": 1, "method": "full", "save_single_file": True}
    finished = finetune_generator(pictures, tmp_path / "run", tmp_path / "model", **words)
    folder, file = finished.files
    assert file.name == "model.safetensors"
    parts = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    single = load_file(file)
    assert torch.equal(
        single["model.diffusion_model.input_blocks.0.0.weight"], parts["conv_in.weight"]
    )
    generator = ImageGenerator.load(folder, runtime="torch")
    drawn = generator.generate("a bird", num_inference_steps=1, width=64, height=64)
    assert drawn.image.size == (64, 64)
