"""Choose the layers that get a low-rank update, and give them one that changes nothing yet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from diptych.errors import BadInput
from diptych.models.lora import Layer, LowRank, attach, layers

__all__ = ["DEFAULT_RANK", "add_updates", "choose_layers", "matrices", "new_update"]

DEFAULT_RANK = 8

# Words for groups of layers: parts of paths, of which one has to occur between dots.
_GROUPS = {
    "attention": (
        *("to_q", "to_k", "to_v", "to_out", "q_proj", "k_proj", "v_proj", "out_proj"),
        *("attn.c_attn", "attn.c_proj", "q_attn", "crossattention.c_attn", "crossattention.c_proj"),
    ),
    "feed-forward": ("ff", "mlp"),
    "conv": ("conv1", "conv2", "conv_shortcut", "downsamplers", "upsamplers", "conv_in"),
}
_NEVER = ("conv_out", "lm_head")


def choose_layers(networks: Mapping[str, nn.Module], words: str) -> list[tuple[str, str, Layer]]:
    """Return network, path and layer of all that `words` name, with commas between.

    `attention`, `feed-forward`, `conv` and `all` are groups; any other word is a part of a path,
    as in `down_blocks.1` or `to_q`. Raises `BadInput` for a word that names no layer.
    """
    wanted = [word.strip() for word in words.split(",") if word.strip()]
    if not wanted:
        raise BadInput(f"lora_layers is {words!r}: give {', '.join(_GROUPS)} or all")
    every = [
        (name, path, layer)
        for name, module in networks.items()
        for path, layer in layers(module).items()
        if not any(part in path for part in _NEVER)
    ]
    chosen: dict[tuple[str, str], Layer] = {}
    for word in wanted:
        parts = _GROUPS.get(word, (word,))
        found = {
            (name, path): layer
            for name, path, layer in every
            if word == "all" or any(_has(f"{name}.{path}", part) for part in parts)
        }
        if not found:
            raise BadInput(
                f"lora_layers: {word!r} names no layer of this model: give "
                f"{', '.join(_GROUPS)}, all, or a part of a path such as "
                f"{_example(every)}"
            )
        chosen |= found
    return [(name, path, layer) for name, path, layer in every if (name, path) in chosen]


def add_updates(
    chosen: Iterable[tuple[str, str, Layer]], rank: int, alpha: float | None, seed: int
) -> dict[tuple[str, str], LowRank]:
    """Attach an update of `rank` to each layer, which begins as nothing added; float32.

    The first matrix is drawn as kohya and PEFT draw it (Kaiming, a = sqrt 5), the second is 0.
    """
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, path, layer in chosen:
        update = new_update(layer, rank, alpha, generator)
        attach(layer, update)
        made[name, path] = update.float()
    return made


def new_update(layer: Layer, rank: int, alpha: float | None, generator: torch.Generator) -> LowRank:
    """Return an update of `layer` that changes nothing yet, of a lower rank where it has to be."""
    out, into, *kernel = layer.weight.shape
    width = min(rank, out, into * math.prod(kernel))
    down = torch.empty(width, into, *kernel)
    bound = 1 / math.sqrt(into * math.prod(kernel))
    down.uniform_(-bound, bound, generator=generator)
    up = torch.zeros(out, width, *[1] * len(kernel))
    return LowRank(down, up, 1.0 if alpha is None else alpha / rank)


def matrices(updates: Mapping[tuple[str, str], LowRank]) -> dict[str, nn.Parameter]:
    """Return the parameters of all updates, named as PEFT names them."""
    return {
        f"{network}.{path}.{kind}": matrix
        for (network, path), update in updates.items()
        for kind, matrix in (("lora_A", update.down), ("lora_B", update.up))
    }


def _has(path: str, part: str) -> bool:
    return f".{part}." in f".{path}."


def _example(every: Iterable[tuple[str, str, Layer]]) -> str:
    return next((path for _, path, _ in every), "to_q")
