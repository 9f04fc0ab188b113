"""The autoencoder against diffusers, through files on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from diptych.models.vae import Vae, VaeConfig

CONFIGS: dict[str, dict[str, Any]] = {
    "four-levels": {"block_out_channels": (16, 32, 32, 32), "norm_num_groups": 8},
    "own-small": {
        "block_out_channels": (16, 32, 48),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "latent_channels": 8,
    },
    "bare": {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_attention": False,
    },
}


def make_pair(folder: Path, config: dict[str, Any]) -> tuple[AutoencoderKL, Vae]:
    ours = {"layers_per_block": 2, **config}
    theirs = {**ours, "mid_block_add_attention": ours.get("mid_attention", True)}
    theirs.pop("mid_attention", None)
    levels = len(ours["block_out_channels"])
    reference = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **theirs,
    ).eval()
    randomize(reference)
    reference.save_pretrained(folder)
    model = Vae(VaeConfig(**ours)).eval()
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    model.load_state_dict(stored, strict=True)
    return reference, model


def randomize(module: torch.nn.Module) -> None:
    """Norms start as 1 and 0, which would hide one that is missing or in the wrong place."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, float("norm" in name and "weight" in name), 0.2)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_encodes_and_decodes_as_the_reference(
    name: str, memory_format: torch.memory_format, tmp_path: Path
) -> None:
    reference, model = make_pair(tmp_path, CONFIGS[name])
    model = model.to(memory_format=memory_format)
    step = model.config.downsampling
    for size in ((8 * step, 6 * step), (5 * step, 7 * step), (4 * step + 1, 4 * step + step - 1)):
        pixel_values = torch.rand(2, 3, *size) * 2 - 1
        with torch.no_grad():
            expected = reference.encode(pixel_values).latent_dist
            mean, log_variance = model.encode(pixel_values)
            pictures = reference.decode(expected.mean).sample
            torch.testing.assert_close(mean, expected.mean, atol=5e-5, rtol=1e-5)
            torch.testing.assert_close(log_variance, expected.logvar, atol=5e-5, rtol=1e-5)
            torch.testing.assert_close(model.decode(mean), pictures, atol=5e-5, rtol=1e-5)


def test_clamps_the_variance(tmp_path: Path) -> None:
    reference, model = make_pair(tmp_path, CONFIGS["own-small"])
    for module in (reference, model):
        with torch.no_grad():
            module.quant_conv.bias[8:] = torch.tensor([-90.0, 90.0]).repeat(4)
    pixel_values = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        _, log_variance = model.encode(pixel_values)
        expected = reference.encode(pixel_values).latent_dist.logvar
    assert torch.equal(log_variance.unique(), torch.tensor([-30.0, 20.0]))
    assert torch.equal(log_variance, expected)


def test_draws_latents_from_the_posterior(tmp_path: Path) -> None:
    reference, model = make_pair(tmp_path, CONFIGS["own-small"])
    pixel_values, noise = torch.rand(1, 3, 16, 16), torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        posterior = reference.encode(pixel_values).latent_dist
        expected = reference.decode(posterior.mean + posterior.std * noise).sample
        pictures, mean, _ = model(pixel_values, noise)
        plain, _, _ = model(pixel_values)
        of_mean = reference.decode(posterior.mean).sample
    torch.testing.assert_close(pictures, expected, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(plain, of_mean, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(mean, posterior.mean, atol=5e-5, rtol=1e-5)


def test_trains() -> None:
    model = Vae(VaeConfig.tiny())
    pictures, mean, log_variance = model(torch.rand(2, 3, 16, 16), torch.randn(2, 4, 8, 8))
    (pictures.square().mean() + mean.square().mean() + log_variance.mean()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_counts_the_pixels_of_a_latent() -> None:
    assert VaeConfig().downsampling == 8
    assert VaeConfig(block_out_channels=(8, 8, 8)).downsampling == 4
    with torch.device("meta"):
        published = Vae(VaeConfig())
    decoder = sum(p.numel() for p in published.decoder.parameters())
    encoder = sum(p.numel() for p in published.encoder.parameters())
    assert (round(decoder / 1e6, 1), round(encoder / 1e6, 1)) == (49.5, 34.2)
