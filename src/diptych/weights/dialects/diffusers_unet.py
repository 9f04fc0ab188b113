"""Speak diffusers' UNet2DConditionModel, whose names on disk are those of our module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diptych.errors import UnsupportedModel
from diptych.weights.fields import Field, check_fields, translate
from diptych.weights.rename import Reshape, Rules

__all__ = [
    "ALIASES",
    "ATTENTION",
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

NAME = "diffusers UNet"
TELLTALE = "down_blocks.0.resnets.0.time_emb_proj.weight"

RESNET = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
_BLOCK = "transformer_blocks.{}"
ATTENTION = (
    "norm",
    "proj_in",
    *(f"{_BLOCK}.{norm}" for norm in ("norm1", "norm2", "norm3")),
    *(f"{_BLOCK}.{attn}.{to}" for attn in ("attn1", "attn2") for to in ("to_q", "to_k", "to_v")),
    *(f"{_BLOCK}.{attn}.to_out.{{}}" for attn in ("attn1", "attn2")),
    f"{_BLOCK}.ff.net.{{}}.proj",
    f"{_BLOCK}.ff.net.{{}}",
    "proj_out",
)
_PLACES = ("down_blocks.{}", "mid_block", "up_blocks.{}")
_PATHS = (
    "conv_in",
    "time_embedding.linear_1",
    "time_embedding.linear_2",
    "time_embedding.cond_proj",
    "add_embedding.linear_1",
    "add_embedding.linear_2",
    *(f"{place}.resnets.{{}}.{inner}" for place in _PLACES for inner in RESNET),
    *(f"{place}.attentions.{{}}.{inner}" for place in _PLACES for inner in ATTENTION),
    "down_blocks.{}.downsamplers.{}.conv",
    "up_blocks.{}.upsamplers.{}.conv",
    "conv_norm_out",
    "conv_out",
)

ALIASES: tuple[tuple[str, str], ...] = ()
RULES: Rules = tuple((path, path) for path in _PATHS)
TENSORS: Rules = ()
RESHAPE: Mapping[str, Reshape] = {}

# --- configuration --------------------------------------------------------------------------------

_WIDTH, _LEVELS = 1 << 16, 8

FIELDS = {
    "sample_size": Field("int", 64, 1, 4096),
    "in_channels": Field("int", 4, 1, 64),
    "out_channels": Field("int", 4, 1, 64),
    "block_out_channels": Field("ints", (320, 640, 1280, 1280), 1, _WIDTH, most=_LEVELS),
    "layers_per_block": Field("int", 2, 1, 16),
    "down_attention": Field("bools", (True, True, True, False), most=_LEVELS),
    "up_attention": Field("bools", None, is_optional=True, most=_LEVELS),
    "mid_attention": Field("bool", True),
    "transformer_layers_per_block": Field("ints", (1, 1, 1, 1), 0, 64, most=_LEVELS),
    "mid_transformer_layers": Field("int", None, 1, 64, is_optional=True),
    "num_attention_heads": Field("ints", (8, 8, 8, 8), 1, 4096, most=_LEVELS),
    "cross_attention_dim": Field("int", 768, 1, _WIDTH),
    "use_linear_projection": Field("bool", False),
    "norm_num_groups": Field("int", 32, 1, 4096),
    "norm_eps": Field("float", 1e-5, 0, 1),
    "upcast_attention": Field("bool", False),
    "flip_sin_to_cos": Field("bool", True),
    "freq_shift": Field("float", 0.0, -16, 16),
    "addition_time_embed_dim": Field("int", None, 1, _WIDTH, is_optional=True),
    "projection_class_embeddings_input_dim": Field("int", None, 1, _WIDTH, is_optional=True),
    "time_cond_proj_dim": Field("int", None, 1, _WIDTH, is_optional=True),
}

# Words that change the network and have no place in ours: each with the values that mean nothing.
_INERT: Mapping[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type_num_heads": (64,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (),
    "encoder_hid_dim_type": (),
    "mid_block_only_cross_attention": (False,),
    "mid_block_scale_factor": (1,),
    "num_class_embeds": (),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (),
    "time_embedding_act_fn": (),
    "time_embedding_dim": (),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (),
}
_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
_MID = {"UNetMidBlock2DCrossAttn": True, "UNetMidBlock2D": False}
# What diffusers takes where the file says nothing.
_THEIRS = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "attention_head_dim": 8,
    "cross_attention_dim": 1280,
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "addition_embed_type": None,
}


def read_config(document: Mapping[str, Any]) -> dict[str, Any]:
    """Translate `unet/config.json` into the fields of `UNetConfig`.

    Raises `UnsupportedModel` for a network that ours is not.
    """
    if (kind := document.get("_class_name")) not in (None, "UNet2DConditionModel"):
        raise UnsupportedModel(f"unet: it is a {_shown(kind)}; diptych runs UNet2DConditionModel")
    if document.get("quantization_config"):
        raise UnsupportedModel("unet: its weights are quantized; fetch the full ones")
    for word, inert in _INERT.items():
        if document.get(word) is not None and document[word] not in inert:
            raise UnsupportedModel(f"unet: {word} is {_shown(document[word])}, which is not built")
    if "mid_block_type" in document and document["mid_block_type"] is None:
        raise UnsupportedModel("unet: mid_block_type is null, and a UNet without one is not built")
    given = {word: value for word, value in document.items() if value is not None}
    theirs = {**_THEIRS, **given}
    levels = theirs["block_out_channels"]
    if not isinstance(levels, list | tuple):
        raise UnsupportedModel(f"unet: block_out_channels is {_shown(levels)}, not a list")
    count = len(levels)
    up = tuple(reversed(_kinds("up_block_types", theirs["up_block_types"], _UP, count)))
    down = _kinds("down_block_types", theirs["down_block_types"], _DOWN, count)
    depth = theirs["transformer_layers_per_block"]
    values: dict[str, Any] = translate(FIELDS, document)
    values |= {
        "block_out_channels": levels,
        "layers_per_block": _same("layers_per_block", theirs["layers_per_block"]),
        "cross_attention_dim": _same("cross_attention_dim", theirs["cross_attention_dim"]),
        "down_attention": down,
        "up_attention": None if up == down else up,
        "mid_attention": _kinds("mid_block_type", [theirs["mid_block_type"]], _MID, 1)[0],
        "transformer_layers_per_block": _each(depth, count),
        # Called the size of a head in the file, it is their number.
        "num_attention_heads": _each(
            theirs.get("num_attention_heads") or theirs["attention_head_dim"], count
        ),
        "mid_transformer_layers": None,
    }
    # With these off the fields mean nothing, and some files fill them in all the same.
    if theirs["addition_embed_type"] is None:
        values["addition_time_embed_dim"] = None
        values["projection_class_embeddings_input_dim"] = None
    elif theirs["addition_embed_type"] != "text_time":
        kind = _shown(theirs["addition_embed_type"])
        raise UnsupportedModel(f"unet: addition_embed_type is {kind}; diptych knows 'text_time'")
    if isinstance(size := values["sample_size"], list | tuple):
        values["sample_size"] = size[0] if size else None
    return check_config(values)


def write_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the fields of `UNetConfig` into a config that diffusers reads."""
    config = check_config(config)
    up = config["up_attention"] or config["down_attention"]
    is_xl = config["addition_time_embed_dim"] is not None
    words = {
        name: config[name]
        for name in FIELDS
        if name
        not in (
            "down_attention",
            "up_attention",
            "mid_attention",
            "num_attention_heads",
            "mid_transformer_layers",
        )
    }
    depths = config["transformer_layers_per_block"]
    if config["mid_transformer_layers"] not in (None, depths[-1]):
        raise UnsupportedModel("unet: the middle is deeper than diffusers can say")
    return {
        "_class_name": "UNet2DConditionModel",
        **{
            word: list(value) if isinstance(value, tuple) else value
            for word, value in words.items()
        },
        "freq_shift": _plain(config["freq_shift"]),
        "down_block_types": [_word(_DOWN, kind) for kind in config["down_attention"]],
        "mid_block_type": _word(_MID, config["mid_attention"]),
        "up_block_types": [_word(_UP, kind) for kind in reversed(up)],
        "attention_head_dim": list(config["num_attention_heads"]),
        "addition_embed_type": "text_time" if is_xl else None,
        # diffusers builds no transformer of depth 0, even where it has no place.
        "transformer_layers_per_block": [max(depth, 1) for depth in depths],
        "act_fn": "silu",
    }


