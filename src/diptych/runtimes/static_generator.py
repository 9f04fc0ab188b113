"""Let a UNet multiply in 8 bits, by ranges that are seen while pictures are drawn.

What bears it badly stays in half precision: the first and last convolution, those around residual
blocks, what the timestep goes through, and every product whose range is wide for what it mostly
reads, since rounding to 256 steps of that range would drown it (the gated products of a transformer
block, above all).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.runtimes.artifact import network_path
from diptych.runtimes.graph import Graph
from diptych.runtimes.network import OpenNetworks
from diptych.runtimes.picture_agreement import Words, denoised, sketch_of
from diptych.runtimes.static_quantize import Range, Ranges, calibrate, quantize_statically

__all__ = ["ROUNDED", "describe_rounding", "find_ranges", "write_rounded"]

ROUNDED = ("unet", "unet_shallow")

_OPS = ("MatMul", "Conv")
_STEPS, _GUIDANCE_SCALE = 6, 5.0
_LEAST_DECIBELS = 30.0  # of what a product reads over what rounding adds to it
_KEPT = (
    *("conv_in.", "conv_out."),
    *("time_embedding.", "add_embedding.", "time_emb_proj."),
    "conv_shortcut.",  # what it reads was never normed: 26 instead of 33 dB for SD 1.5
)


def find_ranges(
    graph: Graph,
    networks: OpenNetworks,
    configs: Mapping[str, Mapping[str, Any]],
    schedule: Mapping[str, Any],
    words: Words,
    folder: Path,
) -> dict[str, Range]:
    """Return what the products of the UNet in `graph` read while `words` are drawn, as `calibrate`.

    `words` [B + 1, T] by text encoder, the last row being the empty prompt; each is drawn alone, in
    six steps of DDIM at the model's own size. `folder` takes the float32 network for a while.
    """
    feeds: list[dict[str, NDArray[Any]]] = []
    random, edge = np.random.default_rng(0), int(configs["unet"]["sample_size"])
    for row in range(len(next(iter(words.values()))) - 1):
        own = {name: ids[[row, -1]] for name, ids in words.items()}
        sketch = sketch_of(own, configs, edge, random, steps=_STEPS, guidance_scale=_GUIDANCE_SCALE)
        denoised(networks, configs["unet"], schedule, sketch, feeds)
    with TemporaryDirectory(dir=folder) as temporary:
        path = network_path(Path(temporary), graph.name)
        graph.write(path)
        return calibrate(path, feeds, ops=_OPS)


def write_rounded(graph: Graph, path: Path, ranges: Ranges, weights_of: Path | None = None) -> None:
    """Write `graph` to `path` with its products in 8 bits, where they bear it.

    `weights_of` is as in `Graph.write`.
    """
    rounded = {weight: seen for weight, seen in ranges.items() if not _is_kept(weight, seen)}
    with TemporaryDirectory(dir=path.parent) as temporary:
        plain = network_path(Path(temporary), graph.name)
        graph.write(plain)
        quantize_statically(plain, path, rounded, weights_of)


def describe_rounding(ranges: Ranges) -> dict[str, Any]:
    """Return how many products are rounded, and the decibels of those that are kept in 16 bits."""
    kept = {
        weight: round(seen.decibels, 1) for weight, seen in ranges.items() if _is_kept(weight, seen)
    }
    return {"products": len(ranges) - len(kept), "kept_wide": kept}


def _is_kept(weight: str, seen: Range) -> bool:
    return seen.decibels < _LEAST_DECIBELS or any(
        weight.startswith(name) or f".{name}" in weight for name in _KEPT
    )
