"""Measure likeness by what AlexNet sees: LPIPS for structure, Gram matrices for style.

Structure: Zhang et al. 2018, equation 1, with all channels weighted alike; the published figures
use weights that were learned on top, so these are no such figures. Style: Gatys et al. 2016.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from diptych.canvas import fit

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Perceptual"]

_SIDE = 224
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


class Perceptual:
    """Hold the network, loaded from the weights of torchvision's AlexNet."""

    measures = "AlexNet: LPIPS with equal weights, and Gram matrices"

    def __init__(self, weights: str | Path) -> None:
        from diptych.weights.load_metric import load_alexnet

        self._network = load_alexnet(weights)

    def structure_distance(self, content: Image.Image, result: Image.Image) -> float:
        """Return LPIPS with equal weights, both pictures at 224 × 224."""
        total = 0.0
        for ours, theirs in zip(self._maps(content), self._maps(result), strict=True):
            difference = (_unit(ours) - _unit(theirs)).square().sum(1)
            total += float(difference.mean())
        return total

    def style_distance(self, style: Image.Image, result: Image.Image) -> float:
        """Return the mean over layers of how far Gram matrices differ, by the style's size."""
        shares = []
        for ours, theirs in zip(self._maps(style), self._maps(result), strict=True):
            wanted, found = _gram(ours), _gram(theirs)
            shares.append(float((wanted - found).norm() / (wanted.norm() + 1e-12)))
        return float(np.mean(shares))

    def _maps(self, picture: Image.Image) -> list[Tensor]:
        import torch

        square = fit(picture.convert("RGB"), (_SIDE, _SIDE))
        pixels = torch.tensor(np.asarray(square, np.float32) / 255).permute(2, 0, 1)
        mean, deviation = (torch.tensor(each)[:, None, None] for each in (_MEAN, _DEVIATION))
        with torch.inference_mode():
            maps: list[Tensor] = self._network(((pixels - mean) / deviation)[None])
        return maps


def _unit(hidden: Tensor) -> Tensor:
    """Bring every place of [1, C, h, w] to length one."""
    return hidden / (hidden.square().sum(1, keepdim=True).sqrt() + 1e-10)


def _gram(hidden: Tensor) -> Tensor:
    flat = hidden.flatten(2)[0]
    return flat @ flat.T / flat.shape[1]
