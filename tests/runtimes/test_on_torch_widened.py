"""Weights of 16 bits on a processor that multiplies float32 only."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diptych.models import lora
from diptych.models.clip_text import ClipText, ClipTextConfig
from diptych.models.unet import UNet, UNetConfig
from diptych.models.vae import Vae, VaeConfig
from diptych.runtimes import on_torch_widened
from diptych.runtimes.on_torch_generator import generator_networks, open_generator_checkpoint
from diptych.weights.diffusion import describe_generator
from tiny_pipelines import make_pipeline

NARROW = [torch.bfloat16, torch.float16]


@pytest.fixture
def old_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_torch_widened, "multiplies", lambda dtype: False)


def modules(dtype: torch.dtype) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    text = ClipTextConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=24,
        eos_token_id=49,
    )
    made = {
        "text_encoder": ClipText(text),
        "unet": UNet(UNetConfig.tiny()),
        "vae": Vae(VaeConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)),
    }
    return {name: each.to(dtype).eval().requires_grad_(False) for name, each in made.items()}


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


CALLS: dict[str, dict[str, Any]] = {
    "text_encoder": {"input_ids": np.array([[3, 7, 49, 49]])},
    "unet": {
        "latents": random(2, 4, 8, 8),
        "timestep": np.array([999.0, 1.0], np.float32),
        "encoder_hidden_states": random(2, 5, 32),
    },
    "vae_encoder": {"pixel_values": random(1, 3, 16, 16)},
    "vae_decoder": {"latents": random(1, 4, 8, 8)},
}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("old_processor")
def test_widened_is_float32_with_rounded_weights(name: str, dtype: torch.dtype) -> None:
    narrow = modules(dtype)
    wide = {part: copy.deepcopy(each).float() for part, each in narrow.items()}
    found = generator_networks(narrow)[name](**CALLS[name])
    expected = generator_networks(wide)[name](**CALLS[name])
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    kinds = {each.dtype for module in narrow.values() for each in module.parameters()}
    assert kinds == {dtype}, "the weights are to stay small"


@pytest.mark.usefixtures("old_processor")
@pytest.mark.parametrize("fused", [False, True])
def test_widened_layers_take_updates(fused: bool) -> None:
    narrow = modules(torch.bfloat16)
    layer = lora.layers(narrow["unet"])[
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    ]
    update = lora.LowRank(torch.randn(2, 16), torch.randn(16, 2)).requires_grad_(False)
    (before,) = generator_networks(narrow)["unet"](**CALLS["unet"])
    lora.attach(layer, update, fused=fused)
    (found,) = generator_networks(narrow)["unet"](**CALLS["unet"])
    wide = {"unet": copy.deepcopy(narrow["unet"]).float(), "vae": narrow["vae"]}
    (expected,) = generator_networks(wide)["unet"](**CALLS["unet"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, before, rtol=1e-2)


@pytest.mark.usefixtures("old_processor")
def test_widened_is_nearer_to_float32_than_the_reference_in_bfloat16(tmp_path: Path) -> None:
    reference = make_pipeline(tmp_path, "sd1", 0).unet
    opened = open_generator_checkpoint(describe_generator(tmp_path), "cpu", "bfloat16")
    assert opened.dtype == "bfloat16"
    assert opened.reason.endswith("computed in float32: this processor multiplies no bfloat16")
    latents, words = torch.from_numpy(random(2, 4, 8, 8)), torch.from_numpy(random(2, 7, 32))
    timestep = torch.tensor([999.0, 20.0])

    def predict(dtype: torch.dtype) -> Tensor:
        reference.to(dtype)
        with torch.inference_mode():
            made = reference(latents.to(dtype), timestep, words.to(dtype)).sample
        return made.float()  # type: ignore[no-any-return]

    truth, narrow = predict(torch.float32), predict(torch.bfloat16)
    (found,) = opened["unet"](latents=latents, timestep=timestep, encoder_hidden_states=words)
    error, theirs = ((each - truth).norm() / truth.norm() for each in (found, narrow))
    assert 1e-5 < error < theirs < 0.05
    assert (found - narrow).norm() / truth.norm() < 2 * theirs


def test_only_a_cpu_that_cannot_is_helped(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(on_torch_widened, "multiplies", lambda dtype: asked.append(dtype))
    computed, cpu = on_torch_widened.computed_in, torch.device("cpu")
    assert computed(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    assert computed(torch.float32, cpu) == torch.float32
    assert not asked
    assert computed(torch.float16, cpu) == torch.float32
    monkeypatch.setattr(on_torch_widened, "multiplies", lambda dtype: True)
    assert computed(torch.float16, cpu) == torch.float16
