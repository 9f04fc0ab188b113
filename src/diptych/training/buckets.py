"""Sort pictures by proportions, and lay out which batch shows which pictures."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np

__all__ = ["Plan", "bucket_of", "bucket_sizes"]

Size = tuple[int, int]
"""Width and height in pixels."""


@lru_cache(maxsize=16)
def bucket_sizes(resolution: int, step: int) -> tuple[Size, ...]:
    """Return the sizes that pictures are brought to: about resolution² pixels, sides by `step`.

    Sides are from half to twice `resolution`: kohya's layout (sd-scripts, `model_util.make_buckets`
    as described in its documentation), which is that of NovelAI's aspect ratio bucketing.
    """
    area, largest = resolution * resolution, 2 * resolution
    square = max(step, resolution // step * step)
    sizes = {(square, square)}
    width = max(step, math.ceil(resolution / 2 / step) * step)
    while width <= largest:
        height = min(largest // step * step, area // width // step * step)
        if height >= max(step, resolution // 2):
            sizes |= {(width, height), (height, width)}
        width += step
    return tuple(sorted(sizes))


def bucket_of(size: Size, sizes: Sequence[Size]) -> Size:
    """Return the one of `sizes` whose proportions are nearest, of equal ones the largest."""
    ratio = math.log(size[0] / size[1])
    return min(sizes, key=lambda s: (abs(math.log(s[0] / s[1]) - ratio), -s[0] * s[1]))


class Plan:
    """Say which pictures are in batch number i, for all i, from the seed alone.

    `kinds` gives the bucket of each picture, and `repeats` how often an epoch shows it: a batch
    holds pictures of one bucket. The last batch of a bucket is filled up from its beginning.
    """

    def __init__(
        self,
        kinds: Sequence[Hashable],
        batch_size: int,
        seed: int,
        repeats: Sequence[int] | None = None,
    ) -> None:
        groups: dict[Hashable, list[int]] = {}
        for index, kind in enumerate(kinds):
            groups.setdefault(kind, []).extend([index] * (repeats[index] if repeats else 1))
        self._groups = [np.array(group) for group in groups.values() if group]
        self._batch_size, self._seed = batch_size, seed
        self.batches_per_epoch = sum(-(-len(group) // batch_size) for group in self._groups)
        self._epoch: tuple[int, list[list[int]]] | None = None

    def batch(self, number: int) -> list[int]:
        """Return the indices of batch `number`, from 0 to without end."""
        epoch, place = divmod(number, self.batches_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self._laid_out(epoch)
        return self._epoch[1][place]

    def _laid_out(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([self._seed, epoch])
        batches = []
        for group in self._groups:
            order = rng.permutation(group)
            short = -len(order) % self._batch_size
            order = np.concatenate([order, np.resize(order, short)]) if short else order
            batches += order.reshape(-1, self._batch_size).tolist()
        return [batches[index] for index in rng.permutation(len(batches))]
