"""Build the networks of a generator and fill them from its checkpoint, of whatever layout."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from diptych.errors import WeightsMismatch
from diptych.models.clip_text import ClipText, ClipTextConfig
from diptych.models.unet import UNet, UNetConfig
from diptych.models.vae import Vae, VaeConfig
from diptych.weights.adapters import merge_lora
from diptych.weights.dialects.ldm_file import is_dropped
from diptych.weights.files import contents, read_checkpoint
from diptych.weights.generator_files import GeneratorFolder
from diptych.weights.layouts import Component, components, leftover
from diptych.weights.load_module import Reader, Source, as_device, as_dtype, fill, unfilled
from diptych.weights.single_file import read_single_file
from diptych.weights.tensors import FETCH_ANEW, StoredTensor

__all__ = ["build_module", "load_generator"]

logger = logging.getLogger("diptych")


def load_generator(
    model: GeneratorFolder,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    check_finite: bool = False,
    only: Collection[str] | None = None,
) -> dict[str, nn.Module]:
    """Build the networks of `model`, fill them, and return them ready for inference.

    They are `text_encoder`, for SDXL `text_encoder_2`, `unet` and `vae`, or `only` the named ones.
    `dtype` None is the files' own, but float32 on a CPU, where halves are slow. With
    `check_finite`, a tensor that holds NaN or infinity is refused. Raises `WeightsMismatch` unless
    every tensor of the files finds its place and every place its tensor.
    """
    if not model.weights:
        raise WeightsMismatch(
            f"{model.name} has no PyTorch weights ({contents(model.path)}): give a generator with "
            "safetensors, .bin or .ckpt files."
        )
    device = as_device(device)
    sources = _sources(model)
    every = [tensor for source in sources.values() for tensor in source.stored.values()]
    reader = Reader(device, as_dtype(dtype, device, every))
    modules: dict[str, nn.Module] = {}
    for name, source in sources.items():
        if only is not None and name not in only:
            continue
        modules[name] = build_module(name, model.configs[name])
        fill(modules[name], source, reader, check_finite=check_finite)
        modules[name].eval()
    if model.lora is not None:
        # It may be of networks that nobody asked for: they are there without numbers.
        others = {name: build_module(name, model.configs[name]) for name in {*sources} - {*modules}}
        merge_lora({**modules, **others}, model.lora)
    return modules


def build_module(name: str, config: Mapping[str, Any]) -> nn.Module:
    """Build one network of a generator, without numbers, from the fields of its config."""
    with unfilled():
        if name == "unet":
            return UNet(UNetConfig(**config))
        if name == "vae":
            return Vae(VaeConfig(**config))
        return ClipText(ClipTextConfig(**config))


def _sources(model: GeneratorFolder) -> dict[str, Source]:
    if model.layout == "diffusers":
        parts = components(model.layout, model.family, model.configs)
        return {
            part.name: _source(model, part, read_checkpoint(model.weights[part.name]))
            for part in parts
        }
    stored, _ = read_single_file(model.path)
    parts = components(model.layout, model.family, model.configs, stored)
    if unknown := leftover(parts, stored):
        shown = ", ".join(name[:120] for name in unknown[:5]) + (", …" if len(unknown) > 5 else "")
        raise WeightsMismatch(
            f"{model.name}: {len(unknown)} of the tensors in {model.path.name}, read as a single "
            f"file of Stable Diffusion, are unexpected: {shown}. {FETCH_ANEW.capitalize()}."
        )
    if dropped := [name for name in stored if is_dropped(name)]:
        logger.debug("%s: dropped: %s", model.name, ", ".join(dropped)[:400])
    return {part.name: _source(model, part, _below(stored, part.prefix)) for part in parts}


def _source(model: GeneratorFolder, part: Component, stored: Mapping[str, StoredTensor]) -> Source:
    return Source(model.name, part.dialect, model.weights[part.name], stored, part.prefix)


def _below(stored: Mapping[str, StoredTensor], prefix: str) -> dict[str, StoredTensor]:
    return {
        name[len(prefix) :]: tensor
        for name, tensor in stored.items()
        if name.startswith(prefix) and not is_dropped(name)
    }
