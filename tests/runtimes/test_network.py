"""Which runtime is chosen, why, and what is said where none can be."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych.errors import BadInput, MissingExtra
from diptych.runtimes import network
from diptych.runtimes.network import gather_rows, open_networks, require_torch
from diptych.weights.files import ModelFolder, describe
from tiny_models import make_captioner

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_captioner(folder, 0)
    return describe(folder, name="mine")


@pytest.fixture
def artifact(artifacts: Make) -> ModelFolder:
    return describe(artifacts("cross-attention") / "int8", name="mine")


@pytest.fixture
def both(checkpoint: ModelFolder, artifact: ModelFolder) -> ModelFolder:
    return replace(checkpoint, networks=artifact.networks, precision=artifact.precision)


def test_artifacts_run_in_onnxruntime(
    artifact: ModelFolder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "diptych"):
        opened = open_networks(artifact)
    assert set(opened) == {"encoder", "decoder"}
    assert (opened.runtime, opened.device, opened.dtype) == ("onnxruntime", "cpu", "int8")
    assert opened.reason == "the model has ONNX networks"
    expected = "mine runs in onnxruntime on cpu as int8: the model has ONNX networks"
    assert expected in caplog.messages
    assert open_networks(artifact, "onnxruntime", "cpu", "float32").reason == "it was asked for"


def test_checkpoints_run_in_torch(checkpoint: ModelFolder) -> None:
    opened = open_networks(checkpoint, device="cpu")
    assert (opened.runtime, opened.device, opened.dtype) == ("torch", "cpu", "float32")
    assert opened.reason == "it has no ONNX networks"
    assert open_networks(checkpoint, "torch", "cpu", "bfloat16").dtype == "bfloat16"
    (bridged,) = opened["encoder"](pixel_values=np.zeros((1, 3, 32, 32), np.float32))
    logits, _ = opened["decoder"](input_ids=np.array([[0]]), cross_key_values=bridged)
    assert (type(logits), logits.dtype) == (np.ndarray, np.float32)


def test_what_is_asked_for_decides(both: ModelFolder) -> None:
    assert open_networks(both).runtime == "onnxruntime"
    opened = open_networks(both, "torch", "cpu")
    assert (opened.runtime, opened.reason) == ("torch", "it was asked for")
    opened = open_networks(both, device="cpu", dtype="bfloat16")
    assert (opened.runtime, opened.dtype) == ("torch", "bfloat16")
    assert opened.reason == "its ONNX networks are int8, not bfloat16"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"runtime": "onnx"}, "runtime is 'onnx': give auto, onnxruntime, openvino or torch"),
        ({"dtype": "fp16"}, "dtype is 'fp16': give auto, float32, bfloat16 or float16"),
        ({"device": "gpu"}, "device is 'gpu': give auto, cpu, cuda, cuda:1 .* or mps"),
        ({"device": 0}, "device is 0: give auto"),
        ({"runtime": "onnxruntime", "device": "cuda"}, "run on the cpu, not on cuda"),
        ({"runtime": "onnxruntime", "dtype": "float16"}, "are int8, not float16"),
        ({"runtime": "torch"}, "has no PyTorch weights, and it holds ONNX networks only"),
        ({"device": "cuda"}, "no PyTorch weights, and its ONNX networks run on the cpu"),
    ],
)
def test_artifacts_say_what_they_cannot(
    artifact: ModelFolder, given: dict[str, Any], text: str
) -> None:
    with pytest.raises(BadInput, match=text):
        open_networks(artifact, **given)


def test_checkpoints_tell_how_to_export(checkpoint: ModelFolder) -> None:
    with pytest.raises(BadInput, match=r"mine cannot run in onnxruntime: .* `diptych export mine"):
        open_networks(checkpoint, "onnxruntime")


def test_missing_packages_are_named(
    checkpoint: ModelFolder, artifact: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_torch("this")
    require_torch("that", "export")
    monkeypatch.setattr(network, "find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(MissingExtra, match=r"running a PyTorch checkpoint .*diptych\[torch\]"):
        open_networks(checkpoint)
    with pytest.raises(MissingExtra, match=r"exporting a model .*diptych\[export\]"):
        require_torch("exporting a model", "export")
    assert open_networks(artifact).runtime == "onnxruntime"
    monkeypatch.setattr(network, "find_spec", lambda name: None if name == "onnx" else object())
    require_torch("this")
    with pytest.raises(MissingExtra):
        require_torch("that", "export")


def test_gathered_caches_lie_straight() -> None:
    cache = np.arange(2 * 2 * 3 * 4).reshape(2, 2, 3, 4)
    rows = np.array([2, 2, 0, 1])
    found = gather_rows(cache, rows)
    assert np.array_equal(found, cache[:, :, rows])
    assert found.flags.c_contiguous
    assert not cache[:, :, rows].flags.c_contiguous


def test_one_artifact_folder_is_enough(artifacts: Make, tmp_path: Path) -> None:
    """A copied folder runs from where it is, as a path relative or not."""
    for path in (artifacts("prefix") / "fp32").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    opened = open_networks(describe(tmp_path))
    (bridged,) = opened["encoder"](pixel_values=np.zeros((1, 3, 32, 32), np.float32))
    assert bridged.shape == (1, 17, 32)
