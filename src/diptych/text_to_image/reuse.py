"""Save work between the steps of a run: deep features of the UNet that are used again.

What the deep layers of a UNet make changes little from one step to the next, so they are computed
at every Nth step and given back to the network at those between (DeepCache: Ma et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diptych.runtimes.network import Array, Network

__all__ = ["FeatureReuse"]


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """Hold features [B, C, h, w], the words they were computed for, and at which step."""

    words: Array
    step: int
    features: Array


class FeatureReuse:
    """Run a UNet as a whole at every `interval`th noise level, and `shallow` at the others.

    One object belongs to one run. Features stay with the words they were computed for: rows that
    guidance adds or leaves out are computed as a whole at first.
    """

    def __init__(self, unet: Network, shallow: Network, interval: int) -> None:
        self._unet, self._shallow, self._interval = unet, shallow, interval
        self._sigma: float | None = None
        self._step = -1
        self._kept: dict[int, _Kept] = {}

    def predict(self, sigma: float, inputs: Mapping[str, Any]) -> Array:
        """Return what the UNet, or its last block, says to `inputs` at a noise level."""
        if sigma != self._sigma:
            self._sigma, self._step = sigma, self._step + 1
        words = inputs["encoder_hidden_states"]
        kept = self._kept.get(id(words))
        if kept is None or kept.words is not words or self._step - kept.step >= self._interval:
            output, features = self._unet(("noise_pred", "deep_features"), **inputs)
            self._kept[id(words)] = _Kept(words, self._step, features)
            return output
        (output,) = self._shallow(**inputs, deep_features=kept.features)
        return output
