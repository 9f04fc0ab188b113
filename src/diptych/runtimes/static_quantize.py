"""Round what goes into products as well, by ranges that were seen on pictures: static int8.

`MatMulNBits` rounds rows as they come, block by block, which costs time on processors without
8-bit instructions. Ranges that are fixed beforehand cost less and round more coarsely. Written as
QuantizeLinear and DequantizeLinear around float operators, which ONNX Runtime and OpenVINO both
turn into 8-bit products. Pictures of a batch do not touch each other: ranges are constants.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from diptych.runtimes.graph import read_network, write_network
from diptych.runtimes.quantize import halve_tables, used

if TYPE_CHECKING:
    import onnx

__all__ = ["calibrate", "quantize_statically"]

Floats = NDArray[np.float32]
Ranges = Mapping[str, tuple[float, float]]

# Processors without VNNI add two products of 8-bit numbers in 16 bits, where full ones overflow.
_HIGHEST = 63
_ERRORS_ONLY = 3


def calibrate(path: Path, feeds: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return the lowest and highest number in whatever a product of the network at `path` reads.

    By name, for the products with stored matrices; the mean over `feeds` of each one's extremes,
    so that one odd picture does not widen the steps for all.
    """
    from onnx import TensorProto, helper

    model, weights = read_network(path)
    names = [*dict.fromkeys(node.input[0] for node in _products(model.graph.node, weights))]
    outputs = {output.name for output in model.graph.output}
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in names
        if name not in outputs
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    # What an optimiser fuses away could not be looked at.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    folder = str(path.parent)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for feed in feeds:
        for name, array in zip(names, session.run(names, dict(feed)), strict=True):
            seen[name].append((float(array.min()), float(array.max())))
    means = {name: np.mean(extremes, axis=0) for name, extremes in seen.items()}
    return {name: (float(low), float(high)) for name, (low, high) in means.items()}


def quantize_statically(source: Path, target: Path, ranges: Ranges) -> None:
    """Write the float32 network at `source` with 8-bit products to `target`.

    `ranges` are those of `calibrate`. What is no product stays float, its tables halved.
    """
    model, weights = read_network(source)
    made: dict[str, NDArray[Any]] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[0] in ranges and _is_matrix(node, weights):
            nodes += _round_input(node.input[0], ranges, made)
            nodes += _round_matrix(node.input[1], weights, made)
            node.input[0], node.input[1] = f"{node.input[0]}.rounded", f"{node.input[1]}.wide"
        nodes.append(node)
    read = used(nodes)
    kept = {name: array for name, array in weights.items() if name in read}
    casts, nodes = halve_tables(kept, nodes)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])
    write_network(model, {**kept, **made}, target)


def _products(
    nodes: Iterable[onnx.NodeProto], weights: Mapping[str, Any]
) -> Iterable[onnx.NodeProto]:
    return (node for node in nodes if node.op_type == "MatMul" and _is_matrix(node, weights))


def _is_matrix(node: onnx.NodeProto, weights: Mapping[str, Any]) -> bool:
    found = weights.get(node.input[1])
    return found is not None and found.ndim == 2 and found.dtype == np.float32


def _round_input(name: str, ranges: Ranges, made: dict[str, NDArray[Any]]) -> list[onnx.NodeProto]:
    """Write `name` in steps of its range, 0 among them; nothing where that is done already."""
    from onnx import helper

    scale, zero = f"{name}.scale", f"{name}.zero"
    if scale in made:
        return []
    low, high = min(0.0, ranges[name][0]), max(0.0, ranges[name][1])
    step = np.float32((high - low) / 255 or 1.0)
    made[scale], made[zero] = np.asarray(step), np.asarray(round(-low / step), np.uint8)
    rounding = [scale, zero]
    return [
        helper.make_node("QuantizeLinear", [name, *rounding], [f"{name}.bytes"]),
        helper.make_node("DequantizeLinear", [f"{name}.bytes", *rounding], [f"{name}.rounded"]),
    ]


def _round_matrix(
    name: str, weights: Mapping[str, NDArray[Any]], made: dict[str, NDArray[Any]]
) -> list[onnx.NodeProto]:
    """Write a matrix [in, out] as 7-bit numbers with a scale for each output."""
    from onnx import helper

    stored = f"{name}.static"
    if stored in made:
        return []
    matrix: Floats = weights[name]
    scales = np.abs(matrix).max(0) / np.float32(_HIGHEST)
    scales = np.where(scales == 0, np.float32(1), scales)
    made[stored] = np.rint(matrix / scales).astype(np.int8)
    made[f"{name}.static.scales"] = scales.astype(np.float32)
    made[f"{name}.static.zeros"] = np.zeros(len(scales), np.int8)
    inputs = [stored, f"{name}.static.scales", f"{name}.static.zeros"]
    return [helper.make_node("DequantizeLinear", inputs, [f"{name}.wide"], axis=1)]
