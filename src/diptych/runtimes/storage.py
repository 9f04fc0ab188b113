"""Store the weights of a graph in fewer bytes; the graph widens them again when it is opened.

What is computed stays float32, and costs what it costs with float32 weights: ONNX Runtime computes
constants once, when it loads a network. "int8" and "int4" cut every row of a matrix or kernel into
blocks of about 64 numbers with a scale each.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.errors import BadInput
from diptych.runtimes.blocks import round_blocks
from diptych.runtimes.graph import Graph, Node

__all__ = ["PRECISIONS", "check_precision", "shrink"]

PRECISIONS = ("fp32", "fp16", "int8", "int4")

Floats = NDArray[np.float32]

_FEW = 4096  # numbers; an array that is smaller stays as it is
# Up to this many numbers stay in half precision in an int8 graph: what is read first and written
# last, where an error is seen, and a percent of the bytes.
_FEW_FOR_INT8 = 1 << 14
_LONGEST_BLOCK, _SHORTEST_BLOCK = 72, 16
_FLOAT = 1  # ONNX's number for float32


def check_precision(precision: str) -> None:
    """Raise `BadInput` for what is no way to store weights."""
    if precision not in PRECISIONS:
        choices = f"{', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}"
        raise BadInput(f"the precision is {precision!r}: give {choices}")


def shrink(graph: Graph, precision: str, checkpoint: Path | None = None) -> Graph:
    """Return `graph` with its weights stored as `precision`; the given one stays as it is.

    With a safetensors file of halves as `checkpoint`, "fp16" maps from it what it holds.
    """
    check_precision(precision)
    if precision == "fp32":
        return graph
    small = Graph(graph.name, inputs=graph.inputs, outputs=graph.outputs)
    products = {node.inputs[1] for node in graph.nodes if node.op == "MatMul"}
    find = Halves(checkpoint) if checkpoint is not None and precision == "fp16" else None
    for name, array in graph.weights.items():
        if array.dtype != np.float32 or array.ndim < 2 or array.size < _FEW:
            small.weight(name, array)
        elif precision in _STORED and array.size > _FEW_FOR_INT8:
            _STORED[precision](small, name, array, transposed=name in products)
        elif find is None or not _take_halves(small, name, array, find):
            _store_halves(small, name, array)
    small.nodes.extend(graph.nodes)
    return small


class Halves:
    """Find arrays of halves among the bytes of a file."""

    def __init__(self, path: Path) -> None:
        self._path, self._content = path, path.read_bytes()

    def __call__(self, array: Floats) -> NDArray[np.float16] | None:
        """Return `array` as the file has it, mapped; None where it has not."""
        with np.errstate(over="ignore"):
            half = np.ascontiguousarray(array, np.float16)
        place = self._content.find(half.tobytes())
        return None if place < 0 else np.memmap(self._path, np.float16, "r", place, half.shape)


def _take_halves(graph: Graph, name: str, array: Floats, find: Halves) -> bool:
    """Write `array` as what a checkpoint has, which keeps matrices the other way round."""
    if (found := find(array)) is not None:
        graph.weight(f"{name}.half", found)
        _add(graph, "Cast", [f"{name}.half"], name, to=_FLOAT)
    elif array.ndim == 2 and (found := find(array.T)) is not None:
        graph.weight(f"{name}.half", found)
        _add(graph, "Cast", [f"{name}.half"], f"{name}.rows", to=_FLOAT)
        _add(graph, "Transpose", [f"{name}.rows"], name, perm=[1, 0])
    return found is not None


def _store_halves(graph: Graph, name: str, array: Floats) -> None:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():  # beyond 65504
        graph.weight(name, array)
        return
    graph.weight(f"{name}.half", half)
    _add(graph, "Cast", [f"{name}.half"], name, to=_FLOAT)


def _store_bytes(graph: Graph, name: str, array: Floats, *, transposed: bool) -> None:
    """Write bytes · scales in place of `array`, whose rows are what is multiplied and summed."""
    rows = array.T if transposed else array
    blocks = _blocks(rows)
    scales = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    scales = np.where(scales == 0, np.float32(1), scales).astype(np.float32)
    graph.weight(f"{name}.int8", np.rint(blocks / scales).astype(np.int8))
    graph.weight(f"{name}.scales", scales)
    _add(graph, "Cast", [f"{name}.int8"], f"{name}.numbers", to=_FLOAT)
    _add(graph, "Mul", [f"{name}.numbers", f"{name}.scales"], f"{name}.blocks")
    _shape(graph, name, rows, transposed)


def _store_nibbles(graph: Graph, name: str, array: Floats, *, transposed: bool) -> None:
    """Write 4-bit codes · scales in place of `array`: a byte holds one of each half of a block."""
    rows = array.T if transposed else array
    blocks = _blocks(rows)
    if blocks.shape[2] % 2:
        _store_bytes(graph, name, array, transposed=transposed)
        return
    codes, scales = round_blocks(blocks, 4)
    low, high = np.split(codes, 2, axis=2)
    graph.weight(f"{name}.int4", low | high << np.uint8(4))
    graph.weight(f"{name}.scales", scales[..., None])
    mask, four = graph.weight("nibble", np.uint8(15)), graph.weight("four", np.uint8(4))
    _add(graph, "BitwiseAnd", [f"{name}.int4", mask], f"{name}.low")
    # OpenVINO divides where it should shift, and rounds: without the low half that is exact.
    upper = graph.weight("upper_nibble", np.uint8(240))
    _add(graph, "BitwiseAnd", [f"{name}.int4", upper], f"{name}.upper")
    _add(graph, "BitShift", [f"{name}.upper", four], f"{name}.high", direction="RIGHT")
    _add(graph, "Concat", [f"{name}.low", f"{name}.high"], f"{name}.codes", axis=2)
    _add(graph, "Cast", [f"{name}.codes"], f"{name}.numbers", to=_FLOAT)
    middle = graph.weight("middle", np.float32(8))
    _add(graph, "Sub", [f"{name}.numbers", middle], f"{name}.centred")
    _add(graph, "Cast", [f"{name}.scales"], f"{name}.factors", to=_FLOAT)
    _add(graph, "Mul", [f"{name}.centred", f"{name}.factors"], f"{name}.blocks")
    _shape(graph, name, rows, transposed)


_STORED = {"int8": _store_bytes, "int4": _store_nibbles}


def _blocks(rows: Floats) -> Floats:
    """Cut the rows [N, …] into blocks: [N, blocks, size]."""
    flat = rows.reshape(len(rows), -1)
    return flat.reshape(len(rows), -1, _block_size(flat.shape[1]))


def _shape(graph: Graph, name: str, rows: Floats, transposed: bool) -> None:
    """Write the blocks of `name` back into the array that they were cut from."""
    flat = f"{name}.rows" if transposed else name
    _add(graph, "Reshape", [f"{name}.blocks", graph.ints(*rows.shape)], flat)
    if transposed:
        _add(graph, "Transpose", [flat], name, perm=[1, 0])


def _block_size(length: int) -> int:
    """Return the largest divisor of `length` that is about 64; a row of its own without one."""
    sizes = range(_LONGEST_BLOCK, _SHORTEST_BLOCK - 1, -1)
    return next((size for size in sizes if length % size == 0), length)


def _add(graph: Graph, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
    graph.nodes.append(Node(op, tuple(inputs), (output,), attributes))
