"""The laws of the tables for generators, and full key lists of the published models, both ways."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.errors import UnsupportedModel
from diptych.weights.dialects import clip_text, diffusers_unet, diffusers_vae, scheduler
from diptych.weights.dialects.ldm_unet import ldm_unet
from diptych.weights.dialects.ldm_vae import ldm_vae
from diptych.weights.dialects.openclip_text import openclip_text
from diptych.weights.load_generator import build_module
from diptych.weights.rename import Scheme, backwards, forwards, pieces
from diptych.weights.single_file import sniff
from diptych.weights.tensors import StoredTensor
from ldm_files import write_clip, write_openclip, write_unet, write_vae

# The published configs, where they are not what diffusers takes by default.
_SD1_UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_SD2_UNET = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
}
_XL_UNET = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "force_upcast": False,
}
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "eos_token_id": 49407,
}
_CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
    "eos_token_id": 49407,
}
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
    "eos_token_id": 49407,
}
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "sd1": {"unet": _SD1_UNET, "vae": _VAE, "text_encoder": _CLIP_L},
    "sd2": {"unet": _SD2_UNET, "vae": _VAE, "text_encoder": _CLIP_H},
    "sdxl": {
        "unet": _XL_UNET,
        "vae": {**_VAE, "scaling_factor": 0.13025, "force_upcast": True},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _CLIP_G,
    },
}
PREFIXES = {
    ("sd1", "text_encoder"): "cond_stage_model.transformer.",
    ("sd2", "text_encoder"): "cond_stage_model.model.",
    ("sdxl", "text_encoder"): "conditioner.embedders.0.transformer.",
    ("sdxl", "text_encoder_2"): "conditioner.embedders.1.model.",
}


def theirs(name: str, config: dict[str, Any]) -> nn.Module:
    """Build the reference without memory."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        if name == "unet":
            return UNet2DConditionModel(**config)
        if name == "vae":
            return AutoencoderKL(**config)
        kind = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
        return kind(CLIPTextConfig(**config))


def ours(name: str, config: dict[str, Any], family: str) -> tuple[dict[str, Any], nn.Module]:
    if name == "unet":
        read = diffusers_unet.read_config(config)
    elif name == "vae":
        read = diffusers_vae.read_config(config)
    else:
        read = clip_text.read_config(
            config, has_projection=name == "text_encoder_2", is_xl=family == "sdxl"
        )
    return read, build_module(name, read)


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.fixture(scope="module", params=PUBLISHED)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def references(family: str) -> dict[str, nn.Module]:
    return {name: theirs(name, config) for name, config in PUBLISHED[family].items()}


def test_names_of_the_folder(family: str, references: dict[str, nn.Module]) -> None:
    tables = {"unet": diffusers_unet, "vae": diffusers_vae}
    for name, reference in references.items():
        _, module = ours(name, PUBLISHED[family][name], family)
        table = tables.get(name, clip_text)
        theirs_ = shapes(reference.state_dict())
        ours_ = shapes(module.state_dict())
        renamed = forwards(table, theirs_)
        assert not renamed.unknown and not renamed.twice and not renamed.dropped
        assert {new: theirs_[old] for new, old in renamed.names.items()} == ours_
        assert backwards(table, ours_) == {name: name for name in ours_}


