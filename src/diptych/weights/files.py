"""Say what is in a folder: a checkpoint, an artifact or both. Reads safely, and without torch.

A checkpoint is `config.json` with tensors beside it, as transformers writes it. An artifact is
`artifact.json` with ONNX files beside it, as `diptych export` writes it. What a file is, its
content says, not its name.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from diptych.errors import UnknownModel, UnsupportedModel, WeightsMismatch
from diptych.weights.bounded_json import Rejected, read_object
from diptych.weights.dialects import vision_encoder_decoder as dialect
from diptych.weights.generation import filter_words, generation_defaults
from diptych.weights.pickles import LEGACY_START, read_pickle
from diptych.weights.tensors import FETCH_ANEW, StoredTensor, read_safetensors

__all__ = [
    "ModelFolder",
    "check_artifact",
    "checkpoint_files",
    "contents",
    "describe",
    "editions_in",
    "is_inside",
    "networks_of",
    "object_in",
    "precision_of",
    "preprocessing_of",
    "read_checkpoint",
    "read_document",
    "read_tensors",
    "shards_of",
    "stated_file",
    "tokenizer_of",
    "verify",
]

_CHECKPOINTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_ARTIFACT_FORMAT, _ARTIFACT_VERSION = "diptych-artifact", 1
_CAPTIONER_NETWORKS = frozenset({"encoder", "decoder"})
_MAX_INDEX = 25_000_000
_MAX_SHARDS = 1000


class Artifact(Protocol):
    """Name what `verify` needs of a model on disk."""

    @property
    def path(self) -> Path: ...
    @property
    def name(self) -> str: ...
    @property
    def networks(self) -> Mapping[str, Path]: ...


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """Describe a captioner on disk: everything but the tensors, checked and in our words."""

    path: Path
    name: str  # what the user asked for
    revision: str | None  # the commit it was fetched from, where it comes from the hub
    config: Mapping[
        str, Any
    ]  # {"encoder": fields of ViTConfig, "decoder": of Gpt2Config, "bridge"}
    preprocessing: Mapping[str, Any]  # the words of a preprocessor_config.json
    generation: Mapping[str, Any]  # only what is set; decoder_start_token_id always
    tokenizer: Path  # tokenizer.json, or vocab.json with merges.txt beside it
    weights: tuple[Path, ...]  # the files of the checkpoint, () if none
    networks: Mapping[str, Path]  # the ONNX files of the artifact by network, {} if none
    precision: str | None  # of the artifact: "fp32", "int8"


def describe(folder: Path, name: str | None = None, revision: str | None = None) -> ModelFolder:
    """Say what is in `folder`; no tensor is read.

    `name` is for messages and stays with the model. Of a folder that holds both, the artifact says
    how pictures and words are treated. Raises `UnknownModel` where there is no model,
    `UnsupportedModel` for one of another kind, `WeightsMismatch` where files are missing.
    """
    folder = Path(folder)
    name = str(folder) if name is None else name
    try:
        _check_folder(folder, name)
        if (folder / "artifact.json").is_file():
            return _describe_artifact(folder, name, revision)
        return _describe_checkpoint(folder, name, revision)
    except OSError as error:
        raise UnknownModel(f"{name} cannot be opened: {error.strerror or error}.") from error
    except (UnsupportedModel, WeightsMismatch) as error:
        raise type(error)(f"{name}: {str(error).rstrip('.')}.") from error


def verify(model: Artifact) -> None:
    """Compare the ONNX files of an artifact with the hashes it states.

    Raises `WeightsMismatch` naming the first file that is another one.
    """
    if not model.networks:
        return
    document = read_document(model.path, "artifact.json")
    stated = {**object_in(document, "networks")}
    for kind, edition in editions_in(document).items():
        own = {**object_in(edition, "networks"), "LoRA": edition.get("lora")}
        stated |= {f"{network} of {kind}": entry for network, entry in own.items()}
    for network, entry in ((name, each) for name in stated for each in _entries(stated[name])):
        path = stated_file(model.path, network, entry)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if not hmac.compare_digest(found, entry["sha256"]):
            raise WeightsMismatch(
                f"{model.name}: {path.name} is not the file that artifact.json describes: its "
                f"sha256 is {found[:12]}…, not {entry['sha256'][:12]}…: "
                "export or fetch the model anew."
            )


def read_checkpoint(paths: Sequence[Path]) -> dict[str, StoredTensor]:
    """Return where the tensors of a checkpoint lie, by name, from one file or its shards.

    Raises `WeightsMismatch` for a damaged file, and for a name that two shards claim.
    """
    found: dict[str, StoredTensor] = {}
    for path in paths:
        for name, stored in read_tensors(path).items():
            if name in found:
                raise WeightsMismatch(
                    f"{name[:80]} is both in {found[name].file.name} and in {path.name}: "
                    f"{FETCH_ANEW}."
                )
            found[name] = stored
    return found


def contents(folder: Path) -> str:
    """List the first names in a folder, for messages."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if not names:
        return "it is empty"
    shown = ", ".join(names[:6])
    return f"it holds {shown}" + (f" and {len(names) - 6} more" if len(names) > 6 else "")


