"""ONNX files as networks: without torch, on what they were made for, and nothing hostile."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from diptych.errors import BadInput, UnsupportedModel, WeightsMismatch
from diptych.runtimes import cores
from diptych.runtimes.cores import available_cores
from diptych.runtimes.network import open_networks
from diptych.runtimes.on_onnxruntime import OnnxSession
from diptych.weights.files import describe, verify

Make = Callable[..., Any]


def relocate(path: Path, location: str) -> None:
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("variant", ["cross-attention", "prefix"])
def test_neither_torch_nor_transformers_nor_onnx(
    artifacts: Make, variant: str, precision: str
) -> None:
    code = f"""
        import sys

        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("torch", "transformers", "onnx", "onnxscript"):
                    raise ImportError(name + " is blocked")

        sys.meta_path.insert(0, Blocked())
        from diptych.runtimes.agreement import greedy_tokens, pictures_for
        from diptych.runtimes.network import open_networks
        from diptych.weights.files import describe

        import diptych.runtimes.quantize

        model = describe({str(artifacts(variant) / precision)!r})
        networks = open_networks(model)
        images = pictures_for(model.config, model.preprocessing, None, 2)
        tokens = greedy_tokens(networks, images, model.config, model.generation)
        assert networks.runtime == "onnxruntime" and len(tokens) == 2 and tokens[0], tokens
        assert not set(sys.modules) & {{"torch", "transformers", "onnx", "onnxscript"}}
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_signatures_are_those_of_the_models(artifacts: Make, module: Make) -> None:
    from diptych.models import gpt2, vit
    from diptych.runtimes.on_torch import torch_networks

    for variant in ("cross-attention", "prefix"):
        opened = open_networks(describe(artifacts(variant) / "fp32"))
        for name, network in torch_networks(module(variant)).items():
            assert opened[name].inputs == network.inputs
            assert opened[name].outputs == network.outputs
        assert opened["encoder"].inputs == vit.INPUTS
        assert opened["decoder"].outputs == gpt2.OUTPUTS
        assert opened["decoder"].inputs.items() <= gpt2.INPUTS.items()


def test_only_what_is_wanted(artifacts: Make, pictures: Make) -> None:
    networks = open_networks(describe(artifacts("cross-attention") / "fp32"))
    (bridged,) = networks["encoder"](pixel_values=pictures(1))
    given = {"input_ids": np.array([[0, 3, 4]]), "cross_key_values": bridged}
    both = networks["decoder"](**given)
    assert [each.shape for each in both] == [(1, 400), (2, 2, 1, 4, 3, 8)]
    seen, logits = networks["decoder"](("image_attention", "logits"), **given)
    assert (seen.shape, seen.dtype, logits.dtype) == ((1, 3, 17), np.float32, np.float32)
    assert np.allclose(seen.sum(-1), 1, atol=1e-5)
    assert np.array_equal(logits, both[0])
    with pytest.raises(BadInput, match="no output is called 'logit': there are logits, present"):
        networks["decoder"](("logit",), **given)


def test_results_are_the_callers(artifacts: Make, pictures: Make) -> None:
    """No call may change what an earlier one returned."""
    networks = open_networks(describe(artifacts("prefix") / "fp32"))
    (first,) = networks["encoder"](pixel_values=pictures(2))
    kept = first.copy()
    networks["encoder"](pixel_values=pictures(2, seed=9))
    assert np.array_equal(first, kept)
    logits, past = networks["decoder"](input_ids=np.array([[1], [2]]), prefix_embeds=first)
    copies = logits.copy(), past.copy()
    networks["decoder"](input_ids=np.array([[3], [4]]), past_key_values=past)
    assert np.array_equal(logits, copies[0])
    assert np.array_equal(past, copies[1])


