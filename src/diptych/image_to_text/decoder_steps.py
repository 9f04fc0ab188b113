"""Stand between a search and the decoder: hold the cache, and gather it by parents."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.image_to_text import decoding
from diptych.runtimes.network import (
    BRIDGED,
    ChoosingNetwork,
    HeldSearch,
    HoldingNetwork,
    Network,
    gather_rows,
)

__all__ = ["decoder_step"]


def decoder_step(decoder: Network, bridge: str, bridged: Any) -> decoding.Step:
    """Return the step of a search over the pictures that `bridged` is of; it serves one search."""
    if isinstance(decoder, HoldingNetwork):
        return _HeldStep(decoder, bridge, bridged)
    if isinstance(decoder, ChoosingNetwork):
        return _ChoosingStep(decoder, bridge, bridged)
    return _Step(decoder, bridge, bridged)


class _Step:
    """Run the decoder behind `decoding.Step`: hold the cache, gather it by parents."""

    def __init__(self, decoder: Network, bridge: str, bridged: Any) -> None:
        self.decoder, self.name, self.bridged = decoder, BRIDGED[bridge], bridged
        self.past: Any = None
        self.rows_per_image = 1
        self.images = 0

    def __call__(
        self, token_ids: NDArray[np.int64], parents: NDArray[np.int64] | None
    ) -> NDArray[np.float32]:
        logits, present = self.decoder(**self._given(token_ids, parents))
        self._keep(present)
        scores: NDArray[np.float32] = logits
        return scores

    def _given(
        self, token_ids: NDArray[np.int64], parents: NDArray[np.int64] | None
    ) -> dict[str, Any]:
        if parents is None:
            self.images = len(token_ids)
        else:
            self._follow(parents)
        return {
            "input_ids": token_ids,
            "past_key_values": self.past,
            self.name: self.bridged,
        }

    def _keep(self, present: Any) -> None:
        self.past = present
        if self.name == "prefix_embeds":
            self.bridged = None  # the picture is in the cache now

    def _follow(self, parents: NDArray[np.int64]) -> None:
        """Reorder the cache, and forget the pictures that are done."""
        images = parents // self.rows_per_image
        kept = images[np.flatnonzero(np.diff(images, prepend=-1))]
        if self.bridged is not None and len(kept) < self.images:
            self.bridged = gather_rows(self.bridged, kept)
        rows = self.images * self.rows_per_image
        self.images, self.rows_per_image = len(kept), len(parents) // len(kept)
        if len(parents) != rows or (parents != np.arange(rows)).any():
            self.past = gather_rows(self.past, parents)


class _ChoosingStep(_Step):
    """Run a decoder that tells the best words behind `decoding.ChoosingStep`."""

    decoder: ChoosingNetwork

    def best(
        self, token_ids: NDArray[np.int64], parents: NDArray[np.int64] | None, count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        best, logits, log_sums, present = self.decoder.best(
            count, **self._given(token_ids, parents)
        )
        self._keep(present)
        return best, logits, log_sums


class _HeldStep(_ChoosingStep):
    """Hand the search over to a decoder that keeps the cache, as soon as its rows are known."""

    decoder: HoldingNetwork

    def __init__(self, decoder: Network, bridge: str, bridged: Any) -> None:
        super().__init__(decoder, bridge, bridged)
        self.held: HeldSearch | None = None
        self.is_known = False

    def __call__(
        self, token_ids: NDArray[np.int64], parents: NDArray[np.int64] | None
    ) -> NDArray[np.float32]:
        rows = self._held(parents)
        if self.held is not None:
            return self.held.logits(token_ids, rows)
        return super().__call__(token_ids, rows)

    def best(
        self, token_ids: NDArray[np.int64], parents: NDArray[np.int64] | None, count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        rows = self._held(parents)
        if self.held is not None:
            return self.held.best(token_ids, rows, count)
        return super().best(token_ids, rows, count)

    def _held(self, parents: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
        """Return the parents that are still to be followed."""
        if parents is None or self.is_known:
            return parents
        self.is_known = True
        self._follow(parents)
        self.held = self.decoder.hold(self.past, self.bridged, self.images)
        if self.held is None:
            return np.arange(len(parents))
        self.past = self.bridged = None
        return None