def test_names_of_the_single_file(family: str, references: dict[str, nn.Module]) -> None:
    """Hold our tables against the rules of the tests and the converters of diffusers."""
    from diffusers.loaders import single_file_utils

    stored: dict[str, Tensor] = {}
    for name, reference in references.items():
        config, module = ours(name, PUBLISHED[family][name], family)
        state, scheme = dict(module.state_dict()), scheme_of(family, name, config)
        files = files_of(family, name, reference)
        # Ours from theirs: every name of the file, and every place of the module, exactly once.
        renamed = forwards(scheme, files)
        assert not renamed.unknown and not renamed.twice
        assert renamed.names.keys() == state.keys()
        # Theirs from ours.
        written = backwards(scheme, state)
        assert set(written.values()) == set(files) - set(renamed.dropped)
        assert written == renamed.names
        prefix = PREFIXES.get((family, name)) or (
            "model.diffusion_model." if name == "unet" else "first_stage_model."
        )
        stored |= {prefix + file: tensor for file, tensor in files.items()}
    unet, vae = references["unet"], references["vae"]
    converted = single_file_utils.convert_ldm_unet_checkpoint(dict(stored), config=unet.config)
    assert shapes(converted) == shapes(unet.state_dict())
    converted = single_file_utils.convert_ldm_vae_checkpoint(dict(stored), config=vae.config)
    assert shapes(converted) == shapes(vae.state_dict())
    for (of, name), prefix in PREFIXES.items():
        if of == family:
            if prefix.endswith(".model."):
                converted = single_file_utils.convert_open_clip_checkpoint(
                    references[name], dict(stored), prefix=prefix
                )
            else:
                converted = single_file_utils.convert_ldm_clip_checkpoint(dict(stored))
            wanted = shapes(references[name].state_dict())
            bare = {n.removeprefix("text_model."): s for n, s in shapes(converted).items()}
            assert bare == {n.removeprefix("text_model."): s for n, s in wanted.items()}


def scheme_of(family: str, name: str, config: dict[str, Any]) -> Any:
    if name == "unet":
        return ldm_unet(config)
    if name == "vae":
        return ldm_vae(config)
    if PREFIXES[family, name].endswith(".model."):
        return openclip_text(has_projection=family == "sdxl")
    return clip_text


def files_of(family: str, name: str, reference: Any) -> dict[str, Tensor]:
    state = reference.state_dict()
    if name == "unet":
        return write_unet(state, reference.config)
    if name == "vae":
        return write_vae(state, reference.config)
    is_open = PREFIXES[family, name].endswith(".model.")
    return write_openclip(state) if is_open else write_clip(state)


@pytest.mark.parametrize("inputs", [4, 9])
def test_configs_from_shapes(
    family: str, references: dict[str, nn.Module], inputs: int, tmp_path: Any
) -> None:
    from diptych.weights.dialects.ldm_file import PREFIXES as OURS

    assert {(f, n): p for f, of in OURS.items() for n, p in of.items()} == PREFIXES
    stored = {}
    for name, reference in references.items():
        prefix = PREFIXES.get((family, name)) or (
            "model.diffusion_model." if name == "unet" else "first_stage_model."
        )
        for file, tensor in files_of(family, name, reference).items():
            stored[prefix + file] = StoredTensor(tmp_path, "float16", tuple(tensor.shape), 0)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    stored[first] = StoredTensor(tmp_path, "float16", (320, inputs, 3, 3), 0)
    if family == "sd2":  # whole, as published: with the layer that is not run
        prefix = PREFIXES["sd2", "text_encoder"]
        for name in [n for n in stored if n.startswith(f"{prefix}transformer.resblocks.0.")]:
            stored[name.replace(".0.", ".23.", 1)] = stored[name]
        stored[f"{prefix}text_projection"] = StoredTensor(tmp_path, "float16", (1024, 1024), 0)
    found = sniff(stored, {})
    assert found.family == family
    for name, config in PUBLISHED[family].items():
        wanted, _ = ours(name, config, family)
        if name == "unet":
            is_inpainting = family == "sd2" and inputs == 9
            wanted |= {"in_channels": inputs}
            if is_inpainting:  # trained at 512 pixels, to predict epsilon
                wanted |= {"sample_size": 64, "upcast_attention": False}
        assert found.configs[name] == wanted


# The tables themselves.

CONFIGS = {
    "levels of different depth": {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 3],
        "layers_per_block": 3,
        "attention_head_dim": [1, 2],
        "cross_attention_dim": 8,
    },
    "more attention on the way up": {
        "block_out_channels": [32, 32, 64],
        "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "cross_attention_dim": 8,
        "time_cond_proj_dim": 12,
    },
}


