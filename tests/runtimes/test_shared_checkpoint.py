"""Networks whose weights are the bytes of the checkpoint beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from diptych.errors import QualityLoss, UnsupportedModel, WeightsMismatch
from diptych.models.lora import LowRank, layers
from diptych.runtimes.export_generator import add_edition, export_generator
from diptych.runtimes.network import open_generator_networks
from diptych.runtimes.picture_agreement import draw, sketch_for
from diptych.weights.diffusion import describe_generator
from diptych.weights.files import verify
from diptych.weights.save_adapters import save_lora
from diptych.weights.save_generator import save_generator
from generator_modules import FAMILIES, make_model, make_modules

pytestmark = pytest.mark.usefixtures("one_thread")

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give an artifact of halves that shares its weights, and an edition of it."""
    folder, modules = tmp_path_factory.mktemp("shared") / "generator", make_modules("diptych")
    model = make_model(modules, "diptych")
    export_generator(modules, model, folder, precision="fp16", checkpoint=True)
    random = torch.Generator().manual_seed(8)
    updates = {
        ("unet", path): LowRank(
            torch.randn(2, *layer.weight.shape[1:], generator=random) * 0.05,
            torch.randn(len(layer.weight), 2, *[1] * (layer.weight.ndim - 2), generator=random),
        )
        for path, layer in layers(modules["unet"]).items()
    }
    save_lora(updates, folder.with_name("lora.safetensors"), dtype=torch.float16)
    add_edition(modules["unet"], folder, "turbo", folder.with_name("lora.safetensors"), {})
    return folder


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "own"))


def outside(path: Path) -> dict[str, onnx.TensorProto]:
    stored = onnx.load(path, load_external_data=False).graph.initializer
    return {each.name: each for each in stored if each.external_data}


def test_the_checkpoint_is_what_is_saved_by_itself(folder: Path, tmp_path: Path) -> None:
    modules = make_modules("diptych")
    save_generator(modules, make_model(modules, "diptych"), tmp_path / "alone", dtype="float16")
    for path in (tmp_path / "alone").rglob("*.safetensors"):
        again = folder / path.relative_to(tmp_path / "alone")
        assert again.read_bytes() == path.read_bytes()


def test_the_weights_are_stored_once(folder: Path) -> None:
    assert not list(folder.glob("*.data"))
    for network, part in {
        "unet": "unet",
        "unet_shallow": "unet",
        "unet_turbo": "unet",
        "vae_encoder": "vae",
        "vae_decoder": "vae",
    }.items():
        taken = outside(folder / f"{network}.onnx")
        places = {each.external_data[0].value for each in taken.values()}
        assert places <= {f"{part}/diffusion_pytorch_model.safetensors"}, network
    stored = load_file(folder / UNET)
    large = {name for name, tensor in stored.items() if tensor.ndim > 1 and tensor.numel() >= 4096}
    # A gated layer is cut in two, at its rows.
    assert len(outside(folder / "unet.onnx")) >= len(large) > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_networks_say_what_those_with_weights_of_their_own_say(family: str, tmp_path: Path) -> None:
    modules = make_modules(family)
    model, drawn = make_model(modules, family), []
    for kind in ("shared", "alone"):
        export_generator(
            *(modules, model, tmp_path / kind), precision="fp16", checkpoint=kind == "shared"
        )
        found = describe_generator(tmp_path / kind)
        assert bool(found.weights) == (kind == "shared")
        sketch = sketch_for(found.configs, pictures=2, steps=3, seed=11)
        for runtime in ("onnxruntime", "openvino"):
            networks = open_generator_networks(found, runtime)
            drawn.append(draw(networks, found.configs, found.schedule, sketch))
    assert drawn[0].std() > 0.01
    for other in drawn[1:]:
        np.testing.assert_allclose(other, drawn[0], rtol=0, atol=1e-3)


def test_what_is_changed_in_the_checkpoint_is_found(own: Path) -> None:
    verify(describe_generator(own))
    tensors = load_file(own / UNET)
    tensors["conv_in.weight"] = tensors["conv_in.weight"] + 1
    save_file(tensors, own / UNET)
    with pytest.raises(WeightsMismatch, match=r"diffusion_pytorch_model\.safetensors is not the"):
        verify(describe_generator(own))
    (own / UNET).unlink()
    with pytest.raises(WeightsMismatch, match=r"is missing|has no weights"):
        describe_generator(own)


@pytest.mark.parametrize(
    "file", ["../{UNET}", "unet/../../secret", "/etc/passwd", "a/b/c", "/secret", "unet/", "./x"]
)
def test_weights_elsewhere_are_refused(own: Path, file: str) -> None:
    document = json.loads((own / "artifact.json").read_text())
    document["networks"]["unet"]["data"]["file"] = file
    (own / "artifact.json").write_text(json.dumps(document))
    with pytest.raises(UnsupportedModel, match=r"names the file .*, not one beside it"):
        describe_generator(own)


@pytest.mark.parametrize("linked", ["unet", UNET])
def test_links_to_somewhere_else_are_refused(own: Path, linked: str) -> None:
    away = (own / linked).rename(own.parent / "away")
    (own / linked).symlink_to(away)
    with pytest.raises(UnsupportedModel, match="is a link to somewhere outside the folder"):
        describe_generator(own)


def test_links_of_the_hub_are_followed(own: Path, tmp_path: Path) -> None:
    blobs, commit = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    for number, path in enumerate([each for each in own.rglob("*") if each.is_file()]):
        link = commit / path.relative_to(own)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.rename(blobs / str(number)))
    verify(describe_generator(commit))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_pictures_of_no_numbers_are_no_export(tmp_path: Path, broken: float) -> None:
    modules = make_modules("diptych")
    with torch.no_grad():
        next(modules["unet"].parameters()).fill_(broken)
    with pytest.raises(QualityLoss, match=r"at 0\.0 dB"):
        export_generator(modules, make_model(modules, "diptych"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_saved_over_an_artifact_is_what_loads(own: Path) -> None:
    modules = make_modules("diptych")
    save_generator(modules, make_model(modules, "diptych"), own, dtype="float16")
    found = describe_generator(own)
    assert found.weights and not found.networks
