"""Draw the noise that pictures begin from: each from its seed, alike on every device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.errors import BadInput
from diptych.text_to_image.denoiser import Array

__all__ = ["NoiseSource"]


class NoiseSource:
    """Draw noise for each image from its own seed, the same on every device and in any batch.

    `kind` "philox" (the default) needs NumPy only: Philox 4x32-10 and Box-Muller, counted as CUDA
    counts small tensors, so these equal `torch.randn` on a GPU. "torch" draws from one
    `torch.Generator("cpu")` per image, as diffusers does when given such a list.
    Raises BadInput for a seed outside 0 … 2^64 - 1 or an unknown kind.
    """

    def __init__(self, seeds: Sequence[int], kind: str = "philox") -> None:
        if wrong := [seed for seed in seeds if not 0 <= seed < 2**64]:
            raise BadInput(f"seed is {wrong[0]}: give a whole number from 0 to 2^64 - 1")
        if kind not in ("philox", "torch"):
            raise BadInput(f"the kind of noise is {kind!r}: give philox or torch")
        self.seeds = tuple(seeds)
        self._draws = 0
        self._generators: list[Any] | None = None
        if kind == "torch":
            import torch

            self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]

    def draw(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Return the next noise, `B` + `shape`: one image's `shape` for each seed."""
        if self._generators is not None:
            import torch

            rows = [torch.randn(*shape, generator=g).numpy() for g in self._generators]
        else:
            rows = [_philox_normal(seed, self._draws, shape) for seed in self.seeds]
        self._draws += 1
        return np.stack(rows)

    def like(self, latents: Array) -> Array:
        """Return the next noise as an array of the kind, shape and place of `latents`."""
        drawn = self.draw(tuple(latents.shape[1:]))
        if isinstance(latents, np.ndarray):
            return drawn
        import torch

        return torch.from_numpy(drawn).to(latents.device)


_WORD = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def _philox_normal(seed: int, offset: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """Return normal numbers by Philox 4x32-10 (Salmon et al. 2011) and Box-Muller.

    Number i has the counter (offset, 0, i, 0) and takes the first two words, as CUDA's do.
    """
    count = math.prod(shape)
    a = np.full(count, offset, np.uint64)
    b = np.zeros(count, np.uint64)
    c = np.arange(count, dtype=np.uint64)
    d = np.zeros(count, np.uint64)
    low_key, high_key = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        from_a, from_c = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a = (from_c >> _SHIFT) ^ b ^ np.uint64(low_key)
        c = (from_a >> _SHIFT) ^ d ^ np.uint64(high_key)
        b, d = from_c & _WORD, from_a & _WORD
        low_key = (low_key + 0x9E3779B9) & 0xFFFFFFFF
        high_key = (high_key + 0xBB67AE85) & 0xFFFFFFFF
    # The middle of each cell: never 0, of which there is no logarithm.
    radius = np.sqrt(-2 * np.log((a + 0.5) * 2.0**-32))
    normal = radius * np.sin((b + 0.5) * (2.0**-32 * 2 * math.pi))
    return np.asarray(normal, np.float32).reshape(shape)
