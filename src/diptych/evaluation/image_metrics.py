"""Compare a picture with its original (PSNR, SSIM), and pictures with prompts (retrieval).

Pictures are PIL images, uint8 arrays (0 to 255) or float arrays (0 to 1), [H, W] or [H, W, C].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from diptych.errors import BadInput
from diptych.evaluation.caption_metrics import bootstrap_interval

__all__ = ["Retrieval", "psnr", "retrieval", "ssim"]

Floats = npt.NDArray[np.float64]
Picture = Image.Image | npt.NDArray[Any]


def psnr(picture: Picture, original: Picture) -> float:
    """Compute the peak signal-to-noise ratio in dB; infinite for equal pictures."""
    ours, theirs = _pair(picture, original)
    error = float(np.mean((ours - theirs) ** 2))
    return math.inf if error == 0.0 else -10.0 * math.log10(error)


def ssim(picture: Picture, original: Picture) -> float:
    """Compute the mean structural similarity, -1 to 1, over pixels and channels.

    Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5, K1 0.01, K2 0.03, and only windows
    that lie inside the picture.
    """
    ours, theirs = _pair(picture, original)
    if min(ours.shape[:2]) < _WINDOW:
        raise BadInput(
            f"a picture of {ours.shape[1]} × {ours.shape[0]} is too small for SSIM, which looks "
            f"through a window of {_WINDOW} pixels: compare larger ones"
        )
    mean_a, mean_b = _blurred(ours), _blurred(theirs)
    variance_a = _blurred(ours * ours) - mean_a * mean_a
    variance_b = _blurred(theirs * theirs) - mean_b * mean_b
    covariance = _blurred(ours * theirs) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    likeness /= (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return float(likeness.mean())


_WINDOW = 11
_KERNEL = np.exp(-((np.arange(_WINDOW) - _WINDOW // 2) ** 2) / (2 * 1.5**2))
_KERNEL /= _KERNEL.sum()


def _blurred(values: Floats) -> Floats:
    """Blur [H, W, C] by the window, along one axis after the other; returns what lies inside."""
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(values, _WINDOW, axis=axis)
        values = np.asarray(windows @ _KERNEL)
    return values


def _pair(picture: Picture, original: Picture) -> tuple[Floats, Floats]:
    ours, theirs = _floats(picture), _floats(original)
    if ours.shape != theirs.shape:
        raise BadInput(
            f"pictures of shapes {ours.shape} and {theirs.shape} cannot be compared: bring both to "
            "one size and mode"
        )
    return ours, theirs


def _floats(picture: Picture) -> Floats:
    """Return [H, W, C] between 0 and 1."""
    values = np.asarray(picture)
    if values.ndim not in (2, 3) or values.size == 0:
        raise BadInput(f"an array of shape {values.shape} is no picture: give [H, W] or [H, W, C]")
    values = values.reshape(*values.shape[:2], -1)
    if values.dtype == np.uint8:
        return values.astype(np.float64) / 255.0
    if values.dtype.kind != "f":
        raise BadInput(f"a picture of {values.dtype} has no known range: give uint8 or floats")
    return values.astype(np.float64)


# --- prompts --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Hold how often the right prompt comes first among `among`, and the 95 % interval."""

    accuracy: float
    interval: tuple[float, float]
    among: int
    pictures: int

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.accuracy:.1%} of {self.pictures} ({low:.1%} to {high:.1%}), "
            f"right prompt among {self.among}, chance {1 / self.among:.0%}"
        )


def retrieval(
    scores: npt.NDArray[np.floating[Any]], right: Sequence[int], among: int = 10
) -> Retrieval:
    """Compute the accuracy over all draws of `among` - 1 wrong prompts.

    `scores` [B, P] of B pictures with P different prompts, `right` the right one of each. Nothing
    is drawn: if b wrong prompts beat the right one, it wins in C(P-1-b, n) of C(P-1, n) draws.
    """
    wrong = scores.shape[1] - 1
    among = min(among, wrong + 1)
    own = scores[np.arange(len(right)), right]
    better = ((scores >= own[:, None]).sum(axis=1) - 1).tolist()  # a tie is lost
    wins = [math.comb(wrong - b, among - 1) / math.comb(wrong, among - 1) for b in better]
    return Retrieval(float(np.mean(wins)), bootstrap_interval(wins), among, len(wins))
