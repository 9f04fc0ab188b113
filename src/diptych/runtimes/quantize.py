"""Make a network smaller: its matrices as numbers of 8 or 4 bits, its tables as 16-bit ones.

Each row of a matrix is cut into blocks of 64 numbers with a scale each; the rows that are
multiplied with it are rounded to 8 bits the same way, block by block, as they come
(`MatMulNBits`). A scale for a whole tensor would let the pictures of a batch change each other's
captions. Convolutions, norms and attention are computed in float32.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diptych.errors import BadInput
from diptych.runtimes.blocks import Blocks, round_rows
from diptych.runtimes.graph import read_network, write_network

if TYPE_CHECKING:
    import onnx

__all__ = [
    "MODES",
    "Bits",
    "bits_for",
    "check_mode",
    "halve_tables",
    "quantize_network",
    "unit_of",
    "used",
]

Weights = dict[str, NDArray[Any]]

_INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level
_ZERO = 128
_HALF = 16  # bits
_HALF_SCALES = ".scales.half"
_TABLE, _VECTOR = 4096, 512  # numbers; what is smaller stays as it is
# The words' embeddings, and the head that shares them, decide between near ties. Up to this many
# numbers they stay in half precision: 1 MB for one caption in a hundred, in the default model.
_FEW_WORDS = 1 << 21
_WORDS = ("decoder.wte.", "decoder.head.", "decoder.lm_head.")
_UNIT = re.compile(r"(.*?\.\d+\.(?:attention|mlp|attn|crossattention))\.")


@dataclass(frozen=True, slots=True)
class Bits:
    """Say how many bits the matrices of a network get: 16, 8, 4 or 2.

    `words` are the embeddings and the head, `units` the exceptions, by the names of `unit_of`.
    """

    usual: int
    words: int = 8
    units: Mapping[str, int] = field(default_factory=dict)

    def of(self, weight: str) -> int:
        """Return the bits of the matrix called `weight`."""
        if weight.startswith(_WORDS):
            return self.words
        return self.units.get(unit_of(weight), self.usual)


_BITS = {"fp16": Bits(_HALF, words=_HALF), "int8": Bits(8), "int4": Bits(4)}
MODES = tuple(_BITS)


def bits_for(mode: str) -> Bits:
    """Return what `mode` means before any exception; raises `BadInput` for another word."""
    check_mode(mode)
    return _BITS[mode]


def check_mode(mode: str) -> None:
    """Raise `BadInput` for what is no way to quantize."""
    if mode not in MODES:
        raise BadInput(f"quantize is {mode!r}: give {', '.join(MODES[:-1])} or {MODES[-1]}")


def unit_of(weight: str) -> str:
    """Name what a matrix is a part of and rounded with: the attention or MLP of its layer."""
    found = _UNIT.match(weight)
    return found[1] if found else weight


def quantize_network(source: Path, target: Path, bits: Bits) -> None:
    """Write the network at `source`, exported in float32, with its matrices rounded to `target`.

    `bits` tells how many bits each matrix gets; 16 leaves it in half precision.
    """
    model, weights = read_network(source)
    rewritten = _Rewriter(weights, bits)
    nodes = [new for node in model.graph.node for new in rewritten.rewrite(node)]
    read = used(nodes)
    kept = {name: array for name, array in weights.items() if name in read}
    made = {name: array for name, array in rewritten.made.items() if name in read}
    casts, nodes = halve_tables(kept, nodes)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *rewritten.casts, *nodes])
    halves = {name: array for name, array in rewritten.made.items() if name.endswith(_HALF_SCALES)}
    write_network(model, {**kept, **made, **halves}, target)


def used(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Return the values that `nodes` read, those read in their branches among them."""
    names: set[str] = set()
    for node in nodes:
        names |= set(node.input) | _used_in_branches(node)
    return names


def _used_in_branches(node: onnx.NodeProto) -> set[str]:
    graphs = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return {name for graph in graphs for name in used(graph.node)}