# --- the two kinds --------------------------------------------------------------------------------


def _check_folder(folder: Path, name: str) -> None:
    if folder.is_file():
        raise UnknownModel(f"{name} is a file: give the folder that holds it, {folder.parent}.")
    if not folder.is_dir():
        raise UnknownModel(f"{name} does not exist.")
    if (folder / "artifact.json").is_file() or (folder / "config.json").is_file():
        return
    if (folder / "model_index.json").is_file():
        raise UnsupportedModel("it is a diffusers pipeline, not a captioner")
    raise UnknownModel(
        f"{name} has no config.json or artifact.json ({contents(folder)}): "
        "give the folder of a captioner, one of transformers' or one that diptych exported."
    )


def _describe_checkpoint(folder: Path, name: str, revision: str | None) -> ModelFolder:
    document = read_document(folder, "config.json")
    config = dialect.read_config(document)
    words = read_document(folder, "generation_config.json", missing=None)
    return ModelFolder(
        path=folder,
        name=name,
        revision=revision,
        config=config,
        preprocessing=preprocessing_of(folder, config["encoder"]["image_size"]),
        generation=generation_defaults(document, words, config["decoder"]["vocab_size"]),
        tokenizer=tokenizer_of(folder),
        weights=checkpoint_files(folder),
        networks={},
        precision=None,
    )


def _describe_artifact(folder: Path, name: str, revision: str | None) -> ModelFolder:
    document = read_document(folder, "artifact.json")
    check_artifact(document, "image-to-text")
    config = dialect.check_config(object_in(document, "config"))
    if (folder / "config.json").is_file():
        _check_same(config, dialect.read_config(read_document(folder, "config.json")))
    vocab_size = config["decoder"]["vocab_size"]
    return ModelFolder(
        path=folder,
        name=name,
        revision=revision,
        config=config,
        preprocessing=object_in(document, "preprocessing"),
        generation=filter_words(object_in(document, "generation"), vocab_size),
        tokenizer=tokenizer_of(folder),
        weights=checkpoint_files(folder),
        networks=networks_of(folder, object_in(document, "networks"), _CAPTIONER_NETWORKS),
        precision=precision_of(document.get("precision")),
    )


