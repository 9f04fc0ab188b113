"""Hold the blocks that a UNet is made of: the levels down and up, and their transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from diptych.models.layers import (
    GegluFeedForward,
    MultiHeadAttention,
    to_map,
    to_tokens,
)
from diptych.models.token_merging import TokenMerging

__all__ = [
    "DownBlock",
    "Downsample",
    "MidBlock",
    "SpatialTransformer",
    "Style",
    "TransformerBlock",
    "UpBlock",
]

Style = tuple[Tensor, Tensor, Tensor, Tensor]

_TRANSFORMER_EPS = 1e-6  # of the norm before a transformer, whatever a UNet's `norm_eps` says


class DownBlock(nn.Module):
    """Apply one level on the way down; the maps that its counterpart on the way up needs."""

    def __init__(
        self,
        resnets: Sequence[nn.Module],
        attentions: Sequence[nn.Module],
        downsampler: nn.Module | None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])

    def forward(
        self, hidden: Tensor, time: Tensor, context: Tensor, merged: float = 0.0
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the coarser map and every map on the way to it."""
        found = []
        for index, resnet in enumerate(self.resnets):
            hidden = resnet(hidden, time)
            if self.attentions:
                hidden = self.attentions[index](hidden, context, merged=merged)
            found.append(hidden)
        for downsampler in self.downsamplers:
            hidden = downsampler(hidden)
            found.append(hidden)
        return hidden, found


class MidBlock(nn.Module):
    """Work on the coarsest map; [B, C, h, w] to [B, C, h, w]."""

    def __init__(self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)

    def forward(self, hidden: Tensor, time: Tensor, context: Tensor) -> Tensor:
        hidden = self.resnets[0](hidden, time)
        for index, attend in enumerate(self.attentions):
            hidden = self.resnets[index + 1](attend(hidden, context), time)
        return hidden


class UpBlock(nn.Module):
    """Apply one level on the way up, beside the maps of the way down."""

    def __init__(
        self,
        resnets: Sequence[nn.Module],
        attentions: Sequence[nn.Module],
        upsampler: nn.Module | None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])

    def forward(
        self,
        hidden: Tensor,
        skips: list[Tensor],
        time: Tensor,
        context: Tensor,
        styles: Iterator[Style],
        merged: float = 0.0,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """Return the finer map; takes its maps from the end of `skips`.

        `start` and `stop` name the layers that run, as in a slice.
        """
        for index in range(len(self.resnets))[start:stop]:
            hidden = self.resnets[index](torch.cat([hidden, skips.pop()], dim=1), time)
            if self.attentions:
                hidden = self.attentions[index](hidden, context, next(styles, None), merged)
        for upsampler in self.upsamplers:
            # An odd edge was rounded up on the way down: double to what the skip has, not by two.
            hidden = upsampler(hidden, skips[-1].shape[-2:])
        return hidden


class Downsample(nn.Module):
    """Halve a map by a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        halved: Tensor = self.conv(hidden)
        return halved


class SpatialTransformer(nn.Module):
    """Add what transformer blocks make of a map's points; [B, C, h, w] to [B, C, h, w]."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        depth: int,
        *,
        context_width: int,
        num_groups: int,
        is_linear: bool,
        upcast: bool,
    ) -> None:
        super().__init__()
        self.is_linear = is_linear
        self.norm = nn.GroupNorm(num_groups, channels, _TRANSFORMER_EPS)
        self.proj_in = _projection(channels, is_linear)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, num_heads, context_width, upcast) for _ in range(depth)
        )
        self.proj_out = _projection(channels, is_linear)

    def forward(
        self, hidden: Tensor, context: Tensor, style: Style | None = None, merged: float = 0.0
    ) -> Tensor:
        residual, size = hidden, hidden.shape[-2:]
        hidden = self.norm(hidden)
        # The two kinds of checkpoints store the same projection as a 1x1 convolution or a matrix.
        if self.is_linear:
            tokens = self.proj_in(to_tokens(hidden))
        else:
            tokens = to_tokens(self.proj_in(hidden))
        for block in self.transformer_blocks:
            tokens = block(tokens, context, style, merged, size)
        if self.is_linear:
            hidden = to_map(self.proj_out(tokens), size)
        else:
            hidden = self.proj_out(to_map(tokens, size))
        return hidden + residual


class TransformerBlock(nn.Module):
    """Look at the map, look at the words, think; [B, T, D] to [B, T, D]."""

    def __init__(self, width: int, num_heads: int, context_width: int, upcast: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = MultiHeadAttention(width, num_heads, upcast=upcast)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = MultiHeadAttention(
            width, num_heads, context_width=context_width, upcast=upcast
        )
        self.norm3 = nn.LayerNorm(width)
        self.ff = GegluFeedForward(width)

    def forward(
        self,
        tokens: Tensor,
        context: Tensor,
        style: Style | None = None,
        merged: float = 0.0,
        size: Sequence[int] = (),
    ) -> Tensor:
        """Attend; `merged` is the share of points, on a map of `size`, to merge at first."""
        normed = self.norm1(tokens)
        if merged and min(size) > 1:
            merging = TokenMerging(normed, size, merged)
            tokens = tokens + merging.unmerge(self.attn1(merging.merge(normed)))
        else:
            tokens = tokens + self.attn1(normed, style=style)
        tokens = tokens + self.attn2(self.norm2(tokens), context)
        tokens = tokens + self.ff(self.norm3(tokens))
        return tokens


def _projection(channels: int, is_linear: bool) -> nn.Module:
    return nn.Linear(channels, channels) if is_linear else nn.Conv2d(channels, channels, 1)
