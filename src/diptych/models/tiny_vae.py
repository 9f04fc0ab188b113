"""Turn latents into pictures cheaply: the decoder of TAESD, a distilled autoencoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["INPUTS", "OUTPUTS", "TinyVae", "TinyVaeConfig"]

INPUTS = {"latents": "B c h w"}
OUTPUTS = {"pixel_values": "B 3 H W"}

_MAGNITUDE = 3  # latents are bent to stay within it


@dataclass(frozen=True, slots=True)
class TinyVaeConfig:
    """Describe a decoder; the defaults are TAESD's. `num_blocks` goes by level, coarsest first."""

    out_channels: int = 3
    latent_channels: int = 4
    num_blocks: tuple[int, ...] = (3, 3, 3, 1)
    num_channels: int = 64
    upsampling_scaling_factor: int = 2
    scaling_factor: float = 1.0  # of latents as the generator knows them
    shift_factor: float = 0.0

    @property
    def downsampling(self) -> int:
        """Return how many pixels a latent stands for, each way."""
        return int(self.upsampling_scaling_factor ** (len(self.num_blocks) - 1))


class TinyVae(nn.Module):
    """Decode latents by plain convolutions (TAESD: Bohan 2023), without the encoder."""

    def __init__(self, config: TinyVaeConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = TinyDecoder(config)

    def decode(self, latents: Tensor) -> Tensor:
        """Map `latents` [B, c, h, w] to `pixel_values` [B, 3, H, W] of about -1..1."""
        pixels: Tensor = self.decoder(torch.tanh(latents / _MAGNITUDE) * _MAGNITUDE)
        return pixels * 2 - 1


class TinyDecoder(nn.Module):
    """Widen, then at each level some blocks, an upsampling and a convolution."""

    def __init__(self, config: TinyVaeConfig) -> None:
        super().__init__()
        width, last = config.num_channels, len(config.num_blocks) - 1
        layers = [nn.Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU()]
        for level, blocks in enumerate(config.num_blocks):
            layers += [TinyBlock(width) for _ in range(blocks)]
            if level < last:
                layers.append(nn.Upsample(scale_factor=config.upsampling_scaling_factor))
                layers.append(nn.Conv2d(width, width, 3, padding=1, bias=False))
        layers.append(nn.Conv2d(width, config.out_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.layers(latents)
        return pixels


class TinyBlock(nn.Module):
    """Add three convolutions to the input; [B, C, h, w] to [B, C, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.relu(self.conv(hidden) + hidden)
