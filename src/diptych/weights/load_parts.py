"""Begin a captioner with a ViT and a GPT-2 that were published apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diptych.errors import UnknownModel, UnsupportedModel, WeightsMismatch
from diptych.inputs import at_home, is_folder
from diptych.models.gpt2 import Gpt2
from diptych.models.vision_encoder_decoder import VisionEncoderDecoder
from diptych.models.vit import ViT
from diptych.weights.dialects import vision_encoder_decoder as dialect
from diptych.weights.files import (
    ModelFolder,
    checkpoint_files,
    contents,
    preprocessing_of,
    read_checkpoint,
    read_document,
    tokenizer_of,
)
from diptych.weights.generation import filter_words
from diptych.weights.load import build_config
from diptych.weights.load_module import Reader, Source, as_device, fill, unfilled
from diptych.weights.tensors import StoredTensor

__all__ = ["load_parts"]

_STD = 0.02  # of new matrices, as GPT-2 draws its own (Radford et al. 2019)
_LONGEST = 64  # tokens of a caption, start token included
# What may stand before the names of a network alone, and what a head for another task adds.
_WRAPPERS = {"encoder": ("vit.", "deit."), "decoder": ("transformer.",)}
_HEADS = {"encoder": ("classifier.", "pooler.", "cls_classifier.", "distillation_classifier."),
          "decoder": ("lm_head.", "score.")}  # fmt: skip
_PREFIXES = {"encoder": "encoder.", "decoder": "decoder.transformer."}
_KINDS = {"encoder": ("vit", "deit"), "decoder": ("gpt2",)}


class _Parts(nn.Module):
    """Hold both networks under the names that the dialect knows, with nothing between them."""

    def __init__(self, encoder: ViT, decoder: Gpt2) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder


def load_parts(
    encoder: str | Path,
    decoder: str | Path,
    *,
    bridge: str = "cross-attention",
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[VisionEncoderDecoder, ModelFolder]:
    """Join a ViT and a GPT-2, folders or ids of the hub, by a `bridge` that is new.

    Returns the captioner in float32 and what goes with it: the pictures' treatment comes from the
    encoder, the words from the decoder. What is new is drawn from `seed`. Raises `UnknownModel`,
    `UnsupportedModel` or `WeightsMismatch`.
    """
    folders = {"encoder": _folder(encoder), "decoder": _folder(decoder)}
    documents = {part: _document(folder, part) for part, folder in folders.items()}
    config = dialect.read_config({"model_type": dialect.NAME, **documents, "bridge": bridge})
    # The head of a GPT-2 is its word embeddings, said or not.
    config["decoder"]["tie_word_embeddings"] = True
    built = build_config(config)
    device = as_device(device)
    stored: dict[str, StoredTensor] = {}
    files: list[Path] = []
    for part, folder in folders.items():
        found = checkpoint_files(folder)
        if not found:
            raise WeightsMismatch(
                f"{folder} has no model.safetensors or pytorch_model.bin ({contents(folder)})"
            )
        files += found
        stored |= _renamed(read_checkpoint(found), part)
    with unfilled():
        plain = dataclasses.replace(built.decoder, add_cross_attention=False)
        parts = _Parts(ViT(built.encoder), Gpt2(plain))
    name = f"{encoder} + {decoder}"
    reader = Reader(device, torch.float32)
    fill(parts, Source(name, dialect, tuple(files), stored), reader, check_finite=True)
    module = VisionEncoderDecoder(built)
    _draw(module, seed)
    module.to(device)
    lost = module.load_state_dict(parts.state_dict(), strict=False, assign=True)
    assert not lost.unexpected_keys, lost
    return module.eval(), _described(folders, config, documents["decoder"], name, tuple(files))


def _folder(name: str | Path) -> Path:
    path = at_home(name)
    if is_folder(path):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "model*.safetensors", "merges.txt"]
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=wanted))
        if not checkpoint_files(folder):
            folder = Path(
                snapshot_download(str(name), allow_patterns=[*wanted, "pytorch_model*.bin"])
            )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UnknownModel(
            f"{str(name)!r} is no folder here, and cannot be fetched from the hub "
            f"({type(error).__name__}): give a folder, or an id such as gpt2"
        ) from error
    return folder


def _document(folder: Path, part: str) -> dict[str, Any]:
    document = read_document(folder, "config.json")
    kind = document.get("model_type")
    if kind not in _KINDS[part]:
        wanted = "a ViT" if part == "encoder" else "a GPT-2"
        raise UnsupportedModel(f"{folder}: is a {str(kind)[:60]!r} model; the {part} is {wanted}")
    return dict(document)


def _renamed(stored: Mapping[str, StoredTensor], part: str) -> dict[str, StoredTensor]:
    """Give the tensors of a network alone the names they have in a captioner."""
    found = {}
    for name, tensor in stored.items():
        for wrapper in _WRAPPERS[part]:
            name = name.removeprefix(wrapper)
        if not name.startswith(_HEADS[part]):
            found[f"{_PREFIXES[part]}{name}"] = tensor
    return found


@torch.no_grad()
def _draw(module: VisionEncoderDecoder, seed: int) -> None:
    """Draw what no file gives: the bridge, and the decoder's layers that look at the picture."""
    generator = torch.Generator().manual_seed(seed)
    depth = 2 * module.config.decoder.num_hidden_layers
    for name, parameter in module.named_parameters():
        if not (name.startswith("bridge.") or "cross" in name):
            continue
        if parameter.ndim > 1:
            # What is added to the stream of words begins small, so that GPT-2 still speaks.
            std = _STD / math.sqrt(depth) if "c_proj" in name else _STD
            parameter.normal_(std=std, generator=generator)
        elif name.endswith("bias"):
            parameter.zero_()


def _described(
    folders: Mapping[str, Path],
    config: Mapping[str, Any],
    decoder: Mapping[str, Any],
    name: str,
    weights: tuple[Path, ...],
) -> ModelFolder:
    vocab_size = config["decoder"]["vocab_size"]
    end = decoder.get("eos_token_id")
    end = vocab_size - 1 if end is None else end
    start = decoder.get("bos_token_id")
    words = {
        "decoder_start_token_id": end if start is None else start,
        "eos_token_id": end,
        "pad_token_id": end,
        "max_length": _LONGEST,
    }
    return ModelFolder(
        path=folders["encoder"],
        name=name,
        revision=None,
        config=config,
        preprocessing=preprocessing_of(folders["encoder"], config["encoder"]["image_size"]),
        generation=filter_words(words, vocab_size),
        tokenizer=tokenizer_of(folders["decoder"]),
        weights=weights,
        networks={},
        precision=None,
    )
