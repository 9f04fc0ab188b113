"""Write the two halves of an autoencoder as ONNX graphs, as `generator_graphs` does the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diptych.runtimes.graph import Graph, Weights
from diptych.runtimes.graph_blocks import attend, repeat_pixels, resnet, to_map, to_tokens
from diptych.runtimes.graph_layers import LayerWriter

__all__ = ["vae_decoder_graph", "vae_encoder_graph"]

Config = Mapping[str, Any]
_VAE_EPS = 1e-6


def vae_encoder_graph(config: Config, weights: Weights) -> Graph:
    """Write `pixel_values` [B, 3, H, W] to `mean` and `log_variance` [B, c, h, w]."""
    graph = Graph("vae_encoder")
    patch, levels = config["patch_size"], len(config["block_out_channels"])
    write = LayerWriter(graph, _folded(weights, patch))
    hidden = graph.input("pixel_values", "FLOAT", ["B", config["in_channels"], "H", "W"])
    if patch > 1:
        hidden = graph.add("SpaceToDepth", hidden, blocksize=patch)
    hidden = write.conv(hidden, "encoder.conv_in", pad=1)
    for level in range(levels):
        path = f"encoder.down_blocks.{level}"
        for index in range(config["layers_per_block"]):
            hidden = _vae_resnet(write, config, hidden, f"{path}.resnets.{index}")
        if level < levels - 1:
            # The VAE was trained with padding on the right and bottom only.
            pad = (0, 0, 1, 1)
            hidden = write.conv(hidden, f"{path}.downsamplers.0.conv", stride=2, pad=pad)
    hidden = _vae_middle(write, config, hidden, "encoder")
    hidden = write.conv(hidden, "encoder.conv_out", pad=1)
    if config["use_quant_conv"]:
        hidden = write.conv(hidden, "quant_conv")
    shape = ["B", config["latent_channels"], "h", "w"]
    mean, log_variance = graph.output("mean", shape), graph.output("log_variance", shape)
    graph.add("Split", hidden, to=[mean, "spread"], axis=1, num_outputs=2)
    low, high = (graph.weight(f"edge.{edge}", np.float32(edge)) for edge in (-30, 20))
    graph.add("Clip", "spread", low, high, to=log_variance)
    return graph


def vae_decoder_graph(config: Config, weights: Weights) -> Graph:
    """Write `latents` [B, c, h, w] to `pixel_values` [B, 3, H, W]."""
    graph = Graph("vae_decoder")
    write, levels = LayerWriter(graph, weights), len(config["block_out_channels"])
    hidden = graph.input("latents", "FLOAT", ["B", config["latent_channels"], "h", "w"])
    if config["use_post_quant_conv"]:
        hidden = write.conv(hidden, "post_quant_conv")
    hidden = write.conv(hidden, "decoder.conv_in", pad=1)
    hidden = _vae_mid_block(write, config, hidden, "decoder.mid_block")
    twice = graph.weight("twice", np.array([1, 1, 2, 2], np.float32))
    for level in range(levels):
        path = f"decoder.up_blocks.{level}"
        for index in range(config["layers_per_block"] + 1):
            hidden = _vae_resnet(write, config, hidden, f"{path}.resnets.{index}")
        if level < levels - 1:
            hidden = repeat_pixels(graph, hidden, twice)
            hidden = write.conv(hidden, f"{path}.upsamplers.0.conv", pad=1)
    hidden = _vae_end(write, config, hidden, "decoder")
    output = graph.output("pixel_values", ["B", config["out_channels"], "H", "W"])
    hidden = write.conv(hidden, "decoder.conv_out", pad=1)
    if (patch := config["patch_size"]) > 1:
        hidden = graph.add("DepthToSpace", hidden, blocksize=patch, mode="CRD")
    if config["refine_channels"]:
        ends = (graph.ints(0), graph.ints(config["out_channels"]), graph.ints(1))
        told = write.silu(write.conv(hidden, "refine.conv_in", pad=1))
        told = write.conv(told, "refine.conv_out", pad=1)
        hidden = graph.add("Add", graph.add("Slice", hidden, *ends), told)
    graph.add("Identity", hidden, to=output)
    return graph


def _folded(weights: Weights, patch: int) -> Weights:
    """Order the first convolution's inputs as SpaceToDepth gives them: the place, then the colour.

    torch's `pixel_unshuffle` gives the colour first.
    """
    if patch == 1:
        return weights
    name = "encoder.conv_in.weight"
    kernel = weights[name]
    split = kernel.reshape(len(kernel), -1, patch**2, *kernel.shape[2:])
    return {**weights, name: np.ascontiguousarray(split.swapaxes(1, 2)).reshape(kernel.shape)}


def _vae_middle(write: LayerWriter, config: Config, hidden: str, path: str) -> str:
    return _vae_end(write, config, _vae_mid_block(write, config, hidden, f"{path}.mid_block"), path)


def _vae_end(write: LayerWriter, config: Config, hidden: str, path: str) -> str:
    groups = config["norm_num_groups"]
    return write.silu(write.group_norm(hidden, f"{path}.conv_norm_out", groups, _VAE_EPS))


def _vae_resnet(write: LayerWriter, config: Config, hidden: str, path: str) -> str:
    return resnet(write, hidden, path, config["norm_num_groups"], _VAE_EPS)


def _vae_mid_block(write: LayerWriter, config: Config, hidden: str, path: str) -> str:
    graph = write.graph
    hidden = _vae_resnet(write, config, hidden, f"{path}.resnets.0")
    if config["mid_attention"]:
        attention, groups = f"{path}.attentions.0", config["norm_num_groups"]
        normed = write.group_norm(hidden, f"{attention}.group_norm", groups, _VAE_EPS)
        tokens = to_tokens(graph, normed)
        mixed = attend(write, tokens, tokens, attention, 1)
        hidden = graph.add("Add", to_map(graph, mixed, hidden), hidden)
    return _vae_resnet(write, config, hidden, f"{path}.resnets.1")
