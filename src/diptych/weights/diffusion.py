"""Find and describe a generator: by name, folder or file."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

from diptych.errors import UnsupportedModel
from diptych.weights import catalog
from diptych.weights.generator_files import (
    FAMILIES,
    GeneratorFolder,
    TokenizerFiles,
    describe_generator,
    weight_names,
)
from diptych.weights.hub import Kind, resolve_kind
from diptych.weights.tokenizer_files import copy_tokenizer

__all__ = [
    "FAMILIES",
    "GeneratorFolder",
    "TokenizerFiles",
    "copy_tokenizer",
    "describe_generator",
    "resolve_generator",
]

_BESIDE = re.compile(
    r"README\.md|model_index\.json|artifact\.json"
    r"|(unet|vae|text_encoder(_2)?)/config\.json|scheduler/scheduler_config\.json"
    r"|tokenizer(_2)?/(vocab\.json|merges\.txt|tokenizer\.json|tokenizer_config\.json"
    r"|special_tokens_map\.json|added_tokens\.json)"
)
_NETWORKS = re.compile(r"[A-Za-z0-9_-]+\.onnx(\.data)?")
_LORA = re.compile(r"[A-Za-z0-9_-]+\.safetensors")  # of an edition, beside its artifact.json
_PARTS = ("text_encoder", "text_encoder_2", "unet", "vae")


def resolve_generator(
    name_or_path: str | os.PathLike[str],
    revision: str | None = None,
    progress: bool = False,
    *,
    prediction_type: str | None = None,
    variant: str | None = None,
) -> GeneratorFolder:
    """Return the generator that a name or path means, fetched if need be.

    `default` is the embedded model and `default-turbo` its edition for few steps, then come
    folders and single files, aliases of the catalog, and ids of the hub (`owner/name`), of which
    the diffusers layout is fetched: `variant` "fp16" takes the smaller files where the repository
    has them. `revision` and errors are those of `hub.resolve`, `prediction_type` that of
    `describe_generator`.
    """
    kind = Kind(
        catalog.PICTURES,
        partial(describe_generator, prediction_type=prediction_type, variant=variant),
        partial(_needed, variant=variant),
        "a folder, a single file",
    )
    if os.fspath(name_or_path) == catalog.TURBO:
        return resolve_kind(kind, catalog.DEFAULT, revision).edition("turbo", catalog.TURBO)
    model = resolve_kind(kind, name_or_path, revision, progress=progress)
    known = catalog.known_model(os.fspath(name_or_path), catalog.PICTURES)
    if known is None or Path(name_or_path).exists():
        return model
    return dataclasses.replace(model, defaults={**model.defaults, **known.defaults})


def _needed(files: Sequence[str], name: str, *, variant: str | None) -> list[str]:
    """Choose what to fetch: no code, no safety checker, no other framework's weights."""
    needed = [file for file in files if _BESIDE.fullmatch(file)]
    if "artifact.json" in needed:
        needed += [file for file in files if _NETWORKS.fullmatch(file) or _LORA.fullmatch(file)]
    for part in _PARTS:
        beside = _below(files, part)
        chosen = weight_names(beside, part, variant)
        needed += [f"{part}/{file}" for file in (*chosen, *_shards(beside, chosen))]
    if "artifact.json" not in needed and not any(file.startswith("unet/") for file in needed):
        shown = ", ".join(sorted(files)[:8])
        raise UnsupportedModel(
            f"{name} is no diffusers pipeline with a UNet (it has {shown}): give a generator in "
            "the diffusers layout, or fetch its single file and give its path."
        )
    return needed


def _below(files: Sequence[str], part: str) -> list[str]:
    start = f"{part}/"
    return [file[len(start) :] for file in files if file.startswith(start) and file.count("/") == 1]


def _shards(files: Collection[str], chosen: Sequence[str]) -> list[str]:
    """Return the files that an index stands for, whose content is not here yet."""
    if not chosen or not chosen[0].endswith(".json"):
        return []
    stem, _, rest = chosen[0].partition(".")
    words = set(rest.split(".")) - {"json", "index"}  # ending, and variant if any
    pattern = re.compile(re.escape(stem) + r"[A-Za-z0-9_.]*-\d{5}-of-\d{5}(\.[a-z0-9_]+)+")
    return [
        file
        for file in files
        if pattern.fullmatch(file)
        and set(re.sub(r"-\d{5}-of-\d{5}", "", file).split(".")) - {stem} == words
    ]
