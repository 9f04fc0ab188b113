"""Write an ONNX graph node by node, and keep its weights in one file beside it.

By hand rather than traced: the fused operators of ONNX Runtime (attention with a cache above all)
leave a fraction of the nodes, tied weights are stored once, and the names in the file are those of
the module. The operators of the domain `com.microsoft` are described in
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diptych.errors import UnsupportedModel

if TYPE_CHECKING:
    import onnx

__all__ = [
    "Graph",
    "Shape",
    "Weights",
    "data_path",
    "read_network",
    "share_weights",
    "weights_file",
    "write_network",
]

Weights = Mapping[str, NDArray[Any]]
Shape = Sequence[int | str]

_OPSET, _IR_VERSION = 21, 10
_MICROSOFT = "com.microsoft"
_INLINE = 1024  # bytes; smaller weights stay in the graph itself
_PAGE = 4096  # what a file is mapped into memory by
_LARGE = 1 << 20  # bytes; arrays from there on begin a page of their own


@dataclass(frozen=True, slots=True)
class Node:
    """Hold one operation: `outputs` of `op` on `inputs`, an empty name being one left out."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


@dataclass
class Graph:
    """Collect nodes, weights, inputs and outputs; values are known by their names.

    Two weights that are the same array are stored once.
    """

    name: str
    weights: dict[str, NDArray[Any]] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    inputs: dict[str, tuple[str, Shape]] = field(default_factory=dict)
    outputs: dict[str, tuple[str, Shape]] = field(default_factory=dict)

    def input(self, name: str, kind: str, shape: Shape) -> str:
        self.inputs[name] = (kind, shape)
        return name

    def optional(self, name: str, kind: str, shape: Shape, default: NDArray[Any]) -> str:
        """Add an input that may be left out; `default` stands for it then."""
        self.weight(name, default)
        return self.input(name, kind, shape)

    def output(self, name: str, shape: Shape) -> str:
        self.outputs[name] = ("FLOAT", shape)
        return name

    def weight(self, name: str, array: Any) -> str:
        self.weights[name] = np.asanyarray(array)  # one that is mapped stays so
        return name

    def ints(self, *values: int) -> str:
        """Store the int64 vector that shapes and axes want."""
        return self.weight(".".join(["ints", *map(str, values)]), np.array(values, np.int64))

    def add(self, op: str, *inputs: str, to: str | Sequence[str] = "", **attributes: Any) -> str:
        """Append a node; return the name of its first output, which is `to` where that is given.

        Operators of `com.microsoft` are written with a leading dot, as in `.FastGelu`.
        """
        outputs = [to] if isinstance(to, str) else list(to)
        outputs[0] = outputs[0] or f"{self.name}.{op.lstrip('.')}.{len(self.nodes)}"
        self.nodes.append(Node(op, inputs, tuple(outputs), attributes))
        return outputs[0]

    def branch(self, name: str) -> Graph:
        """Return a graph for one side of an `If`: it sees all values of this one."""
        return Graph(name, weights=self.weights)

    def proto(self) -> onnx.GraphProto:
        """Return the graph for ONNX, without its weights."""
        from onnx import TensorProto, helper

        def infos(values: Mapping[str, tuple[str, Shape]]) -> list[Any]:
            return [
                helper.make_tensor_value_info(name, getattr(TensorProto, kind), shape)
                for name, (kind, shape) in values.items()
            ]

        nodes = [
            helper.make_node(
                node.op.lstrip("."),
                node.inputs,
                node.outputs,
                domain=_MICROSOFT if node.op.startswith(".") else "",
                **{
                    name: value.proto() if isinstance(value, Graph) else value
                    for name, value in node.attributes.items()
                },
            )
            for node in self.nodes
        ]
        return helper.make_graph(nodes, self.name, infos(self.inputs), infos(self.outputs))

    def write(
        self, path: Path, weights_of: Path | None = None, checkpoint: Path | None = None
    ) -> None:
        """Write the network to `path`, and its weights beside it.

        With `weights_of` it takes those that another network's file has under their names, with
        `checkpoint` those mapped from there, and keeps the others in its own.
        """
        from onnx import helper

        opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(_MICROSOFT, 1)]
        model = helper.make_model(
            self.proto(), opset_imports=opsets, ir_version=_IR_VERSION, producer_name="diptych"
        )
        if weights_of is None:
            write_network(model, self.weights, path, checkpoint)
        else:
            share_weights(model, self.weights, weights_of)
            path.write_bytes(model.SerializeToString())


