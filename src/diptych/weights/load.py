"""Build a network and fill it from a checkpoint: strictly, and with every number read once."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch

from diptych.errors import WeightsMismatch
from diptych.models.gpt2 import Gpt2Config
from diptych.models.vision_encoder_decoder import VisionEncoderDecoder, VisionEncoderDecoderConfig
from diptych.models.vit import ViTConfig
from diptych.weights.dialects import vision_encoder_decoder as dialect
from diptych.weights.files import ModelFolder, contents, read_checkpoint
from diptych.weights.load_module import (
    Place,
    Reader,
    Source,
    as_device,
    as_dtype,
    fill,
    unfilled,
)
from diptych.weights.tensors import StoredTensor

__all__ = ["build_config", "load_captioner"]

logger = logging.getLogger("diptych")


def load_captioner(
    model: ModelFolder,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    check_finite: bool = False,
) -> VisionEncoderDecoder:
    """Build the captioner of `model`, fill it, and return it ready for inference.

    `dtype` None is the file's own, but float32 on a CPU, where halves are slow. With
    `check_finite`, a tensor that holds NaN or infinity is refused. Raises `WeightsMismatch` unless
    every tensor of the file finds its place and every place its tensor.
    """
    if not model.weights:
        raise WeightsMismatch(
            f"{model.name} has no model.safetensors or pytorch_model.bin "
            f"({contents(model.path)}): give a captioner with PyTorch weights."
        )
    device = as_device(device)
    stored = read_checkpoint(model.weights)
    config, stored = _settle_head(build_config(model.config), stored, model)
    with unfilled():
        module = VisionEncoderDecoder(config)
    reader = Reader(device, as_dtype(dtype, device, stored.values()))
    source = Source(model.name, dialect, model.weights, stored)
    fill(module, source, reader, check_finite=check_finite)
    return module.eval()


def build_config(config: Mapping[str, Any]) -> VisionEncoderDecoderConfig:
    """Turn the config of a `ModelFolder` into the one the networks take."""
    encoder = dict(config["encoder"])
    encoder["stem_channels"] = tuple(encoder["stem_channels"])
    return VisionEncoderDecoderConfig(
        ViTConfig(**encoder), Gpt2Config(**config["decoder"]), config["bridge"]
    )


# --- the head, which is often the word embeddings once more ---------------------------------------


def _settle_head(
    config: VisionEncoderDecoderConfig, stored: dict[str, StoredTensor], model: ModelFolder
) -> tuple[VisionEncoderDecoderConfig, dict[str, StoredTensor]]:
    """Decide whether the head is a matrix of its own, and drop it from `stored` where it is not."""
    head, words = (_spelled(stored, name) for name in dialect.TIED)
    if not config.decoder.tie_word_embeddings or head is None:
        return config, stored
    rest = {name: tensor for name, tensor in stored.items() if name != head}
    if words is None:
        # Some writers keep the head's name for the one matrix.
        return config, {**rest, head.replace(*dialect.TIED): stored[head]}
    if _are_equal(stored[head], stored[words]):
        return config, rest
    logger.warning(
        "%s: its config ties the head to the word embeddings, but the two differ: kept apart",
        model.name,
    )
    decoder = dataclasses.replace(config.decoder, tie_word_embeddings=False)
    return dataclasses.replace(config, decoder=decoder), stored


def _spelled(stored: Mapping[str, StoredTensor], name: str) -> str | None:
    """Return `name` as the file spells it: whoever wrapped the module put a prefix before it."""
    found = [spelling for spelling in stored if f".{spelling}".endswith(f".{name}")]
    return found[0] if len(found) == 1 else None


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.file, one.offset, one.shape, one.strides) == (
        other.file,
        other.offset,
        other.shape,
        other.strides,
    ):
        return one.dtype == other.dtype
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    reader = Reader(torch.device("cpu"), getattr(torch, one.dtype))
    name = dialect.TIED[0]
    place = Place(dialect, name, name, torch.empty(one.shape, device="meta"))
    found = reader.read({"one": (one, place), "other": (other, place)})
    return torch.equal(found["one"], found["other"])
