"""Write the two networks of a captioner as ONNX graphs.

They follow `models` line by line, over weights that arrive as NumPy arrays under the module's own
names; that both compute the same is measured by every export. The biases stay with the operators
that take them in (attention, activations), so a layer is a dozen nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diptych.runtimes.graph import Graph, Shape, Weights
from diptych.runtimes.graph_layers import LayerWriter

__all__ = ["decoder_graph", "encoder_graph", "num_image_tokens"]

Config = Mapping[str, Any]

_FAR = 2**31 - 1


def encoder_graph(config: Config, weights: Weights) -> Graph:
    """Write ViT, bridge and the decoder's projections of the picture as one graph.

    `pixel_values` [B, C, H, W] to `cross_key_i`, `cross_value_i` [B, heads, P, d] of every layer
    of the decoder, or to `prefix_embeds` [B, P, D].
    """
    vit, gpt2 = config["encoder"], config["decoder"]
    graph = Graph("encoder")
    write = LayerWriter(graph, weights)
    size, eps = vit["image_size"], vit["layer_norm_eps"]
    graph.input("pixel_values", "FLOAT", ["B", vit["num_channels"], size, size])
    hidden = _patches(write, vit)
    for layer in range(vit["num_hidden_layers"]):
        path = f"encoder.encoder.layer.{layer}"
        normed = write.norm(hidden, f"{path}.layernorm_before", eps)
        hidden = graph.add("Add", _vit_attention(write, normed, path, vit), hidden)
        normed = write.norm(hidden, f"{path}.layernorm_after", eps)
        wide = write.matmul(normed, f"{path}.mlp.intermediate")
        wide = write.activate(wide, f"{path}.mlp.intermediate.bias", vit["hidden_act"])
        hidden = graph.add("Add", write.linear(wide, f"{path}.mlp.output"), hidden)
    hidden = write.norm(hidden, "encoder.layernorm", eps)
    tokens, width = num_image_tokens(vit), gpt2["hidden_size"]
    if config["bridge"] == "prefix":
        hidden = write.linear(hidden, "bridge.projection")
        name = graph.output("prefix_embeds", ["B", tokens, width])
        write.norm(hidden, "bridge.layer_norm", gpt2["layer_norm_eps"], to=name)
        return graph
    if vit["hidden_size"] != width:
        hidden = write.linear(hidden, "bridge.enc_to_dec_proj")
    heads = gpt2["num_attention_heads"]
    for layer in range(gpt2["num_hidden_layers"]):
        for index, part in enumerate(("key", "value")):
            path = f"decoder.h.{layer}.crossattention.c_attn"
            projected = write.linear(hidden, path, slice(index * width, (index + 1) * width))
            split = graph.add("Reshape", projected, graph.ints(0, 0, heads, width // heads))
            name = graph.output(f"cross_{part}_{layer}", ["B", heads, tokens, width // heads])
            graph.add("Transpose", split, to=name, perm=[0, 2, 1, 3])
    return graph


def decoder_graph(config: Config, weights: Weights) -> Graph:
    """Write one decoder step: prefill and every later word alike.

    `input_ids` [N, T], of every layer `past_key_i`, `past_value_i` [N, heads, S, d], and
    `cross_key_i`, `cross_value_i` [B, heads, P, d] or `prefix_embeds` [N, P or 0, D], to `logits`
    [N, V] of the last position, `present_key_i`, `present_value_i` [N, heads, S + T, d] and
    `image_attention` [N, T, P], if the input `look` is true. A tensor a layer, because a slice of
    the whole cache is one as it lies, while taking slices inside the graph copies them.
    """
    prefix = config["bridge"] == "prefix"
    tokens = num_image_tokens(config["encoder"])
    return _Step(LayerWriter(Graph("decoder"), weights), config["decoder"], prefix, tokens).run()


def num_image_tokens(vit: Config) -> int:
    """Count the vectors of a picture: patches, CLS and DeiT's second token."""
    patches: int = (vit["image_size"] // vit["patch_size"]) ** 2
    return patches + 1 + bool(vit["distillation_token"])


# --- the encoder ----------------------------------------------------------------------------------


def _patches(write: LayerWriter, vit: Config) -> str:
    """Write the tokens before the first layer: [B, P, D]."""
    graph, path = write.graph, "encoder.embeddings"
    if vit["stem_channels"]:
        pixels = _stem(write, vit, f"{path}.patch_embeddings")
    else:
        patch = f"{path}.patch_embeddings.projection"
        pixels = write.conv("pixel_values", patch, stride=vit["patch_size"])
    flat = graph.add("Reshape", pixels, graph.ints(0, vit["hidden_size"], -1))
    patches = graph.add("Transpose", flat, perm=[0, 2, 1])
    learned = [write.source[f"{path}.cls_token"]]
    if vit["distillation_token"]:
        learned.append(write.source[f"{path}.distillation_token"])
    tokens = graph.weight(f"{path}.tokens", np.concatenate(learned, axis=1))
    batch = graph.add("Shape", "pixel_values", start=0, end=1)
    shape = graph.add("Concat", batch, graph.ints(1), graph.ints(1), axis=0)
    together = graph.add("Concat", graph.add("Expand", tokens, shape), patches, axis=1)
    return graph.add("Add", together, write.weight(f"{path}.position_embeddings"))


def _stem(write: LayerWriter, vit: Config, path: str) -> str:
    """Write the convolutions that stand for the patches; their order is `ConvStem`'s."""
    graph, pixels, index = write.graph, "pixel_values", 0
    for stage in range(len(vit["stem_channels"])):
        at = f"{path}.stages.{index}"
        pixels = graph.add("Relu", write.conv(pixels, f"{at}.0", norm=f"{at}.1", stride=2, pad=1))
        index += 2
        for _ in range(vit["stem_blocks"] if stage else 0):
            at = f"{path}.stages.{index}"
            bent = write.conv(pixels, f"{at}.conv_1.0", norm=f"{at}.conv_1.1", pad=1)
            bent = graph.add("Relu", bent)
            bent = write.conv(bent, f"{at}.conv_2.0", norm=f"{at}.conv_2.1", pad=1)
            pixels = graph.add("Relu", graph.add("Add", bent, pixels))
            index += 1
    return write.conv(pixels, f"{path}.projection")


def _vit_attention(write: LayerWriter, normed: str, layer: str, vit: Config) -> str:
    """Write attention of all to all."""
    path, parts = f"{layer}.attention", ("query", "key", "value")
    heads = [write.matmul(normed, f"{path}.{part}") for part in parts]
    if vit["qkv_bias"]:
        biases = [write.source[f"{path}.{part}.bias"] for part in parts]
        heads.append(write.graph.weight(f"{path}.qkv.bias", np.concatenate(biases)))
    number = vit["num_attention_heads"]
    scale = (vit["hidden_size"] // number) ** -0.5
    mixed = write.graph.add(".MultiHeadAttention", *heads, num_heads=number, scale=scale)
    return write.linear(mixed, f"{path}.output")


# --- the decoder ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Step:
    """Write the decoder; holds what its layers share."""

    write: LayerWriter
    config: Config
    prefix: bool
    image_tokens: int

    def run(self) -> Graph:
        graph, write, eps = self.write.graph, self.write, self.config["layer_norm_eps"]
        self.declare()
        hidden = self.embed()
        for layer in range(self.config["num_hidden_layers"]):
            path = f"decoder.h.{layer}"
            mixed = self.self_attention(layer, write.norm(hidden, f"{path}.ln_1", eps))
            hidden = graph.add("Add", mixed, hidden)
            if not self.prefix:
                normed = write.norm(hidden, f"{path}.ln_cross_attn", eps)
                hidden = graph.add("Add", self.cross_attention(layer, normed), hidden)
            wide = write.matmul(write.norm(hidden, f"{path}.ln_2", eps), f"{path}.mlp.c_fc")
            wide = write.activate(wide, f"{path}.mlp.c_fc.bias", self.config["hidden_act"])
            hidden = graph.add("Add", write.linear(wide, f"{path}.mlp.c_proj"), hidden)
        last = graph.add("Gather", hidden, graph.weight("last", np.int64(-1)), axis=1)
        last = write.norm(last, "decoder.ln_f", eps)
        # Tied, the head is the array that the words were looked up in: one matrix in the file.
        head = "wte" if self.config["tie_word_embeddings"] else "lm_head"
        kernel = graph.weight("decoder.head.weight", write.source[f"decoder.{head}.weight"])
        graph.add("Gemm", last, kernel, to="logits", transB=1)
        self.image_attention()
        return graph

    @property
    def head_size(self) -> int:
        return int(self.config["hidden_size"]) // int(self.config["num_attention_heads"])

    def scale(self, layer: int) -> float:
        """Return what the scores are multiplied by, as `Gpt2Config.attention_scale`."""
        scale = self.head_size**-0.5 if self.config["scale_attn_weights"] else 1.0
        return scale / (layer + 1) if self.config["scale_attn_by_inverse_layer_idx"] else scale

    def declare(self) -> None:
        """Name the inputs and outputs."""
        graph, heads, size = self.write.graph, self.config["num_attention_heads"], self.head_size
        graph.input("input_ids", "INT64", ["N", "T"])
        if self.prefix:
            graph.input("prefix_embeds", "FLOAT", ["N", "I", self.config["hidden_size"]])
        graph.output("logits", ["N", self.config["vocab_size"]])
        for layer in range(self.config["num_hidden_layers"]):
            for part in ("key", "value"):
                graph.input(f"past_{part}_{layer}", "FLOAT", ["N", heads, "S", size])
                graph.output(f"present_{part}_{layer}", ["N", heads, "S+I+T", size])
                if not self.prefix:
                    shape = ["B", heads, self.image_tokens, size]
                    graph.input(f"cross_{part}_{layer}", "FLOAT", shape)

    def embed(self) -> str:
        """Look words and positions up, behind the picture's tokens: [N, I + T, D]."""
        graph = self.write.graph
        hidden = graph.add("Gather", self.write.weight("decoder.wte.weight"), "input_ids")
        rows = graph.add("Shape", "input_ids", start=0, end=1)
        words = graph.add("Shape", "input_ids", start=1, end=2, to="words")
        width = graph.ints(self.config["hidden_size"])
        if self.prefix:
            hidden = graph.add("Concat", "prefix_embeds", hidden, axis=1)
        else:
            pictures = graph.add("Shape", "cross_key_0", start=0, end=1)
            graph.add("Concat", pictures, graph.ints(-1), width, to="by_picture", axis=0)
            graph.add("Concat", rows, graph.ints(-1), width, to="by_row", axis=0)
            graph.add("Concat", rows, words, graph.ints(-1), to="by_word", axis=0)
        past = graph.add("Shape", "past_key_0", start=2, end=3)
        total = graph.add("Add", past, graph.add("Shape", hidden, start=1, end=2), to="total")
        table = self.write.weight("decoder.wpe.weight")
        return graph.add("Add", hidden, graph.add("Slice", table, past, total, graph.ints(0)))

    def self_attention(self, layer: int, normed: str) -> str:
        graph, path = self.write.graph, f"decoder.h.{layer}.attn"
        parts = [f"{path}.{part}" for part in ("query", "key", "value")]
        fused = self.write.matmul(normed, f"{path}.c_attn")
        graph.add("Split", fused, to=parts, axis=-1, num_outputs=3)
        bias = self.write.weight(f"{path}.c_attn.bias")
        mixed = graph.add(
            ".MultiHeadAttention",
            *(*parts, bias, "", "", f"past_key_{layer}", f"past_value_{layer}"),
            to=["", f"present_key_{layer}", f"present_value_{layer}"],
            num_heads=self.config["num_attention_heads"],
            scale=self.scale(layer),
            unidirectional=1,
        )
        return self.write.linear(mixed, f"{path}.c_proj")

    def cross_attention(self, layer: int, normed: str) -> str:
        graph, path = self.write.graph, f"decoder.h.{layer}.crossattention"
        query = self.write.linear(normed, f"{path}.q_attn")
        # The beams become further queries of their picture: its keys are read once, not per beam.
        query = graph.add("Reshape", query, "by_picture", to=f"{path}.query")
        mixed = graph.add(
            ".MultiHeadAttention",
            *(query, f"cross_key_{layer}", f"cross_value_{layer}"),
            num_heads=self.config["num_attention_heads"],
            scale=self.scale(layer),
        )
        return self.write.linear(graph.add("Reshape", mixed, "by_row"), f"{path}.c_proj")

    # What follows is for `image_attention` only. It stands in a branch of its own, because a run
    # computes what lies outside of branches whether it is asked for or not.

    def image_attention(self) -> None:
        """Write how far each word looked at each image token, if `look` says so: [N, T, P]."""
        graph = self.write.graph
        shape: Shape = ["N", "T", self.image_tokens]
        seen, unseen = graph.branch("seen"), graph.branch("unseen")
        layers = [self.seen(seen, layer) for layer in range(self.config["num_hidden_layers"])]
        seen.add("Mean", *layers, to=seen.output("image_attention.seen", shape))
        nothing = graph.weight("nothing", np.zeros((0, 0, self.image_tokens), np.float32))
        unseen.add("Identity", nothing, to=unseen.output("image_attention.unseen", shape))
        graph.input("look", "BOOL", [])
        graph.output("image_attention", shape)
        graph.add("If", "look", to="image_attention", then_branch=seen, else_branch=unseen)

    def seen(self, graph: Graph, layer: int) -> str:
        """Write the heads' mean attention of one layer."""
        if not self.prefix:
            query = f"decoder.h.{layer}.crossattention.query"
            weights = self.weights(graph, layer, query, f"cross_key_{layer}")
            return graph.add("Reshape", weights, "by_word")
        if layer == 0:
            self.mask(graph)
        path = f"decoder.h.{layer}.attn"
        ends = "minus_words", graph.ints(_FAR)
        query = graph.add("Slice", f"{path}.query", *ends, graph.ints(1))
        bias = self.write.source[f"{path}.c_attn.bias"][: self.config["hidden_size"]]
        query = graph.add("Add", query, graph.weight(f"{path}.query.bias", bias))
        weights = self.weights(graph, layer, query, f"present_key_{layer}", "mask")
        return graph.add(
            "Slice", weights, graph.ints(0), graph.ints(self.image_tokens), graph.ints(2)
        )

    def weights(self, graph: Graph, layer: int, query: str, key: str, mask: str = "") -> str:
        """Write the attention of `query` [B, T, D] to `key` [B, heads, S, d]: [B, T, S]."""
        split = graph.ints(0, 0, self.config["num_attention_heads"], self.head_size)
        query = graph.add("Transpose", graph.add("Reshape", query, split), perm=[0, 2, 1, 3])
        scores = graph.add(".FusedMatMul", query, key, transB=1, alpha=self.scale(layer))
        if mask:
            scores = graph.add("Add", scores, mask)
        weights = graph.add("Softmax", scores, axis=-1)
        return graph.add("ReduceMean", weights, graph.ints(1), keepdims=0)

    def mask(self, graph: Graph) -> None:
        """Write what the last T of S + I + T positions may see: 0, and -inf for what is later."""
        graph.add("Neg", "words", to="minus_words")
        total = graph.add("Reshape", "total", graph.ints())
        zero, one = graph.weight("zero", np.int64(0)), graph.weight("one", np.int64(1))
        keys = graph.add("Range", zero, total, one)
        queries = graph.add("Slice", keys, "minus_words", graph.ints(_FAR))
        later = graph.add("Less", graph.add("Unsqueeze", queries, graph.ints(1)), keys)
        now = graph.weight("now", np.float32(0))
        never = graph.weight("never", np.float32(-np.inf))
        graph.add("Where", later, never, now, to="mask")
