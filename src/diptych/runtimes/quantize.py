"""Make an artifact smaller: its matrices as 8-bit numbers, its tables as 16-bit ones.

Each row of a matrix is cut into blocks of 64 numbers with a scale each; the rows that are
multiplied with it are rounded the same way, block by block, as they come (`MatMulNBits`). A scale
for a whole tensor would let the pictures of a batch change each other's captions. Convolutions,
norms and attention are computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diptych.errors import BadInput
from diptych.runtimes.agreement import (
    Pixels,
    compare_tensors,
    compare_tokens,
    greedy_tokens,
    pictures_for,
)
from diptych.runtimes.artifact import (
    NETWORKS,
    copy_tokenizer,
    network_path,
    network_size,
    staged,
    versions,
    write_artifact,
    write_json,
)
from diptych.runtimes.graph import read_network, write_network
from diptych.runtimes.network import open_networks
from diptych.weights.files import describe

if TYPE_CHECKING:
    import onnx

__all__ = ["MODES", "check_mode", "compare_artifacts", "quantize_captioner", "quantize_network"]

MODES = ("int8",)

Weights = dict[str, NDArray[Any]]

# Blocks of 64 and 32 are computed alike however many rows there are; in those of 128 and 256, which
# are 5 % faster, the last bits of a row depend on the number of rows (ONNX Runtime 1.32).
_BLOCK, _SMALL_BLOCK = 64, 32
_INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level
_ZERO = 128
_TABLE = 4096  # numbers; a table that is smaller stays as it is
# The words' embeddings, and the head that shares them, decide between near ties. Up to this many
# numbers they stay in half precision: 1 MB for one caption in a hundred, in the default model.
_FEW_WORDS = 1 << 21


def quantize_captioner(
    source: Path, folder: Path, mode: str = "int8", *, images: Sequence[Pixels] | None = None
) -> dict[str, Any]:
    """Write the artifact at `source`, which is left as it is, as a smaller one to `folder`.

    Captions of both are compared over `images` [C, H, W], or over seeded ones. Returns the content
    of `quantize.json`. Raises `BadInput` for another mode, or a source that is not float32.
    """
    check_mode(mode)
    model = describe(Path(source))
    if not model.networks or model.precision != "fp32":
        found = f"is {model.precision}" if model.networks else "has no ONNX networks"
        raise BadInput(f"{model.name} {found}: give the folder of an fp32 artifact")
    images = pictures_for(model.config, model.preprocessing, images)
    with staged(Path(folder)) as staging:
        for network in NETWORKS:
            quantize_network(model.networks[network], network_path(staging, network))
        copy_tokenizer(model.tokenizer, staging)
        document = {
            "precision": mode,
            "config": model.config,
            "preprocessing": model.preprocessing,
            "generation": model.generation,
            "source": {"name": model.name, "revision": model.revision},
        }
        write_artifact(staging, document)
        report = {
            "versions": versions("onnxruntime", "onnx", "numpy"),
            mode: compare_artifacts(model.path, staging, images),
        }
        write_json(staging / "quantize.json", report)
    return report


def check_mode(mode: str) -> None:
    """Raise `BadInput` for what is no way to quantize."""
    if mode not in MODES:
        raise BadInput(f"quantize is {mode!r}: give {' or '.join(MODES)}")


def compare_artifacts(source: Path, folder: Path, images: Sequence[Pixels]) -> dict[str, Any]:
    """Measure what quantizing changed: words, tensors and bytes."""
    models = [describe(source), describe(folder)]
    before, after = (open_networks(model, "onnxruntime") for model in models)
    config, generation = models[0].config, models[0].generation
    tokens = [greedy_tokens(networks, images, config, generation) for networks in (before, after)]
    worst = compare_tensors(before, after, images[0], config, generation)
    networks = {
        network: {
            "max_abs_difference": worst[network],
            "bytes": network_size(models[1].networks[network]),
            "bytes_before": network_size(models[0].networks[network]),
        }
        for network in NETWORKS
    }
    return {"tokens": compare_tokens(*tokens), "networks": networks}


def quantize_network(source: Path, target: Path) -> None:
    """Write the network at `source`, exported in float32, with 8-bit matrices to `target`."""
    model, weights = read_network(source)
    rewritten = _Rewriter(weights)
    nodes = [new for node in model.graph.node for new in rewritten.rewrite(node)]
    used = _used(nodes)
    kept = {name: array for name, array in weights.items() if name in used}
    made = {name: array for name, array in rewritten.made.items() if name in used}
    casts = _halve_tables(kept)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])
    write_network(model, {**kept, **made}, target)


def _used(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Return the values that `nodes` read, those read in their branches among them."""
    names: set[str] = set()
    for node in nodes:
        names |= set(node.input)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                names |= _used(attribute.g.node)
    return names


