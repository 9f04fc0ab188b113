"""What a folder holds, told by content; and what is refused, in one clear sentence."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diptych.errors import DiptychError, UnknownModel, UnsupportedModel, WeightsMismatch
from diptych.weights.bounded_json import Rejected, parse_object, read_object
from diptych.weights.files import describe, verify
from diptych.weights.generation import filter_words, generation_defaults

Edit = Callable[[Path, dict[str, Any]], None]


def test_checkpoint(checkpoint: Path) -> None:
    model = describe(checkpoint, name="mine", revision="c0ffee")
    assert (model.path, model.name, model.revision) == (checkpoint, "mine", "c0ffee")
    assert model.config["bridge"] == "cross-attention"
    assert model.config["decoder"]["hidden_size"] == 24
    assert model.tokenizer == checkpoint / "tokenizer.json"
    assert model.weights == (checkpoint / "model.safetensors",)
    assert (model.networks, model.precision) == ({}, None)
    assert model.generation["decoder_start_token_id"] == 5
    side = model.config["encoder"]["image_size"]
    assert model.preprocessing["size"] == {"height": side, "width": side}
    assert model.preprocessing["resample"] == 2
    verify(model)


def test_name_is_the_folder_where_none_is_given(checkpoint: Path) -> None:
    assert describe(checkpoint).name == str(checkpoint)
    assert describe(checkpoint).revision is None


def test_preprocessing_is_what_the_file_says(checkpoint: Path) -> None:
    path = checkpoint / "processor_config.json"
    path.write_text(json.dumps({"image_processor": {"size": 7}}))
    assert describe(checkpoint).preprocessing == {"size": 7}
    (checkpoint / "preprocessor_config.json").write_text(json.dumps({"size": 9, "x": [1]}))
    assert describe(checkpoint).preprocessing == {"size": 9, "x": [1]}


def test_safetensors_come_before_pickles_and_one_file_before_shards(checkpoint: Path) -> None:
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    assert describe(checkpoint).weights == (checkpoint / "model.safetensors",)
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").unlink()
    assert describe(checkpoint).weights == (checkpoint / "pytorch_model.bin",)
    (checkpoint / "pytorch_model.bin").unlink()
    assert describe(checkpoint).weights == ()


# No model, or another.


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"nowhere does not exist\.$"):
        describe(tmp_path / "nowhere")


def test_a_file_is_no_folder(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    with pytest.raises(UnknownModel) as caught:
        describe(path)
    assert str(caught.value) == f"{path} is a file: give the folder that holds it, {checkpoint}."


def test_folder_without_a_model_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"it is empty"):
        describe(tmp_path)
    for number in range(9):
        (tmp_path / f"{number}.txt").touch()
    with pytest.raises(UnknownModel, match=r"holds 0\.txt, 1\.txt, .*5\.txt and 3 more\): give"):
        describe(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="diffusers pipeline"):
        describe(tmp_path)


def test_no_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").rename(checkpoint / "vocab.json")
    with pytest.raises(UnsupportedModel, match=r"no tokenizer: .*vocab\.json and a merges\.txt"):
        describe(checkpoint)


def test_errors_of_the_config_name_the_model(checkpoint: Path, edit: Edit) -> None:
    edit(checkpoint / "config.json", {"encoder.model_type": "swin"})
    with pytest.raises(UnsupportedModel) as caught:
        describe(checkpoint, name="owner/model")
    assert str(caught.value) == (
        "owner/model: its encoder is 'swin'; diptych runs vision-encoder-decoder captioners: "
        "ViT or DeiT with GPT-2."
    )


# Shards.


def index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    document = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))


def test_missing_shard_is_named(checkpoint: Path) -> None:
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}
    (checkpoint / "model-1.safetensors").touch()
    index(checkpoint, names)
    with pytest.raises(WeightsMismatch, match=r"1 of the 2 files .* is model-2\.safetensors"):
        describe(checkpoint)
    (checkpoint / "model-2.safetensors").touch()
    found = describe(checkpoint).weights
    assert [path.name for path in found] == ["model-1.safetensors", "model-2.safetensors"]


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        "",
        "a\\b",
        "C:x",
        "a\0b",
        "a\nb",
        ".hidden",
        "x" * 999,
    ],
)
def test_shards_elsewhere_are_refused(checkpoint: Path, name: str) -> None:
    index(checkpoint, {"a": name})
    with pytest.raises(UnsupportedModel, match=r"names the file .* not one beside it"):
        describe(checkpoint)


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 1}, {"a": None}, "x"])
def test_index_that_is_none(checkpoint: Path, weight_map: Any) -> None:
    index(checkpoint, weight_map)
    with pytest.raises(WeightsMismatch, match="names no files"):
        describe(checkpoint)


# Artifacts.


@pytest.fixture
def artifact(tmp_path: Path, checkpoint: Path) -> Path:
    """Return a folder as the export writes it, with other bytes for graphs."""
    model = describe(checkpoint)
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    networks = {}
    for network in ("encoder", "decoder"):
        data = network.encode()
        (folder / f"{network}.onnx").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        networks[network] = {"file": f"{network}.onnx", "sha256": digest}
    document = {
        "format": "diptych-artifact",
        "version": 1,
        "task": "image-to-text",
        "precision": "int8",
        "networks": networks,
        "config": dict(model.config),
        "preprocessing": dict(model.preprocessing),
        "generation": {**model.generation, "num_beams": 4},
        "source": {"name": "x", "revision": None},
        "diptych_version": "0.1.0",
    }
    (folder / "artifact.json").write_text(json.dumps(document))
    return folder


def test_artifact(artifact: Path, checkpoint: Path) -> None:
    model = describe(artifact)
    assert model.config == describe(checkpoint).config
    assert model.networks == {n: artifact / f"{n}.onnx" for n in ("encoder", "decoder")}
    assert (model.precision, model.weights) == ("int8", ())
    assert model.generation["num_beams"] == 4
    verify(model)


def test_folder_of_both(artifact: Path, checkpoint: Path, edit: Edit) -> None:
    for name in ("config.json", "model.safetensors"):
        (artifact / name).write_bytes((checkpoint / name).read_bytes())
    edit(
        artifact / "config.json", {"decoder.resid_pdrop": 0.3, "decoder.tie_word_embeddings": False}
    )
    model = describe(artifact)
    assert model.weights == (artifact / "model.safetensors",)
    assert model.networks
    assert model.generation["num_beams"] == 4
    edit(artifact / "config.json", {"decoder.vocab_size": 98})
    with pytest.raises(UnsupportedModel, match=r"decoder vocab_size is \d+ and 98"):
        describe(artifact)


def test_changed_weights_of_a_graph_are_found(artifact: Path, edit: Edit) -> None:
    data = artifact / "decoder.onnx.data"
    data.write_bytes(b"numbers")
    digest = hashlib.sha256(b"numbers").hexdigest()
    entry = {"file": data.name, "sha256": digest}
    edit(artifact / "artifact.json", {"networks.decoder.data": entry})
    verify(describe(artifact))
    data.write_bytes(b"others")
    with pytest.raises(WeightsMismatch, match=r"decoder\.onnx\.data is not the file"):
        verify(describe(artifact))
    data.unlink()
    with pytest.raises(WeightsMismatch, match=r"decoder\.onnx\.data is missing"):
        describe(artifact)


def test_changed_graph_is_found(artifact: Path) -> None:
    (artifact / "decoder.onnx").write_bytes(b"evil")
    model = describe(artifact)
    with pytest.raises(WeightsMismatch, match=r"decoder\.onnx is not the file that artifact\.json"):
        verify(model)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"format": "onnx"}, UnsupportedModel, "not of the format diptych-artifact"),
        (
            {"version": 2, "diptych_version": "9.1"},
            UnsupportedModel,
            "diptych 9.1; this diptych",
        ),
        ({"version": True}, UnsupportedModel, "is of version True"),
        ({"task": "text-to-image"}, UnsupportedModel, "is for 'text-to-image'"),
        ({"networks": {}}, UnsupportedModel, "does not name decoder and encoder"),
        ({"networks": None}, UnsupportedModel, "no usable 'networks'"),
        ({"networks.vae": {}}, UnsupportedModel, "does not name decoder and encoder"),
        ({"networks.encoder": "encoder.onnx"}, UnsupportedModel, "no sha256 of the encoder"),
        ({"networks.encoder.sha256": "0" * 63}, UnsupportedModel, "no sha256 of the encoder"),
        ({"networks.encoder.file": "../encoder.onnx"}, UnsupportedModel, "not one beside it"),
        ({"networks.encoder.file": ["x"]}, UnsupportedModel, "not one beside it"),
        ({"networks.encoder.file": "gone.onnx"}, WeightsMismatch, "gone.onnx is missing"),
        ({"precision": None}, UnsupportedModel, "no precision"),
        ({"config": []}, UnsupportedModel, "no usable 'config'"),
        ({"config.bridge": "x"}, UnsupportedModel, "bridge is 'x'"),
        ({"config.decoder.vocab_size": "9"}, UnsupportedModel, "vocab_size is '9'"),
        ({"preprocessing": 1}, UnsupportedModel, "no usable 'preprocessing'"),
        ({"generation": {}}, UnsupportedModel, "decoder_start_token_id is None"),
    ],
)
def test_other_artifacts_are_refused(
    artifact: Path, edit: Edit, changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    edit(artifact / "artifact.json", changes)
    with pytest.raises(error) as caught:
        describe(artifact, name="mine")
    assert text in str(caught.value)
    assert str(caught.value).startswith("mine: ")


def test_links_out_of_the_folder_are_refused(artifact: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    (artifact / "encoder.onnx").rename(outside)
    (artifact / "encoder.onnx").symlink_to(outside)
    with pytest.raises(UnsupportedModel, match="link to somewhere outside"):
        describe(artifact)


def test_links_of_the_hubs_cache_are_followed(artifact: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in artifact.iterdir():
        (blobs / path.name.upper()).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name.upper())
    model = describe(snapshot)
    verify(model)
    (blobs / "OUT").symlink_to(artifact / "encoder.onnx")
    (snapshot / "encoder.onnx").unlink()
    (snapshot / "encoder.onnx").symlink_to("../../blobs/OUT")
    with pytest.raises(UnsupportedModel, match="link to somewhere outside"):
        describe(snapshot)


# JSON of strangers.

HOSTILE = {
    "no JSON": (b"{'a': 1}", "not JSON: line 1"),
    "nothing": (b"", "not JSON: line 1"),
    "a list": (b"[]", "holds no JSON object"),
    "a number": (b"3", "holds no JSON object"),
    "no UTF-8": (b'{"a": "\xff"}', "not UTF-8 text: byte 7"),
    "a BOM": (b"\xef\xbb\xbf{}", "not JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "NaN": (b'{"a": NaN}', "NaN is out of range"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is out of range"),
    "overflow": (b'{"a": 1e999}', "1e999 is out of range"),
    "a long number": (b'{"a": ' + b"9" * 10**6 + b"}", "the number 99999999999999999999 is out"),
    "a large number": (b'{"a": 9007199254740993}', "9007199254740993 is out of range"),
    "twice": (b'{"a": 1, "b": 2, "a": 3}', "says 'a' twice"),
    "deep lists": (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested more than 20"),
    "deep objects": (b'{"a":' * 900 + b"1" + b"}" * 900, "nested more than 20"),
    "a little deep": (b'{"a":' * 21 + b"1" + b"}" * 21, "nested more than 20"),
    "large": (b'{"a": "' + b"x" * (5 << 20) + b'"}', "more than 4194304"),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "artifact.json"])
def test_hostile_json_is_told(checkpoint: Path, kind: str, name: str) -> None:
    data, reason = HOSTILE[kind]
    (checkpoint / name).write_bytes(data)
    with pytest.raises(UnsupportedModel) as caught:
        describe(checkpoint, name="mine")
    text = str(caught.value)
    assert text.startswith(f"mine: {name} cannot be used: it ") or "the number" in text
    assert reason in text
    assert text.endswith(": fetch or save the model anew.")
    assert len(text) < 300


def test_json_within_bounds_is_read() -> None:
    text = b'{"a":' * 18 + b'{"b": [-9007199254740992, 1e308, "\\u0000", null]}' + b"}" * 18
    assert parse_object(text)


def test_json_is_a_regular_file(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(Rejected, match="not a regular file"):
            read_object(path)
    with pytest.raises(Rejected, match="cannot be opened: No such file"):
        read_object(tmp_path / "x")


def test_no_value_of_an_artifact_brings_another_error(artifact: Path) -> None:
    path = artifact / "artifact.json"
    whole = json.loads(path.read_text())
    odd = [None, True, -1, 1e300, "", "x", [], {}, [[]], {"a": {}}]
    for word in whole:
        for value in odd:
            path.write_text(json.dumps({**whole, word: value}))
            try:
                describe(artifact)
            except DiptychError:
                continue
            assert word in ("source", "diptych_version", "precision", "preprocessing")


# Generation.


def config(top: dict[str, Any] | None = None, **decoder: Any) -> dict[str, Any]:
    return {"decoder": {"bos_token_id": 5, **decoder}, **(top or {})}


@pytest.mark.parametrize(
    ("document", "words", "expected"),
    [
        (config(), None, {"bos_token_id": 5, "decoder_start_token_id": 5}),
        (
            config({"decoder_start_token_id": 3, "max_length": 20, "task_specific_params": {}}),
            None,
            {"bos_token_id": 5, "decoder_start_token_id": 3, "max_length": 20},
        ),
        (
            config({"num_beams": None}, num_beams=4, max_length=9, eos_token_id=1),
            None,
            {
                "bos_token_id": 5,
                "decoder_start_token_id": 5,
                "eos_token_id": 1,
                "max_length": 9,
                "num_beams": 4,
            },
        ),
        (
            config({"num_beams": 2, "max_length": 30, "pad_token_id": 2}, num_beams=4),
            {"max_length": 16, "bos_token_id": None, "eos_token_id": [1, 2], "use_cache": True},
            {
                "bos_token_id": 5,
                "decoder_start_token_id": 5,
                "eos_token_id": [1, 2],
                "max_length": 16,
                "pad_token_id": 2,
            },
        ),
        # As transformers 5 begins: with the first token that the generation config names.
        (
            config({"bos_token_id": 3}, decoder_start_token_id=7, eos_token_id=1),
            {"bos_token_id": 4},
            {"bos_token_id": 4, "decoder_start_token_id": 4, "eos_token_id": 1},
        ),
    ],
)
def test_generation_defaults(
    document: dict[str, Any], words: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    assert generation_defaults(document, words, 10) == expected


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({}, "decoder_start_token_id is None, not one of the 10 tokens"),
        ({"decoder_start_token_id": 10}, "decoder_start_token_id is 10, not one of the 10"),
        ({"decoder_start_token_id": -1}, "decoder_start_token_id is -1"),
        ({"decoder_start_token_id": "a"}, "decoder_start_token_id is 'a', not a token id"),
        ({"decoder_start_token_id": [1]}, "decoder_start_token_id is '[1]', not one token id"),
        ({"decoder_start_token_id": 1, "eos_token_id": []}, "eos_token_id is '[]'"),
        ({"decoder_start_token_id": 1, "eos_token_id": [1.0]}, "eos_token_id is '[1.0]'"),
        ({"decoder_start_token_id": 1, "pad_token_id": True}, "pad_token_id is 'True'"),
    ],
)
def test_token_ids_that_are_none(words: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        filter_words(words, 10)
    assert text in str(caught.value)


@pytest.mark.parametrize("with_file", [True, False])
def test_generation_is_what_transformers_takes(
    checkpoint: Path, edit: Edit, transformers: Any, with_file: bool
) -> None:
    """The words of a config count only where there is no generation config."""
    edit(
        checkpoint / "config.json",
        {"num_beams": 3, "max_length": 18, "decoder.max_length": 11, "decoder.length_penalty": 2.0},
    )
    path = checkpoint / "generation_config.json"
    if with_file:
        edit(path, {"max_length": 16, "no_repeat_ngram_size": 2, "eos_token_id": [5, 6]})
    else:
        path.unlink()
    theirs = transformers.VisionEncoderDecoderModel.from_pretrained(checkpoint).generation_config
    found = describe(checkpoint).generation
    for word, value in found.items():
        assert getattr(theirs, word) == value, word
    for word in ("num_beams", "max_length", "length_penalty", "no_repeat_ngram_size"):
        assert found.get(word) == getattr(theirs, word), word


# The torch line.


def test_looking_into_a_folder_needs_no_torch_and_little_time(checkpoint: Path) -> None:
    script = f"""
import sys
for name in ("torch", "numpy", "huggingface_hub", "safetensors", "transformers"):
    sys.modules[name] = None
from diptych.weights.files import describe, read_checkpoint
from diptych.weights.catalog import available_models
from diptych.weights.hub import resolve
model = resolve({str(checkpoint)!r})
assert len(read_checkpoint(model.weights)) > 20
available_models()
print(model.config["bridge"])
"""
    path = Path(__file__).resolve().parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(path), "HF_HOME": str(checkpoint)},
    )
    assert done.stdout == "cross-attention\n"
