"""Round what goes into products as well, by ranges that were seen on examples: static int8.

`MatMulNBits` rounds rows as they come, block by block, which costs time on processors without
8-bit instructions. Ranges that are fixed beforehand cost less and round more coarsely. Written as
QuantizeLinear and DequantizeLinear around float operators, which ONNX Runtime and OpenVINO both
turn into 8-bit products. Pictures of a batch do not touch each other: ranges are constants.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from diptych.runtimes.graph import read_network, share_weights, write_network
from diptych.runtimes.quantize import halve_tables, used

if TYPE_CHECKING:
    import onnx

__all__ = ["Range", "Ranges", "calibrate", "quantize_statically"]

Floats = NDArray[np.float32]

# Processors without VNNI add two products of 8-bit numbers in 16 bits, where full ones overflow.
_HIGHEST = 63
_ERRORS_ONLY = 3
_RANKS = {"MatMul": 2, "Conv": 4}  # of the stored weight of a product


@dataclass(frozen=True, slots=True)
class Range:
    """Hold the extremes of what a product reads, and the mean of its squares."""

    low: float
    high: float
    power: float

    @property
    def step(self) -> np.float32:
        """Return the distance between two of the 256 values that are left; 0 is one of them."""
        return np.float32((max(0.0, self.high) - min(0.0, self.low)) / 255 or 1.0)

    @property
    def zero(self) -> int:
        """Return which of the 256 is 0."""
        return round(-min(0.0, self.low) / float(self.step))

    @property
    def decibels(self) -> float:
        """Return the power of what is read beside that of what rounding adds to it."""
        return 10 * math.log10(max(self.power, 1e-20) / (float(self.step) ** 2 / 12))


Ranges = Mapping[str, Range]
"""By the weight of the product that reads it."""


def calibrate(
    path: Path, feeds: Iterable[Mapping[str, Any]], *, ops: Collection[str] = ("MatMul",)
) -> dict[str, Range]:
    """Return what the products of the network at `path` read, by the names of their weights.

    `ops` may be MatMul and Conv. The mean over `feeds` of each one's extremes, so that one odd
    example does not widen the steps for all.
    """
    model, weights = read_network(path)
    read = {
        node.input[1]: node.input[0]
        for node in model.graph.node
        if node.op_type in ops and _is_product(node, weights)
    }
    values = [*dict.fromkeys(read.values())]
    outputs = _add_extremes(model, values)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    # What an optimiser fuses away could not be looked at.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    folder = str(path.parent)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    seen = [session.run(outputs, dict(feed)) for feed in feeds]
    means = np.mean(np.array(seen, np.float64), axis=0).reshape(len(values), 3)
    found = {value: Range(*row) for value, row in zip(values, means.tolist(), strict=True)}
    return {weight: found[value] for weight, value in read.items()}


def _add_extremes(model: onnx.ModelProto, values: Iterable[str]) -> list[str]:
    """Let `model` give the lowest and highest number of each of `values`, and the mean square."""
    from onnx import TensorProto, helper

    outputs = []
    for value in values:
        square = f"{value}.square"
        model.graph.node.append(helper.make_node("Mul", [value, value], [square]))
        for op, source in (("ReduceMin", value), ("ReduceMax", value), ("ReduceMean", square)):
            outputs.append(f"{value}.{op}")
            model.graph.node.append(helper.make_node(op, [source], outputs[-1:], keepdims=0))
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in outputs
    )
    return outputs


def quantize_statically(
    source: Path, target: Path, ranges: Ranges, weights_of: Path | None = None
) -> None:
    """Write the float32 network at `source` with 8-bit products to `target`.

    `ranges` are those of `calibrate`. What is no product of theirs stays float, its tables halved.
    With `weights_of` it takes those that another network's file has under their names.
    """
    model, weights = read_network(source)
    made: dict[str, NDArray[Any]] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if _is_product(node, weights) and node.input[1] in ranges:
            nodes += _round_input(node.input[0], ranges[node.input[1]], made)
            nodes += _round_weight(node.input[1], weights, made, _outputs(node))
            node.input[0], node.input[1] = f"{node.input[0]}.rounded", f"{node.input[1]}.wide"
        nodes.append(node)
    read = used(nodes)
    kept = {name: array for name, array in weights.items() if name in read}
    casts, nodes = halve_tables(kept, nodes)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])
    if weights_of is None:
        write_network(model, {**kept, **made}, target)
    else:
        share_weights(model, {**kept, **made}, weights_of)
        target.write_bytes(model.SerializeToString())


def _is_product(node: onnx.NodeProto, weights: Mapping[str, Any]) -> bool:
    if node.op_type not in _RANKS:
        return False
    found = weights.get(node.input[1])
    rank = _RANKS[node.op_type]
    return found is not None and found.ndim == rank and found.dtype == np.float32


def _outputs(node: onnx.NodeProto) -> int:
    """Return the axis of a product's outputs in its weight: [in, out], or a kernel [out, in, …]."""
    return 1 if node.op_type == "MatMul" else 0


def _round_input(name: str, seen: Range, made: dict[str, NDArray[Any]]) -> list[onnx.NodeProto]:
    """Write `name` in steps of its range; nothing where that is done already."""
    from onnx import helper

    scale, zero = f"{name}.scale", f"{name}.zero"
    if scale in made:
        return []
    made[scale], made[zero] = np.asarray(seen.step), np.asarray(seen.zero, np.uint8)
    rounding = [scale, zero]
    return [
        helper.make_node("QuantizeLinear", [name, *rounding], [f"{name}.bytes"]),
        helper.make_node("DequantizeLinear", [f"{name}.bytes", *rounding], [f"{name}.rounded"]),
    ]


def _round_weight(
    name: str, weights: Mapping[str, NDArray[Any]], made: dict[str, NDArray[Any]], axis: int
) -> list[onnx.NodeProto]:
    """Write a weight as 7-bit numbers with a scale for each output, which lie along `axis`."""
    from onnx import helper

    stored = f"{name}.static"
    if stored in made:
        return []
    weight: Floats = weights[name]
    others = tuple(each for each in range(weight.ndim) if each != axis)
    scales = np.abs(weight).max(others, keepdims=True) / np.float32(_HIGHEST)
    scales = np.where(scales == 0, np.float32(1), scales)
    made[stored] = np.rint(weight / scales).astype(np.int8)
    made[f"{name}.static.scales"] = scales.astype(np.float32).ravel()
    made[f"{name}.static.zeros"] = np.zeros(scales.size, np.int8)
    inputs = [stored, f"{name}.static.scales", f"{name}.static.zeros"]
    return [helper.make_node("DequantizeLinear", inputs, [f"{name}.wide"], axis=axis)]
