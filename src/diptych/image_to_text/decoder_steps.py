"""Stand between a search and the decoder: hold the cache, and gather it by parents."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.image_to_text import decoding
from diptych.runtimes.network import BRIDGED, ChoosingNetwork, Network, gather_rows

__all__ = ["decoder_step"]


def decoder_step(decoder: Network, bridge: str, bridged: Any) -> decoding.Step:
    """Return the step of a search over the pictures that `bridged` is of; it serves one search."""
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