@dataclass
class _Rewriter:
    """Replace products with stored matrices, and look-ups in them, by their 8-bit forms."""

    weights: Mapping[str, NDArray[Any]]
    made: Weights = field(default_factory=dict)
    pairs: dict[tuple[int, bool], tuple[NDArray[np.uint8], NDArray[np.float32]]] = field(
        default_factory=dict
    )
    product: onnx.NodeProto | None = None  # the last one, while a bias may still follow

    def rewrite(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return what stands in place of `node`."""
        product, self.product = self.product, None
        if node.op_type == "Add" and product is not None and node.input[0] == product.output[0]:
            bias = self.weights.get(node.input[1])
            if bias is not None and bias.ndim == 1:
                product.input.extend(["", "", node.input[1]])
                product.output[0] = node.output[0]
                return []
        if node.op_type == "MatMul" and self._is_matrix(node.input[1]):
            self.product = self._multiply(node)
            return [self.product]
        if node.op_type == "Gemm" and self._is_matrix(node.input[1], _FEW_WORDS):
            return [self._multiply(node)]
        if node.op_type == "Gather" and self._is_matrix(node.input[0], _FEW_WORDS):
            return self._look_up(node)
        return [node]

    def _is_matrix(self, name: str, more_than: int = 0) -> bool:
        found = self.weights.get(name)
        is_matrix = found is not None and found.ndim == 2 and found.dtype == np.float32
        return is_matrix and self.weights[name].size > more_than

    def _multiply(self, node: onnx.NodeProto) -> onnx.NodeProto:
        from onnx import helper

        name = node.input[1]
        # MatMul holds [in, out]; the heads, as Gemm with transB, hold [out, in] like MatMulNBits.
        blocks, scales = self._pair(name, transposed=node.op_type == "MatMul")
        width = self.weights[name].shape[0 if node.op_type == "MatMul" else 1]
        return helper.make_node(
            "MatMulNBits",
            [node.input[0], *self._names(name, blocks, scales)],
            list(node.output),
            domain="com.microsoft",
            K=width,
            N=len(blocks),
            bits=8,
            block_size=blocks.shape[2],
            accuracy_level=_INT8_ACTIVATIONS,
        )

    def _look_up(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Write rows · scales for the rows that are looked up: [N, T, blocks, 64] to [N, T, D]."""
        from onnx import TensorProto, helper

        name, ids = node.input[0], node.input[1]
        blocks, scales = self._pair(name, transposed=False)
        stored = self._names(name, blocks, scales)
        width = self.weights[name].shape[1]
        constants = {
            "zero": np.float32(_ZERO),
            "last": np.array([-1], np.int64),
            "flat": np.array([0, 0, -1], np.int64),
            "start": np.array([0], np.int64),
            "width": np.array([width], np.int64),
        }
        self.made |= {f"{name}.{key}": np.asarray(value) for key, value in constants.items()}

        def step(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> Any:
            named = [each.replace("@", f"{name}.") for each in inputs]
            return helper.make_node(op, named, [output.replace("@", f"{name}.")], **attributes)

        return [
            step("Gather", [stored[0], ids], "@rows"),
            step("Gather", [stored[1], ids], "@row_scales"),
            step("Cast", ["@rows"], "@numbers", to=TensorProto.FLOAT),
            step("Sub", ["@numbers", "@zero"], "@centred"),
            step("Unsqueeze", ["@row_scales", "@last"], "@factors"),
            step("Mul", ["@centred", "@factors"], "@scaled"),
            step("Reshape", ["@scaled", "@flat"], "@padded"),
            step("Slice", ["@padded", "@start", "@width", "@last"], node.output[0]),
        ]

    def _pair(self, name: str, transposed: bool) -> tuple[Any, Any]:
        """Return the blocks and scales of a matrix, the same arrays for the same matrix."""
        array = self.weights[name]
        key = (id(array), transposed)
        if key not in self.pairs:
            self.pairs[key] = _quantize(array.T if transposed else array)
        return self.pairs[key]

    def _names(self, name: str, blocks: Any, scales: Any) -> list[str]:
        self.made |= {f"{name}.int8": blocks, f"{name}.scales": scales}
        return [f"{name}.int8", f"{name}.scales"]


def _quantize(rows: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Round [N, K] to blocks [N, K / 64, 64] around 128, with their scales [N, K / 64]."""
    size = _BLOCK if rows.shape[1] >= _BLOCK else _SMALL_BLOCK
    count = -(-rows.shape[1] // size)
    padded = np.zeros((len(rows), count * size), np.float32)
    padded[:, : rows.shape[1]] = rows
    blocks = padded.reshape(len(rows), count, size)
    scales = np.abs(blocks).max(-1) / 127
    blocks /= np.where(scales == 0, 1, scales)[..., None]
    return (np.rint(blocks) + _ZERO).astype(np.uint8), scales


def _halve_tables(weights: Weights) -> list[onnx.NodeProto]:
    """Store large arrays in half precision, in place; return the nodes that widen them again.

    ONNX Runtime widens them once, when it loads the network.
    """
    from onnx import TensorProto, helper

    halves: dict[int, NDArray[Any]] = {}
    casts = []
    for name, array in [*weights.items()]:
        if array.dtype != np.float32 or array.size < _TABLE or array.ndim < 2:
            continue
        if id(array) not in halves:
            with np.errstate(over="ignore"):
                halves[id(array)] = array.astype(np.float16)
        if np.isfinite(halves[id(array)]).all():
            weights[f"{name}.half"] = halves[id(array)]
            del weights[name]
            casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    return casts