def check_artifact(document: Mapping[str, Any], task: str) -> None:
    """Raise `UnsupportedModel` unless `document` is an artifact for `task` that we can read."""
    if document.get("format") != _ARTIFACT_FORMAT:
        raise UnsupportedModel(f"artifact.json is not of the format {_ARTIFACT_FORMAT}")
    version = document.get("version")
    if type(version) is not int or version != _ARTIFACT_VERSION:
        writer = str(document.get("diptych_version", "unknown"))[:20]
        raise UnsupportedModel(
            f"artifact.json is of version {str(version)[:20]}, written by diptych {writer}; this "
            f"diptych reads version {_ARTIFACT_VERSION}: upgrade diptych, or export the model anew"
        )
    if (found := document.get("task")) != task:
        raise UnsupportedModel(f"artifact.json is for {str(found)[:40]!r}, not {task}")


def networks_of(
    folder: Path,
    entries: Mapping[str, Any],
    wanted: frozenset[str],
    optional: frozenset[str] = frozenset(),
) -> dict[str, Path]:
    """Return the ONNX files that an artifact states, each there and with a hash."""
    if set(entries) - optional != wanted:
        raise UnsupportedModel(f"artifact.json does not name {' and '.join(sorted(wanted))}")
    found = {}
    for network, entry in sorted(entries.items()):
        paths = [stated_file(folder, network, each) for each in _entries(entry)]
        found[network] = paths[0]
    return found


def _entries(entry: Any) -> list[Any]:
    """Return the entries of a network's graph and, where it lies apart, of its weights."""
    data = entry.get("data") if isinstance(entry, dict) else None
    return [entry] if data is None else [entry, data]


def stated_file(folder: Path, network: str, entry: Any) -> Path:
    """Return a file of a network, there and with a hash to hold it against."""
    file = entry.get("file") if isinstance(entry, dict) else None
    digest = entry.get("sha256") if isinstance(entry, dict) else None
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise UnsupportedModel(f"artifact.json states no sha256 of the {network}")
    part, slash, name = file.rpartition("/") if isinstance(file, str) else ("", "", file)
    # In the folder of a part lie weights that a network shares with the checkpoint.
    place = _beside(folder, part, "artifact.json") if slash else folder
    path = _beside(place, name, "artifact.json")
    if not path.is_file():
        raise WeightsMismatch(f"{path.name} is missing: {FETCH_ANEW}.")
    if not is_inside(path, folder):
        raise UnsupportedModel(f"{path.name} is a link to somewhere outside the folder")
    if entry.get("bytes", found := path.stat().st_size) != found:
        raise WeightsMismatch(
            f"{path.name} has {found} bytes and not {str(entry['bytes'])[:20]}, as artifact.json "
            f"states: {FETCH_ANEW}."
        )
    return path


