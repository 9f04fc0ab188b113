"""Write a captioner as transformers writes it: the same table backwards, whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.errors import BadInput
from diptych.models.vision_encoder_decoder import VisionEncoderDecoder
from diptych.weights.bounded_json import Rejected, read_object
from diptych.weights.dialects import vision_encoder_decoder as dialect
from diptych.weights.rename import backwards, reshape
from diptych.weights.tensors import ITEM_SIZES, SAFETENSORS_NAMES

__all__ = ["describe_config", "save_captioner"]

_CODES = {name: code for code, name in SAFETENSORS_NAMES.items()}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MAX_TOKENIZER = 64 << 20
# What may lie beside a tokenizer and belongs to it.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def save_captioner(
    module: VisionEncoderDecoder,
    folder: str | Path,
    *,
    preprocessing: Mapping[str, Any],
    generation: Mapping[str, Any],
    tokenizer: Path,
    dtype: str | torch.dtype | None = None,
) -> None:
    """Write `module` and all that goes with it to `folder`, in the layout of transformers.

    `preprocessing` and `generation` are those of a `ModelFolder`; `tokenizer` is its file, and is
    copied with what belongs to it. `dtype` None keeps the module's. A new folder appears whole; in
    one that exists, each file is replaced whole. Raises `BadInput` where it cannot be written.
    """
    folder = Path(folder)
    target = _dtype(dtype)
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    config = describe_config(module)
    documents = {
        "config.json": {**dialect.write_config(config), **_tokens(generation)},
        "generation_config.json": dict(generation),
        "preprocessor_config.json": {"image_processor_type": "ViTImageProcessor", **preprocessing},
    }
    documents["config.json"]["torch_dtype"] = _written_dtype(state, target)
    try:
        with _staged(folder) as staging:
            _write_tensors(staging / "model.safetensors", state, target)
            _copy_tokenizer(Path(tokenizer), staging, generation)
            for name, document in documents.items():
                _write(staging / name, json.dumps(document, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        needed = sum(tensor.nbytes for tensor in state.values()) >> 20
        raise BadInput(
            f"{folder} cannot be written: {error.strerror or error}. About {needed} MB are needed: "
            "make room, or give another folder."
        ) from error


def describe_config(module: VisionEncoderDecoder) -> dict[str, Any]:
    """Return the module's config as a `ModelFolder` holds it."""
    config = dataclasses.asdict(module.config)
    config["encoder"]["stem_channels"] = list(config["encoder"]["stem_channels"])
    return dialect.check_config(config)


def _tokens(generation: Mapping[str, Any]) -> dict[str, Any]:
    # Training with transformers 4 looks for them here.
    words = ("decoder_start_token_id", "eos_token_id", "pad_token_id")
    return {word: generation[word] for word in words if word in generation}


# --- tensors --------------------------------------------------------------------------------------


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in _DTYPES.values():
        raise BadInput(f"dtype is {str(dtype)!r}: give {', '.join(_DTYPES)}.")
    return found


def _written_dtype(state: Mapping[str, Tensor], target: torch.dtype | None) -> str:
    return _name(target or state["decoder.wte.weight"].dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_tensors(path: Path, state: Mapping[str, Tensor], target: torch.dtype | None) -> None:
    """Write a safetensors file tensor by tensor, so that no second copy of all is ever made."""
    files = backwards(dialect, state)
    dtypes = {
        name: target if target and tensor.is_floating_point() else tensor.dtype
        for name, tensor in state.items()
    }
    # The widest numbers first keep all of them aligned.
    order = sorted(state, key=lambda name: (-ITEM_SIZES[_name(dtypes[name])], files[name]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        shape = list(state[name].shape)
        if reshape(dialect, files[name]) == "transpose":
            shape.reverse()
        dtype = _name(dtypes[name])
        end = position + state[name].numel() * ITEM_SIZES[dtype]
        header[files[name]] = {
            "dtype": _CODES[dtype],
            "shape": shape,
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _written(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_bytes(name, state[name], dtypes[name], files[name]))


def _bytes(name: str, tensor: Tensor, dtype: torch.dtype, file: str) -> memoryview:
    tensor = tensor.cpu()
    cast = tensor.to(dtype)
    if cast.dtype != tensor.dtype and bool((tensor.isfinite() & ~cast.isfinite()).any()):
        raise BadInput(f"{name} holds numbers beyond {_name(dtype)}: save it as float32.")
    if reshape(dialect, file) == "transpose":
        cast = cast.t()
    return cast.contiguous().flatten().view(torch.uint8).numpy().data


# --- files ----------------------------------------------------------------------------------------


def _copy_tokenizer(tokenizer: Path, staging: Path, generation: Mapping[str, Any]) -> None:
    beside = [tokenizer.with_name(name) for name in _TOKENIZER_FILES]
    for source in beside:
        if source == tokenizer or source.is_file():
            _write(staging / source.name, source.read_bytes())
    if not (staging / "tokenizer_config.json").exists():
        _write(staging / "tokenizer_config.json", _tokenizer_config(tokenizer, generation))


def _tokenizer_config(tokenizer: Path, generation: Mapping[str, Any]) -> str:
    """Tell transformers which class reads the tokenizer and which token ends a sentence."""
    if tokenizer.name != "tokenizer.json":
        return json.dumps({"tokenizer_class": "GPT2Tokenizer"})
    document: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    try:
        added = read_object(tokenizer, _MAX_TOKENIZER).get("added_tokens") or []
        texts = {token["id"]: token["content"] for token in added}
    except (Rejected, TypeError, KeyError) as error:
        raise BadInput(f"{tokenizer} cannot be used: {error}: give another tokenizer.") from error
    for word in ("bos_token", "eos_token", "pad_token"):
        value = generation.get(f"{word}_id")
        value = value[0] if isinstance(value, list) else value
        if value in texts:
            document[word] = texts[value]
    return json.dumps(document, indent=2)


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, whose files then take their places in `folder` at once."""
    is_new = not folder.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.parent if is_new else folder
    staging = beside / f".{folder.name}.{secrets.token_hex(4)}.partial"
    staging.mkdir()
    try:
        yield staging
        if is_new:
            _sync(staging)
            staging.rename(folder)
        else:
            for path in sorted(staging.iterdir()):
                path.replace(folder / path.name)
            _sync(folder)
            staging.rmdir()
        _sync(folder.parent)
    finally:
        if staging.exists():
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _written(path: Path) -> Iterator[Any]:
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _write(path: Path, content: str | bytes) -> None:
    with _written(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def _sync(folder: Path) -> None:
    # Makes the new names durable. Not every system lets a folder be opened.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
