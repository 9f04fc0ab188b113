"""Write text encoders and UNets as ONNX graphs.

They follow `models` line by line, over weights that arrive as NumPy arrays under the module's own
names; that both compute the same is measured by every export. Batch, sizes and the number of words
may vary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diptych.runtimes.graph import Graph, Weights
from diptych.runtimes.graph_blocks import (
    Style,
    attend,
    repeat_pixels,
    resnet,
    to_map,
    to_tokens,
    unsqueeze,
)
from diptych.runtimes.graph_layers import LayerWriter

__all__ = [
    "text_encoder_graph",
    "unet_graph",
    "unet_shallow_graph",
]

Config = Mapping[str, Any]
_TRANSFORMER_EPS = 1e-6
_LAYER_NORM_EPS = 1e-5  # torch's default, which the transformer blocks keep
_LEGACY_EOS = 2


# --- words ----------------------------------------------------------------------------------------


def text_encoder_graph(config: Config, weights: Weights, name: str = "text_encoder") -> Graph:
    """Write a text tower.

    `input_ids` [B, T] and `clip_skip` [] to `encoder_hidden_states` [B, T, D] and `pooled` [B, E].
    """
    graph = Graph(name)
    write, eps, path = LayerWriter(graph, weights), config["layer_norm_eps"], "text_model"
    graph.input("input_ids", "INT64", ["B", "T"])
    graph.input("clip_skip", "INT64", [])
    table = write.weight(f"{path}.embeddings.token_embedding.weight")
    places = write.weight(f"{path}.embeddings.position_embedding.weight")
    words = graph.add("Shape", "input_ids", start=1, end=2)
    places = graph.add("Slice", places, graph.ints(0), words, graph.ints(0))
    hidden = graph.add("Add", graph.add("Gather", table, "input_ids"), places)
    states = [hidden]
    for layer in range(config["num_hidden_layers"]):
        hidden = _text_layer(write, config, hidden, f"{path}.encoder.layers.{layer}")
        states.append(hidden)
    norm = f"{path}.final_layer_norm"
    stacked = graph.add("Concat", *(unsqueeze(graph, each, 0) for each in states), axis=0)
    last = graph.weight("last_state", np.int64(len(states) + config["output_layer"]))
    index = graph.add("Sub", last, "clip_skip")
    output = graph.output("encoder_hidden_states", ["B", "T", config["hidden_size"]])
    if config["output_norm"]:
        write.norm(graph.add("Gather", stacked, index, axis=0), norm, eps, to=output)
    else:
        graph.add("Gather", stacked, index, to=output, axis=0)
    _pool(write, config, hidden, norm)
    return graph


def _text_layer(write: LayerWriter, config: Config, hidden: str, path: str) -> str:
    graph, eps = write.graph, config["layer_norm_eps"]
    normed = write.norm(hidden, f"{path}.layer_norm1", eps)
    parts = [write.linear(normed, f"{path}.self_attn.{each}_proj") for each in "qkv"]
    heads = config["num_attention_heads"]
    mixed = graph.add(
        ".MultiHeadAttention",
        *parts,
        num_heads=heads,
        scale=(config["hidden_size"] // heads) ** -0.5,
        unidirectional=1,
    )
    hidden = graph.add("Add", hidden, write.linear(mixed, f"{path}.self_attn.out_proj"))
    normed = write.norm(hidden, f"{path}.layer_norm2", eps)
    wide = write.matmul(normed, f"{path}.mlp.fc1")
    wide = write.activate(wide, f"{path}.mlp.fc1.bias", config["hidden_act"])
    return graph.add("Add", hidden, write.linear(wide, f"{path}.mlp.fc2"))


def _pool(write: LayerWriter, config: Config, hidden: str, norm: str) -> None:
    """Write the normed state at the first end token of each text, projected if the model does."""
    graph, eps = write.graph, config["layer_norm_eps"]
    marks = "input_ids"
    if config["eos_token_id"] != _LEGACY_EOS:
        end = graph.weight("end_token", np.int64(config["eos_token_id"]))
        found = graph.add("Equal", "input_ids", end)
        one, zero = graph.weight("one", np.int64(1)), graph.weight("zero", np.int64(0))
        marks = graph.add("Where", found, one, zero)
    ends = graph.add("ArgMax", marks, axis=1, keepdims=1)
    state = graph.add("GatherND", hidden, ends, batch_dims=1)
    if config["projection_dim"] is None:
        write.norm(state, norm, eps, to=graph.output("pooled", ["B", config["hidden_size"]]))
        return
    kernel = graph.weight("text_projection.weight", write.source["text_projection.weight"].T)
    pooled = graph.output("pooled", ["B", config["projection_dim"]])
    graph.add("MatMul", write.norm(state, norm, eps), kernel, to=pooled)


# --- the UNet -------------------------------------------------------------------------------------


def unet_graph(config: Config, weights: Weights) -> Graph:
    """Write the UNet; inputs as `UNetConfig.inputs` names them.

    To `noise_pred` [B, C, h, w] and `deep_features` [B, D, h, w].
    """
    return _UNet(LayerWriter(Graph("unet"), weights), config).run()


def unet_shallow_graph(config: Config, weights: Weights) -> Graph:
    """Write the UNet's last block; inputs are those of the UNet and its `deep_features`."""
    return _UNet(LayerWriter(Graph("unet_shallow"), weights), config).finish()