@pytest.mark.parametrize("document", CONFIGS.values(), ids=CONFIGS)
def test_unusual_unets(document: dict[str, Any]) -> None:
    reference = theirs("unet", document)
    config, module = ours("unet", document, "sd1")
    assert shapes(module.state_dict()) == shapes(reference.state_dict())
    again = diffusers_unet.read_config(diffusers_unet.write_config(config))
    assert again == config
    scheme = ldm_unet(config)
    state = {n: t for n, t in module.state_dict().items() if "cond_proj" not in n}
    written = backwards(scheme, state)
    wanted = {n: t for n, t in reference.state_dict().items() if "cond_proj" not in n}
    assert set(written.values()) == set(write_unet(wanted, reference.config))
    assert forwards(scheme, written.values()).names == written


def schemes() -> dict[str, Any]:
    unet = diffusers_unet.read_config(_XL_UNET)
    vae = diffusers_vae.read_config(_VAE)
    return {
        "diffusers UNet": diffusers_unet,
        "diffusers VAE": diffusers_vae,
        "CLIP": clip_text,
        "ldm UNet": ldm_unet(unet),
        "ldm VAE": ldm_vae(vae),
        "OpenCLIP": openclip_text(has_projection=True),
        "OpenCLIP, cut": openclip_text(has_projection=False, unused_layer=23),
    }


@pytest.mark.parametrize("name", schemes())
def test_every_rule_stands_once(name: str) -> None:
    table = schemes()[name]
    every = (*table.RULES, *table.TENSORS)
    files = [file for file, _ in every]
    assert len(set(files)) == len(files)
    kept: list[str] = []
    for _, target in every:
        kept += [target] if isinstance(target, str) else target or ()
    assert len(set(kept)) == len(kept)
    assert not {old for old, _ in table.ALIASES} & set(files)
    # A number that is left open on one side is so on the other.
    for file, target in every:
        for module in [target] if isinstance(target, str) else target or ():
            assert file.count("{}") == module.count("{}")
    if isinstance(table, Scheme):
        assert set(table.RESHAPE) <= {f"{f}.weight" for f in files} | set(files)


def test_a_fused_tensor_is_told_in_order() -> None:
    table = openclip_text(has_projection=False)
    found = pieces(table, "transformer.resblocks.11.attn.in_proj_bias")
    start = "text_model.encoder.layers.11.self_attn."
    assert found == (f"{start}q_proj.bias", f"{start}k_proj.bias", f"{start}v_proj.bias")
    cut = openclip_text(has_projection=False, unused_layer=11)
    assert pieces(cut, "transformer.resblocks.11.attn.in_proj_bias") == ()
    assert pieces(cut, "transformer.resblocks.1.attn.in_proj_bias") != ()
    dropped = forwards(cut, ["transformer.resblocks.11.mlp.c_fc.weight", "logit_scale", "x.weight"])
    assert len(dropped.dropped) == 2 and dropped.unknown == ("x.weight",)


def test_full_sizes(family: str) -> None:
    count = {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}[family]
    _, module = ours("unet", PUBLISHED[family]["unet"], family)
    assert sum(parameter.numel() for parameter in module.parameters()) == count


# Schedulers.

_CLASSES = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "HeunDiscreteScheduler": "heun",
    "LMSDiscreteScheduler": "lms",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSinglestepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "DDPMScheduler": "ddim",
    "DEISMultistepScheduler": "dpmpp_2m",
}


def parameters_of(name: str) -> dict[str, Any]:
    """Return what a scheduler takes, from its source: some want packages that are not here."""
    from importlib.util import find_spec

    spec = find_spec("diffusers")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "schedulers"
    for path in sorted(folder.glob("scheduling_*.py")):
        source = path.read_text("utf-8")
        if f"class {name}(" in source:
            break
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            made = next(f for f in node.body if getattr(f, "name", "") == "__init__")
            assert isinstance(made, ast.FunctionDef)
            words = [argument.arg for argument in made.args.args[1:]]
            return dict(zip(words, map(_value, made.args.defaults), strict=True))
    raise AssertionError(name)


