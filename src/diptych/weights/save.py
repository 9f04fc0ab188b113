"""Write a captioner as transformers writes it: the same table backwards, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.errors import BadInput
from diptych.models.vision_encoder_decoder import VisionEncoderDecoder
from diptych.weights.bounded_json import Rejected, read_object
from diptych.weights.dialects import vision_encoder_decoder as dialect
from diptych.weights.save_module import (
    Written,
    as_target,
    dtype_name,
    forget_artifact,
    staged,
    write_file,
    write_tensors,
)

__all__ = ["describe_config", "save_captioner"]

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
    target = as_target(dtype)
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    config = describe_config(module)
    documents = {
        "config.json": {**dialect.write_config(config), **_tokens(generation)},
        "generation_config.json": dict(generation),
        "preprocessor_config.json": {"image_processor_type": "ViTImageProcessor", **preprocessing},
    }
    documents["config.json"]["torch_dtype"] = _written_dtype(state, target)
    try:
        with staged(folder) as staging:
            write_tensors(staging / "model.safetensors", [Written(dialect, state)], target)
            _copy_tokenizer(Path(tokenizer), staging, generation)
            for name, document in documents.items():
                write_file(staging / name, json.dumps(document, indent=2, sort_keys=True) + "\n")
            forget_artifact(folder)
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


def _written_dtype(state: Mapping[str, Tensor], target: torch.dtype | None) -> str:
    return dtype_name(target or state["decoder.wte.weight"].dtype)


# --- files ----------------------------------------------------------------------------------------


def _copy_tokenizer(tokenizer: Path, staging: Path, generation: Mapping[str, Any]) -> None:
    beside = [tokenizer.with_name(name) for name in _TOKENIZER_FILES]
    for source in beside:
        if source == tokenizer or source.is_file():
            write_file(staging / source.name, source.read_bytes())
    if not (staging / "tokenizer_config.json").exists():
        write_file(staging / "tokenizer_config.json", _tokenizer_config(tokenizer, generation))


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
