"""The UNet against diffusers, through files on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from diptych.models.unet import UNet, UNetConfig

# One small network for each family, in the words of ours.
CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (16, 32, 32, 32),
        "num_attention_heads": (4, 4, 4, 4),
        "cross_attention_dim": 24,
    },
    "sd1-inpaint": {
        "in_channels": 9,
        "block_out_channels": (16, 32, 32, 32),
        "num_attention_heads": (4, 4, 4, 4),
        "cross_attention_dim": 24,
    },
    "sd2": {
        "block_out_channels": (16, 32, 64, 64),
        "num_attention_heads": (2, 4, 8, 8),
        "cross_attention_dim": 32,
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        "block_out_channels": (16, 32, 64),
        "num_attention_heads": (2, 4, 8),
        "down_attention": (False, True, True),
        "transformer_layers_per_block": (1, 2, 3),
        "cross_attention_dim": 40,
        "use_linear_projection": True,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 20,
    },
    "lcm": {
        "block_out_channels": (16, 32),
        "num_attention_heads": (2, 4),
        "down_attention": (True, False),
        "transformer_layers_per_block": (1, 1),
        "cross_attention_dim": 24,
        "time_cond_proj_dim": 12,
        "layers_per_block": 1,
    },
    "up-attention-only": {
        "in_channels": 8,
        "out_channels": 8,
        "block_out_channels": (16, 32, 48),
        "num_attention_heads": (2, 4, 4),
        "down_attention": (False, True, True),
        "up_attention": (True, True, True),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 24,
        "layers_per_block": 1,
    },
    "no-mid-attention": {
        "block_out_channels": (16, 32),
        "num_attention_heads": (2, 4),
        "down_attention": (False, False),
        "up_attention": (True, False),
        "mid_attention": False,
        "transformer_layers_per_block": (2, 1),
        "cross_attention_dim": 24,
        "flip_sin_to_cos": False,
        "freq_shift": 1.0,
    },
}


def make_pair(folder: Path, config: dict[str, Any]) -> tuple[UNet2DConditionModel, UNet]:
    ours = UNetConfig(norm_num_groups=8, **config)
    theirs = dict(config)
    down = theirs.pop("down_attention", (True, True, True, False))
    up = theirs.pop("up_attention", down)
    mid = theirs.pop("mid_attention", True)
    theirs["attention_head_dim"] = theirs.pop("num_attention_heads")
    if "addition_time_embed_dim" in config:
        theirs["addition_embed_type"] = "text_time"
    reference = UNet2DConditionModel(
        norm_num_groups=8,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in down),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(up)),
        mid_block_type="UNetMidBlock2DCrossAttn" if mid else "UNetMidBlock2D",
        **theirs,
    ).eval()
    for name, parameter in reference.named_parameters():
        # Norms start as 1 and 0, which would hide one that is missing or in the wrong place.
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, float("norm" in name and "weight" in name), 0.2)
    reference.save_pretrained(folder)
    model = UNet(ours).eval()
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    model.load_state_dict(stored, strict=True)
    return reference, model


def make_inputs(config: UNetConfig, rows: int, height: int, width: int) -> dict[str, torch.Tensor]:
    inputs = {
        "latents": torch.randn(rows, config.in_channels, height, width),
        "timestep": torch.randint(0, 1000, (rows,)),
        "encoder_hidden_states": torch.randn(rows, 7, config.cross_attention_dim),
    }
    if config.addition_time_embed_dim is not None:
        inputs["time_ids"] = torch.randint(0, 1024, (rows, 6)).float()
        inputs["text_embeds"] = torch.randn(rows, 20)
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = torch.randn(rows, config.time_cond_proj_dim)
    assert set(inputs) == set(config.inputs)
    return inputs


def ask_reference(reference: UNet2DConditionModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    predicted: torch.Tensor = reference(
        inputs["latents"],
        inputs["timestep"],
        inputs["encoder_hidden_states"],
        timestep_cond=inputs.get("timestep_cond"),
        added_cond_kwargs=added or None,
    ).sample
    return predicted


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", [1, 2])
def test_predicts_as_the_reference(name: str, seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    reference, model = make_pair(tmp_path, CONFIGS[name])
    if seed == 2:
        model = model.to(memory_format=torch.channels_last)
    for size in ((16, 8), (8, 24), (9, 13), (11, 6)):
        inputs = make_inputs(model.config, 2, *size)
        with torch.no_grad():
            torch.testing.assert_close(
                model(**inputs), ask_reference(reference, inputs), atol=3e-5, rtol=1e-5
            )


@pytest.mark.parametrize("name", CONFIGS)
def test_deep_features_are_what_reaches_the_last_block(name: str, tmp_path: Path) -> None:
    """DeepCache, of which diffusers has none: its modules, called one by one."""
    reference, model = make_pair(tmp_path, CONFIGS[name])
    first, later = (make_inputs(model.config, 2, 9, 6) for _ in range(2))
    seen: dict[str, torch.Tensor] = {}
    last, channels = reference.up_blocks[-1], model.config.block_out_channels[0]

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        seen["fed"], seen["time"] = args[0], (args[1:] or [kwargs.get("temb")])[0]

    with torch.no_grad():
        plain = model(**first)
        predicted, deep = model.predict(**first)
        assert torch.equal(predicted, plain)
        assert torch.equal(model.predict(**first, deep_features=deep)[0], plain)
        handle = last.resnets[-1].register_forward_pre_hook(keep, with_kwargs=True)
        ask_reference(reference, first)
        kept = seen["fed"][:, :-channels]
        torch.testing.assert_close(deep, kept, atol=3e-5, rtol=1e-5)

        ask_reference(reference, later)  # for its embedding of the timestep
        handle.remove()
        skip = reference.conv_in(later["latents"])
        hidden = last.resnets[-1](torch.cat([kept, skip], 1), seen["time"])
        if hasattr(last, "attentions"):
            words = later["encoder_hidden_states"]
            (hidden,) = last.attentions[-1](hidden, words, return_dict=False)
        hidden = reference.conv_act(reference.conv_norm_out(hidden))
        found, same = model.predict(**later, deep_features=deep)
        torch.testing.assert_close(found, reference.conv_out(hidden), atol=3e-5, rtol=1e-5)
        assert same is deep and not torch.allclose(found, model(**later), atol=1e-3)


def test_takes_a_timestep_between_two() -> None:
    model = UNet(UNetConfig.tiny()).eval()
    inputs = make_inputs(model.config, 1, 8, 8)
    predicted = []
    with torch.no_grad():
        for timestep in (500.0, 500.5, 501.0):
            inputs["timestep"] = torch.tensor([timestep])
            predicted.append(model(**inputs))
    assert not torch.equal(predicted[0], predicted[1])
    assert not torch.equal(predicted[1], predicted[2])


def test_computes_the_timestep_in_float32(tmp_path: Path) -> None:
    """In bfloat16, 999 and 1000 are one number; the reference keeps them apart too."""
    reference, model = make_pair(tmp_path, CONFIGS["sd1"])
    reference, model = reference.to(torch.bfloat16), model.to(torch.bfloat16)
    inputs = make_inputs(model.config, 1, 8, 8)
    inputs = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    inputs["timestep"] = torch.tensor([997])
    with torch.no_grad():
        ours, theirs = model(**inputs), ask_reference(reference, inputs)
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.05)
        inputs["timestep"] = torch.tensor([999])
        assert not torch.equal(ours, model(**inputs))


def test_keeps_rows_apart(tmp_path: Path) -> None:
    _, model = make_pair(tmp_path, CONFIGS["sdxl"])
    inputs = make_inputs(model.config, 3, 8, 8)
    with torch.no_grad():
        together = model(**inputs)
        for row in range(3):
            alone = model(**{name: value[row : row + 1] for name, value in inputs.items()})
            torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)


def test_trains() -> None:
    model = UNet(UNetConfig.tiny())
    model(**make_inputs(model.config, 2, 8, 8)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (UNetConfig(), 859.5),
        (
            UNetConfig(
                num_attention_heads=(5, 10, 20, 20),
                cross_attention_dim=1024,
                use_linear_projection=True,
            ),
            865.9,
        ),
        (
            UNetConfig(
                block_out_channels=(320, 640, 1280),
                down_attention=(False, True, True),
                transformer_layers_per_block=(1, 2, 10),
                num_attention_heads=(5, 10, 20),
                cross_attention_dim=2048,
                use_linear_projection=True,
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
            2567.5,
        ),
    ],
)
def test_has_the_published_sizes(config: UNetConfig, millions: float) -> None:
    with torch.device("meta"):
        model = UNet(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
