"""Speak diffusers' AutoencoderKL, with the names of its attention before and since 0.16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diptych.errors import UnsupportedModel
from diptych.weights.fields import Field, check_fields, translate
from diptych.weights.rename import Reshape, Rules

__all__ = [
    "ALIASES",
    "NAME",
    "RESHAPE",
    "RESNET",
    "RULES",
    "TELLTALE",
    "TENSORS",
    "check_config",
    "read_config",
    "write_config",
]

NAME = "diffusers VAE"
TELLTALE = "decoder.mid_block.resnets.0.conv1.weight"

RESNET = ("norm1", "conv1", "norm2", "conv2", "conv_shortcut")
_HALVES = (("encoder", "down_blocks", "downsamplers"), ("decoder", "up_blocks", "upsamplers"))
_ATTENTION = "{}.mid_block.attentions.{{}}"
_PATHS = (
    *(f"{half}.conv_in" for half, _, _ in _HALVES),
    *(f"{half}.{blocks}.{{}}.resnets.{{}}.{n}" for half, blocks, _ in _HALVES for n in RESNET),
    *(f"{half}.{blocks}.{{}}.{samplers}.{{}}.conv" for half, blocks, samplers in _HALVES),
    *(f"{half}.mid_block.resnets.{{}}.{inner}" for half, _, _ in _HALVES for inner in RESNET),
    *(
        f"{_ATTENTION.format(half)}.{inner}"
        for half, _, _ in _HALVES
        for inner in ("group_norm", "to_q", "to_k", "to_v", "to_out.{}")
    ),
    *(f"{half}.{last}" for half, _, _ in _HALVES for last in ("conv_norm_out", "conv_out")),
    "quant_conv",
    "post_quant_conv",
    "refine.conv_in",  # ours, as `refine_channels` is
    "refine.conv_out",
)

ALIASES = tuple(
    (f"{_ATTENTION.format(half)}.{old}", f"{_ATTENTION.format(half)}.{new}")
    for half, _, _ in _HALVES
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"))
) + tuple(
    # The number of `to_out.0` is not one of the old name, so it is said.
    (
        f"{half}.mid_block.attentions.0.proj_attn",
        f"{half}.mid_block.attentions.0.to_out.0",
    )
    for half, _, _ in _HALVES
)
RULES: Rules = tuple((path, path) for path in _PATHS)
TENSORS: Rules = ()
RESHAPE: Mapping[str, Reshape] = {}

# --- configuration --------------------------------------------------------------------------------

FIELDS = {
    "in_channels": Field("int", 3, 1, 16),
    "out_channels": Field("int", 3, 1, 16),
    "latent_channels": Field("int", 4, 1, 64),
    "block_out_channels": Field("ints", (64,), 1, 1 << 16, most=8),
    "layers_per_block": Field("int", 1, 1, 16),
    "norm_num_groups": Field("int", 32, 1, 4096),
    "scaling_factor": Field("float", 0.18215, 1e-6, 1e6),
    "shift_factor": Field("float", 0.0, -1e6, 1e6),
    "use_quant_conv": Field("bool", True),
    "use_post_quant_conv": Field("bool", True),
    "mid_attention": Field("bool", True, foreign="mid_block_add_attention"),
    "force_upcast": Field("bool", True),
    "patch_size": Field("int", 1, 1, 16),  # ours; published models have none
    "refine_channels": Field("int", 0, 0, 256),  # ours too
}
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


def read_config(document: Mapping[str, Any]) -> dict[str, Any]:
    """Translate `vae/config.json` into the fields of `VaeConfig`.

    Raises `UnsupportedModel` for a network that ours is not.
    """
    if (kind := document.get("_class_name")) not in (None, "AutoencoderKL"):
        raise UnsupportedModel(f"vae: it is a {repr(kind)[:60]}; diptych runs AutoencoderKL")
    for word, block in _BLOCKS.items():
        kinds = document.get(word) or [block]
        if not isinstance(kinds, list) or any(kind != block for kind in kinds):
            raise UnsupportedModel(f"vae: {word} is {repr(kinds)[:60]}; diptych knows {block}")
    if document.get("act_fn", "silu") not in ("silu", "swish"):
        raise UnsupportedModel(
            f"vae: act_fn is {repr(document['act_fn'])[:40]}, which is not built"
        )
    for word in ("latents_mean", "latents_std"):
        if document.get(word) is not None:
            raise UnsupportedModel(f"vae: {word} is set; diptych scales latents by one number")
    return check_config(translate(FIELDS, document))


def write_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the fields of `VaeConfig` into a config that diffusers reads."""
    config = check_config(config)
    count = len(config["block_out_channels"])
    words = {FIELDS[name].foreign or name: value for name, value in config.items()}
    for ours in ("patch_size", "refine_channels"):
        if config[ours] == FIELDS[ours].default:
            del words[ours]
    return {
        "_class_name": "AutoencoderKL",
        **words,
        "block_out_channels": list(config["block_out_channels"]),
        "shift_factor": config["shift_factor"] or None,
        **{word: [block] * count for word, block in _BLOCKS.items()},
        "act_fn": "silu",
    }


def check_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `VaeConfig`, every one there and fitting, else `UnsupportedModel`."""
    config = check_fields("vae", FIELDS, values)
    for width in config["block_out_channels"]:
        if width % config["norm_num_groups"]:
            raise UnsupportedModel(
                f"vae: {width} channels do not divide by norm_num_groups "
                f"{config['norm_num_groups']}"
            )
    return config