def data_path(path: Path) -> Path:
    """Return the file that holds the weights of the network at `path`."""
    return path.with_name(f"{path.name}.data")


def weights_file(path: Path) -> str:
    """Return the file that the network at `path` takes its weights from, from its folder on."""
    import onnx

    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                return str(entry.value)
    return data_path(path).name


def write_network(
    model: onnx.ModelProto, weights: Weights, path: Path, checkpoint: Path | None = None
) -> None:
    """Write `model` to `path` and `weights` beside it, an array at a time.

    Names of one array share its bytes in the file. So each user maps them by itself: ONNX Runtime
    keeps a packed copy for the matrix product and of the words' embeddings only the rows it reads.
    Arrays that are mapped from `checkpoint` stay there, and the others go into the graph then.
    """
    from onnx import numpy_helper

    del model.graph.initializer[:]
    if checkpoint is not None:
        for name, array in weights.items():
            if isinstance(array, np.memmap) and str(array.filename) == str(checkpoint.resolve()):
                location = checkpoint.relative_to(path.parent).as_posix()
                _refer(model, name, array, location, (array.offset, array.nbytes))
            else:
                model.graph.initializer.append(numpy_helper.from_array(array, name))
        path.write_bytes(model.SerializeToString())
        return
    places: dict[int, tuple[int, int]] = {}
    with data_path(path).open("wb") as file:
        for name, array in weights.items():
            if array.nbytes < _INLINE:
                model.graph.initializer.append(numpy_helper.from_array(array, name))
                continue
            if id(array) not in places:
                file.write(b"\0" * (-file.tell() % (_PAGE if array.nbytes >= _LARGE else 64)))
                places[id(array)] = (file.tell(), array.nbytes)
                file.write(np.ascontiguousarray(array).data)
            _refer(model, name, array, data_path(path).name, places[id(array)])
    path.write_bytes(model.SerializeToString())


def _refer(
    model: onnx.ModelProto,
    name: str,
    array: NDArray[Any],
    location: str,
    place: tuple[int, int],
) -> None:
    """Let `model` have `array`, whose bytes lie in the file `location` from, and for, `place`."""
    from onnx import TensorProto, helper

    tensor = model.graph.initializer.add()
    tensor.name = name
    tensor.dims.extend(array.shape)
    tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor.data_location = TensorProto.EXTERNAL
    words = {"location": location, "offset": str(place[0]), "length": str(place[1])}
    for key, value in words.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def share_weights(model: onnx.ModelProto, weights: Weights, path: Path) -> None:
    """Let `model` take its weights from where the network at `path` has them, if it has."""
    import onnx
    from onnx import numpy_helper

    del model.graph.initializer[:]
    stored = {
        tensor.name: tensor
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
    }
    for name, array in weights.items():
        if name not in stored:
            model.graph.initializer.append(
                numpy_helper.from_array(np.ascontiguousarray(array), name)
            )
            continue
        assert tuple(stored[name].dims) == array.shape, f"{path} has no {name} of this shape"
        model.graph.initializer.append(stored[name])


def read_network(path: Path) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    """Return what `write_network` wrote; large weights are mapped, not read.

    Names that share their bytes get the same array. Raises `UnsupportedModel` for weights that lie
    elsewhere than in the file beside `path`.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(path, load_external_data=False)
    weights: dict[str, NDArray[Any]] = {}
    mapped: dict[tuple[Any, ...], NDArray[Any]] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            weights[tensor.name] = numpy_helper.to_array(tensor)
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        if entry["location"] != data_path(path).name:
            raise UnsupportedModel(f"{path} keeps weights in {entry['location']!r}, not beside it")
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        key = (int(entry["offset"]), dtype, tuple(tensor.dims))
        if key not in mapped:
            try:
                mapped[key] = np.memmap(data_path(path), dtype, "r", key[0], key[2])
            except (OSError, ValueError) as error:
                raise UnsupportedModel(
                    f"{data_path(path)} does not hold all that {path.name} names: it is cut, or of "
                    "another export: export or fetch the model anew"
                ) from error
        weights[tensor.name] = mapped[key]
    return model, weights
