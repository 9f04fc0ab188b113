"""Speak diffusers' AutoencoderTiny, of which the decoder is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diptych.errors import UnsupportedModel
from diptych.weights.fields import Field, check_fields, translate
from diptych.weights.rename import Pairs, Reshape, Rules

__all__ = ["ALIASES", "NAME", "RESHAPE", "RULES", "TELLTALE", "TENSORS", "read_config"]

NAME = "diffusers tiny VAE"
TELLTALE = "decoder.layers.0.weight"
ALIASES: Pairs = ()
RULES: Rules = (
    ("decoder.layers.{}", "decoder.layers.{}"),
    ("decoder.layers.{}.conv.{}", "decoder.layers.{}.conv.{}"),
    ("encoder.layers.{}", None),
    ("encoder.layers.{}.conv.{}", None),
)
TENSORS: Rules = ()
RESHAPE: Mapping[str, Reshape] = {}

_FIELDS = {
    "out_channels": Field("int", 3, 3, 3),
    "latent_channels": Field("int", 4, 1, 64),
    "num_blocks": Field("ints", (3, 3, 3, 1), 0, 64, most=8, foreign="num_decoder_blocks"),
    "num_channels": Field("int", 64, 1, 4096),
    "upsampling_scaling_factor": Field("int", 2, 1, 8),
    "scaling_factor": Field("float", 1.0, 1e-6, 1e6),
    "shift_factor": Field("float", 0.0, -1e6, 1e6),
}
_WIDTHS = "decoder_block_out_channels"


def read_config(document: Mapping[str, Any]) -> dict[str, Any]:
    """Translate `config.json` into the fields of `TinyVaeConfig`.

    Raises `UnsupportedModel` for a network that ours is not.
    """
    if (kind := document.get("_class_name")) != "AutoencoderTiny":
        raise UnsupportedModel(
            f"tiny VAE: it is a {repr(kind)[:60]}; diptych previews with an AutoencoderTiny"
        )
    for word, built in (("act_fn", "relu"), ("upsample_fn", "nearest")):
        if (asked := document.get(word, built)) != built:
            raise UnsupportedModel(f"tiny VAE: {word} is {repr(asked)[:40]}, which is not built")
    config = translate(_FIELDS, document)
    widths = document.get(_WIDTHS) or [config["num_channels"]]
    if not isinstance(widths, list) or any(width != widths[0] for width in widths):
        raise UnsupportedModel(f"tiny VAE: {_WIDTHS} is {repr(widths)[:60]}, not one number")
    return check_fields("tiny VAE", _FIELDS, {**config, "num_channels": widths[0]})
