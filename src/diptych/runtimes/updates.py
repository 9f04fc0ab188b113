"""Let a network have the weights of another, with a low-rank update (LoRA) added to each.

The sums are made when the network is opened: runtimes compute constants once. So an edition needs
the bytes of its updates only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.errors import UnsupportedModel
from diptych.runtimes.graph import Graph, Node

__all__ = ["updated"]

Floats = NDArray[np.float32]

_FLOAT = 1  # ONNX's number for float32


def updated(graph: Graph, name: str, updates: Mapping[str, tuple[Floats, Floats]]) -> Graph:
    """Return `graph` under another `name`, with `updates` added to its weights.

    They are matrices by the path of the layer: `down` [r, in · kernel] and `up` [out, r], which are
    stored as halves. Raises `UnsupportedModel` for a layer that the graph does not have.
    """
    made = Graph(name, inputs=graph.inputs, outputs=graph.outputs, weights={**graph.weights})
    transposed = {node.inputs[1] for node in graph.nodes if node.op == "MatMul"}
    used = {name for node in graph.nodes for name in node.inputs}
    named = {f"{path}.weight": both for path, both in updates.items()}
    cut = {piece: both for weight in named for piece, both in _pieces(weight, named[weight], used)}
    if missing := sorted(named.keys() - used - {_whole(piece) for piece in cut}):
        raise UnsupportedModel(f"the {graph.name} has no {missing[0]} to be updated")
    renamed = {weight: f"{weight}.updated" for weight in cut}
    widened = {name for node in graph.nodes for name in node.outputs}
    late: dict[str, list[Node]] = {}  # by the weight that has to be there first
    for weight, (down, up) in cut.items():
        nodes = _sum(made, weight, down, up, transposed=weight in transposed)
        if weight in widened:
            late[weight] = nodes
        else:
            made.nodes.extend(nodes)
    for node in graph.nodes:
        made.nodes.append(_renamed(node, renamed))
        for output in node.outputs:
            made.nodes.extend(late.get(output, ()))
    return made


def _pieces(
    weight: str, both: tuple[Floats, Floats], used: Collection[str]
) -> Iterator[tuple[str, tuple[Floats, Floats]]]:
    """Yield the update of `weight`, or of each piece of its rows that is a weight by itself."""
    down, up = both
    if weight in used:
        yield weight, both
        return
    starts = sorted(int(name.rpartition(".")[2]) for name in used if _whole(name) == weight)
    for start, end in pairwise([*starts, len(up)]):
        yield f"{weight}.{start}", (down, up[start:end])


def _whole(name: str) -> str:
    """Return the weight that `name` is a piece of, or `name`; a piece ends with its first row."""
    weight, _, start = name.rpartition(".")
    return weight if start.isdigit() else name


def _sum(graph: Graph, weight: str, down: Floats, up: Floats, *, transposed: bool) -> list[Node]:
    """Return what adds up · down to `weight`, whose shape is that of its layer."""
    parts = []
    nodes = []
    for word, array in (("up", up), ("down", down)):
        half = graph.weight(f"{weight}.{word}.half", array.astype(np.float16))
        parts.append(f"{weight}.{word}")
        nodes.append(Node("Cast", (half,), (parts[-1],), {"to": _FLOAT}))
    product, delta = f"{weight}.product", f"{weight}.delta"
    nodes.append(Node("MatMul", tuple(parts), (product,), {}))
    if transposed:
        nodes.append(Node("Transpose", (product,), (delta,), {"perm": [1, 0]}))
    else:
        nodes.append(Node("Shape", (weight,), (f"{weight}.shape",), {}))
        nodes.append(Node("Reshape", (product, f"{weight}.shape"), (delta,), {}))
    nodes.append(Node("Add", (weight, delta), (f"{weight}.updated",), {}))
    return nodes


def _renamed(node: Node, names: Mapping[str, str]) -> Node:
    attributes: dict[str, Any] = {
        key: _within(value, names) if isinstance(value, Graph) else value
        for key, value in node.attributes.items()
    }
    inputs = tuple(names.get(each, each) for each in node.inputs)
    return Node(node.op, inputs, node.outputs, attributes)


def _within(branch: Graph, names: Mapping[str, str]) -> Graph:
    """Rename in one side of an `If` too."""
    return dataclasses.replace(branch, nodes=[_renamed(node, names) for node in branch.nodes])
