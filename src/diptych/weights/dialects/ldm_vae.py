"""Speak the KL autoencoder of CompVis' latent diffusion, the inside of a single file.

Its decoder counts levels from the finest, ours in the order they run, so the rules follow from
the config. Its attention is made of 1x1 convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from diptych.weights.rename import Rules, Scheme

__all__ = ["ldm_vae"]

_RESNET = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("nin_shortcut", "conv_shortcut"),
)
_ATTENTION = (
    ("norm", "group_norm"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("proj_out", "to_out.0"),
)
_HALVES = ("encoder", "decoder")
_OUTSIDE: Rules = (
    ("quant_conv", "quant_conv"),
    ("post_quant_conv", "post_quant_conv"),
    *(
        (f"{half}.{file}", f"{half}.{module}")
        for half in _HALVES
        for file, module in (
            ("conv_in", "conv_in"),
            ("norm_out", "conv_norm_out"),
            ("conv_out", "conv_out"),
        )
    ),
)


def ldm_vae(config: Mapping[str, Any]) -> Scheme:
    """Return the dialect of the VAE that `config`, the fields of `VaeConfig`, describes."""
    squeezed = [file for file, module in _ATTENTION if module.startswith("to_")]
    return Scheme(
        NAME="ldm VAE",
        TELLTALE="encoder.down.0.block.0.conv1.weight",
        RULES=(*_OUTSIDE, *_middles(config), *_levels(config)),
        RESHAPE={
            f"{half}.mid.attn_1.{file}.weight": "squeeze" for half in _HALVES for file in squeezed
        },
    )


def _middles(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for half in _HALVES:
        for number in (0, 1):
            ours = f"{half}.mid_block.resnets.{number}"
            yield from _resnet(f"{half}.mid.block_{number + 1}", ours)
        for file, module in _ATTENTION if config["mid_attention"] else ():
            yield f"{half}.mid.attn_1.{file}", f"{half}.mid_block.attentions.0.{module}"


def _levels(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    for level in range(levels):
        theirs, ours = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        for layer in range(layers):
            yield from _resnet(f"{theirs}.block.{layer}", f"{ours}.resnets.{layer}")
        if level < levels - 1:
            yield f"{theirs}.downsample.conv", f"{ours}.downsamplers.0.conv"
    for block, level in enumerate(reversed(range(levels))):
        theirs, ours = f"decoder.up.{level}", f"decoder.up_blocks.{block}"
        for layer in range(layers + 1):
            yield from _resnet(f"{theirs}.block.{layer}", f"{ours}.resnets.{layer}")
        if level:
            yield f"{theirs}.upsample.conv", f"{ours}.upsamplers.0.conv"


def _resnet(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    for file, module in _RESNET:
        yield f"{theirs}.{file}", f"{ours}.{module}"
