"""The ONNX graphs of a generator against the modules, over every kind of config."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diptych.errors import BadInput, UnsupportedModel
from diptych.models import clip_text, unet, vae
from diptych.models.clip_text import ClipText, ClipTextConfig
from diptych.models.unet import UNet, UNetConfig
from diptych.models.vae import Vae, VaeConfig
from diptych.runtimes.export_generator import write_networks
from diptych.runtimes.network import GENERATOR_NETWORKS, OpenNetworks, unet_inputs
from diptych.runtimes.on_onnxruntime import open_generator_files
from diptych.runtimes.on_torch_generator import generator_networks

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS: dict[str, dict[str, Any]] = {
    "first end token": {},
    "legacy end token": {"eos_token_id": 2, "hidden_act": "gelu"},
    "penultimate, projected": {
        "output_layer": -2,
        "output_norm": False,
        "projection_dim": 24,
        "num_hidden_layers": 3,
    },
}
UNETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear, deep": {
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "down_attention": (False, True),
        "layers_per_block": 2,
        "mid_transformer_layers": 1,
        "upcast_attention": True,
    },
    "attention on the way up only": {
        "down_attention": (False, False),
        "up_attention": (True, True),
        "mid_attention": False,
        "flip_sin_to_cos": False,
        "freq_shift": 1.0,
        "norm_eps": 1e-4,
    },
    "three levels, inpainting": {
        "block_out_channels": (16, 24, 32),
        "down_attention": (True, True, False),
        "transformer_layers_per_block": (1, 1, 1),
        "num_attention_heads": (2, 3, 4),
        "in_channels": 9,
    },
    "sdxl": {
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    },
    "lcm": {"time_cond_proj_dim": 12},
}
VAES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bare": {"use_quant_conv": False, "use_post_quant_conv": False, "mid_attention": False},
    "three levels": {"block_out_channels": (8, 8, 16), "layers_per_block": 2},
    "folded": {"patch_size": 2},
    "folded and refined": {"patch_size": 2, "refine_channels": 4},
    "refined": {"refine_channels": 3},
}


def enliven(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give norms and biases values too, which a fresh module leaves at one and nought."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return module.eval()


def make_modules(
    text: str = "first end token", unet: str = "plain", vae: str = "plain"
) -> dict[str, nn.Module]:
    torch.manual_seed(5)
    made = {
        "text_encoder": ClipText(dataclasses.replace(ClipTextConfig.tiny(), **TEXTS[text])),
        "unet": UNet(dataclasses.replace(UNetConfig.tiny(), **UNETS[unet])),
        "vae": Vae(dataclasses.replace(VaeConfig.tiny(), **VAES[vae])),
    }
    return {name: enliven(module) for name, module in made.items()}


def open_onnx(modules: dict[str, nn.Module], folder: Path, precision: str) -> OpenNetworks:
    files = write_networks(modules, folder, precision=precision)
    networks = open_generator_files(files, dataclasses.asdict(modules["unet"].config))
    return OpenNetworks(
        networks, runtime="onnxruntime", device="cpu", dtype=precision, reason="tested"
    )


def compare(one: OpenNetworks, other: OpenNetworks, network: str, **arrays: Any) -> float:
    """Return the largest difference, relative to the largest value."""
    expected = [one.numpy(each) for each in one[network](**arrays)]
    found = [other.numpy(each) for each in other[network](**arrays)]
    assert [each.shape for each in found] == [each.shape for each in expected]
    assert all(each.dtype == np.float32 for each in found)
    return max(
        float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(expected, found, strict=True)
    )


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def words(rows: int, length: int) -> np.ndarray:
    """Return texts that end at different places, one of them twice."""
    ids = np.random.default_rng(rows).integers(3, 990, (rows, length))
    for row in range(rows):
        ids[row, (3 * row + 2) % length :: 4] = 999
    return ids


def unet_arrays(
    config: UNetConfig, rows: int, size: tuple[int, int], length: int
) -> dict[str, Any]:
    given = {
        "latents": noise(rows, config.in_channels, *size),
        "timestep": np.linspace(0, 999, rows).astype(np.float32),
        "encoder_hidden_states": noise(rows, length, config.cross_attention_dim),
        "text_embeds": noise(rows, 24),
        "time_ids": np.array([[1024, 768, 0, 16, 1024, 1000]] * rows, np.float32),
        "timestep_cond": noise(rows, 12),
    }
    return {name: given[name] for name in config.inputs}


@pytest.mark.parametrize("text", TEXTS)
def test_text_encoder(text: str, tmp_path: Path) -> None:
    modules = make_modules(text)
    ours, onnx = generator_networks(modules), open_onnx(modules, tmp_path, "fp32")
    for ids in (words(3, 13), words(1, 77), words(2, 1)):
        for clip_skip in (0, 1):
            arrays = {"input_ids": ids, "clip_skip": clip_skip}
            assert compare(ours, onnx, "text_encoder", **arrays) < 2e-5
    assert compare(ours, onnx, "text_encoder", input_ids=words(2, 5)) < 2e-5


@pytest.mark.parametrize("kind", UNETS)
def test_unet(kind: str, tmp_path: Path) -> None:
    modules = make_modules(unet=kind)
    ours, onnx = generator_networks(modules), open_onnx(modules, tmp_path, "fp32")
    config = modules["unet"].config
    for rows, size, length in ((2, (8, 8), 77), (1, (7, 13), 5), (3, (6, 10), 1)):
        arrays = unet_arrays(config, rows, size, length)
        assert compare(ours, onnx, "unet", **arrays) < 2e-5
    assert onnx["unet"].inputs == ours["unet"].inputs


@pytest.mark.parametrize("kind", UNETS)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_last_block_of_the_unet(kind: str, precision: str, tmp_path: Path) -> None:
    modules = make_modules(unet=kind)
    ours, onnx = generator_networks(modules), open_onnx(modules, tmp_path, precision)
    config, wanted = modules["unet"].config, ("noise_pred", "deep_features")
    assert onnx["unet_shallow"].inputs == ours["unet_shallow"].inputs
    assert not (tmp_path / "unet_shallow.onnx.data").exists(), "weights are stored once"
    for rows, size, length in ((2, (8, 8), 7), (1, (7, 13), 5)):
        first, later = (unet_arrays(config, rows, size, length) for _ in range(2))
        later["latents"] = later["latents"][..., ::-1].copy()
        plain, deep = onnx["unet"](wanted, **first)
        assert np.array_equal(plain, onnx["unet"](**first)[0])
        if precision == "fp32":
            expected = ours["unet"](wanted, **first)[1].numpy()
            assert np.abs(deep - expected).max() < 2e-5 * np.abs(expected).max()
            assert compare(ours, onnx, "unet_shallow", **later, deep_features=deep) < 2e-5
        (again,) = onnx["unet_shallow"](**first, deep_features=deep)
        assert np.abs(again - plain).max() < 2e-5 * np.abs(plain).max()


@pytest.mark.parametrize("kind", VAES)
def test_vae(kind: str, tmp_path: Path) -> None:
    modules = make_modules(vae=kind)
    ours, onnx = generator_networks(modules), open_onnx(modules, tmp_path, "fp32")
    for rows, size in ((2, (8, 8)), (1, (5, 11))):
        assert compare(ours, onnx, "vae_decoder", latents=noise(rows, 4, *size)) < 2e-5
        edges = [edge * modules["vae"].config.downsampling for edge in size]
        pixels = noise(rows, 3, *edges)
        assert compare(ours, onnx, "vae_encoder", pixel_values=pixels) < 2e-5


@pytest.mark.parametrize(("precision", "within"), [("fp16", 3e-3), ("int8", 5e-2)])
def test_smaller_weights_give_nearly_the_same(
    precision: str, within: float, tmp_path: Path
) -> None:
    modules = make_modules()
    # Wide enough that most weights are stored smaller.
    modules["unet"] = UNet(
        dataclasses.replace(
            UNetConfig.tiny(), block_out_channels=(64, 96), norm_num_groups=32, in_channels=4
        )
    ).eval()
    full, small = tmp_path / "fp32", tmp_path / precision
    full.mkdir()
    small.mkdir()
    ours, onnx = open_onnx(modules, full, "fp32"), open_onnx(modules, small, precision)
    found = compare(ours, onnx, "unet", **unet_arrays(modules["unet"].config, 2, (8, 8), 9))
    assert 1e-5 < found < within
    sizes = [(folder / "unet.onnx.data").stat().st_size for folder in (full, small)]
    assert sizes[1] < {"fp16": 0.55, "int8": 0.35}[precision] * sizes[0]


def test_weights_beyond_half_precision_stay_as_they_are(tmp_path: Path) -> None:
    modules = make_modules()
    table = modules["text_encoder"].text_model.embeddings.token_embedding.weight
    table.data[5, 3] = 7e4
    ours, onnx = generator_networks(modules), open_onnx(modules, tmp_path, "fp16")
    ids = np.array([[5, 5, 999]])
    assert compare(ours, onnx, "text_encoder", input_ids=ids) < 3e-3


def test_names_and_shapes_are_those_of_the_models() -> None:
    assert {
        "text_encoder": (clip_text.INPUTS, clip_text.OUTPUTS),
        "text_encoder_2": (clip_text.INPUTS, clip_text.OUTPUTS),
        "unet": (unet.INPUTS, unet.OUTPUTS),
        "unet_shallow": (
            {**unet.INPUTS, **unet.DEEP_FEATURES},
            {"noise_pred": unet.OUTPUTS["noise_pred"]},
        ),
        "vae_encoder": (vae.INPUTS, vae.OUTPUTS),
        "vae_decoder": (vae.DECODER_INPUTS, vae.DECODER_OUTPUTS),
    } == GENERATOR_NETWORKS
    for changes in UNETS.values():
        config = dataclasses.replace(UNetConfig.tiny(), **changes)
        assert unet_inputs(dataclasses.asdict(config)) == config.inputs


def test_a_file_is_opened_when_it_is_needed(tmp_path: Path) -> None:
    modules = make_modules()
    onnx = open_onnx(modules, tmp_path, "fp32")
    (tmp_path / "vae_encoder.onnx").write_bytes(b"no graph")
    onnx["vae_decoder"](latents=noise(1, 4, 4, 4))
    with pytest.raises(UnsupportedModel, match=r"vae_encoder\.onnx cannot be run"):
        onnx["vae_encoder"](pixel_values=noise(1, 3, 8, 8))


def test_what_is_missing_or_misshapen_is_named(tmp_path: Path) -> None:
    onnx = open_onnx(make_modules(), tmp_path, "fp32")
    with pytest.raises(BadInput, match=r"unet\.onnx needs encoder_hidden_states"):
        onnx["unet"](latents=noise(1, 4, 8, 8), timestep=noise(1))
    with pytest.raises(BadInput, match=r"latents \[1, 3, 8, 8\]"):
        onnx["vae_decoder"](latents=noise(1, 3, 8, 8))
    with pytest.raises(BadInput, match="no output is called 'logits'"):
        onnx["vae_decoder"](["logits"], latents=noise(1, 4, 8, 8))
