"""Speak the UNet of CompVis' latent diffusion, the inside of a single file.

Its blocks are numbered through from the first to the last, whatever they hold, so the rules follow
from the config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from diptych.weights.dialects.diffusers_unet import ATTENTION
from diptych.weights.rename import Rules, Scheme

__all__ = ["ldm_unet"]

_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_OUTSIDE: Rules = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("time_embed.cond_proj", "time_embedding.cond_proj"),
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)


def ldm_unet(config: Mapping[str, Any]) -> Scheme:
    """Return the dialect of the UNet that `config`, the fields of `UNetConfig`, describes."""
    return Scheme(
        NAME="ldm UNet",
        TELLTALE="input_blocks.0.0.weight",
        RULES=(*_OUTSIDE, *_down(config), *_middle(config), *_up(config)),
    )


def _down(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    per_level = config["layers_per_block"] + 1  # and the downsampler
    levels = len(config["block_out_channels"])
    for level in range(levels):
        ours, first = f"down_blocks.{level}", 1 + level * per_level
        for layer in range(config["layers_per_block"]):
            theirs = f"input_blocks.{first + layer}"
            yield from _resnet(f"{theirs}.0", f"{ours}.resnets.{layer}")
            if config["down_attention"][level]:
                depth = config["transformer_layers_per_block"][level]
                yield from _transformer(f"{theirs}.1", f"{ours}.attentions.{layer}", depth)
        if level < levels - 1:
            theirs = f"input_blocks.{first + per_level - 1}"
            yield f"{theirs}.0.op", f"{ours}.downsamplers.0.conv"


def _middle(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from _resnet("middle_block.0", "mid_block.resnets.0")
    last = 1
    if config["mid_attention"]:
        depth = config["mid_transformer_layers"] or config["transformer_layers_per_block"][-1]
        yield from _transformer("middle_block.1", "mid_block.attentions.0", depth)
        last = 2
    yield from _resnet(f"middle_block.{last}", "mid_block.resnets.1")


def _up(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    per_level = config["layers_per_block"] + 1
    attention = config["up_attention"] or config["down_attention"]
    levels = len(config["block_out_channels"])
    for block, level in enumerate(reversed(range(levels))):
        ours, first = f"up_blocks.{block}", block * per_level
        for layer in range(per_level):
            theirs = f"output_blocks.{first + layer}"
            yield from _resnet(f"{theirs}.0", f"{ours}.resnets.{layer}")
            if attention[level]:
                depth = config["transformer_layers_per_block"][level]
                yield from _transformer(f"{theirs}.1", f"{ours}.attentions.{layer}", depth)
        if level:
            # It stands after what the last layer of the level holds.
            theirs = f"output_blocks.{first + per_level - 1}.{1 + attention[level]}"
            yield f"{theirs}.conv", f"{ours}.upsamplers.0.conv"


def _resnet(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    for file, module in _RESNET:
        yield f"{theirs}.{file}", f"{ours}.{module}"


def _transformer(theirs: str, ours: str, depth: int) -> Iterator[tuple[str, str]]:
    """Yield the paths inside a transformer, which are the same in both."""
    for inner in _inside(depth):
        yield f"{theirs}.{inner}", f"{ours}.{inner}"


def _inside(depth: int) -> Iterator[str]:
    for path in ATTENTION:
        head, _, tail = path.partition("transformer_blocks.{}.")
        if not tail:
            yield head
        # `to_out.0`; of the feed-forward `net.0.proj` and `net.2`.
        number = 0 if "to_out" in tail or tail.endswith(".proj") else 2
        for block in range(depth if tail else 0):
            yield f"transformer_blocks.{block}.{tail.format(number)}"