def _value(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None  # an expression: -float("inf")


@pytest.mark.parametrize("name", _CLASSES)
def test_scheduler_that_says_nothing(name: str) -> None:
    found = scheduler.read_config({"_class_name": name}, is_xl=True)
    assert found["sampler"] == _CLASSES[name]
    defaults = parameters_of(name)
    # For this one another stands in, which does not take the word.
    unread = {"lower_order_final"} if name == "DPMSolverSinglestepScheduler" else set()
    for word, value in found.items():
        if word in defaults and word not in {"timestep_spacing", "solver_type", *unread}:
            assert value == defaults[word], word
    assert found["timestep_spacing"] is None


@pytest.mark.parametrize("name", _CLASSES)
def test_scheduler_round_trip(name: str) -> None:
    spacing = {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    document = {"_class_name": name, "beta_schedule": "scaled_linear", "steps_offset": 1, **spacing}
    found = scheduler.read_config(document, is_xl=True)
    written = scheduler.write_config(found)
    assert scheduler.read_config(written, is_xl=True) == found
    known = parameters_of(str(written["_class_name"]))
    assert {word for word in written if word[0] != "_"} <= set(known)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"use_karras_sigmas": True}, {"schedule": "karras"}),
        ({"use_exponential_sigmas": True}, {"schedule": "exponential"}),
        ({"use_beta_sigmas": True}, {"schedule": "beta"}),
        ({"algorithm_type": "sde-dpmsolver++"}, {"sampler": "dpmpp_2m_sde"}),
        ({"trained_betas": [0.1, 0.2], "num_train_timesteps": 2}, {"trained_betas": (0.1, 0.2)}),
        ({"rescale_betas_zero_snr": True}, {"rescale_betas_zero_snr": True}),
        ({"final_sigmas_type": "sigma_min"}, {"final_sigmas_type": "sigma_min"}),
        ({"solver_order": 3}, {"solver_order": 3}),
    ],
)
def test_words_of_schedulers(document: dict[str, Any], words: dict[str, Any]) -> None:
    start = {"_class_name": "DPMSolverMultistepScheduler"}
    found = scheduler.read_config({**start, **document}, is_xl=True)
    assert {word: found[word] for word in words} == words
    again = scheduler.read_config(scheduler.write_config(found), is_xl=True)
    assert again == found


@pytest.mark.parametrize(
    ("document", "word"),
    [
        ({"_class_name": "UniPCMultistepScheduler", "predict_x0": False}, "predict_x0"),
        ({"_class_name": "UniPCMultistepScheduler", "disable_corrector": [0]}, "disable_corrector"),
        ({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -5.1}, "lambda_min"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True}, "use_lu_lambdas"),
        ({"_class_name": "PNDMScheduler"}, "skip_prk_steps"),
        ({"_class_name": "LCMScheduler", "clip_sample": True}, "clip_sample"),
        ({"_class_name": "DPMSolverSinglestepScheduler"}, "dpmpp_2m instead"),
    ],
)
def test_words_that_are_left_out_are_told(
    document: dict[str, Any], word: str, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler.read_config(document, is_xl=True)
    assert word in caplog.text
    caplog.clear()
    usual = {"predict_x0": True, "disable_corrector": [], "lambda_min_clipped": -math.inf}
    scheduler.read_config({"_class_name": "DPMSolverMultistepScheduler", **usual}, is_xl=True)
    assert not caplog.text


def test_old_files_of_sd_are_corrected() -> None:
    clipping = {"_class_name": "DDIMScheduler"}
    assert scheduler.read_config(clipping, is_xl=False)["clip_sample"] is False
    assert scheduler.read_config(clipping, is_xl=True)["clip_sample"] is True
    document = {"_class_name": "PNDMScheduler", "steps_offset": 0}
    assert scheduler.read_config(document, is_xl=False)["steps_offset"] == 1
    assert scheduler.read_config(document, is_xl=True)["steps_offset"] == 0


@pytest.mark.parametrize(
    "document",
    [
        {"_class_name": "EDMEulerScheduler"},
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
        {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
        {"_class_name": "EulerDiscreteScheduler", "sigma_max": 80.0},
        {"_class_name": "DDIMScheduler", "prediction_type": "flow"},
        {"_class_name": "DDIMScheduler", "num_train_timesteps": 0},
        {"_class_name": "DDIMScheduler", "trained_betas": [0.1]},
        {"_class_name": ["x"]},
    ],
)
def test_noise_of_another_kind(document: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match="scheduler: "):
        scheduler.read_config(document, is_xl=False)
