"""See as AlexNet does: the convolutions, for measures of likeness (Krizhevsky 2014)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["AlexNet"]

# Channels, kernel, stride and padding of each convolution, by its place in torchvision's file.
_LAYERS = {
    0: (3, 64, 11, 4, 2),
    3: (64, 192, 5, 1, 2),
    6: (192, 384, 3, 1, 1),
    8: (384, 256, 3, 1, 1),
    10: (256, 256, 3, 1, 1),
}
_POOLED_BEFORE = (3, 6)


class AlexNet(nn.Module):
    """Return the five feature maps after their ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict(
            {
                str(place): nn.Conv2d(before, after, kernel, stride, padding)
                for place, (before, after, kernel, stride, padding) in _LAYERS.items()
            }
        )

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Take [B, 3, H, W], normed as ImageNet's pictures are; at least 64 pixels a side."""
        hidden, found = pixel_values, []
        for place in _LAYERS:
            if place in _POOLED_BEFORE:
                hidden = F.max_pool2d(hidden, 3, 2)
            hidden = F.relu(self.features[str(place)](hidden))
            found.append(hidden)
        return found
