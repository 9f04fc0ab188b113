"""Press pictures into latents and back: the KL autoencoder of Stable Diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.models.layers import MultiHeadAttention, ResnetBlock, Upsample, to_map, to_tokens

__all__ = ["DECODER_INPUTS", "DECODER_OUTPUTS", "INPUTS", "OUTPUTS", "Vae", "VaeConfig"]

INPUTS = {"pixel_values": "B 3 H W"}  # in [-1, 1]
OUTPUTS = {"mean": "B c h w", "log_variance": "B c h w"}
DECODER_INPUTS = {"latents": "B c h w"}
DECODER_OUTPUTS = {"pixel_values": "B 3 H W"}

_EPS = 1e-6  # of every norm; the UNet's residual blocks have 1e-5


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """Describe an autoencoder; the defaults are those of Stable Diffusion 1 and 2."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # latents of the UNet = (mean - shift_factor) * scaling_factor
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_attention: bool = True
    force_upcast: bool = False  # overflows in float16
    patch_size: int = 1  # pixels along an edge folded into channels first; 1 in published models
    refine_channels: int = 0  # maps for the last look, pixel by pixel; 0 in published models

    @property
    def downsampling(self) -> int:
        """Count the pixels along an edge that become one latent."""
        return int(self.patch_size * 2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def tiny(cls) -> VaeConfig:
        return cls(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)


class Vae(nn.Module):
    """Encode pictures as latents, decode latents as pictures (Rombach et al. 2022, Kingma 2014).

    Neither side knows `scaling_factor`: that is between the latents and the UNet.
    """

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        latent, folded = config.latent_channels, config.patch_size**2
        self.encoder = Encoder(
            config.in_channels * folded,
            config.block_out_channels,
            2 * latent,
            config.layers_per_block,
            config.norm_num_groups,
            config.mid_attention,
        )
        self.decoder = Decoder(
            latent,
            config.block_out_channels[::-1],
            (config.out_channels + config.refine_channels) * folded,
            config.layers_per_block + 1,
            config.norm_num_groups,
            config.mid_attention,
        )
        self.quant_conv: nn.Conv2d | None = None
        if config.use_quant_conv:
            self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv: nn.Conv2d | None = None
        if config.use_post_quant_conv:
            self.post_quant_conv = nn.Conv2d(latent, latent, 1)
        self.refine: Refine | None = None
        if config.refine_channels:
            self.refine = Refine(config.out_channels, config.refine_channels)

    def encode(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Map [B, 3, H, W] in [-1, 1] to `mean` and `log_variance`, both [B, c, h, w]."""
        if self.config.patch_size > 1:
            pixel_values = F.pixel_unshuffle(pixel_values, self.config.patch_size)
        moments: Tensor = self.encoder(pixel_values)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Map unscaled `latents` [B, c, h, w] to `pixel_values` [B, 3, H, W], about in [-1, 1]."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        pixel_values: Tensor = self.decoder(latents)
        if self.config.patch_size > 1:
            pixel_values = F.pixel_shuffle(pixel_values, self.config.patch_size)
        if self.refine is not None:
            pixel_values = self.refine(pixel_values)
        return pixel_values

    def forward(self, pixel_values: Tensor, noise: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the picture as it comes back, `mean` and `log_variance`, for training.

        With `noise` [B, c, h, w] the latents are drawn from the posterior instead of its mean.
        """
        mean, log_variance = self.encode(pixel_values)
        latents = mean if noise is None else mean + torch.exp(0.5 * log_variance) * noise
        return self.decode(latents), mean, log_variance


class Encoder(nn.Module):
    """Halve the picture level by level; [B, C, H, W] to [B, out, h, w]."""

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        out_channels: int,
        num_layers: int,
        num_groups: int,
        mid_attention: bool,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(before, after, num_layers, num_groups, shrinks=level < len(channels) - 1)
            for level, (before, after) in enumerate(pairwise((channels[0], *channels)))
        )
        self.mid_block = MidBlock(channels[-1], num_groups, mid_attention)
        self.conv_norm_out = nn.GroupNorm(num_groups, channels[-1], _EPS)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.conv_in(hidden)
        for block in self.down_blocks:
            hidden = block(hidden)
        hidden = self.mid_block(hidden)
        encoded: Tensor = self.conv_out(F.silu(self.conv_norm_out(hidden)))
        return encoded


class Decoder(nn.Module):
    """Double the picture level by level; [B, c, h, w] to [B, out, H, W]."""

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        out_channels: int,
        num_layers: int,
        num_groups: int,
        mid_attention: bool,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], num_groups, mid_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(before, after, num_layers, num_groups, grows=level < len(channels) - 1)
            for level, (before, after) in enumerate(pairwise((channels[0], *channels)))
        )
        self.conv_norm_out = nn.GroupNorm(num_groups, channels[-1], _EPS)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.mid_block(self.conv_in(hidden))
        for block in self.up_blocks:
            hidden = block(hidden)
        decoded: Tensor = self.conv_out(F.silu(self.conv_norm_out(hidden)))
        return decoded


