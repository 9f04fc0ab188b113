"""Weights in fewer bytes: what a runtime widens again is what was rounded, in both runtimes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diptych.errors import BadInput
from diptych.runtimes.graph import Graph
from diptych.runtimes.on_onnxruntime import OnnxSession
from diptych.runtimes.storage import shrink

# Half a step of a block, in units of its largest number; fp16 has eleven digits.
HALF_STEPS = {"fp16": 2.0**-11, "int8": 0.51 / 127, "int4": 0.26}


def make_graph(matrix: np.ndarray, kernel: np.ndarray) -> Graph:
    """Write `rows @ matrix`, and `pixels` convolved with `kernel`."""
    graph = Graph("both")
    graph.input("rows", "FLOAT", ["N", len(matrix)])
    graph.input("pixels", "FLOAT", ["B", kernel.shape[1], "H", "W"])
    graph.output("product", ["N", matrix.shape[1]])
    graph.output("map", ["B", len(kernel), "h", "w"])
    graph.add("MatMul", "rows", graph.weight("matrix", matrix), to="product")
    graph.add("Conv", "pixels", graph.weight("kernel", kernel), to="map")
    return graph


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_each_number_is_close(precision: str, runtime: str, tmp_path: Path) -> None:
    """Unit rows and a one-pixel picture read single weights out of the network."""
    random = np.random.default_rng(3)
    matrix = random.standard_normal((96, 200)).astype(np.float32)
    kernel = random.standard_normal((64, 96, 3, 3)).astype(np.float32)
    small = shrink(make_graph(matrix, kernel), precision)
    small.write(tmp_path / "both.onnx")
    stored = sum(array.nbytes for array in small.weights.values())
    parts = {"fp16": 0.5, "int8": 0.29, "int4": 0.17}
    assert stored < parts[precision] * (matrix.nbytes + kernel.nbytes) + 200
    picture = np.zeros((96, 96, 5, 5), np.float32)
    picture[np.arange(96), np.arange(96), 2, 2] = 1
    feed = {"rows": np.eye(96, dtype=np.float32), "pixels": picture}
    if runtime == "onnxruntime":
        session = OnnxSession(tmp_path / "both.onnx", "rows", memory="in pieces")
    else:
        pytest.importorskip("openvino")
        from diptych.runtimes.on_openvino import OpenVinoSession

        session = OpenVinoSession(
            tmp_path / "both.onnx", "rows", memory="in pieces", dtype="float32"
        )
    product, mapped = session.compute(feed, ["product", "map"])
    # The picture's point meets the kernel turned about.
    read = mapped.transpose(1, 0, 2, 3)[..., ::-1, ::-1]
    for found, expected in ((product.T, matrix.T), (read, kernel)):
        flat, wanted = (each.reshape(len(each), -1) for each in (found, expected))
        largest = np.abs(wanted).max(1, keepdims=True)
        off = np.abs(flat - wanted)
        assert off.max() > 0
        share = 1.0 if precision != "int4" else 0.97  # the outermost may be cut off
        assert (off <= HALF_STEPS[precision] * largest + 1e-6).mean() >= share


def test_another_precision_is_refused() -> None:
    with pytest.raises(BadInput, match="the precision is 'int3': give fp32, fp16, int8 or int4"):
        shrink(Graph("empty"), "int3")


def test_int4_of_a_larger_matrix_is_one_in_both_runtimes(tmp_path: Path) -> None:
    """OpenVINO once rounded every other upper half up, where it multiplies by packed weights."""
    pytest.importorskip("openvino")
    from diptych.runtimes.on_openvino import OpenVinoSession

    random = np.random.default_rng(4)
    matrix = random.standard_normal((256, 512)).astype(np.float32)
    graph = Graph("one")
    graph.input("rows", "FLOAT", ["N", len(matrix)])
    graph.output("product", ["N", matrix.shape[1]])
    graph.add("MatMul", "rows", graph.weight("matrix", matrix), to="product")
    shrink(graph, "int4").write(path := tmp_path / "one.onnx")
    rows = {"rows": np.eye(256, dtype=np.float32)}
    (one,) = OnnxSession(path, "rows", memory="in pieces").compute(rows, ["product"])
    session = OpenVinoSession(path, "rows", memory="in pieces", dtype="float32")
    (other,) = session.compute(rows, ["product"])
    np.testing.assert_allclose(other, one, atol=1e-6)
