"""From a name to a generator: folders, files, the catalog, the cache, and a hub on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from diptych.errors import BadInput, UnknownModel, UnsupportedModel
from diptych.weights import catalog
from diptych.weights.catalog import available_models
from diptych.weights.diffusion import _needed, resolve_generator
from hub_server import Hub, served_hub
from tiny_pipelines import make_pipeline

COMMIT = "c" * 40


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "pipeline"
    make_pipeline(folder, "sd1", seed=1)
    return folder


@pytest.fixture
def pipeline(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "pipeline")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HOME", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with served_hub(monkeypatch) as served:
        yield served


def test_folder_and_default(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_generator(pipeline).path == pipeline
    monkeypatch.setattr(catalog, "EMBEDDED_GENERATOR", pipeline)
    model = resolve_generator("default")
    assert (model.path, model.name) == (pipeline, "default")
    with pytest.raises(BadInput, match="revision='main' is for models of the hub"):
        resolve_generator("default", revision="main")
    monkeypatch.setattr(catalog, "EMBEDDED_GENERATOR", pipeline / "gone")
    with pytest.raises(UnknownModel, match="no default model for text-to-image"):
        resolve_generator("default")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sd-1.6", "Did you mean sd-1.5"),
        ("sdlx", "Did you mean sdxl"),
        ("vit-gpt2", "vit-gpt2 writes captions: use it with `diptych caption`"),
        ("nowhere", "a single file, an id of the hub"),
        ("./nowhere.safetensors", "is no folder here and no known model"),
    ],
)
def test_names_that_lead_nowhere(name: str, hint: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        resolve_generator(name)
    assert hint in str(caught.value)


def test_fetch_once_and_never_again(online: Hub, pipeline: Path, cache: Path) -> None:
    for name in ("evil.py", "unet/evil.py", "unet/diffusion_pytorch_model.bin", "README.md"):
        (pipeline / name).write_text("x")
    (pipeline / "safety_checker").mkdir()
    (pipeline / "safety_checker" / "model.safetensors").write_text("not asked for")
    (pipeline / "v1-5-pruned.ckpt").write_text("not asked for")
    online.models["owner/model"] = {"main": pipeline, COMMIT: pipeline}
    model = resolve_generator("owner/model")
    assert (model.revision, model.family) == (COMMIT, "sd1")
    files = {path.relative_to(model.path).as_posix() for path in model.path.rglob("*.*")}
    assert files == {
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    online.asked.clear()
    assert resolve_generator("owner/model") == model
    assert online.asked == []
    (found,) = [info for info in available_models() if info.name == "owner/model"]
    assert (found.task, found.state, found.path) == ("text-to-image", "cached", model.path)
    assert found not in available_models("image-to-text")


def test_half_of_a_model_is_none(online: Hub, pipeline: Path) -> None:
    online.models["owner/model"] = {"main": pipeline, COMMIT: pipeline}
    model = resolve_generator("owner/model")
    (model.path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert not [info for info in available_models() if info.name == "owner/model"]
    assert resolve_generator("owner/model") == model


def test_alias_and_what_files_do_not_tell(online: Hub, pipeline: Path) -> None:
    online.models["stabilityai/sd-turbo"] = {"main": pipeline, COMMIT: pipeline}
    model = resolve_generator("sd-turbo")
    assert model.name == "sd-turbo"
    assert model.defaults["guidance_scale"] == 1.0
    assert model.defaults["width"] == 64
    assert resolve_generator("stabilityai/sd-turbo").defaults == model.defaults
    assert "guidance_scale" not in resolve_generator(model.path).defaults


def test_captioner_is_no_generator(online: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "captioner"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "vision-encoder-decoder"}))
    (folder / "model.safetensors").write_text("x")
    online.models["owner/captioner"] = {"main": folder, COMMIT: folder}
    with pytest.raises(UnsupportedModel, match="no diffusers pipeline with a UNet"):
        resolve_generator("owner/captioner")


def test_no_connection() -> None:
    with pytest.raises(UnknownModel, match="HF_HUB_OFFLINE is set: load it once"):
        resolve_generator("sdxl")


UNET = "unet/diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("files", "variant", "wanted"),
    [
        ([".safetensors", ".fp16.safetensors", ".bin"], None, [".safetensors"]),
        ([".safetensors", ".fp16.safetensors", ".bin"], "fp16", [".fp16.safetensors"]),
        ([".safetensors", ".bin"], "fp16", [".safetensors"]),
        ([".fp16.safetensors", ".bin"], None, [".fp16.safetensors"]),
        ([".bin", ".fp16.bin", ".non_ema.bin"], None, [".bin"]),
        (
            [
                ".safetensors.index.json",
                "-00001-of-00002.safetensors",
                "-00002-of-00002.safetensors",
                ".fp16-00001-of-00001.safetensors",
                ".safetensors.index.fp16.json",
                "-00001-of-00001.bin",
            ],
            None,
            [
                ".safetensors.index.json",
                "-00001-of-00002.safetensors",
                "-00002-of-00002.safetensors",
            ],
        ),
        (
            [
                ".safetensors.index.fp16.json",
                ".fp16-00001-of-00002.safetensors",
                "-00002-of-00002.fp16.safetensors",
                "-00001-of-00002.safetensors",
                ".safetensors.index.json",
            ],
            "fp16",
            [
                ".safetensors.index.fp16.json",
                ".fp16-00001-of-00002.safetensors",
                "-00002-of-00002.fp16.safetensors",
            ],
        ),
    ],
)
def test_which_weights_are_fetched(
    files: list[str], variant: str | None, wanted: list[str]
) -> None:
    found = _needed([f"{UNET}{file}" for file in files], "x", variant=variant)
    assert sorted(found) == sorted(f"{UNET}{file}" for file in wanted)


def test_what_is_fetched_of_an_artifact() -> None:
    files = ["artifact.json", "unet.onnx", "unet.onnx.data", "tokenizer/tokenizer.json"]
    files += ["turbo.safetensors", "unet_turbo.onnx"]  # of an edition
    found = _needed([*files, "evil.py", "sub/x.onnx", "tokenizer/evil.py"], "x", variant=None)
    assert sorted(found) == sorted(files)


def test_known_generators() -> None:
    ids = {info.name for info in available_models("text-to-image")}
    assert {
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "stabilityai/stable-diffusion-2-1",
        "stabilityai/stable-diffusion-2-1-base",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "stabilityai/sd-turbo",
        "stabilityai/sdxl-turbo",
        "SimianLuo/LCM_Dreamshaper_v7",
        "stable-diffusion-v1-5/stable-diffusion-inpainting",
    } <= ids
    aliases = [alias for known in catalog.KNOWN for alias in (known.id, *known.aliases)]
    assert len(set(aliases)) == len(aliases)
