"""8-bit artifacts: batches do not matter, words stay close, one matrix for words and head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from diptych.errors import BadInput, UnsupportedModel
from diptych.runtimes import quantize
from diptych.runtimes.agreement import greedy_tokens
from diptych.runtimes.graph import Graph, read_network
from diptych.runtimes.network import open_networks
from diptych.runtimes.on_onnxruntime import OnnxSession
from diptych.runtimes.quantize import Bits, bits_for, quantize_network
from diptych.runtimes.smaller_captioner import quantize_captioner
from diptych.weights.files import describe, verify

Make = Callable[..., Any]


@pytest.mark.parametrize("variant", ["cross-attention", "prefix", "odd"])
def test_batches_do_not_change_a_bit(variant: str, artifacts: Make, pictures: Make) -> None:
    """Picture i of a batch of 8: its numbers, not only its tokens, are those it has alone."""
    model = describe(artifacts(variant) / "int8")
    networks = open_networks(model)
    images = pictures(8)
    together = greedy_tokens(networks, images, model.config, model.generation)
    alone = [greedy_tokens(networks, [i], model.config, model.generation)[0] for i in images]
    assert together == alone
    assert len({tuple(tokens) for tokens in alone}) > 1
    (all_bridged,) = networks["encoder"](pixel_values=images)
    bridge = next(iter(networks["encoder"].outputs))
    axis = 2 if all_bridged.ndim == 6 else 0
    words = np.arange(8)[:, None] + 1
    logits, _ = networks["decoder"](input_ids=words, **{bridge: all_bridged})
    for row in range(8):
        (bridged,) = networks["encoder"](pixel_values=images[row : row + 1])
        assert np.array_equal(bridged, all_bridged.take([row], axis))
        own, _ = networks["decoder"](input_ids=words[row : row + 1], **{bridge: bridged})
        assert np.array_equal(own[0], logits[row])


@pytest.mark.parametrize(
    "variant", ["cross-attention", "prefix", "deit", "enc_to_dec_proj", "stem", "untied", "odd"]
)
def test_words_stay_close(variant: str, artifacts: Make) -> None:
    """Random networks exaggerate: words are near ties, and one other word changes the rest."""
    folder = artifacts(variant)
    report = json.loads((folder / "int8" / "export.json").read_text())["int8"]
    assert report["tokens"]["images"] == 8
    assert report["tokens"]["agreeing"] > 0.3 * report["tokens"]["tokens"]
    for network in ("encoder", "decoder"):
        entry = report["networks"][network]
        assert entry["bytes"] < entry["bytes_before"]
        assert all(0 < value < 3 for value in entry["max_abs_difference"].values())
    verify(describe(folder / "int8"))
    assert describe(folder / "int8").precision == "int8"


def test_only_convolutions_and_norms_stay_float(artifacts: Make) -> None:
    for variant in ("stem", "cross-attention"):
        for network in ("encoder", "decoder"):
            path = artifacts(variant) / "int8" / f"{network}.onnx"
            model, weights = read_network(path)
            ops = {node.op_type for node in model.graph.node}
            assert not ops & {"MatMul", "Gemm"}
            assert "MatMulNBits" in ops
            floats = [a.shape for a in weights.values() if a.dtype == np.float32 and a.ndim > 1]
            scales = [a.shape for n, a in weights.items() if n.endswith(".scales")]
            # What is left is small: kernels, tokens, positions.
            assert all(np.prod(shape) < 4096 for shape in floats if shape not in scales)


def test_few_words_stay_in_half_precision(artifacts: Make, tmp_path: Path) -> None:
    source = artifacts("prefix") / "fp32" / "decoder.onnx"
    quantize_network(source, tmp_path / "decoder.onnx", bits_for("int8"))
    _, weights = read_network(tmp_path / "decoder.onnx")
    words, head = (weights[f"decoder.{name}.weight.half"] for name in ("wte", "head"))
    assert words is head
    assert (words.dtype, words.shape) == (np.float16, (400, 32))
    assert "decoder.wte.weight.int8" not in weights
    OnnxSession(tmp_path / "decoder.onnx", "input_ids", memory="kept")


def write_product(path: Path, kernel: np.ndarray, op: str) -> None:
    graph = Graph("product")
    graph.input("rows", "FLOAT", ["N", kernel.shape[0 if op == "MatMul" else 1]])
    graph.output("product", ["N", kernel.shape[1 if op == "MatMul" else 0]])
    attributes = {"transB": 1} if op == "Gemm" else {}
    graph.add(op, "rows", graph.weight("kernel", kernel), to="product", **attributes)
    graph.write(path)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.03), (4, 0.12), (2, 0.6)])
@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
@pytest.mark.parametrize("shape", [(64, 50), (130, 33), (20, 300), (768, 96)])
def test_products_are_close(
    op: str,
    shape: tuple[int, int],
    bits: int,
    error: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantize, "_FEW_WORDS", 0)
    random = np.random.default_rng(0)
    inner, outer = shape
    kernel = random.standard_normal(shape if op == "MatMul" else shape[::-1]).astype(np.float32)
    write_product(tmp_path / "a.onnx", kernel, op)
    quantize_network(tmp_path / "a.onnx", tmp_path / "b.onnx", Bits(bits))
    rows = random.standard_normal((5, inner)).astype(np.float32)
    rows[:, 3] *= 30  # an outlier, as language models have, costs its own block only
    expected = rows @ (kernel if op == "MatMul" else kernel.T)
    found = np.empty((5, outer), np.float32)
    OnnxSession(tmp_path / "b.onnx", "rows", memory="in pieces").run(
        {"rows": rows}, {"product": found}
    )
    assert np.abs(found - expected).max() < error * np.abs(expected).max()
    model = onnx.load(tmp_path / "b.onnx")
    assert [node.op_type for node in model.graph.node] == ["Cast", "MatMulNBits"]


def test_zeros_and_extremes_survive(tmp_path: Path) -> None:
    kernel = np.zeros((64, 4), np.float32)
    kernel[0] = [0, 1e-30, 1e30, -7]
    write_product(tmp_path / "a.onnx", kernel, "MatMul")
    quantize_network(tmp_path / "a.onnx", tmp_path / "b.onnx", bits_for("int8"))
    rows = np.eye(1, 64, dtype=np.float32)
    found = np.empty((1, 4), np.float32)
    OnnxSession(tmp_path / "b.onnx", "rows", memory="in pieces").run(
        {"rows": rows}, {"product": found}
    )
    assert np.allclose(found, kernel[:1], rtol=0.02, atol=0)


def test_only_float32_artifacts_are_quantized(artifacts: Make, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is int8: give the folder of an fp32 artifact"):
        quantize_captioner(artifacts("prefix") / "int8", tmp_path / "a")
    with pytest.raises(BadInput, match="quantize is 'int2': give fp16, int8 or int4"):
        quantize_captioner(artifacts("prefix") / "fp32", tmp_path / "a", "int2")
    assert list(tmp_path.iterdir()) == []


def test_weights_elsewhere_are_not_read(artifacts: Make, tmp_path: Path) -> None:
    source = artifacts("prefix") / "fp32"
    model = onnx.load(source / "encoder.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret.data"
    (tmp_path / "encoder.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedModel, match=r"\.\./secret\.data"):
        quantize_network(tmp_path / "encoder.onnx", tmp_path / "out.onnx", bits_for("int8"))