def _check_same(artifact: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
    for part in ("encoder", "decoder"):
        for word, value in artifact[part].items():
            other = checkpoint[part][word]
            # Neither changes what the network is: one is for training, one may follow the weights.
            if word not in ("dropout", "tie_word_embeddings") and value != other:
                raise UnsupportedModel(
                    f"artifact.json and config.json describe different models: {part} {word} is "
                    f"{value} and {other}: keep one of the two in a folder"
                )


def precision_of(value: Any) -> str:
    """Return the precision that `artifact.json` states."""
    if not isinstance(value, str) or not re.fullmatch(r"[a-z0-9-]{1,16}", value):
        raise UnsupportedModel("artifact.json states no precision")
    return value


# --- the files beside -----------------------------------------------------------------------------


def read_document(
    folder: Path, name: str, missing: Any = UnsupportedModel, *, infinite: bool = False
) -> Any:
    """Return the JSON object in a file of `folder`; with `missing` None, None where it is not.

    `infinite` as in `read_object`.
    """
    path = folder / name
    if missing is None and not path.is_file():
        return None
    try:
        return read_object(path, infinite=infinite)
    except Rejected as error:
        raise UnsupportedModel(f"{name} cannot be used: {error}: {FETCH_ANEW}") from error


def object_in(document: Mapping[str, Any], word: str) -> dict[str, Any]:
    """Return the object that `artifact.json` holds under `word`."""
    value = document.get(word)
    if not isinstance(value, dict):
        raise UnsupportedModel(f"artifact.json has no usable {word!r}")
    return value


def editions_in(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what `artifact.json` says of each edition of the model; {} where it names none."""
    editions = object_in(document, "editions") if "editions" in document else {}
    return {kind: object_in(editions, kind) for kind in editions}


def preprocessing_of(folder: Path, image_size: int) -> dict[str, Any]:
    """Return how the checkpoint in `folder` wants its pictures, else as ViT does."""
    found = read_document(folder, "preprocessor_config.json", missing=None)
    if found is None:
        # Processors of transformers 5 may be saved in one file with their tokenizer.
        together = read_document(folder, "processor_config.json", missing=None) or {}
        found = together.get("image_processor")
    if isinstance(found, dict):
        return found
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": image_size, "width": image_size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def tokenizer_of(folder: Path) -> Path:
    """Return the file of the tokenizer in `folder`; raises `UnsupportedModel` for none."""
    if (path := folder / "tokenizer.json").is_file():
        return path
    if (path := folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return path
    raise UnsupportedModel(
        "no tokenizer: it needs a tokenizer.json, or a vocab.json and a merges.txt "
        f"({contents(folder)})"
    )


def checkpoint_files(folder: Path) -> tuple[Path, ...]:
    """Return the weights in `folder`, safetensors first; () for none."""
    for single, index in _CHECKPOINTS:
        if (folder / single).is_file():
            return (folder / single,)
        if (folder / index).is_file():
            return shards_of(folder, index)
    return ()


def shards_of(folder: Path, index: str) -> tuple[Path, ...]:
    """Return the files that an index names, all of them there."""
    try:
        shards = read_object(folder / index, _MAX_INDEX).get("weight_map")
    except Rejected as error:
        raise WeightsMismatch(f"{index} cannot be used: {error}: {FETCH_ANEW}.") from error
    names = list(shards.values()) if isinstance(shards, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise WeightsMismatch(f"{index} names no files: {FETCH_ANEW}.")
    paths = tuple(_beside(folder, name, index) for name in sorted(set(names)))
    missing = [path.name for path in paths if not path.is_file()]
    if len(paths) > _MAX_SHARDS or missing:
        raise WeightsMismatch(
            f"{len(missing)} of the {len(paths)} files that {index} names are missing, the first "
            f"is {', '.join(missing[:1])}: {FETCH_ANEW}."
        )
    return paths


def _beside(folder: Path, name: Any, where: str) -> Path:
    """Return the path of a file that must lie directly in `folder`."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", name):
        raise UnsupportedModel(f"{where} names the file {str(name)[:80]!r}, not one beside it")
    return folder / name


def is_inside(path: Path, folder: Path) -> bool:
    """Tell a file that really lies in `folder`, or where the Hub's cache keeps what is in it."""
    real, home = path.resolve(), folder.resolve()
    if real.parent in (home, home / path.parent.relative_to(folder)):
        return True
    # The hub's cache keeps the bytes in blobs/, and in snapshots/<commit>/ links to them.
    return home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return where the tensors of one file lie, be it safetensors or of `torch.save`."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise WeightsMismatch(f"{path} cannot be read: {error.strerror or error}.") from error
    if start.startswith((b"PK\x03\x04", LEGACY_START)):
        return read_pickle(path)
    if start[8:9] == b"{":
        return read_safetensors(path)
    raise WeightsMismatch(f"{path} {_what_else(start)}: {FETCH_ANEW}.")


def _what_else(start: bytes) -> str:
    text = start.lstrip()[:40].lower()
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of git-lfs, not the file itself: run `git lfs pull`"
    if not start:
        return "is empty"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page: the download went wrong"
    if start.startswith((b"\x80", b"ustar")) or start[257:262] == b"ustar":
        return "is a pickle, but not one of torch.save, and is not run"
    return "is neither safetensors nor a file of torch.save"