def check_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `UNetConfig`, every one there and fitting, else `UnsupportedModel`."""
    config = check_fields("unet", FIELDS, values)
    widths, groups = config["block_out_channels"], config["norm_num_groups"]
    for name in (
        "down_attention",
        "up_attention",
        "transformer_layers_per_block",
        "num_attention_heads",
    ):
        if config[name] is not None and len(config[name]) != len(widths):
            raise UnsupportedModel(
                f"unet: {name} is for {len(config[name])} levels, block_out_channels for "
                f"{len(widths)}"
            )
    for width, heads in zip(widths, config["num_attention_heads"], strict=True):
        if width % groups or width % heads:
            raise UnsupportedModel(
                f"unet: {width} channels do not divide by norm_num_groups {groups} and "
                f"num_attention_heads {heads}"
            )
    both = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
    if (config[both[0]] is None) != (config[both[1]] is None):
        raise UnsupportedModel(f"unet: {both[0]} and {both[1]} go together")
    return config


def _kinds(name: str, value: Any, known: Mapping[str, bool], count: int) -> tuple[bool, ...]:
    if not isinstance(value, list | tuple) or len(value) != count:
        raise UnsupportedModel(f"unet: {name} is {_shown(value)}, not a list of {count}")
    for item in value:
        if not isinstance(item, str) or item not in known:
            raise UnsupportedModel(
                f"unet: {name} names {_shown(item)}; diptych knows {', '.join(known)}"
            )
    return tuple(known[item] for item in value)


def _each(value: Any, count: int) -> Any:
    return value if isinstance(value, list | tuple) else (value,) * count


def _same(name: str, value: Any) -> Any:
    """Return the one value of a list that repeats it."""
    if not isinstance(value, list | tuple):
        return value
    if not value or any(item != value[0] for item in value):
        raise UnsupportedModel(f"unet: {name} is {_shown(value)}; diptych takes one for all levels")
    return value[0]


def _word(known: Mapping[str, bool], kind: bool) -> str:
    return next(word for word, value in known.items() if value == kind)


def _plain(value: float) -> float:
    return int(value) if value == int(value) else value


def _shown(value: Any) -> str:
    return repr(value)[:60]
