"""Round the rows of a matrix to few bits, block by block, as `MatMulNBits` reads them.

Every block of a row has a scale of its own: an outlier costs its block only. The numbers are
whole, around 2^(bits - 1); https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Blocks", "block_size", "round_blocks", "round_rows", "widen_rows"]

Floats = NDArray[np.float32]

# Blocks of 64 and 32 are computed alike however many rows there are; in those of 128 and 256, which
# are 5 % faster, the last bits of a row depend on the number of rows (ONNX Runtime 1.32).
_BLOCK, _SMALL_BLOCK = 64, 32
# What a scale may lose for a smaller error of its block: the outermost numbers are cut off then.
_SHRINKING = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8)
_SMALLEST_HALF = 2.0**-14  # below, half precision has fewer digits


@dataclass(frozen=True, slots=True)
class Blocks:
    """Hold a rounded matrix of N rows: `numbers` [N, blocks, bytes], `scales` [N, blocks]."""

    numbers: NDArray[np.uint8]
    scales: NDArray[Any]  # float16, or float32 where a scale is too large or small for it
    bits: int

    @property
    def size(self) -> int:
        """Count the numbers in a block."""
        return int(self.numbers.shape[2]) * 8 // self.bits

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + self.scales.nbytes


def block_size(width: int) -> int:
    """Return how many numbers of a row of `width` share a scale."""
    return _BLOCK if width >= _BLOCK else _SMALL_BLOCK


def round_rows(rows: Floats, bits: int) -> Blocks:
    """Round `rows` [N, K] to 8, 4 or 2 bits a number; the last block is filled with zeros.

    8 bits spread evenly to both sides. With fewer, each block's largest number takes the lowest
    code, which is one further from zero than the highest, and of some smaller scales the one with
    the least squared error is taken.
    """
    size = block_size(rows.shape[1])
    count = -(-rows.shape[1] // size)
    padded = np.zeros((len(rows), count * size), np.float32)
    padded[:, : rows.shape[1]] = rows
    codes, scales = round_blocks(padded.reshape(len(rows), count, size), bits)
    return Blocks(_pack(codes, bits), scales, bits)


def round_blocks(blocks: Floats, bits: int) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Round [N, blocks, size] to codes of 0 to 2^bits - 1, one a byte, and scales [N, blocks]."""
    if bits == 8:
        scales = _storable(np.abs(blocks).max(-1) / np.float32(127))
    else:
        scales = _best_scales(blocks, bits)
    return _codes(blocks, scales, bits), scales


def widen_rows(blocks: Blocks, width: int) -> Floats:
    """Return what [N, width] the runtime computes with."""
    count = 8 // blocks.bits
    shifts = np.arange(count, dtype=np.uint8) * np.uint8(blocks.bits)
    codes = blocks.numbers[..., None] >> shifts & np.uint8(2**blocks.bits - 1)
    centred = codes.reshape(*blocks.numbers.shape[:2], -1).astype(np.float32) - _zero(blocks.bits)
    centred *= blocks.scales.astype(np.float32)[..., None]
    return centred.reshape(len(centred), -1)[:, :width]


def _best_scales(blocks: Floats, bits: int) -> NDArray[Any]:
    """Return the scales [N, blocks] that leave the least squared error among some."""
    places = np.abs(blocks).argmax(-1)[..., None]
    furthest = np.take_along_axis(blocks, places, -1)[..., 0] / np.float32(-_zero(bits))
    best = _storable(furthest)
    least = np.full(furthest.shape, np.inf, np.float32)
    for factor in _SHRINKING:
        scales = _storable(furthest * np.float32(factor))
        rounded = _codes(blocks, scales, bits).astype(np.float32) - _zero(bits)
        rounded *= scales.astype(np.float32)[..., None]
        rounded -= blocks
        error = np.einsum("nbk,nbk->nb", rounded, rounded)
        if best.dtype != scales.dtype:
            best = best.astype(np.float32)
        better = error < least
        best[better], least[better] = scales[better], error[better]
    return best


def _storable(scales: Floats) -> NDArray[Any]:
    """Return `scales` in half precision, where it holds them all to its eleven digits."""
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    used = np.abs(scales[scales != 0])
    fits = not used.size or (used.min() >= _SMALLEST_HALF and np.isfinite(half).all())
    return half if fits else scales.astype(np.float32)


def _codes(blocks: Floats, scales: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Return [N, blocks, size] as whole numbers around the middle of 0 to 2^bits - 1."""
    wide = scales.astype(np.float32)
    codes = blocks / np.where(wide == 0, np.float32(1), wide)[..., None]
    np.rint(codes, out=codes)
    codes += _zero(bits)
    np.clip(codes, 0, 2**bits - 1, out=codes)
    return codes.astype(np.uint8)


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Put several codes into a byte, the first one lowest."""
    count = 8 // bits
    if count == 1:
        return codes
    together = codes.reshape(*codes.shape[:2], -1, count)
    packed = np.zeros(together.shape[:3], np.uint8)
    for place in range(count):
        packed |= together[..., place] << np.uint8(bits * place)
    return packed


def _zero(bits: int) -> int:
    return 1 << (bits - 1)
