"""Write the two networks of a captioner as ONNX graphs, node by node.

By hand rather than traced: the fused operators of ONNX Runtime (attention with a cache, sums with
their norm) leave about a third of the nodes, tied weights are stored once, and the names in the
file are those of the module. Torch is not needed: the weights arrive as NumPy arrays under the
module's own names. The operators of the domain `com.microsoft` are described in
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diptych.errors import UnsupportedModel

if TYPE_CHECKING:
    import onnx

__all__ = ["Graph", "decoder_graph", "encoder_graph"]

Weights = Mapping[str, NDArray[np.float32]]
Config = Mapping[str, Any]

OPSET = 21
MICROSOFT = "com.microsoft"
_BATCH_NORM_EPS = 1e-5  # torch's default, which the model keeps


@dataclass(slots=True)
class Node:
    """Hold one operation: `outputs` of `op` on `inputs`, an empty name being one left out."""

    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]
    domain: str = ""


@dataclass
class Graph:
    """Collect nodes, weights, inputs and outputs; values are known by their names."""

    name: str
    weights: dict[str, NDArray[Any]] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    inputs: dict[str, tuple[str, Sequence[int | str]]] = field(default_factory=dict)
    outputs: dict[str, tuple[str, Sequence[int | str]]] = field(default_factory=dict)

    def input(self, name: str, kind: str, shape: Sequence[int | str]) -> str:
        self.inputs[name] = (kind, shape)
        return name

    def output(self, name: str, shape: Sequence[int | str]) -> str:
        self.outputs[name] = ("FLOAT", shape)
        return name

    def weight(self, name: str, array: NDArray[Any] | np.float32) -> str:
        self.weights[name] = np.asarray(array, order="C")
        return name

    def ints(self, *values: int) -> str:
        """Store the int64 vector that shapes and axes want."""
        return self.weight(".".join(["ints", *map(str, values)]), np.asarray(values, np.int64))

    def add(self, op: str, *inputs: str, to: str | Sequence[str] = "", **attributes: Any) -> str:
        """Append a node; return the name of its first output, which is `to` where that is given.

        Operators of `com.microsoft` are written with a leading dot, as in `.FastGelu`.
        """
        outputs = [to] if isinstance(to, str) else list(to)
        outputs[0] = outputs[0] or f"{op.lstrip('.')}.{len(self.nodes)}"
        domain = MICROSOFT if op.startswith(".") else ""
        self.nodes.append(Node(op.lstrip("."), list(inputs), outputs, attributes, domain))
        return outputs[0]

    def proto(self) -> onnx.ModelProto:
        """Return the ONNX model, its weights inside."""
        from onnx import TensorProto, helper, numpy_helper

        def infos(values: Mapping[str, tuple[str, Sequence[int | str]]]) -> list[Any]:
            return [
                helper.make_tensor_value_info(name, getattr(TensorProto, kind), shape)
                for name, (kind, shape) in values.items()
            ]

        nodes = [
            helper.make_node(node.op, node.inputs, node.outputs, domain=node.domain, **node.attributes)
            for node in self.nodes
        ]
        tensors = [numpy_helper.from_array(array, name) for name, array in self.weights.items()]
        graph = helper.make_graph(
            nodes, self.name, infos(self.inputs), infos(self.outputs), tensors
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=10, producer_name="diptych"
        )


@dataclass(frozen=True, slots=True)
class _Writer:
    """Write layers into a graph, taking the weights of the module at `path`."""

    graph: Graph
    source: Weights

    def weight(self, path: str) -> str:
        return self.graph.weight(path, self.source[path])

    def matmul(self, hidden: str, path: str) -> str:
        # torch keeps [out, in]; MatMul wants [in, out].
        kernel = self.graph.weight(f"{path}.weight", self.source[f"{path}.weight"].T)
        return self.graph.add("MatMul", hidden, kernel)

    def linear(self, hidden: str, path: str) -> str:
        return self.graph.add("Add", self.matmul(hidden, path), self.weight(f"{path}.bias"))

    def norm(self, hidden: str, path: str, eps: float) -> str:
        scale, bias = self.weight(f"{path}.weight"), self.weight(f"{path}.bias")
        return self.graph.add("LayerNormalization", hidden, scale, bias, epsilon=eps)

    def add_norm(
        self, hidden: str, update: str, bias: str, path: str, eps: float
    ) -> tuple[str, str]:
        """Return norm(hidden + update + bias) and the sum itself."""
        scale, shift = self.weight(f"{path}.weight"), self.weight(f"{path}.bias")
        total = f"{path}.sum"
        normed = self.graph.add(
            ".SkipLayerNormalization",
            *(hidden, update, scale, shift, self.weight(bias)),
            to=["", "", "", total],
            epsilon=eps,
        )
        return normed, total

    def activate(self, hidden: str, bias: str, act: str) -> str:
        """Add `bias` and bend: erf-GELU and tanh-GELU are kept apart."""
        fused = {"gelu": ".BiasGelu", "gelu_new": ".FastGelu", "gelu_pytorch_tanh": ".FastGelu"}
        if act in fused:
            return self.graph.add(fused[act], hidden, self.weight(bias))
        total = self.graph.add("Add", hidden, self.weight(bias))
        if act == "relu":
            return self.graph.add("Relu", total)
        slopes = {"quick_gelu": 1.702, "silu": 1.0, "swish": 1.0}
        if act not in slopes:
            raise UnsupportedModel(f"the activation {act!r} cannot be exported")
        return self.graph.add(".QuickGelu", total, alpha=slopes[act])

    def conv(self, pixels: str, path: str, *, norm: str = "", stride: int = 1, pad: int = 0) -> str:
        """Convolve; the batch norm at `norm` is folded into the kernel."""
        kernel = self.source[f"{path}.weight"]
        if norm:
            scale, shift, mean, variance = (
                self.source[f"{norm}.{name}"]
                for name in ("weight", "bias", "running_mean", "running_var")
            )
            factor = scale / np.sqrt(variance + _BATCH_NORM_EPS)
            kernel, bias = kernel * factor[:, None, None, None], shift - mean * factor
        else:
            bias = self.source[f"{path}.bias"]
        return self.graph.add(
            "Conv",
            pixels,
            self.graph.weight(f"{path}.weight", kernel),
            self.graph.weight(f"{path}.bias", bias),
            strides=[stride, stride],
            pads=[pad] * 4,
        )


def encoder_graph(config: Config, weights: Weights) -> Graph:
    """Write ViT, bridge and cross-attention projections as one graph.

    `pixel_values` [B, C, H, W] to `cross_key_values` [L, 2, B, heads, P, d] or `prefix_embeds`
    [B, P, D]. `config` is the artifact's, `weights` the captioner's state.
    """
    vit, gpt2 = config["encoder"], config["decoder"]
    graph = Graph("encoder")
    write = _Writer(graph, weights)
    size, eps = vit["image_size"], vit["layer_norm_eps"]
    graph.input("pixel_values", "FLOAT", ["B", vit["num_channels"], size, size])
    hidden = _patches(write, vit)
    normed = write.norm(hidden, "encoder.encoder.layer.0.layernorm_before", eps)
    for layer in range(vit["num_hidden_layers"]):
        path = f"encoder.encoder.layer.{layer}"
        last = layer + 1 == vit["num_hidden_layers"]
        following = "encoder.layernorm" if last else (
            f"encoder.encoder.layer.{layer + 1}.layernorm_before"
        )
        mixed = _vit_attention(write, normed, f"{path}.attention", vit)
        normed, hidden = write.add_norm(
            hidden, mixed, f"{path}.attention.output.bias", f"{path}.layernorm_after", eps
        )
        wide = write.matmul(normed, f"{path}.mlp.intermediate")
        wide = write.activate(wide, f"{path}.mlp.intermediate.bias", vit["hidden_act"])
        narrow = write.matmul(wide, f"{path}.mlp.output")
        normed, hidden = write.add_norm(hidden, narrow, f"{path}.mlp.output.bias", following, eps)
    if config["bridge"] == "prefix":
        projected = write.linear(normed, "bridge.projection")
        normed = write.norm(projected, "bridge.layer_norm", gpt2["layer_norm_eps"])
        graph.nodes[-1].outputs[0] = graph.output(
            "prefix_embeds", ["B", num_image_tokens(vit), gpt2["hidden_size"]]
        )
    else:
        if vit["hidden_size"] != gpt2["hidden_size"]:
            normed = write.linear(normed, "bridge.enc_to_dec_proj")
        _cross_key_values(write, normed, vit, gpt2)
    return graph


def num_image_tokens(vit: Config) -> int:
    """Count the vectors of a picture: patches, CLS and DeiT's second token."""
    patches = (vit["image_size"] // vit["patch_size"]) ** 2
    return patches + 1 + int(vit["distillation_token"])


def _patches(write: _Writer, vit: Config) -> str:
    """Write the tokens before the first layer: [B, P, D]."""
    graph, path = write.graph, "encoder.embeddings"
    width, patch = vit["hidden_size"], vit["patch_size"]
    if vit["stem_channels"]:
        pixels = _stem(write, vit, f"{path}.patch_embeddings")
    else:
        pixels = write.conv("pixel_values", f"{path}.patch_embeddings.projection", stride=patch)
    flat = graph.add("Reshape", pixels, graph.ints(0, width, -1))
    patches = graph.add("Transpose", flat, perm=[0, 2, 1])
    learned = [write.source[f"{path}.cls_token"]]
    if vit["distillation_token"]:
        learned.append(write.source[f"{path}.distillation_token"])
    tokens = graph.weight(f"{path}.tokens", np.concatenate(learned, axis=1))
    batch = graph.add("Shape", "pixel_values", start=0, end=1)
    shape = graph.add("Concat", batch, graph.ints(1), graph.ints(1), axis=0)
    tokens = graph.add("Expand", tokens, shape)
    together = graph.add("Concat", tokens, patches, axis=1)
    return graph.add("Add", together, write.weight(f"{path}.position_embeddings"))


def _stem(write: _Writer, vit: Config, path: str) -> str:
    """Write the convolutions that stand for the patches; their order is `ConvStem`'s."""
    graph, pixels, index = write.graph, "pixel_values", 0
    for stage, _ in enumerate(vit["stem_channels"]):
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


def _vit_attention(write: _Writer, normed: str, path: str, vit: Config) -> str:
    """Write attention of all to all, without the bias of its last projection."""
    parts = ("query", "key", "value")
    heads = [write.matmul(normed, f"{path}.{part}") for part in parts]
    if vit["qkv_bias"]:
        biases = [write.source[f"{path}.{part}.bias"] for part in parts]
        heads.append(write.graph.weight(f"{path}.qkv.bias", np.concatenate(biases)))
    number = vit["num_attention_heads"]
    scale = (vit["hidden_size"] // number) ** -0.5
    mixed = write.graph.add(".MultiHeadAttention", *heads, num_heads=number, scale=scale)
    return write.matmul(mixed, f"{path}.output")


def _cross_key_values(write: _Writer, hidden: str, vit: Config, gpt2: Config) -> None:
    """Write the keys and values of all the decoder's layers as one matrix product."""
    graph, layers, width = write.graph, gpt2["num_hidden_layers"], gpt2["hidden_size"]
    heads, tokens = gpt2["num_attention_heads"], num_image_tokens(vit)
    paths = [f"decoder.h.{layer}.crossattention.c_attn" for layer in range(layers)]
    kernel = np.concatenate([write.source[f"{path}.weight"] for path in paths]).T
    bias = np.concatenate([write.source[f"{path}.bias"] for path in paths])
    product = graph.add("MatMul", hidden, graph.weight("decoder.crossattention.weight", kernel))
    product = graph.add("Add", product, graph.weight("decoder.crossattention.bias", bias))
    split = graph.ints(-1, tokens, layers, 2, heads, width // heads)
    graph.add(
        "Transpose",
        graph.add("Reshape", product, split),
        to=graph.output("cross_key_values", [layers, 2, "B", heads, tokens, width // heads]),
        perm=[2, 3, 0, 4, 1, 5],
    )


def decoder_graph(config: Config, weights: Weights) -> Graph:
    """Write one decoder step: prefill and every later word alike.

    `input_ids` [N, T] and, a layer each, `past_key_i`, `past_value_i` [N, heads, S, d] with
    `cross_key_i`, `cross_value_i` [B, heads, P, d], or `prefix_embeds` [N, P or 0, D], to `logits`
    [N, V] of the last position, `present_key_i`, `present_value_i` [N, heads, S+T, d] and
    `image_attention` [N, T, P]. One tensor a layer: the slices of the whole cache need no copying.
    """
    gpt2 = config["decoder"]
    graph = Graph("decoder")
    write = _Writer(graph, weights)
    step = _Step(write, gpt2, config["bridge"] == "prefix", num_image_tokens(config["encoder"]))
    return step.run()


@dataclass
class _Step:
    """Write the decoder; holds what its layers share."""

    write: _Writer
    config: Config
    prefix: bool
    image_tokens: int
    seen: list[str] = field(default_factory=list)  # each layer's image attention

    def run(self) -> Graph:
        graph, config = self.write.graph, self.config
        graph.input("input_ids", "INT64", ["N", "T"])
        if self.prefix:
            graph.input("prefix_embeds", "FLOAT", ["N", "I", config["hidden_size"]])
        cache = config["num_attention_heads"], self.head_size
        for layer in range(config["num_hidden_layers"]):
            for part in ("key", "value"):
                graph.input(f"past_{part}_{layer}", "FLOAT", ["N", cache[0], "S", cache[1]])
                graph.output(f"present_{part}_{layer}", ["N", cache[0], "S+I+T", cache[1]])
                if not self.prefix:
                    shape = ["B", cache[0], self.image_tokens, cache[1]]
                    graph.input(f"cross_{part}_{layer}", "FLOAT", shape)
        hidden = self.embed()
        normed = self.write.norm(hidden, "decoder.h.0.ln_1", config["layer_norm_eps"])
        for layer in range(config["num_hidden_layers"]):
            normed, hidden = self.block(layer, normed, hidden)
        last = graph.add("Gather", normed, graph.weight("last", np.asarray(-1)), axis=1)
        tied = config["tie_word_embeddings"]
        head = self.write.weight("decoder.wte.weight" if tied else "decoder.lm_head.weight")
        # The head reads the rows that the words were looked up in: one matrix in the file.
        logits = graph.output("logits", ["N", config["vocab_size"]])
        graph.add("Gemm", last, head, to=logits, transB=1)
        seen = graph.output("image_attention", ["N", "T", self.image_tokens])
        graph.add("Mean", *self.seen, to=seen)
        return graph

    @property
    def head_size(self) -> int:
        return int(self.config["hidden_size"]) // int(self.config["num_attention_heads"])

    def embed(self) -> str:
        """Look words and positions up, behind the picture's tokens: [N, I+T, D]."""
        graph = self.write.graph
        hidden = graph.add("Gather", self.write.weight("decoder.wte.weight"), "input_ids")
        rows = graph.add("Shape", "input_ids", start=0, end=1)
        words = graph.add("Shape", "input_ids", start=1, end=2, to="words")
        width = graph.ints(self.config["hidden_size"])
        graph.add("Concat", rows, graph.ints(-1), width, to="by_row", axis=0)
        if self.prefix:
            hidden = graph.add("Concat", "prefix_embeds", hidden, axis=1)
        else:
            pictures = graph.add("Shape", "cross_key_0", start=0, end=1)
            graph.add("Concat", pictures, graph.ints(-1), width, to="by_picture", axis=0)
            counted = graph.add("Concat", rows, words, graph.ints(-1), axis=0)
            graph.add("Identity", counted, to="by_word")
        past = graph.add("Shape", "past_key_0", start=2, end=3)
        total = graph.add("Add", past, graph.add("Shape", hidden, start=1, end=2), to="total")
        table = self.write.weight("decoder.wpe.weight")
        return graph.add("Add", hidden, graph.add("Slice", table, past, total, graph.ints(0)))

    def block(self, layer: int, normed: str, hidden: str) -> tuple[str, str]:
        """Write a layer; takes and returns the normed hidden states and the sum behind them."""
        write, eps, path = self.write, self.config["layer_norm_eps"], f"decoder.h.{layer}"
        last = layer + 1 == self.config["num_hidden_layers"]
        following = "decoder.ln_f" if last else f"decoder.h.{layer + 1}.ln_1"
        mixed, bias = self.self_attention(layer, normed), f"{path}.attn.c_proj.bias"
        if not self.prefix:
            normed, hidden = write.add_norm(hidden, mixed, bias, f"{path}.ln_cross_attn", eps)
            mixed = self.cross_attention(layer, normed)
            bias = f"{path}.crossattention.c_proj.bias"
        normed, hidden = write.add_norm(hidden, mixed, bias, f"{path}.ln_2", eps)
        wide = write.matmul(normed, f"{path}.mlp.c_fc")
        wide = write.activate(wide, f"{path}.mlp.c_fc.bias", self.config["hidden_act"])
        narrow = write.matmul(wide, f"{path}.mlp.c_proj")
        return write.add_norm(hidden, narrow, f"{path}.mlp.c_proj.bias", following, eps)

    def self_attention(self, layer: int, normed: str) -> str:
        graph, path = self.write.graph, f"decoder.h.{layer}.attn"
        parts = [f"{path}.{part}" for part in ("query", "key", "value")]
        graph.add("Split", self.write.matmul(normed, f"{path}.c_attn"), to=parts, axis=-1, num_outputs=3)
        bias = self.write.weight(f"{path}.c_attn.bias")
        mixed = graph.add(
            ".MultiHeadAttention",
            *(*parts, bias, "", "", f"past_key_{layer}", f"past_value_{layer}"),
            to=["", f"present_key_{layer}", f"present_value_{layer}"],
            num_heads=self.config["num_attention_heads"],
            scale=self.scale(layer),
            unidirectional=1,
        )
        if self.prefix:
            self.see_prefix(layer, parts[0])
        return self.write.matmul(mixed, f"{path}.c_proj")

    def cross_attention(self, layer: int, normed: str) -> str:
        graph, path = self.write.graph, f"decoder.h.{layer}.crossattention"
        query = self.write.linear(normed, f"{path}.q_attn")
        # The beams become further queries of their picture: its keys are read once, not per beam.
        query = graph.add("Reshape", query, "by_picture")
        mixed = graph.add(
            ".MultiHeadAttention",
            *(query, f"cross_key_{layer}", f"cross_value_{layer}"),
            num_heads=self.config["num_attention_heads"],
            scale=self.scale(layer),
        )
        weights = self.weights(layer, query, f"cross_key_{layer}")
        self.seen.append(graph.add("Reshape", weights, "by_word"))
        return self.write.matmul(graph.add("Reshape", mixed, "by_row"), f"{path}.c_proj")

    def scale(self, layer: int) -> float:
        scale = self.head_size**-0.5 if self.config["scale_attn_weights"] else 1.0
        inverse = self.config["scale_attn_by_inverse_layer_idx"]
        return float(scale / (layer + 1) if inverse else scale)

    def weights(self, layer: int, query: str, key: str, mask: str = "") -> str:
        """Write the heads' mean attention of `query` [B, T, D] on `key` [B, heads, S, d].

        Only `image_attention` needs it; a run that does not ask for that does not compute it.
        """
        graph, heads = self.write.graph, self.config["num_attention_heads"]
        split = graph.add("Reshape", query, graph.ints(0, 0, heads, self.head_size))
        split = graph.add("Transpose", split, perm=[0, 2, 1, 3])
        scores = graph.add(".FusedMatMul", split, key, transB=1, alpha=self.scale(layer))
        if mask:
            scores = graph.add("Add", scores, mask)
        weights = graph.add("Softmax", scores, axis=-1)
        return graph.add("ReduceMean", weights, graph.ints(1), keepdims=0)

    def see_prefix(self, layer: int, query: str) -> None:
        graph, path = self.write.graph, f"decoder.h.{layer}.attn"
        bias = self.write.source[f"{path}.c_attn.bias"][: self.config["hidden_size"]]
        query = graph.add("Add", query, graph.weight(f"{path}.query.bias", bias))
        if layer == 0:
            self.mask()
        query = graph.add("Slice", query, "minus_words", graph.ints(2**31 - 1), graph.ints(1))
        weights = self.weights(layer, query, f"present_key_{layer}", "mask")
        tokens = graph.ints(self.image_tokens)
        self.seen.append(graph.add("Slice", weights, graph.ints(0), tokens, graph.ints(2)))

    def mask(self) -> None:
        """Write what the last T of S+I+T positions may see: 0, or -inf for what comes later."""
        graph = self.write.graph
        graph.add("Neg", "words", to="minus_words")
        scalar = graph.ints()
        zero, one = graph.weight("zero", np.asarray(0)), graph.weight("one", np.asarray(1))
        total = graph.add("Reshape", "total", scalar)
        keys = graph.add("Range", zero, total, one)
        queries = graph.add("Slice", keys, "minus_words", graph.ints(2**31 - 1))
        later = graph.add("Less", graph.add("Unsqueeze", queries, graph.ints(1)), keys)
        nothing = graph.weight("nothing", np.float32(0))
        graph.add("Where", later, graph.weight("never", np.float32(-np.inf)), nothing, to="mask")