def test_inputs_may_come_in_any_order_and_kind(artifacts: Make, pictures: Make) -> None:
    encoder = open_networks(describe(artifacts("prefix") / "fp32"))["encoder"]
    pixels = pictures(2)
    (expected,) = encoder(pixel_values=pixels)
    crooked = np.asfortranarray(pixels)
    assert np.array_equal(encoder(pixel_values=crooked)[0], expected)
    assert np.array_equal(encoder(pixel_values=pixels.astype(np.float64))[0], expected)


def test_wrong_shapes_are_told(artifacts: Make, pictures: Make) -> None:
    networks = open_networks(describe(artifacts("cross-attention") / "fp32"))
    with pytest.raises(BadInput, match=r"encoder\.onnx cannot be run on pixel_values \[1, 3, 32"):
        networks["encoder"](pixel_values=pictures(1)[..., :16])
    (bridged,) = networks["encoder"](pixel_values=pictures(2))
    with pytest.raises(BadInput, match=r"decoder\.onnx cannot be run"):
        networks["decoder"](input_ids=np.zeros((3, 1), np.int64), cross_key_values=bridged)
    with pytest.raises(BadInput, match=r"decoder\.onnx cannot be run"):
        networks["decoder"](input_ids=np.array([[400], [0]]), cross_key_values=bridged)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    "location",
    ["../secret.data", "{parent}/secret.data", "link.data", "a/../../secret.data", "gone.data"],
)
def test_weights_outside_the_folder_are_refused(own: Path, location: str, runtime: str) -> None:
    inner = own / "inner"
    inner.mkdir()
    for path in own.glob("*.*"):
        path.rename(inner / path.name)
    secret = own / "secret.data"
    secret.write_bytes((inner / "encoder.onnx.data").read_bytes())
    (inner / "link.data").symlink_to(secret)
    relocate(inner / "encoder.onnx", location.format(parent=own))
    with pytest.raises(UnsupportedModel, match=r"encoder\.onnx cannot be run"):
        open_networks(describe(inner), runtime)


def test_other_files_are_refused(own: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"has no input input_ids: it was not exported"):
        OnnxSession(own / "encoder.onnx", "input_ids", memory="kept")
    with pytest.raises(UnsupportedModel, match=r"has no input pixel_values"):
        OnnxSession(own / "decoder.onnx", "pixel_values", memory="in pieces")
    (own / "encoder.onnx").write_bytes(b"not a graph")
    with pytest.raises(UnsupportedModel, match=r"cannot be run: .*: export it anew"):
        OnnxSession(own / "encoder.onnx", "pixel_values", memory="in pieces")
    with pytest.raises(UnsupportedModel):
        OnnxSession(own / "gone.onnx", "pixel_values", memory="in pieces")


def test_cut_weights_are_refused(own: Path) -> None:
    data = own / "encoder.onnx.data"
    data.write_bytes(data.read_bytes()[:5000])
    with pytest.raises(UnsupportedModel):
        OnnxSession(own / "encoder.onnx", "pixel_values", memory="in pieces")


def test_changed_graph_is_found_by_its_hash(own: Path) -> None:
    verify(describe(own))
    relocate(own / "decoder.onnx", "encoder.onnx.data")
    with pytest.raises(WeightsMismatch, match=r"decoder\.onnx is not the file"):
        verify(describe(own))


def test_stderr_stays_quiet(own: Path, capfd: pytest.CaptureFixture[str]) -> None:
    opened = open_networks(describe(own))
    with pytest.raises(BadInput):
        opened["encoder"](pixel_values=np.zeros((1, 3, 5, 5), np.float32))
    (own / "encoder.onnx").write_bytes(b"")
    with pytest.raises(UnsupportedModel):
        OnnxSession(own / "encoder.onnx", "pixel_values", memory="in pieces")
    assert capfd.readouterr() == ("", "")


def test_cores_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
    monkeypatch.setattr(cores, "_quota", lambda: 1)
    assert available_cores() == 1
    monkeypatch.setattr(cores, "_quota", lambda: 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(cores, "_core", lambda cpu: (str(cpu // 2),))
    assert available_cores() == 2
