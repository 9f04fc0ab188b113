"""From a name to a folder: the embedded model, folders, the cache, and a hub on this machine."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diptych.errors import BadInput, UnknownModel, UnsupportedModel
from diptych.weights import catalog, hub
from diptych.weights.catalog import available_models
from diptych.weights.hub import resolve, resolve_file
from hub_server import Hub, served_hub

PINNED = "dc68f91c06a1ba6f15268e5b9c13ae7a7c514084"
NLPCONNECT = "nlpconnect/vit-gpt2-image-captioning"
OTHER = "a" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HOME", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "cache"
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def put(cache: Path, checkpoint: Path) -> Callable[..., Path]:
    """Return `put(id, commit, ref=None, without=())`, which lays a model in the cache."""

    def lay(model_id: str, commit: str, ref: str | None = None, without: Any = ()) -> Path:
        repository = cache / f"models--{model_id.replace('/', '--')}"
        snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir(exist_ok=True)
        for path in checkpoint.iterdir():
            if path.name not in without:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                shutil.copy(path, blobs / digest)
                (snapshot / path.name).symlink_to(os.path.relpath(blobs / digest, snapshot))
        if ref:
            (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
            (repository / "refs" / ref).write_text(commit)
        return snapshot

    return lay


# Folders.


def test_folder(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(checkpoint).path == checkpoint
    assert resolve(str(checkpoint)).name == str(checkpoint)
    monkeypatch.chdir(checkpoint.parent)
    assert resolve("checkpoint").path == Path("checkpoint")
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert resolve("~/checkpoint").path == checkpoint


def test_folder_comes_before_the_hub(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, put: Callable[..., Path]
) -> None:
    put("owner/model", OTHER, "main")
    monkeypatch.chdir(checkpoint.parent)
    shutil.copytree(checkpoint, checkpoint.parent / "owner" / "model")
    assert resolve("owner/model").path == Path("owner/model")


def test_file_is_no_folder(checkpoint: Path) -> None:
    with pytest.raises(UnknownModel, match=r"is a file: give the folder that holds it"):
        resolve(checkpoint / "config.json")


def test_revision_of_a_folder(checkpoint: Path) -> None:
    with pytest.raises(BadInput, match=r"revision='main' is for models of the hub; .* is a folder"):
        resolve(checkpoint, revision="main")


def test_default_is_the_embedded_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "EMBEDDED", checkpoint)
    model = resolve("default")
    assert (model.path, model.name) == (checkpoint, "default")
    with pytest.raises(BadInput, match="revision"):
        resolve("default", revision="main")
    monkeypatch.setattr(catalog, "EMBEDDED", checkpoint / "gone")
    with pytest.raises(UnknownModel, match="carries no default model"):
        resolve("default")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("", "Give a folder"),
        ("vit-gtp2", "Did you mean vit-gpt2"),
        ("defualt", "Did you mean default"),
        ("distillvit", "Did you mean distilvit"),
        ("no/such/folder", "'no/such/folder' is no folder here"),
        ("./photos", "is no folder here and no known model"),
        ("~nobody/x", "'~nobody/x'"),
        ("x" * 5000, "is no folder here"),
        ("a\0b", "is no folder here"),
        ("http://example.com/a", "is no folder here"),
        ("owner/mo del", "is no folder here"),
    ],
)
def test_names_that_lead_nowhere(name: str, hint: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        resolve(name)
    assert hint in str(caught.value)


def test_path_that_is_not_there_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(UnknownModel, match="is no folder here and no known model"):
        resolve(Path("owner/model"))


@pytest.mark.parametrize("revision", ["", "..", "a/../b", "a b", "-x", "x" * 200, "a\nb"])
def test_revision_that_can_be_none(revision: str) -> None:
    with pytest.raises(BadInput, match="give a commit, a tag or a branch of owner/model"):
        resolve("owner/model", revision=revision)


# The cache; conftest.py sets HF_HUB_OFFLINE and blocks the network.


def test_cached_without_a_revision(put: Callable[..., Path], checkpoint: Path) -> None:
    put("owner/model", "b" * 40)
    snapshot = put("owner/model", OTHER, "main")
    model = resolve("owner/model")
    assert (model.path, model.name, model.revision) == (snapshot, "owner/model", OTHER)
    assert model.weights[0].read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_cached_at_a_commit_a_branch_a_tag(put: Callable[..., Path]) -> None:
    first, second = put("owner/model", "b" * 40), put("owner/model", OTHER, "pr/7")
    assert resolve("owner/model", revision="b" * 40).path == first
    assert resolve("owner/model", revision="pr/7").path == second
    assert resolve("owner/model", revision="pr/7").revision == OTHER


@pytest.mark.parametrize("name", [NLPCONNECT, "vit-gpt2", "vit-gpt2-image-captioning"])
def test_catalog_pins(put: Callable[..., Path], name: str) -> None:
    put(NLPCONNECT, OTHER, "main")
    with pytest.raises(UnknownModel, match=f"Another commit is cached: revision='{OTHER}'"):
        resolve(name)
    snapshot = put(NLPCONNECT, PINNED)
    model = resolve(name)
    assert (model.path, model.name, model.revision) == (snapshot, name, PINNED)
    assert resolve(name, revision=OTHER).revision == OTHER
    assert resolve(name, revision="main").revision == OTHER


def test_offline_and_not_cached(cache: Path) -> None:
    with pytest.raises(UnknownModel) as caught:
        resolve("owner/model")
    assert str(caught.value) == (
        f"'owner/model' is no folder here and not in the cache ({cache}), and HF_HUB_OFFLINE is "
        "set: load it once with a connection, or give a folder."
    )


@pytest.mark.parametrize("without", ["model.safetensors", "config.json", "tokenizer.json"])
def test_part_of_a_model_is_not_cached(put: Callable[..., Path], without: str) -> None:
    put("owner/model", OTHER, "main", without={without})
    with pytest.raises(UnknownModel, match="not in the cache"):
        resolve("owner/model")


@pytest.mark.parametrize("ref", ["../../..", "", "b" * 40, "\n", "A" * 40])
def test_refs_that_lead_nowhere(put: Callable[..., Path], cache: Path, ref: str) -> None:
    put("owner/model", OTHER, "main")
    (cache / "models--owner--model" / "refs" / "main").write_text(ref)
    with pytest.raises(UnknownModel, match="not in the cache"):
        resolve("owner/model")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HF_HUB_CACHE": "/a/b"}, "/a/b"),
        ({"HUGGINGFACE_HUB_CACHE": "/c"}, "/c"),
        ({"HF_HOME": "/d"}, "/d/hub"),
        ({"XDG_CACHE_HOME": "/e"}, "/e/huggingface/hub"),
        ({"HF_HOME": "/d", "HF_HUB_CACHE": "$HOME/x"}, "/home/me/x"),
        ({}, "/home/me/.cache/huggingface/hub"),
        ({"HF_HOME": "~/h"}, "/home/me/h/hub"),
    ],
)
def test_cache_folder_is_where_the_hub_keeps_it(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert catalog.cache_folder() == Path(expected)


# The catalog.


def test_available_models(
    put: Callable[..., Path], cache: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "EMBEDDED", checkpoint)
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\nlicense: wrong\n")
    snapshot = put("someone/captioner", OTHER, "main")
    put(NLPCONNECT, OTHER, "main", without={"README.md"})
    put(NLPCONNECT, PINNED, without={"README.md"})
    put("someone/half", OTHER, "main", without={"model.safetensors"})
    other = put("someone/else", OTHER, "main", without={"config.json"})
    (other / "config.json").write_text('{"model_type": "bert"}')
    (cache / "datasets--x--y").mkdir()
    (checkpoint / "README.md").unlink()

    found = available_models("image-to-text")
    assert [info for info in available_models() if info.task == "image-to-text"] == found
    assert [(info.name, info.state) for info in found] == [
        ("default", "embedded"),
        (NLPCONNECT, "cached"),
        ("someone/captioner", "cached"),
        ("ydshieh/vit-gpt2-coco-en", "known"),
        ("Mozilla/distilvit", "known"),
    ]
    default, nlpconnect, someone, ydshieh, _ = found
    assert (default.size, default.path) == (size, checkpoint)
    assert (nlpconnect.revision, nlpconnect.licence) == (PINNED, "apache-2.0")
    assert (someone.licence, someone.path) == ("mit", snapshot)
    assert someone.size == size + len("---\nlicense: mit\n---\nlicense: wrong\n")
    assert someone.source == "https://huggingface.co/someone/captioner"
    assert (ydshieh.path, ydshieh.task, ydshieh.licence) == (None, "image-to-text", "not stated")
    for info in found:
        if info.path:
            assert resolve(info.name, None).path == info.path


def test_available_models_without_a_cache(cache: Path) -> None:
    assert not cache.exists()
    assert {info.state for info in available_models()} <= {"embedded", "known"}


# A hub on this machine.


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with served_hub(monkeypatch) as served:
        yield served


def test_fetch_once_and_never_again(
    online: Hub, checkpoint: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("modeling_evil.py", "pytorch_model.bin", "flax_model.msgpack", "README.md"):
        (checkpoint / name).write_text("not asked for")
    online.models["owner/model"] = {"main": checkpoint, OTHER: checkpoint}
    model = resolve("owner/model")
    assert model.revision == OTHER
    assert model.path == cache / "models--owner--model" / "snapshots" / OTHER
    names = {path.name for path in model.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not names & {"modeling_evil.py", "pytorch_model.bin", "flax_model.msgpack"}
    assert capfd.readouterr() == ("", "")

    online.asked.clear()
    assert resolve("owner/model") == model
    assert resolve("owner/model", revision=OTHER) == model
    assert online.asked == []


def test_pickles_where_there_is_nothing_else(online: Hub, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    online.models["owner/model"] = {"main": checkpoint, OTHER: checkpoint}
    assert [path.name for path in resolve("owner/model").weights] == ["pytorch_model.bin"]


def test_pinned_commit_is_fetched_whatever_main_is(
    online: Hub, checkpoint: Path, tmp_path: Path
) -> None:
    online.models[NLPCONNECT] = {"main": tmp_path, OTHER: tmp_path, PINNED: checkpoint}
    assert resolve("vit-gpt2").revision == PINNED
    assert not any("/main" in asked for asked in online.asked)


def test_interrupted_fetch_is_completed(
    online: Hub, checkpoint: Path, put: Callable[..., Path]
) -> None:
    put("owner/model", OTHER, "main", without={"model.safetensors"})
    online.models["owner/model"] = {"main": checkpoint, OTHER: checkpoint}
    assert resolve("owner/model").weights


def test_branch_is_asked_for_and_its_last_state_kept(
    online: Hub,
    checkpoint: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    newer = "b" * 40
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    online.models["owner/model"] = {"main": checkpoint, OTHER: checkpoint, newer: moved}
    assert resolve("owner/model", revision="main").revision == OTHER
    online.models["owner/model"]["main"] = moved
    assert resolve("owner/model").revision == OTHER
    assert resolve("owner/model", revision="main").revision == newer
    assert resolve("owner/model").revision == newer
    online.broken = 503
    with caplog.at_level(logging.WARNING, "diptych"):
        assert resolve("owner/model", revision="main").revision == newer
    assert f"using owner/model at {newer} from the cache" in caplog.text


def test_no_such_model_on_the_hub(online: Hub) -> None:
    with pytest.raises(UnknownModel) as caught:
        resolve("nlpconect/vit-gpt2-image-captioning")
    assert "the hub has no such model that you may read" in str(caught.value)
    assert f"Did you mean {NLPCONNECT}" in str(caught.value)
    assert online.asked


def test_name_that_the_hub_would_never_give(online: Hub) -> None:
    with pytest.raises(UnknownModel, match="no such model that you may read"):
        resolve("owner/a..b")


def test_no_such_revision(online: Hub, checkpoint: Path) -> None:
    online.models["owner/model"] = {"main": checkpoint, OTHER: checkpoint}
    with pytest.raises(UnknownModel, match="owner/model has no revision 'v9': see https"):
        resolve("owner/model", revision="v9")


@pytest.mark.parametrize("status", [500, 503, 429, 403])
def test_hub_that_does_not_answer(
    online: Hub, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    online.broken = status
    with pytest.raises(UnknownModel, match=r"the hub cannot be reached \(.*Error\): load it once"):
        resolve("owner/model")


def test_hub_that_is_not_there(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnknownModel, match=r"the hub cannot be reached \(ConnectError\)"):
        resolve("owner/model")


def test_repository_without_weights(online: Hub, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "tf_model.h5")
    online.models["owner/model"] = {"main": checkpoint, OTHER: checkpoint}
    with pytest.raises(UnsupportedModel, match=r"has no model\.safetensors .*tf_model\.h5"):
        resolve("owner/model")


def test_repository_of_another_kind(online: Hub, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "blip"}')
    online.models["owner/model"] = {"main": checkpoint, OTHER: checkpoint}
    with pytest.raises(UnsupportedModel, match=r"owner/model: config\.json is a 'blip' model"):
        resolve("owner/model")


def test_full_disk(online: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    online.models["owner/model"] = {"main": checkpoint, OTHER: checkpoint}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(BadInput, match=r"cannot be stored in .*cache: No space left"):
        resolve("owner/model")


def test_what_is_fetched_of_an_artifact() -> None:
    files = ["artifact.json", "encoder.onnx", "decoder.onnx", "config.json"]
    found = hub._needed([*files, "sub/x.onnx", "evil.py"], "x")
    assert sorted(found) == sorted(files)
    shards = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    assert hub._needed([*shards, "pytorch_model.bin", "model.fp16.safetensors"], "x") == shards


# Single files.


def test_file_here_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = Path("owner/model/alex.pth")
    here.parent.mkdir(parents=True)
    here.write_bytes(b"mine")
    assert resolve_file("owner/model/alex.pth").read_bytes() == b"mine"
    with pytest.raises(UnknownModel, match=r"no file other\.pth: give one, or owner/name/file"):
        resolve_file("other.pth")


def test_file_of_the_hub_is_fetched_once(online: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    (folder / "nets").mkdir(parents=True)
    (folder / "nets" / "alex.safetensors").write_bytes(b"weights")
    online.models["owner/model"] = {"main": folder, OTHER: folder}
    name = "owner/model/nets/alex.safetensors"
    assert resolve_file(name).read_bytes() == b"weights"
    online.broken = 503
    assert resolve_file(name).read_bytes() == b"weights"
    with pytest.raises(UnknownModel, match=r"not in the cache .* give a file"):
        resolve_file("owner/model/nets/other.safetensors")


def test_file_or_model_that_the_hub_lacks(online: Hub, checkpoint: Path) -> None:
    online.models["owner/model"] = {"main": checkpoint, OTHER: checkpoint}
    with pytest.raises(UnknownModel, match=r"owner/model has no file alex\.pth on the hub"):
        resolve_file("owner/model/alex.pth")
    with pytest.raises(UnknownModel, match="the hub has no owner/nothing that you may read"):
        resolve_file("owner/nothing/alex.pth")
    for name in ("owner/../alex.pth", "owner/model/../../alex.pth", "owner", ""):
        with pytest.raises(UnknownModel, match="give one, or owner/name/file of the hub"):
            resolve_file(name)


@pytest.mark.parametrize(
    ("failure", "kind", "said"),
    [
        (OSError(errno.ENOSPC, "full"), BadInput, "owner/model cannot be stored in .* Make room"),
        (ConnectionResetError("gone"), UnknownModel, r"cannot be fetched \(ConnectionResetError\)"),
    ],
)
def test_file_that_breaks_off(
    failure: Exception, kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> str:
        raise failure

    monkeypatch.setattr("huggingface_hub.hf_hub_download", broken)
    with pytest.raises(kind, match=said):
        resolve_file("owner/model/alex.pth")


def test_a_part_that_others_fetched_is_not_all(online: Hub, checkpoint: Path) -> None:
    """transformers fetches what it is asked for: tokenizer and weights, say, and no more."""
    (checkpoint / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    online.models["owner/model"] = {"main": checkpoint, OTHER: checkpoint}
    model = resolve("owner/model")
    (model.path / "preprocessor_config.json").unlink()
    assert resolve("owner/model").preprocessing["image_mean"] == [0.1, 0.2, 0.3]


def test_what_a_model_does_not_have_is_not_asked_for_again(online: Hub, checkpoint: Path) -> None:
    (checkpoint / "preprocessor_config.json").unlink(missing_ok=True)
    online.models["owner/model"] = {"main": checkpoint, OTHER: checkpoint}
    model = resolve("owner/model")
    online.asked.clear()
    assert resolve("owner/model") == model and online.asked == []


def test_a_known_model_of_the_other_kind() -> None:
    from diptych.weights.diffusion import resolve_generator

    for name in ("sd-1.5", "default-turbo"):
        with pytest.raises(UnknownModel, match=r"draws pictures: use it with `diptych generate`"):
            resolve(name)
    with pytest.raises(UnknownModel, match=r"writes captions: use it with `diptych caption`"):
        resolve_generator("nlpconnect/vit-gpt2-image-captioning")
