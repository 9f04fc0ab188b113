"""A generator through its folders: checkpoint, artifact, and back to the same pictures."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diptych
from diptych.errors import BadInput, UnsupportedModel, WeightsMismatch
from diptych.models.unet import UNet, UNetConfig
from diptych.runtimes import conversion
from diptych.runtimes.export_generator import export_generator
from diptych.runtimes.network import open_generator_networks
from diptych.runtimes.picture_agreement import compare_pictures, draw, sketch_for
from diptych.weights.diffusion import describe_generator
from diptych.weights.files import verify
from diptych.weights.save_generator import save_generator
from generator_modules import FAMILIES, make_model, make_modules

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a finder: the folder of a family, with `checkpoint` and `artifact` below it."""
    home, done = tmp_path_factory.mktemp("generators"), set()

    def find(family: str) -> Path:
        folder = home / family
        if family not in done:
            modules = make_modules(family)
            save_generator(modules, make_model(modules, family), folder / "checkpoint")
            conversion.export(folder / "checkpoint", folder / "artifact")
            done.add(family)
        return folder

    return find


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_the_same_in_both_runtimes(family: str, made: Callable[[str], Path]) -> None:
    folder = made(family)
    checkpoint, artifact = (
        describe_generator(folder / kind) for kind in ("checkpoint", "artifact")
    )
    torch_networks = open_generator_networks(checkpoint, device="cpu")
    onnx_networks = open_generator_networks(artifact)
    assert (torch_networks.runtime, onnx_networks.runtime) == ("torch", "onnxruntime")
    assert set(torch_networks) == set(onnx_networks)
    # Other words, sizes and number of pictures than those of the export.
    sketch = sketch_for(artifact.configs, pictures=3, steps=4, seed=7)
    sketch["latents"] = sketch["latents"][:, :, :7, :5]
    pictures = [
        draw(networks, checkpoint.configs, checkpoint.schedule, sketch)
        for networks in (torch_networks, onnx_networks)
    ]
    assert pictures[0].shape == (3, 3, 14, 10)
    assert pictures[0].std() > 0.01
    assert compare_pictures(*pictures)["worst_psnr_db"] >= 60


@pytest.mark.parametrize("family", FAMILIES)
def test_an_artifact_says_what_the_checkpoint_says(
    family: str, made: Callable[[str], Path]
) -> None:
    folder = made(family)
    before, after = (describe_generator(folder / kind) for kind in ("checkpoint", "artifact"))
    for word in ("configs", "schedule", "family", "force_zeros_for_empty_prompt"):
        assert getattr(after, word) == getattr(before, word), word
    assert {**before.defaults, **after.defaults} == after.defaults
    assert after.precision == "fp32" and not after.weights
    for name, files in before.tokenizers.items():
        found = after.tokenizers[name]
        assert found.path.read_bytes() == files.path.read_bytes()
    document = json.loads((folder / "artifact" / "artifact.json").read_text())
    assert (document["format"], document["task"]) == ("diptych-artifact", "text-to-image")


def test_the_report_tells_how_far_apart_both_are(made: Callable[[str], Path]) -> None:
    report = json.loads((made("sdxl") / "artifact" / "export.json").read_text())
    fp32 = report["fp32"]
    assert fp32["pictures"]["worst_psnr_db"] >= 60
    assert set(fp32["networks"]) == {
        *("text_encoder", "text_encoder_2", "vae_encoder", "vae_decoder"),
        *("unet", "unet_shallow"),
    }
    for entry in fp32["networks"].values():
        assert entry["bytes"] > 0
        assert 0 <= max(entry["max_abs_difference"].values()) < 1e-3
    assert report["versions"]["onnxruntime"]


