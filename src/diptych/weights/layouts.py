"""Say which networks a checkpoint holds, and in which dialect each speaks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from diptych.weights.dialects import clip_text, diffusers_unet, diffusers_vae
from diptych.weights.dialects.ldm_file import PREFIXES, UNET, VAES, is_dropped
from diptych.weights.dialects.ldm_unet import ldm_unet
from diptych.weights.dialects.ldm_vae import ldm_vae
from diptych.weights.dialects.openclip_text import openclip_text
from diptych.weights.rename import Dialect

__all__ = ["Component", "components", "leftover", "unused_layer"]

_FULL_TOWER = 24  # layers of OpenCLIP ViT-H


@dataclass(frozen=True, slots=True)
class Component:
    """Name a network of a checkpoint, its dialect, and what stands before its names in the file."""

    name: str
    dialect: Dialect
    prefix: str = ""


def components(
    layout: str, family: str, configs: Mapping[str, Mapping[str, Any]], names: Iterable[str] = ()
) -> tuple[Component, ...]:
    """Return the networks of a generator; `names` are those in the file, of a single one."""
    names = list(names)
    texts = [name for name in configs if name.startswith("text_encoder")]
    if layout == "diffusers":
        return (
            *(Component(name, clip_text) for name in texts),
            Component("unet", diffusers_unet),
            Component("vae", diffusers_vae),
        )
    vae = next((p for p in VAES if any(name.startswith(p) for name in names)), VAES[0])
    return (
        *(_text(name, PREFIXES[family][name], configs[name], names) for name in texts),
        Component("unet", ldm_unet(configs["unet"]), UNET),
        Component("vae", ldm_vae(configs["vae"]), vae),
    )


def leftover(parts: Iterable[Component], names: Iterable[str]) -> list[str]:
    """Return the names in a single file that nobody knows."""
    prefixes = tuple(part.prefix for part in parts)
    return [n for n in names if not n.startswith(prefixes) and not is_dropped(n)]


def unused_layer(names: Iterable[str], prefix: str) -> int | None:
    """Return the layer of a tower of Stable Diffusion 2 that stands in the file and is not run.

    A whole tower has its projection. Some programs leave both out on saving.
    """
    names = list(names)
    pattern = re.compile(re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.")
    layers = {int(found[1]) for name in names if (found := pattern.match(name))}
    is_whole = f"{prefix}text_projection" in names or len(layers) >= _FULL_TOWER
    return max(layers) if layers and is_whole else None


def _text(name: str, prefix: str, config: Mapping[str, Any], names: list[str]) -> Component:
    if prefix.endswith("transformer."):
        return Component(name, clip_text, prefix)
    has_projection = config["projection_dim"] is not None
    unused = None if has_projection else unused_layer(names, prefix)
    return Component(
        name, openclip_text(has_projection=has_projection, unused_layer=unused), prefix
    )