class Refine(nn.Module):
    """Add to the colours what the maps beside them tell; [B, out + maps, H, W] to [B, out, H, W].

    Pixels unfolded from channels do not know those of the patch beside theirs: without it the
    edges of the patches show.
    """

    def __init__(self, out_channels: int, channels: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(out_channels + channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        colours = hidden[:, : self.conv_out.out_channels]
        refined: Tensor = colours + self.conv_out(F.silu(self.conv_in(hidden)))
        return refined


class DownBlock(nn.Module):
    """Apply one level of the encoder."""

    def __init__(
        self, in_channels: int, out_channels: int, num_layers: int, num_groups: int, shrinks: bool
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, num_layers, num_groups)
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if shrinks else [])

    def forward(self, hidden: Tensor) -> Tensor:
        for resnet in self.resnets:
            hidden = resnet(hidden)
        for downsampler in self.downsamplers:
            hidden = downsampler(hidden)
        return hidden


class UpBlock(nn.Module):
    """Apply one level of the decoder."""

    def __init__(
        self, in_channels: int, out_channels: int, num_layers: int, num_groups: int, grows: bool
    ) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, num_layers, num_groups)
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if grows else [])

    def forward(self, hidden: Tensor) -> Tensor:
        for resnet in self.resnets:
            hidden = resnet(hidden)
        for upsampler in self.upsamplers:
            hidden = upsampler(hidden)
        return hidden


class MidBlock(nn.Module):
    """Let every latent look at every other, between two residual blocks."""

    def __init__(self, channels: int, num_groups: int, has_attention: bool) -> None:
        super().__init__()
        self.resnets = _resnets(channels, channels, 2, num_groups)
        self.attentions = nn.ModuleList(
            [SpatialAttention(channels, num_groups)] if has_attention else []
        )

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.resnets[0](hidden)
        for attend in self.attentions:
            hidden = attend(hidden)
        mixed: Tensor = self.resnets[1](hidden)
        return mixed


class SpatialAttention(MultiHeadAttention):
    """Add what a single head finds over the whole map; [B, C, h, w] to [B, C, h, w]."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__(channels, num_heads=1, qkv_bias=True)
        self.group_norm = nn.GroupNorm(num_groups, channels, _EPS)

    def forward(self, hidden: Tensor, context: None = None, style: None = None) -> Tensor:  # type: ignore[override]
        tokens = to_tokens(self.group_norm(hidden))
        return hidden + to_map(super().forward(tokens), hidden.shape[-2:])


class Downsample(nn.Module):
    """Halve a map by a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden: Tensor) -> Tensor:
        # The VAE was trained with padding on the right and bottom only.
        halved: Tensor = self.conv(F.pad(hidden, (0, 1, 0, 1)))
        return halved


def _resnets(
    in_channels: int, out_channels: int, num_layers: int, num_groups: int
) -> nn.ModuleList:
    widths = (in_channels, *[out_channels] * (num_layers - 1))
    return nn.ModuleList(
        ResnetBlock(width, out_channels, num_groups=num_groups, eps=_EPS) for width in widths
    )