@pytest.mark.parametrize(("precision", "decibels"), [("fp16", 40), ("int8", 25), ("int4", 12)])
def test_smaller_artifacts(
    precision: str, decibels: float, made: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint = made("diptych") / "checkpoint"
    report = diptych.export(checkpoint, tmp_path / "small", quantize=precision)
    assert 120 > report[precision]["pictures"]["worst_psnr_db"] >= decibels
    model = describe_generator(tmp_path / "small")
    opened = open_generator_networks(model)
    assert model.precision == precision and opened.dtype == precision
    (noise_pred,) = opened["unet"](
        latents=np.zeros((1, 4, 8, 8)),
        timestep=np.array([10]),
        encoder_hidden_states=np.zeros((1, 2, 32), np.float32),
    )
    assert noise_pred.dtype == np.float32


def test_export_beside_the_checkpoint(made: Callable[[str], Path], tmp_path: Path) -> None:
    modules = make_modules("diptych")
    model = make_model(modules, "diptych")
    save_generator(modules, model, tmp_path / "both", dtype="float16")
    for _ in range(2):  # once more over what is there
        export_generator(modules, model, tmp_path / "both", precision="fp16")
    both = describe_generator(tmp_path / "both")
    assert both.networks and both.weights
    verify(both)  # type: ignore[arg-type]
    assert open_generator_networks(both).runtime == "onnxruntime"
    assert open_generator_networks(both, dtype="float32").reason == "the model has ONNX networks"
    asked = open_generator_networks(both, "torch", "cpu")
    assert (asked.runtime, asked.reason) == ("torch", "it was asked for")
    narrow = open_generator_networks(both, device="cpu", dtype="bfloat16")
    assert narrow.runtime == "torch" and narrow.reason.startswith("its ONNX networks are fp16")


def test_a_changed_file_is_found(made: Callable[[str], Path], tmp_path: Path) -> None:
    modules = make_modules("diptych")
    export_generator(modules, make_model(modules, "diptych"), tmp_path / "artifact")
    data = tmp_path / "artifact" / "unet.onnx.data"
    changed = bytearray(data.read_bytes())
    changed[-1] ^= 1
    data.write_bytes(changed)
    with pytest.raises(WeightsMismatch, match=r"unet\.onnx\.data is not the file"):
        verify(describe_generator(tmp_path / "artifact"))  # type: ignore[arg-type]


def test_what_cannot_be_exported(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made("diptych")
    with pytest.raises(BadInput, match="quantize is 'int3': give fp16, int8 or int4"):
        diptych.export(folder / "checkpoint", tmp_path / "out", quantize="int3")
    with pytest.raises(BadInput, match="draws pictures: leave images, words and profile out"):
        diptych.export(folder / "checkpoint", tmp_path / "out", images=["a.png"])
    with pytest.raises(BadInput, match="task is 'words'"):
        diptych.export(folder / "checkpoint", tmp_path / "out", task="words")
    with pytest.raises(WeightsMismatch, match="no PyTorch weights"):
        diptych.export(folder / "artifact", tmp_path / "out")
    with pytest.raises(UnsupportedModel):
        diptych.export(folder / "checkpoint", tmp_path / "out", task="image-to-text")
    modules = make_modules("diptych")
    with torch.device("meta"):
        empty: dict[str, Any] = {**modules, "unet": UNet(UNetConfig.tiny())}
    with pytest.raises(BadInput, match="the unet has no weights yet"):
        export_generator(empty, make_model(modules, "diptych"), tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_modules_are_left_as_they_are(tmp_path: Path) -> None:
    modules = make_modules("diptych")
    modules["unet"].train()
    modules["vae"].bfloat16()
    export_generator(modules, make_model(modules, "diptych"), tmp_path / "out")
    assert modules["unet"].training and not modules["vae"].training
    assert next(modules["vae"].parameters()).dtype == torch.bfloat16


def test_pictures_that_differ_are_told(
    made: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from diptych.runtimes import export_generator as module

    monkeypatch.setitem(module._WANTED_DB, "fp32", 500.0)
    modules = make_modules("diptych")
    with caplog.at_level(logging.WARNING, "diptych"):
        export_generator(modules, make_model(modules, "diptych"), tmp_path / "out")
    assert "dB from torch's" in caplog.text


def test_distance_of_pictures() -> None:
    black, grey = np.zeros((2, 3, 4, 4), np.float32), np.zeros((2, 3, 4, 4), np.float32)
    grey[1] = 0.1  # a tenth of the range everywhere: 20 dB
    assert compare_pictures(black, grey)["psnr_db"] == [200.0, 20.0]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_artifact_runs_without_torch(family: str, made: Callable[[str], Path]) -> None:
    script = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "diffusers", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from diptych.runtimes.network import open_generator_networks
from diptych.runtimes.picture_agreement import draw, sketch_for
from diptych.weights.diffusion import resolve_generator

model = resolve_generator({str(made(family) / "artifact")!r})
networks = open_generator_networks(model)
pictures = draw(networks, model.configs, model.schedule, sketch_for(model.configs, steps=2))
assert pictures.shape == (2, 3, 16, 16) and pictures.std() > 0, pictures.shape
assert not any(name in sys.modules for name in ("torch", "onnx"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("default", "image-to-text"),
        ("sdxl", "text-to-image"),
        ("vit-gpt2", "image-to-text"),
        ("someone/something", None),
    ],
)
def test_tasks_are_told_from_names(name: str, task: str | None) -> None:
    assert conversion._task_of(name) == task


def test_tasks_are_told_from_places(made: Callable[[str], Path], tmp_path: Path) -> None:
    folder = made("diptych")
    for kind in ("checkpoint", "artifact"):
        assert conversion._task_of(folder / kind) == "text-to-image"
    (tmp_path / "model.ckpt").touch()
    assert conversion._task_of(tmp_path / "model.ckpt") == "text-to-image"
    assert conversion._task_of(tmp_path) == "image-to-text"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "mps", "nonsense"])
def test_devices_that_are_not_there(device: str, tmp_path: Path) -> None:
    from diptych.runtimes.on_torch_generator import open_generator_checkpoint

    modules = make_modules("sd1")
    save_generator(modules, make_model(modules, "sd1"), tmp_path / "model")
    with pytest.raises(BadInput, match=r"device '.*' cannot be used here") as caught:
        open_generator_checkpoint(describe_generator(tmp_path / "model"), device, "float32")
    assert len(str(caught.value)) < 300
