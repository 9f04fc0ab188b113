"""Speak the files of low-rank updates: kohya's, PEFT's, and those that diffusers once wrote.

A file names layers, by paths of one of several networks, and stores two matrices for each. The
names are not taken apart but looked up: every way in which the layers of the networks at hand can
be spelled is listed first. That also tells underscores in a name from those between names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diptych.weights.dialects.ldm_unet import ldm_unet
from diptych.weights.rename import backwards

__all__ = ["UNSUPPORTED", "Found", "Place", "Unplaced", "find_places"]

Place = tuple[str, str]  # network, path of a layer in it

# Tensors of one layer, by how their names end.
_ENDINGS = {
    "down": (
        ".lora_down.weight",
        ".lora_A.weight",
        ".lora_A.default.weight",
        ".lora.down.weight",
        ".lora_linear_layer.down.weight",
        "_lora.down.weight",
    ),
    "up": (
        ".lora_up.weight",
        ".lora_B.weight",
        ".lora_B.default.weight",
        ".lora.up.weight",
        ".lora_linear_layer.up.weight",
        "_lora.up.weight",
    ),
    "alpha": (".alpha", ".lora_down.weight.alpha", ".lora_linear_layer.down.weight.alpha"),
}
# What other methods store; no two-matrix update says the same.
UNSUPPORTED = {
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lora_mid.weight": "Tucker-decomposed LoCon",
    ".hada_w1_a": "LoHa",
    ".lokr_w1": "LoKr",
    ".oft_blocks": "OFT",
    ".diff": "full differences",
}
_KOHYA = {
    "unet": ("lora_unet",),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
}
# `base_model.model` is PEFT's own; a file of one network alone has no word before the path.
_DOTTED = ("{network}.", "base_model.model.{network}.", "base_model.model.", "")


@dataclass(slots=True)
class Found:
    """Hold the names in the file of what one layer gets."""

    down: str = ""
    up: str = ""
    alpha: str = ""


class Unplaced(Exception):
    """Carry the names of tensors that belong to no layer."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


def find_places(
    names: Iterable[str],
    layers: Mapping[str, Iterable[str]],
    unet_config: Mapping[str, Any] | None = None,
) -> dict[Place, Found]:
    """Say for each layer that `names` speak of which of them are its matrices.

    `layers` lists the paths of each network; `unet_config`, the fields of `UNetConfig`, lets the
    numbered blocks of ldm be read too. Raises `Unplaced` for names that lead nowhere.
    """
    spelled, numbered = _spellings(layers, unet_config)
    names = list(names)
    found: dict[Place, Found] = {}
    lost = []
    # Some files say everything twice. The numbered blocks of ldm come second then, as in diffusers.
    second = {name for name in names if any(base in numbered for _, base in _bases(name))}
    for name in sorted(names, key=second.__contains__):
        place = None
        for role, base in _bases(name):
            place = spelled.get(base)
            if place is not None and not getattr(found.get(place), role, ""):
                setattr(found.setdefault(place, Found()), role, name)
                break
            if place is not None and name in second and getattr(found[place], role) not in second:
                break
        else:
            lost.append(name)
    lost += [each.down or each.up or each.alpha for each in found.values() if not _whole(each)]
    if lost:
        raise Unplaced(lost)
    return found


def _whole(found: Found) -> bool:
    return bool(found.down and found.up)


def _bases(name: str) -> Iterator[tuple[str, str]]:
    """Yield what `name` may be of which layer, the longest ending first."""
    fitting = [
        (role, ending)
        for role, endings in _ENDINGS.items()
        for ending in endings
        if name.endswith(ending)
    ]
    for role, ending in sorted(fitting, key=lambda each: -len(each[1])):
        yield role, name.removesuffix(ending)


def _spellings(
    layers: Mapping[str, Iterable[str]], unet_config: Mapping[str, Any] | None
) -> tuple[dict[str, Place], set[str]]:
    """Return the place that each spelling of a layer means; the first network wins.

    The set holds those spellings that number the blocks as ldm does.
    """
    spelled: dict[str, Place] = {}
    numbered: set[str] = set()
    for network, paths in layers.items():
        paths = list(paths)
        ldm = _ldm_paths(paths, unet_config) if network == "unet" and unet_config else {}
        for path in paths:
            variants = {path, *_without_tower(path)}
            for prefix in _KOHYA.get(network, ()):
                for variant in variants:
                    spelled.setdefault(f"{prefix}_{variant.replace('.', '_')}", (network, path))
                for variant in ldm.get(path, ()):
                    spelling = f"{prefix}_{variant.replace('.', '_')}"
                    if spelled.setdefault(spelling, (network, path)) == (network, path):
                        numbered.add(spelling)
            for variant in {old for each in variants for old in (each, *_processor(each))}:
                for prefix in _DOTTED:
                    spelled.setdefault(prefix.format(network=network) + variant, (network, path))
    return spelled, numbered


def _without_tower(path: str) -> Iterator[str]:
    """Spell a text tower's path as transformers 5 does."""
    if path.startswith("text_model."):
        yield path.removeprefix("text_model.")


def _processor(path: str) -> Iterator[str]:
    """Spell an attention's layer as diffusers did while attention processors held the updates.

    The `_lora` after it is part of the ending.
    """
    head, _, layer = path.removesuffix(".0").rpartition(".")
    if layer in ("to_q", "to_k", "to_v", "to_out"):
        yield f"{head}.processor.{layer}"
    elif head.endswith(".self_attn"):
        yield f"{head}.to_{layer.removesuffix('_proj')}"


def _ldm_paths(paths: list[str], config: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    dialect = ldm_unet(config)
    found: dict[str, tuple[str, ...]] = {}
    for path in paths:
        try:
            (name,) = backwards(dialect, [f"{path}.weight"]).values()
        except KeyError:
            continue
        found[path] = (name.removesuffix(".weight"),)
    return found
