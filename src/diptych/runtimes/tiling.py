"""Run the autoencoder in pieces that fit into memory: a few pictures at a time, or tiles of one.

Slicing changes nothing. Tiles do, a little, because the norms of the autoencoder look at all of
what they are given: tiles overlap, and fade into each other linearly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.errors import BadInput
from diptych.runtimes.network import Array, Network, check_wanted

__all__ = ["InPieces", "Tiling", "decode_latents", "encode_pixels"]


@dataclass(frozen=True, slots=True)
class Tiling:
    """Say when and how pictures are cut; sizes in pixels."""

    tile: int = 512  # edge of a tile
    overlap: int = 128  # what neighbours share
    most_pixels: int = 1 << 20  # of one call; a larger picture is tiled
    always: bool = False  # tile whatever is larger than a tile

    def __post_init__(self) -> None:
        if self.tile < 64:
            raise BadInput(f"tile is {self.tile} pixels: give at least 64")
        if not 0 <= self.overlap <= self.tile // 2:
            raise BadInput(f"overlap is {self.overlap}: give 0 to {self.tile // 2}, half a tile")

    def cuts(self, height: int, width: int) -> bool:
        """Tell whether a picture of this size is tiled."""
        if max(height, width) <= self.tile:
            return False
        return self.always or height * width > self.most_pixels


class InPieces:
    """Stand for one side of an autoencoder, and give it no more than `tiling` says at once."""

    def __init__(self, network: Network, downsampling: int, tiling: Tiling | None = None) -> None:
        self.network, self.downsampling = network, downsampling
        self.tiling = tiling or Tiling()
        self.inputs, self.outputs = network.inputs, network.outputs

    def __call__(
        self, wanted: Sequence[str] | None = None, /, **arrays: Array
    ) -> tuple[Array, ...]:
        names = check_wanted(wanted, self.outputs)
        how: dict[str, Any] = {"downsampling": self.downsampling, "tiling": self.tiling}
        made: tuple[Array, ...]
        if "latents" in self.inputs:
            made = (decode_latents(self.network, arrays["latents"], **how),)
        else:
            made = encode_pixels(self.network, arrays["pixel_values"], **how)
        found = dict(zip(self.outputs, made, strict=True))
        return tuple(found[name] for name in names)


def decode_latents(
    vae_decoder: Network, latents: Array, *, downsampling: int = 8, tiling: Tiling | None = None
) -> Array:
    """Decode `latents` [B, c, h, w] to `pixel_values` [B, 3, H, W] in pieces as `tiling` says."""
    tiling = tiling or Tiling()
    height, width = (int(size) * downsampling for size in latents.shape[-2:])
    if not tiling.cuts(height, width):
        rows = _rows(tiling, height, width)
        (whole,) = _in_slices(lambda each: vae_decoder(latents=each), latents, rows)
        return whole
    tile, overlap = tiling.tile // downsampling, tiling.overlap // downsampling
    (whole,) = _in_tiles(
        lambda each: vae_decoder(latents=each), latents, tile, overlap, (downsampling, 1)
    )
    return whole


def encode_pixels(
    vae_encoder: Network,
    pixel_values: Array,
    *,
    downsampling: int = 8,
    tiling: Tiling | None = None,
) -> tuple[Array, Array]:
    """Encode `pixel_values` [B, 3, H, W] to mean and log variance [B, c, h, w], in pieces.

    `H` and `W` are multiples of `downsampling`.
    """
    tiling = tiling or Tiling()
    height, width = (int(size) for size in pixel_values.shape[-2:])
    if not tiling.cuts(height, width):
        rows = _rows(tiling, height, width)
        mean, spread = _in_slices(lambda each: vae_encoder(pixel_values=each), pixel_values, rows)
        return mean, spread
    tile, overlap = (size // downsampling * downsampling for size in (tiling.tile, tiling.overlap))
    mean, spread = _in_tiles(
        lambda each: vae_encoder(pixel_values=each), pixel_values, tile, overlap, (1, downsampling)
    )
    return mean, spread


def _rows(tiling: Tiling, height: int, width: int) -> int:
    """Return how many pictures of this size go into one call."""
    return max(1, tiling.most_pixels // (height * width))


def _in_slices(
    run: Callable[[Array], tuple[Array, ...]], batch: Array, rows: int
) -> tuple[Array, ...]:
    if len(batch) <= rows:
        return run(batch)
    parts = [run(batch[start : start + rows]) for start in range(0, len(batch), rows)]
    return tuple(_concatenate(column) for column in zip(*parts, strict=True))


def _in_tiles(
    run: Callable[[Array], tuple[Array, ...]],
    batch: Array,
    tile: int,
    overlap: int,
    scale: tuple[int, int],
) -> tuple[Array, ...]:
    """Run tiles of `batch` [B, C, h, w], one picture at a time, and fade them together.

    Results are `scale[0]` times as large as what is put in, and `scale[1]` times as small.
    """
    up, down = scale
    across, along = (_places(int(size), tile, overlap, down) for size in batch.shape[-2:])
    fades = [
        _fades([(start * up // down, end * up // down) for start, end in places])
        for places in (across, along)
    ]
    wholes: list[Array] = []
    for row in range(len(batch)):
        for (top, bottom), fade in zip(across, fades[0], strict=True):
            for (left, right), side in zip(along, fades[1], strict=True):
                made = run(batch[row : row + 1, :, top:bottom, left:right])
                if not wholes:
                    sizes = [int(size) * up // down for size in batch.shape[-2:]]
                    wholes = [_zeros(each, (len(batch), each.shape[1], *sizes)) for each in made]
                weight = (fade[:, None] * side).astype(np.float32)
                high, wide = (slice(edge * up // down, None) for edge in (top, left))
                for whole, each in zip(wholes, made, strict=True):
                    corner = whole[row : row + 1, :, high, wide]
                    corner[..., : each.shape[2], : each.shape[3]] += each * _like(each, weight)
    return tuple(wholes)


def _places(size: int, tile: int, overlap: int, grain: int) -> list[tuple[int, int]]:
    """Spread tiles evenly over `size`, starting at multiples of `grain`, sharing `overlap`."""
    if size <= tile:
        return [(0, size)]
    count = -(-(size - overlap) // (tile - overlap))
    starts = [round(i * (size - tile) / (count - 1) / grain) * grain for i in range(count)]
    return [(start, min(start + tile, size)) for start in starts]


def _fades(places: list[tuple[int, int]]) -> list[NDArray[np.float64]]:
    """Return the weight of each tile along one edge: ramps where two meet, 1 in all."""
    fades = [np.ones(end - start) for start, end in places]
    for index, ((_, end), (start, _)) in enumerate(pairwise(places)):
        shared = end - start
        if shared > 0:
            ramp = (np.arange(shared) + 0.5) / shared
            fades[index + 1][:shared] *= ramp
            fades[index][-shared:] *= 1 - ramp
    total = np.zeros(places[-1][1])
    for (start, end), fade in zip(places, fades, strict=True):
        total[start:end] += fade
    for (start, end), fade in zip(places, fades, strict=True):
        fade /= total[start:end]  # where three meet, the ramps alone do not add up to 1
    return fades


def _concatenate(parts: tuple[Array, ...]) -> Array:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    import torch

    return torch.cat(parts)


def _zeros(like: Array, shape: tuple[Any, ...]) -> Array:
    return np.zeros(shape, like.dtype) if isinstance(like, np.ndarray) else like.new_zeros(shape)


def _like(array: Array, values: NDArray[np.float32]) -> Array:
    return values if isinstance(array, np.ndarray) else array.new_tensor(values)
