"""The small decoder of previews against diffusers, through files on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from diptych import ImageGenerator
from diptych.errors import BadInput, UnknownModel, UnsupportedModel, WeightsMismatch
from diptych.weights.load_tiny_vae import load_tiny_vae
from tiny_pipelines import make_pipeline

CONFIGS: dict[str, dict[str, Any]] = {
    "taesd": {},
    "two levels": {"num_decoder_blocks": (2, 1), "latent_channels": 8},
    "by four": {"num_decoder_blocks": (1, 0, 2), "upsampling_scaling_factor": 4},
    "scaled": {"num_decoder_blocks": (1, 1, 1, 1), "scaling_factor": 0.5, "shift_factor": 0.1},
}


def make_tiny(folder: Path, width: int = 8, **changes: Any) -> AutoencoderTiny:
    torch.manual_seed(3)
    levels = len(changes.get("num_decoder_blocks", (1, 1, 1, 1)))
    made = AutoencoderTiny(
        encoder_block_out_channels=(width,) * 4,
        decoder_block_out_channels=(width,) * levels,
        num_encoder_blocks=(1, 1, 1, 1),
        **changes,
    )
    made.save_pretrained(folder)
    return made.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_decodes_as_the_reference(name: str, tmp_path: Path) -> None:
    reference = make_tiny(tmp_path, **CONFIGS[name])
    ours = load_tiny_vae(tmp_path)
    latents = 4 * torch.randn(2, ours.config.latent_channels, 3, 5)
    with torch.no_grad():
        expected = reference.decode(latents).sample
        torch.testing.assert_close(ours.decode(latents), expected, atol=1e-5, rtol=1e-5)
    assert ours.config.downsampling == expected.shape[-1] // 5
    assert ours.config.scaling_factor == reference.config.scaling_factor


def test_the_defaults_are_those_of_the_published_model(tmp_path: Path) -> None:
    reference = AutoencoderTiny()
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    few = {"_class_name": "AutoencoderTiny", "latent_channels": config["latent_channels"]}
    (tmp_path / "config.json").write_text(json.dumps(few))
    ours = load_tiny_vae(tmp_path)
    assert len(ours.decoder.layers) == len(reference.decoder.layers)


def test_previews_of_a_run(tmp_path: Path) -> None:
    make_pipeline(tmp_path / "model", "sd1", 0)
    changes = {"scaling_factor": 0.5, "shift_factor": 0.1}
    reference = make_tiny(tmp_path / "tiny", num_decoder_blocks=(1, 1, 1, 1), **changes)
    generator = ImageGenerator.load(tmp_path / "model", preview_vae=tmp_path / "tiny")
    run = generator.denoising_steps(["a cat", "a dog"], num_inference_steps=2, seed=1)
    step = next(iter(run))
    with torch.no_grad():
        pixels = reference.decode(step.denoised / 0.5 + 0.1).sample
    expected = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().permute(0, 2, 3, 1).numpy()
    for picture, wanted in zip(step.previews(), expected, strict=True):
        assert picture.size == (64, 64)
        assert np.abs(np.asarray(picture, float) - wanted).max() <= 1
    plain = ImageGenerator.load(tmp_path / "model").denoising_steps(
        "a cat", num_inference_steps=2, seed=1
    )
    assert next(iter(plain)).preview().tobytes() != step.preview().tobytes()

    make_tiny(tmp_path / "other", latent_channels=8, num_decoder_blocks=(1, 1, 1, 1))
    with pytest.raises(BadInput, match="latents of 8 channels to 8 pixels each"):
        generator.load_preview_vae(tmp_path / "other")


def test_the_default_generator_may_have_one_of_its_own(tmp_path: Path) -> None:
    """Previews run in torch, whatever the generator runs in."""
    make_tiny(tmp_path, latent_channels=8, num_decoder_blocks=(1, 1, 1, 1))
    generator = ImageGenerator.load(preview_vae=tmp_path)
    assert generator.networks.runtime == "onnxruntime"
    step = next(iter(generator.denoising_steps("a red circle", num_inference_steps=2, seed=1)))
    assert step.preview().size == (128, 128)


def test_what_is_no_tiny_vae_is_told(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="holds no tiny VAE: give a folder with the config"):
        load_tiny_vae(tmp_path / "nowhere")
    make_tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, complaint in (
        ({"_class_name": "AutoencoderKL"}, "it is a 'AutoencoderKL'"),
        ({"act_fn": "gelu"}, "act_fn is 'gelu'"),
        ({"decoder_block_out_channels": [8, 8, 16, 8]}, "not one number"),
        ({"num_decoder_blocks": "3"}, "num_blocks"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UnsupportedModel, match=complaint):
            load_tiny_vae(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_decoder_blocks": [3, 1]}))
    with pytest.raises(WeightsMismatch, match="diffusers tiny VAE"):
        load_tiny_vae(tmp_path)
