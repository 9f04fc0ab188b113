"""A UNet that multiplies in 8 bits: ranges as torch sees them, noise close by, rows alike."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import diptych
from command_line import call
from diptych.errors import BadInput
from diptych.runtimes.export_generator import export_generator
from diptych.runtimes.generator_graphs import unet_graph
from diptych.runtimes.network import open_generator_networks
from diptych.runtimes.on_torch_generator import generator_networks
from diptych.runtimes.picture_agreement import Words
from diptych.runtimes.static_generator import find_ranges
from diptych.runtimes.static_quantize import Range
from diptych.weights.diffusion import describe_generator
from diptych.weights.files import verify
from generator_modules import FAMILIES, make_model, make_modules

pytestmark = pytest.mark.usefixtures("one_thread")


def words_for(modules: dict[str, nn.Module], prompts: int = 2) -> Words:
    random = np.random.default_rng(3)
    names = [name for name in modules if name.startswith("text_encoder")]
    return {name: random.integers(0, 49000, (prompts + 1, 77)) for name in names}


def test_ranges_are_what_torch_sees(tmp_path: Path) -> None:
    modules = make_modules("diptych")
    model = make_model(modules, "diptych")
    unet = modules["unet"]
    seen: dict[str, list[tuple[float, float, float]]] = {}

    def watch(name: str) -> Any:
        def look(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            given = inputs[0]
            extremes = (float(given.min()), float(given.max()), float(given.square().mean()))
            seen.setdefault(name, []).append(extremes)

        return look

    hooks = [
        layer.register_forward_pre_hook(watch(f"{path}.weight"))
        for path, layer in unet.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    weights = {name: tensor.numpy() for name, tensor in unet.state_dict().items()}
    graph = unet_graph(model.configs["unet"], weights)
    networks = generator_networks(modules)
    ranges = find_ranges(
        graph, networks, model.configs, model.schedule, words_for(modules), tmp_path
    )
    for hook in hooks:
        hook.remove()
    # The gate of a transformer block is two products of one layer.
    layers = {weight: re.sub(r"\.\d+$", "", weight) for weight in ranges}
    assert {*layers.values()} == seen.keys()
    assert len(layers) > len(seen)
    assert all(len(each) == 12 for each in seen.values())  # 6 steps of 2 prompts
    for name, found in ranges.items():
        low, high, power = np.mean(seen[layers[name]], axis=0)
        expected = (pytest.approx(low, abs=2e-3), pytest.approx(high, abs=2e-3))
        assert (found.low, found.high) == expected, name
        assert found.power == pytest.approx(power, rel=1e-2), name
    assert not [*tmp_path.iterdir()]


def test_steps_of_a_range() -> None:
    seen = Range(-1.0, 3.0, 0.5)
    assert seen.step == np.float32(4 / 255)
    assert seen.zero == 64
    assert seen.decibels == pytest.approx(10 * np.log10(0.5 / ((4 / 255) ** 2 / 12)))
    assert Range(2.0, 3.0, 6.0).zero == 0  # 0 itself is always among the steps
    assert Range(0.0, 0.0, 0.0).step == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_calibrated_generator(family: str, tmp_path: Path) -> None:
    modules = make_modules(family)
    model, words = make_model(modules, family), words_for(modules)
    for name, calibration in (("plain", None), ("small", words)):
        report = export_generator(
            modules, model, tmp_path / name, precision="int8", calibration=calibration, force=True
        )
    rounding = report["int8"]["rounding"]
    assert rounding["products"] > 20
    assert "conv_in.weight" in rounding["kept_wide"]
    assert any("conv_shortcut" in name for name in rounding["kept_wide"])
    assert json.loads((tmp_path / "small" / "export.json").read_text()) == report
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("tmp")]

    opened = describe_generator(tmp_path / "small")
    verify(opened)
    file = onnx.load(tmp_path / "small" / "unet.onnx", load_external_data=False)
    for op, least in (("Conv", 5), ("MatMul", 15)):
        products = [node for node in file.graph.node if node.op_type == op]
        assert sum(node.input[1].endswith(".wide") for node in products) > least
    # The last block has its weights from the whole network's file.
    assert not (tmp_path / "small" / "unet_shallow.onnx.data").exists()

    random = np.random.default_rng(1)
    given: dict[str, Any] = {
        "latents": random.standard_normal((3, 4, 8, 8)).astype(np.float32),
        "timestep": np.array([900, 500, 20], np.float32),
    }
    width = model.configs["unet"]["cross_attention_dim"]
    given["encoder_hidden_states"] = random.standard_normal((3, 7, width)).astype(np.float32)
    if family == "sdxl":
        given["text_embeds"] = random.standard_normal((3, 24)).astype(np.float32)
        given["time_ids"] = np.array([[32, 32, 0, 0, 32, 32]] * 3, np.float32)
    torch_given = {name: torch.tensor(each) for name, each in given.items()}
    expected = generator_networks(modules)["unet"](**torch_given)[0].numpy()
    both = ("noise_pred", "deep_features")
    for runtime in ("onnxruntime", "openvino"):
        networks = open_generator_networks(opened, runtime)
        noise, deep = networks["unet"](both, **given)
        error = np.linalg.norm(noise - expected) / np.linalg.norm(expected)
        assert 1e-4 < error < 0.2, runtime
        (again,) = networks["unet_shallow"](deep_features=deep, **given)
        assert np.abs(again - noise).max() < 1e-4 * np.abs(noise).max(), runtime
        for row in range(3):
            alone = {name: each[row : row + 1] for name, each in given.items()}
            (own,) = networks["unet"](**alone)
            assert np.abs(own - noise[row : row + 1]).max() < 1e-4, runtime


def test_what_a_generators_calibration_needs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    wrong: list[dict[str, Any]] = [
        {"calibration": []},
        {"calibration": "a cup"},
        {"calibration": [np.zeros((8, 8, 3), np.uint8)]},
        {"calibration": ["a cup"], "quantize": "fp16"},
    ]
    for words in wrong:
        with pytest.raises(BadInput, match="is for int8 and needs a list of prompts"):
            diptych.export("default", out, **{"task": "text-to-image", "quantize": "int8", **words})
    assert not out.exists()


def test_prompts_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n\na tulip\n", "utf-8")
    (tmp_path / "none.txt").write_text("\n", "utf-8")
    asked: list[object] = [
        "export",
        "default",
        tmp_path / "out",
        "--task",
        "text-to-image",
        "--no-measure",
    ]
    # Two prompts are few to calibrate by: the pictures come out at the very bound of their quality.
    asked += ["--force", "--quantize", "int8", "--calibration"]
    found = call(monkeypatch, capsys, *asked, tmp_path / "none.txt")
    assert found.code == 2
    assert "none.txt holds no prompt: write one a line" in found.err
    found = call(monkeypatch, capsys, *asked, tmp_path / "prompts.txt")
    assert found.code == 0, found.err
    assert json.loads(found.out)["int8"]["rounding"]["products"] > 100
