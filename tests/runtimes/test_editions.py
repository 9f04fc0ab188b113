"""An edition of a generator: its LoRA in the weights of the other, in every runtime."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from diptych import ImageGenerator
from diptych.errors import UnknownModel, UnsupportedModel, WeightsMismatch
from diptych.evaluation.image_metrics import psnr
from diptych.models.lora import LowRank, layers
from diptych.runtimes import conversion
from diptych.runtimes.export_generator import add_edition, export_generator
from diptych.runtimes.network import open_generator_networks
from diptych.weights import catalog
from diptych.weights.diffusion import describe_generator, resolve_generator
from diptych.weights.files import verify
from diptych.weights.save_adapters import save_lora
from diptych.weights.save_generator import save_generator

from .test_generator_export import make_model, make_modules

pytestmark = pytest.mark.usefixtures("one_thread")

DEFAULTS = {"num_inference_steps": 3, "guidance_scale": 1.0, "sampler": "ddim"}


def random_updates(unet: Any, seed: int) -> dict[tuple[str, str], LowRank]:
    """Return updates of rank 3 of every layer, as large as a trained one is."""
    random = torch.Generator().manual_seed(seed)
    made = {}
    for path, layer in layers(unet).items():
        out, into, *kernel = layer.weight.shape
        down = torch.randn(3, into, *kernel, generator=random)
        up = torch.randn(out, 3, *[1] * len(kernel), generator=random)
        share = 0.3 * layer.weight.std() / (up.flatten(1) @ down.flatten(1)).std()
        made["unet", path] = LowRank(down, up * share.detach())
    return made


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give an artifact with its checkpoint, and an edition of both."""
    root = tmp_path_factory.mktemp("editions")
    folder, modules = root / "generator", make_modules("diptych")
    model = make_model(modules, "diptych")
    save_generator(modules, model, folder)
    export_generator(modules, model, folder, precision=request.param)
    lora = root / "lora.safetensors"
    save_lora(random_updates(modules["unet"], 5), lora, dtype=torch.float16)
    add_edition(modules["unet"], folder, "turbo", lora, DEFAULTS)
    return folder


@pytest.fixture
def turbo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(catalog, "EMBEDDED_GENERATOR", folder)
    return folder


def inputs(seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        "latents": random.standard_normal((2, 4, 8, 8), np.float32),
        "timestep": np.array([3.0, 600.0], np.float32),
        "encoder_hidden_states": random.standard_normal((2, 7, 32), np.float32),
    }


@pytest.mark.parametrize("seed", [1, 2])
def test_the_network_is_that_of_the_summed_weights(turbo: Path, seed: int) -> None:
    unet = make_modules("diptych")["unet"]
    for (_, path), update in random_updates(unet, 5).items():
        down, up = (each.detach().half().float().flatten(1) for each in (update.down, update.up))
        layer = layers(unet)[path]
        layer.weight.data += (up @ down).view_as(layer.weight)
    given = inputs(seed)
    with torch.no_grad():
        wanted = unet(*(torch.from_numpy(each) for each in given.values())).numpy()
    model = resolve_generator("default-turbo")
    precision = json.loads((turbo / "artifact.json").read_text())["precision"]
    bound = {"fp32": 1e-4, "fp16": 5e-3, "int8": 5e-2}[precision] * np.abs(wanted).max()
    for runtime in ("onnxruntime", "torch"):
        (found,) = open_generator_networks(model, runtime)["unet"](**given)
        within = bound if runtime == "onnxruntime" else 1e-4 * np.abs(wanted).max()
        np.testing.assert_allclose(np.asarray(found), wanted, rtol=0, atol=within, err_msg=runtime)


def test_the_weights_are_stored_once(folder: Path) -> None:
    own = onnx.load(folder / "unet_turbo.onnx", load_external_data=False).graph.initializer
    outside = [each for each in own if each.external_data]
    assert {each.external_data[0].value for each in outside} == {"unet.onnx.data"}
    inside = {each.name for each in own if len(each.raw_data) >= 1024}
    assert inside and all(name.endswith((".up.half", ".down.half")) for name in inside)


def test_its_name_brings_its_own_settings(turbo: Path) -> None:
    plain, model = resolve_generator("default"), resolve_generator("default-turbo")
    assert model.networks["unet"] == turbo / "unet_turbo.onnx"
    assert {**plain.networks, **model.networks} == {
        **plain.networks,
        "unet": turbo / "unet_turbo.onnx",
    }
    assert "unet_shallow" not in model.networks  # it has the weights of the other
    pictures = []
    for runtime in ("onnxruntime", "torch"):
        generator = ImageGenerator.load("default-turbo", runtime=runtime)
        chosen = {name: getattr(generator.options, name) for name in DEFAULTS}
        assert chosen == DEFAULTS
        pictures.append(generator.generate("a red circle", seed=3))
        assert pictures[-1].model == "default-turbo"
    other = ImageGenerator.load("default", runtime="torch").generate(
        "a red circle", seed=3, **DEFAULTS
    )
    first, second = (made.image for made in pictures)
    assert psnr(first, second) > 30 > psnr(other.image, second)
    known = {info.name: info for info in catalog.available_models("text-to-image")}
    assert known["default-turbo"].path == turbo
    assert known["default-turbo"].size < known["default"].size
    assert "default-turbo" in catalog.names("text-to-image")
    assert "default-turbo" not in catalog.names("image-to-text")


def test_it_can_be_exported_by_its_name(turbo: Path, tmp_path: Path) -> None:
    assert conversion.tasks_of("default-turbo") == ("text-to-image",)
    exported = tmp_path / "exported"
    report = conversion.export("default-turbo", exported, measure=False)
    assert report["source"]["name"] == "default-turbo"
    pictures = [
        ImageGenerator.load(name, runtime=runtime).generate("a red circle", seed=3, **DEFAULTS)
        for name, runtime in (("default-turbo", "torch"), (exported, "onnxruntime"))
    ]
    assert psnr(pictures[0].image, pictures[1].image) > 50
    assert not describe_generator(exported).editions


def test_a_changed_file_is_told(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    verify(describe_generator(copied))
    lora = copied / "turbo.safetensors"
    lora.write_bytes(lora.read_bytes()[:-1] + b"\x01")
    with pytest.raises(WeightsMismatch, match=r"turbo\.safetensors is not the file"):
        verify(describe_generator(copied))
    lora.unlink()
    with pytest.raises(WeightsMismatch, match=r"turbo\.safetensors is missing"):
        describe_generator(copied)


def test_no_edition(folder: Path) -> None:
    with pytest.raises(UnknownModel, match="has no edition 'lightning'"):
        describe_generator(folder).edition("lightning", "default-lightning")


@pytest.mark.parametrize(
    "entry",
    [
        [],
        {"turbo": 3},
        {"turbo": {"lora": {}, "networks": {}}},
        {"turbo": {"lora": {"file": "../x", "sha256": "0" * 64}, "networks": {}}},
    ],
)
def test_damaged_descriptions(folder: Path, tmp_path: Path, entry: Any) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    document = json.loads((copied / "artifact.json").read_text())
    (copied / "artifact.json").write_text(json.dumps({**document, "editions": entry}))
    with pytest.raises(UnsupportedModel, match=r"artifact\.json"):
        describe_generator(copied)
