"""Speak transformers' CLIP text towers, with and without the `text_model.` before every name.

transformers 5 writes a CLIPTextModel without it, and a CLIPTextModelWithProjection with it.
"""

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
    "RULES",
    "TELLTALE",
    "TENSORS",
    "check_config",
    "read_config",
    "write_config",
]

NAME = "CLIP text"
TELLTALE = "embeddings.token_embedding.weight"

_LAYER = "encoder.layers.{}"
_BARE = (
    "embeddings.token_embedding",
    "embeddings.position_embedding",
    f"{_LAYER}.layer_norm1",
    *(f"{_LAYER}.self_attn.{to}" for to in ("q_proj", "k_proj", "v_proj", "out_proj")),
    f"{_LAYER}.layer_norm2",
    f"{_LAYER}.mlp.fc1",
    f"{_LAYER}.mlp.fc2",
    "final_layer_norm",
)

ALIASES = tuple((path, f"text_model.{path}") for path in _BARE)
RULES: Rules = (
    *((f"text_model.{path}", f"text_model.{path}") for path in _BARE),
    ("text_projection", "text_projection"),
)
TENSORS: Rules = (
    # The numbers 0 to 76, saved until transformers 4.31.
    ("text_model.embeddings.position_ids", None),
    ("embeddings.position_ids", None),
    # Of the two towers together.
    ("logit_scale", None),
)
RESHAPE: Mapping[str, Reshape] = {}

# --- configuration --------------------------------------------------------------------------------

_ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish")

FIELDS = {
    "vocab_size": Field("int", 49408, 1, 4_000_000),
    "hidden_size": Field("int", 512, 1, 16384),
    "intermediate_size": Field("int", 2048, 1, 131072),
    "num_hidden_layers": Field("int", 12, 1, 256),
    "num_attention_heads": Field("int", 8, 1, 1024),
    "max_position_embeddings": Field("int", 77, 1, 65536),
    "hidden_act": Field("str", "quick_gelu", choices=_ACTIVATIONS),
    "layer_norm_eps": Field("float", 1e-5, 0, 1),
    "projection_dim": Field("int", None, 1, 16384, is_optional=True),
    "eos_token_id": Field("int", 49407, 0, 4_000_000),
    "output_layer": Field("int", -1, -256, -1),
    "output_norm": Field("bool", True),
}
_KINDS = ("clip_text_model", "clip")
_TOWERS = ("CLIPTextModel", "CLIPTextModelWithProjection")


def read_config(
    document: Mapping[str, Any], *, has_projection: bool, is_xl: bool
) -> dict[str, Any]:
    """Translate `text_encoder/config.json` into the fields of `ClipTextConfig`.

    The file names a width for the projection whether there is one or not. Stable Diffusion XL takes
    the words from the layer before the last, without the last norm. Raises `UnsupportedModel` for
    another kind of encoder.
    """
    kind = document.get("model_type", _KINDS[0])
    towers = document.get("architectures") or _TOWERS[:1]
    if kind not in _KINDS or not isinstance(towers, list | tuple) or towers[0] not in _TOWERS:
        shown = repr(towers[0] if isinstance(towers, list | tuple) else towers)[:60]
        raise UnsupportedModel(f"text encoder: it is a {shown}; diptych runs CLIP text towers")
    if isinstance(nested := document.get("text_config"), dict):
        document = nested
    values = translate(FIELDS, document)
    values["projection_dim"] = document.get("projection_dim", 512) if has_projection else None
    if document.get("eos_token_id") is None:
        values["eos_token_id"] = 2  # what they take for granted where the file says nothing
    values |= {"output_layer": -2 if is_xl else -1, "output_norm": not is_xl}
    return check_config(values)


def write_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the fields of `ClipTextConfig` into a config that transformers reads."""
    config = check_config(config)
    has_projection = config["projection_dim"] is not None
    words = {
        name: value
        for name, value in config.items()
        if name not in ("output_layer", "output_norm", "projection_dim")
    }
    return {
        "architectures": [_TOWERS[has_projection]],
        "model_type": _KINDS[0],
        **words,
        "projection_dim": config["projection_dim"] or config["hidden_size"],
        "bos_token_id": 0,
        "pad_token_id": 1,
    }


def check_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `ClipTextConfig`, every one there and fitting."""
    config = check_fields("text encoder", FIELDS, values)
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads:
        raise UnsupportedModel(
            f"text encoder: hidden_size {width} does not divide by num_attention_heads {heads}"
        )
    if -config["output_layer"] > config["num_hidden_layers"]:
        raise UnsupportedModel(
            f"text encoder: {config['num_hidden_layers']} layers have no layer "
            f"{config['output_layer']}"
        )
    return config