@dataclass
class _Rewriter:
    """Replace products with stored matrices, and look-ups in them, by their rounded forms."""

    weights: Mapping[str, NDArray[Any]]
    bits: Bits
    made: Weights = field(default_factory=dict)
    casts: list[onnx.NodeProto] = field(default_factory=list)  # of scales in half precision
    pairs: dict[tuple[int, bool, int], Blocks] = field(default_factory=dict)
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
        return is_matrix and self.weights[name].size > more_than and self.bits.of(name) < _HALF

    def _multiply(self, node: onnx.NodeProto) -> onnx.NodeProto:
        from onnx import helper

        name = node.input[1]
        # MatMul holds [in, out]; the heads, as Gemm with transB, hold [out, in] like MatMulNBits.
        blocks = self._pair(name, transposed=node.op_type == "MatMul")
        width = self.weights[name].shape[0 if node.op_type == "MatMul" else 1]
        return helper.make_node(
            "MatMulNBits",
            [node.input[0], *self._names(name, blocks)],
            list(node.output),
            domain="com.microsoft",
            K=width,
            N=len(blocks.numbers),
            bits=blocks.bits,
            block_size=blocks.size,
            accuracy_level=_INT8_ACTIVATIONS,
        )

    def _look_up(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Write rows · scales for the rows that are looked up: [N, T, blocks, 64] to [N, T, D]."""
        from onnx import TensorProto, helper

        name, ids = node.input[0], node.input[1]
        blocks = self._pair(name, transposed=False)
        stored = self._names(name, blocks)
        # Of a mapped table only the rows that are read take memory: they are widened afterwards.
        scales = stored[1] if blocks.scales.dtype == np.float32 else f"{name}{_HALF_SCALES}"
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
            step("Gather", [scales, ids], "@stored_scales"),
            step("Cast", ["@stored_scales"], "@row_scales", to=TensorProto.FLOAT),
            step("Cast", ["@rows"], "@numbers", to=TensorProto.FLOAT),
            step("Sub", ["@numbers", "@zero"], "@centred"),
            step("Unsqueeze", ["@row_scales", "@last"], "@factors"),
            step("Mul", ["@centred", "@factors"], "@scaled"),
            step("Reshape", ["@scaled", "@flat"], "@padded"),
            step("Slice", ["@padded", "@start", "@width", "@last"], node.output[0]),
        ]

    def _pair(self, name: str, transposed: bool) -> Blocks:
        """Return a rounded matrix, the same arrays for the same matrix."""
        array, bits = self.weights[name], self.bits.of(name)
        key = (id(array), transposed, bits)
        if key not in self.pairs:
            self.pairs[key] = round_rows(array.T if transposed else array, bits)
        return self.pairs[key]

    def _names(self, name: str, blocks: Blocks) -> list[str]:
        """Store a rounded matrix; return the names of its numbers and of its scales."""
        from onnx import TensorProto, helper

        numbers, scales = f"{name}.int{blocks.bits}", f"{name}.scales"
        if numbers in self.made:
            return [numbers, scales]
        self.made[numbers] = blocks.numbers
        if blocks.scales.dtype == np.float32:
            self.made[scales] = blocks.scales
        else:
            half = f"{name}{_HALF_SCALES}"
            self.made[half] = blocks.scales
            self.casts.append(helper.make_node("Cast", [half], [scales], to=TensorProto.FLOAT))
        return [numbers, scales]


def halve_tables(
    weights: Weights, nodes: Sequence[onnx.NodeProto]
) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """Store large arrays in half precision, in place.

    Return the nodes that widen them, which ONNX Runtime runs once, when it loads the network, and
    `nodes`, among which are those that widen only the rows that are looked up.
    """
    from onnx import TensorProto, helper

    halves: dict[int, NDArray[Any]] = {}
    read = _only_looked_up(nodes)
    casts = []
    for name, array in [*weights.items()]:
        least = _TABLE if array.ndim > 1 else _VECTOR
        if array.dtype != np.float32 or array.size < least or name.endswith(".scales"):
            continue
        if id(array) not in halves:
            with np.errstate(over="ignore"):
                halves[id(array)] = array.astype(np.float16)
        if not np.isfinite(halves[id(array)]).all():
            read.discard(name)
            continue
        weights[f"{name}.half"] = halves[id(array)]
        del weights[name]
        if name not in read:
            casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    changed = []
    for node in nodes:
        changed.append(node)
        if node.input and node.input[0] in read and f"{node.input[0]}.half" in weights:
            output, narrow = node.output[0], f"{node.output[0]}.half"
            node.input[0], node.output[0] = f"{node.input[0]}.half", narrow
            changed.append(helper.make_node("Cast", [narrow], [output], to=TensorProto.FLOAT))
    return casts, changed


def _only_looked_up(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Return the values of which nodes take rows, and nothing else is done with them."""
    looked_up: set[str] = set()
    others: set[str] = set()
    for node in nodes:
        takes_rows = node.op_type in ("Gather", "Slice")
        (looked_up if takes_rows else others).update(node.input[:1])
        others.update(node.input[1:])
        others |= _used_in_branches(node)
    return looked_up - others