@dataclass(frozen=True, slots=True)
class _UNet:
    """Write the UNet; holds what its blocks share."""

    write: LayerWriter
    config: Config

    def run(self) -> Graph:
        """Write all of it."""
        time, hidden = self.begin()
        styles, skips = self.styles(), [hidden]
        levels = range(len(self.config["block_out_channels"]))
        for level in levels:
            hidden = self.go_down(hidden, time, level, skips)
        hidden = self.turn(hidden, time)
        for level in reversed(levels[1:]):
            hidden = self.go_up(hidden, time, level, skips, styles)
        hidden = self.go_up(hidden, time, 0, skips, styles, slice(-1))
        graph, channels = self.write.graph, self.config["block_out_channels"][0]
        deep = graph.output("deep_features", ["B", channels, "h", "w"])
        graph.add("Identity", hidden, to=deep)
        return self.end(self.go_up(hidden, time, 0, skips, styles, slice(-1, None)))

    def finish(self) -> Graph:
        """Write the last block alone."""
        time, first = self.begin()
        channels = self.config["block_out_channels"][0]
        deep = self.write.graph.input("deep_features", "FLOAT", ["B", channels, "h", "w"])
        return self.end(self.go_up(deep, time, 0, [first], iter(()), slice(-1, None)))

    def begin(self) -> tuple[str, str]:
        """Write the inputs; return what conditions the blocks, and the first map."""
        graph, config = self.write.graph, self.config
        graph.input("latents", "FLOAT", ["B", config["in_channels"], "h", "w"])
        graph.input("timestep", "FLOAT", ["B"])
        graph.input("encoder_hidden_states", "FLOAT", ["B", "T", config["cross_attention_dim"]])
        return self.embed_time(), self.write.conv("latents", "conv_in", pad=1)

    def end(self, hidden: str) -> Graph:
        """Write the output."""
        graph, write, config = self.write.graph, self.write, self.config
        groups, eps = config["norm_num_groups"], config["norm_eps"]
        hidden = write.silu(write.group_norm(hidden, "conv_norm_out", groups, eps))
        output = graph.output("noise_pred", ["B", config["out_channels"], "h", "w"])
        write.conv(hidden, "conv_out", pad=1, to=output)
        return graph

    def embed_time(self) -> str:
        """Write what conditions every residual block, after its SiLU: [B, 4 * channels]."""
        graph, write, config = self.write.graph, self.write, self.config
        waves = self.waves("timestep", config["block_out_channels"][0])
        if config["time_cond_proj_dim"] is not None:
            graph.input("timestep_cond", "FLOAT", ["B", config["time_cond_proj_dim"]])
            guided = write.matmul("timestep_cond", "time_embedding.cond_proj")
            waves = graph.add("Add", waves, guided)
        embedded = self.embed(waves, "time_embedding")
        if config["addition_time_embed_dim"] is not None:
            graph.input("text_embeds", "FLOAT", ["B", "E"])
            graph.input("time_ids", "FLOAT", ["B", 6])
            sizes = self.waves("time_ids", config["addition_time_embed_dim"])
            sizes = graph.add("Reshape", sizes, graph.ints(0, -1))
            added = graph.add("Concat", "text_embeds", sizes, axis=-1)
            embedded = graph.add("Add", embedded, self.embed(added, "add_embedding"))
        return write.silu(embedded)

    def waves(self, steps: str, width: int) -> str:
        """Spread numbers over sines and cosines, as `timestep_embedding`: [*shape, width]."""
        graph, half = self.write.graph, width // 2
        slope = np.float32(-np.log(10000) / (half - self.config["freq_shift"]))
        values = np.exp(slope * np.arange(half, dtype=np.float32))
        frequencies = graph.weight(f"{steps}.frequencies", values)
        angles = graph.add("Mul", unsqueeze(graph, steps, -1), frequencies)
        waves = [graph.add("Cos", angles), graph.add("Sin", angles)]
        if not self.config["flip_sin_to_cos"]:
            waves.reverse()
        return graph.add("Concat", *waves, axis=-1)

    def embed(self, hidden: str, path: str) -> str:
        hidden = self.write.silu(self.write.linear(hidden, f"{path}.linear_1"))
        return self.write.linear(hidden, f"{path}.linear_2")

    def go_down(self, hidden: str, time: str, level: int, skips: list[str]) -> str:
        """Write one level on the way down; every map on it joins `skips`."""
        path = f"down_blocks.{level}"
        for index in range(self.config["layers_per_block"]):
            hidden = self.resnet(hidden, time, f"{path}.resnets.{index}")
            if self.config["down_attention"][level]:
                hidden = self.transformer(hidden, level, f"{path}.attentions.{index}")
            skips.append(hidden)
        if level < len(self.config["block_out_channels"]) - 1:
            hidden = self.write.conv(hidden, f"{path}.downsamplers.0.conv", stride=2, pad=1)
            skips.append(hidden)
        return hidden

    def turn(self, hidden: str, time: str) -> str:
        """Write the coarsest block."""
        hidden = self.resnet(hidden, time, "mid_block.resnets.0")
        if not self.config["mid_attention"]:
            return hidden
        level, depth = len(self.config["block_out_channels"]) - 1, "mid_transformer_layers"
        hidden = self.transformer(hidden, level, "mid_block.attentions.0", self.config[depth])
        return self.resnet(hidden, time, "mid_block.resnets.1")

    def styles(self) -> Iterator[Style]:
        """Write the four inputs of style transfer, neutral by default; yield each layer's part."""
        graph, config = self.write.graph, self.config
        has_attention = config["up_attention"] or config["down_attention"]
        layers = sum(has_attention) * (config["layers_per_block"] + 1)
        if not layers:
            return
        own, none = np.full((layers, 1), -1, np.int64), np.zeros((layers, 1), np.float32)
        keys = graph.optional("key_rows", "INT64", [layers, "S"], own)
        rows = graph.optional("query_rows", "INT64", ["S"], own[0])
        shares = graph.optional("query_preservation", "FLOAT", [layers, "S"], none)
        factors = graph.optional("attention_temperature", "FLOAT", [layers, "S"], none + 1)
        zero, one = graph.weight("row.first", np.int64(0)), graph.weight("row.next", np.int64(1))
        count = graph.add("Squeeze", graph.add("Shape", "latents", end=1))
        every = graph.add("Range", zero, count, one)

        def chosen(wanted: str) -> str:
            """Return the rows that are named, a row's own for -1."""
            return graph.add("Where", graph.add("Less", wanted, zero), every, wanted)

        query_rows = chosen(rows)
        for layer in range(layers):
            index = graph.weight(f"layer.{layer}", np.int64(layer))
            key, share, factor = (
                graph.add("Gather", each, index, axis=0) for each in (keys, shares, factors)
            )
            column = graph.ints(1, 2)
            numbers = [graph.add("Unsqueeze", each, column) for each in (share, factor)]
            yield chosen(key), query_rows, numbers[0], numbers[1]

    def go_up(
        self,
        hidden: str,
        time: str,
        level: int,
        skips: list[str],
        styles: Iterator[Style],
        layers: slice = slice(None),
    ) -> str:
        """Write one level on the way up, or some layers; takes its maps from the end of `skips`."""
        graph, config = self.write.graph, self.config
        path = f"up_blocks.{len(config['block_out_channels']) - 1 - level}"
        has_attention = (config["up_attention"] or config["down_attention"])[level]
        for index in range(config["layers_per_block"] + 1)[layers]:
            both = graph.add("Concat", hidden, skips.pop(), axis=1)
            hidden = self.resnet(both, time, f"{path}.resnets.{index}")
            if has_attention:
                place = f"{path}.attentions.{index}"
                hidden = self.transformer(hidden, level, place, style=next(styles, None))
        if level > 0:
            # An odd edge was rounded up on the way down: double to what the skip has, not by two.
            size = graph.add("Shape", skips[-1], start=2, end=4)
            size = graph.add("Concat", graph.add("Shape", hidden, end=2), size, axis=0)
            hidden = repeat_pixels(graph, hidden, "", size)
            hidden = self.write.conv(hidden, f"{path}.upsamplers.0.conv", pad=1)
        return hidden

    def resnet(self, hidden: str, time: str, path: str) -> str:
        groups, eps = self.config["norm_num_groups"], self.config["norm_eps"]
        return resnet(self.write, hidden, path, groups, eps, time)

    def transformer(
        self,
        hidden: str,
        level: int,
        path: str,
        depth: int | None = None,
        style: Style | None = None,
    ) -> str:
        """Write what a map's points see of each other and of the words: [B, C, h, w]."""
        graph, write, config = self.write.graph, self.write, self.config
        heads = config["num_attention_heads"][level]
        depth = config["transformer_layers_per_block"][level] if depth is None else depth
        groups = config["norm_num_groups"]
        normed = write.group_norm(hidden, f"{path}.norm", groups, _TRANSFORMER_EPS)
        tokens = write.linear(to_tokens(graph, normed), f"{path}.proj_in")
        for index in range(depth):
            block = f"{path}.transformer_blocks.{index}"
            tokens = self.transformer_block(tokens, heads, block, style)
        tokens = write.linear(tokens, f"{path}.proj_out")
        return graph.add("Add", to_map(graph, tokens, hidden), hidden)

    def transformer_block(self, tokens: str, heads: int, path: str, style: Style | None) -> str:
        graph, write = self.write.graph, self.write
        for number, context in ((1, None), (2, "encoder_hidden_states")):
            normed = write.norm(tokens, f"{path}.norm{number}", _LAYER_NORM_EPS)
            place, taken = f"{path}.attn{number}", None if context else style
            mixed = attend(write, normed, context or normed, place, heads, taken)
            tokens = graph.add("Add", tokens, mixed)
        normed = write.norm(tokens, f"{path}.norm3", _LAYER_NORM_EPS)
        # Two products: cutting what one gives would copy it.
        gated, half = f"{path}.ff.net.0.proj", len(write.source[f"{path}.ff.net.0.proj.bias"]) // 2
        value = write.linear(normed, gated, slice(0, half))
        gate = write.linear(normed, gated, slice(half, 2 * half))
        wide = graph.add("Mul", value, graph.add(".Gelu", gate))
        return graph.add("Add", tokens, write.linear(wide, f"{path}.ff.net.2"))
