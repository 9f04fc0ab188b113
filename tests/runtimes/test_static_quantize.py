"""Static int8: ranges as they were seen, products close by, captions that hold, batches alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import diptych
from diptych.errors import BadInput
from diptych.runtimes.graph import Graph
from diptych.runtimes.network import open_networks
from diptych.runtimes.on_onnxruntime import OnnxSession
from diptych.runtimes.smaller_captioner import quantize_captioner
from diptych.runtimes.static_quantize import calibrate, quantize_statically
from diptych.weights.files import describe, verify
from tiny_models import make_captioner

Make = Callable[..., Any]


def write_products(path: Path, first: np.ndarray, second: np.ndarray) -> None:
    """Write relu(rows @ first) @ second."""
    graph = Graph("products")
    graph.input("rows", "FLOAT", ["N", len(first)])
    graph.output("product", ["N", second.shape[1]])
    hidden = graph.add("MatMul", "rows", graph.weight("first", first))
    bent = graph.add("Relu", hidden, to="bent")
    graph.add("MatMul", bent, graph.weight("second", second), to="product")
    graph.write(path)


def test_ranges_are_those_of_the_tensors(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    first = random.standard_normal((32, 48)).astype(np.float32)
    second = random.standard_normal((48, 16)).astype(np.float32)
    write_products(tmp_path / "a.onnx", first, second)
    feeds = [random.standard_normal((5, 32)).astype(np.float32) for _ in range(3)]
    ranges = calibrate(tmp_path / "a.onnx", ({"rows": feed} for feed in feeds))
    bent = [np.maximum(feed @ first, 0) for feed in feeds]
    assert (ranges["first"].low, ranges["first"].high) == pytest.approx(
        (np.mean([f.min() for f in feeds]), np.mean([f.max() for f in feeds]))
    )
    assert (ranges["second"].low, ranges["second"].high) == pytest.approx(
        (0.0, np.mean([b.max() for b in bent])), abs=1e-4
    )
    quantize_statically(tmp_path / "a.onnx", tmp_path / "b.onnx", ranges)
    found = np.empty((5, 16), np.float32)
    session = OnnxSession(tmp_path / "b.onnx", "rows", memory="in pieces")
    session.run({"rows": feeds[0]}, {"product": found})
    expected = bent[0] @ second
    assert 0 < np.abs(found - expected).max() < 0.06 * np.abs(expected).max()
    model = onnx.load(tmp_path / "b.onnx")
    ops = [node.op_type for node in model.graph.node]
    assert ops.count("QuantizeLinear") == 2
    assert ops.count("DequantizeLinear") == 4
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert stored["first.static"] == onnx.TensorProto.INT8
    assert "first" not in stored


@pytest.mark.parametrize("variant", ["cross-attention", "stem"])
def test_a_calibrated_captioner(
    variant: str, artifacts: Make, pictures: Make, tmp_path: Path
) -> None:
    source = artifacts(variant) / "fp32"
    images = pictures(8)
    report = quantize_captioner(
        source, tmp_path / "a", images=images, calibration=images, force=True
    )
    assert report["int8"]["calibrated_on"] == 8
    model = describe(tmp_path / "a")
    verify(model)
    plain, small = (open_networks(each) for each in (describe(source), model))
    (expected,) = plain["encoder"](pixel_values=images)
    (found,) = small["encoder"](pixel_values=images)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 0 < error < 0.2
    axis = 2 if found.ndim == 6 else 0
    for row in range(3):
        (own,) = small["encoder"](pixel_values=images[row : row + 1])
        assert np.array_equal(own, found.take([row], axis))


def test_what_calibration_needs(tmp_path: Path) -> None:
    make_captioner(tmp_path / "checkpoint", 0)
    for words in ({"calibration": []}, {"calibration": ["a.png"], "quantize": "int4"}):
        with pytest.raises(BadInput, match="calibration is for int8, and needs pictures"):
            diptych.export(
                tmp_path / "checkpoint", tmp_path / "out", **{"quantize": "int8", **words}
            )
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    make_captioner(tmp_path / "checkpoint", 0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(BadInput, match=r"is not empty, it holds letter\.txt"):
        diptych.export(tmp_path / "checkpoint", tmp_path / "mine")
    with pytest.raises(BadInput, match="is a file"):
        diptych.export(tmp_path / "checkpoint", tmp_path / "mine" / "letter.txt")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    diptych.export(tmp_path / "checkpoint", tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "artifact.json").exists()
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
