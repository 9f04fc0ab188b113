"""Predict the noise in latents: the UNet of Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.models.layers import ResnetBlock, TimestepEmbedding, Upsample, timestep_embedding
from diptych.models.unet_blocks import (
    DownBlock,
    Downsample,
    MidBlock,
    SpatialTransformer,
    Style,
    UpBlock,
)

__all__ = [
    "DEEP_FEATURES",
    "INPUTS",
    "LCM_INPUTS",
    "OUTPUTS",
    "SDXL_INPUTS",
    "STYLE_INPUTS",
    "UNet",
    "UNetConfig",
]

INPUTS = {"latents": "B C h w", "timestep": "B", "encoder_hidden_states": "B T D"}
SDXL_INPUTS = {"text_embeds": "B E", "time_ids": "B 6"}  # besides, where the config wants them
LCM_INPUTS = {"timestep_cond": "B G"}
# May be left out. L are the layers of self-attention on the way up, coarsest first.
STYLE_INPUTS = {
    "key_rows": "L B",
    "query_rows": "B",
    "query_preservation": "L B",
    "attention_temperature": "L B",
}
DEEP_FEATURES = {"deep_features": "B C h w"}  # given back, and taken at a later step
OUTPUTS = {"noise_pred": "B 4 h w", **DEEP_FEATURES}


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """Describe a UNet; the defaults are Stable Diffusion 1.5. Tuples go by level, finest first."""

    sample_size: int = 64
    in_channels: int = 4  # 9 for inpainting checkpoints
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    down_attention: tuple[bool, ...] = (True, True, True, False)
    up_attention: tuple[bool, ...] | None = None  # None: as `down_attention`
    mid_attention: bool = True
    transformer_layers_per_block: tuple[int, ...] = (1, 1, 1, 1)
    mid_transformer_layers: int | None = None  # None: as the coarsest level
    num_attention_heads: tuple[int, ...] = (8, 8, 8, 8)  # a count, not a width
    cross_attention_dim: int = 768
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    upcast_attention: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    addition_time_embed_dim: int | None = None  # 256 for SDXL
    projection_class_embeddings_input_dim: int | None = None  # 2816 for SDXL
    time_cond_proj_dim: int | None = None  # 256 for LCM: the guidance scale enters the network

    @property
    def finest_attention(self) -> int:
        """Return the finest level that has attention; -1 where none has."""
        both = zip(self.down_attention, self.up_attention or self.down_attention, strict=True)
        return next((level for level, has in enumerate(both) if any(has)), -1)

    @property
    def inputs(self) -> dict[str, str]:
        """Name what `UNet` takes under this config, with shape letters."""
        sdxl = SDXL_INPUTS if self.addition_time_embed_dim is not None else {}
        lcm = LCM_INPUTS if self.time_cond_proj_dim is not None else {}
        return {**INPUTS, **sdxl, **lcm}

    @classmethod
    def tiny(cls) -> UNetConfig:
        return cls(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_attention=(True, False),
            transformer_layers_per_block=(1, 1),
            num_attention_heads=(2, 4),
            cross_attention_dim=32,
            norm_num_groups=8,
        )


class UNet(nn.Module):
    """Predict the noise (or v, or the sample) in latents (Rombach et al. 2022)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, levels = config.block_out_channels, range(len(config.block_out_channels))
        width = 4 * channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], width, config.time_cond_proj_dim)
        self.add_embedding: TimestepEmbedding | None = None
        if config.projection_class_embeddings_input_dim is not None:
            self.add_embedding = TimestepEmbedding(
                config.projection_class_embeddings_input_dim, width
            )
        self.down_blocks = nn.ModuleList(self._down_block(level, width) for level in levels)
        self.mid_block = self._mid_block(width)
        self.up_blocks = nn.ModuleList(self._up_block(level, width) for level in reversed(levels))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        key_rows: Tensor | None = None,
        query_rows: Tensor | None = None,
        query_preservation: Tensor | None = None,
        attention_temperature: Tensor | None = None,
    ) -> Tensor:
        """Map `latents` [B, C, h, w] at `timestep` [B] to `noise_pred` [B, out, h, w].

        `encoder_hidden_states` is [B, T, D]. SDXL takes `text_embeds` [B, E] and `time_ids`
        [B, 6] as well, LCM `timestep_cond` [B, G]. For style transfer (Chung et al. 2024, StyleID)
        a row b takes, in layer l of the self-attentions on the way up, keys and values of row
        `key_rows` [L, B], its query blended with that of row `query_rows` [B] by the share
        `query_preservation` [L, B], scores times `attention_temperature` [L, B]; all four or none.
        """
        conditions = (text_embeds, time_ids, timestep_cond)
        style = (key_rows, query_rows, query_preservation, attention_temperature)
        return self.predict(latents, timestep, encoder_hidden_states, *conditions, *style)[0]

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        key_rows: Tensor | None = None,
        query_rows: Tensor | None = None,
        query_preservation: Tensor | None = None,
        attention_temperature: Tensor | None = None,
        deep_features: Tensor | None = None,
        token_merging_ratio: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """Return what `forward` does and the `deep_features` [B, C, h, w], what the last block got.

        They change little from one step to the next (Ma et al. 2023, DeepCache): with those of an
        earlier step only the last block runs. `token_merging_ratio` is the share of points that
        the self-attentions of the finest level do without, not with style.
        """
        styles = self._styles(key_rows, query_rows, query_preservation, attention_temperature)
        time = self._embed_time(latents, timestep, text_embeds, time_ids, timestep_cond)
        first = self.conv_in(latents)
        merged = [0.0] * len(self.up_blocks)
        if self.config.finest_attention >= 0:
            merged[self.config.finest_attention] = token_merging_ratio
        if deep_features is None:
            deep_features = self._deepen(first, time, encoder_hidden_states, styles, merged)
        rest = (time, encoder_hidden_states, styles, merged[0])
        hidden = self.up_blocks[-1](deep_features, [first], *rest, start=-1)
        noise_pred: Tensor = self.conv_out(F.silu(self.conv_norm_out(hidden)))
        return noise_pred, deep_features

    def _deepen(
        self,
        first: Tensor,
        time: Tensor,
        context: Tensor,
        styles: Iterator[Style],
        merged: Sequence[float],
    ) -> Tensor:
        """Run all but the last block; `merged` is the share of tokens to merge by level."""
        hidden, skips = first, [first]
        for block, ratio in zip(self.down_blocks, merged, strict=True):
            hidden, found = block(hidden, time, context, ratio)
            skips += found
        hidden = self.mid_block(hidden, time, context)
        *coarser, finest = self.up_blocks
        for block, ratio in zip(coarser, reversed(merged[1:]), strict=True):
            hidden = block(hidden, skips, time, context, styles, ratio)
        deep: Tensor = finest(hidden, skips, time, context, styles, merged[0], stop=-1)
        return deep

    def _styles(
        self,
        key_rows: Tensor | None,
        query_rows: Tensor | None,
        query_preservation: Tensor | None,
        attention_temperature: Tensor | None,
    ) -> Iterator[Style]:
        if key_rows is None:
            return iter(())
        assert query_rows is not None, "style takes all four"
        assert query_preservation is not None and attention_temperature is not None
        keys, shares, temperatures = key_rows.long(), query_preservation, attention_temperature
        rows = query_rows.long()
        return iter([(keys[n], rows, shares[n], temperatures[n]) for n in range(len(keys))])

    def _embed_time(
        self,
        latents: Tensor,
        timestep: Tensor,
        text_embeds: Tensor | None,
        time_ids: Tensor | None,
        timestep_cond: Tensor | None,
    ) -> Tensor:
        """Return what conditions every residual block, [B, 4 * channels], after its SiLU."""
        waves = self._waves(timestep.reshape(-1), self.config.block_out_channels[0])
        embedded: Tensor = self.time_embedding(waves.to(latents.dtype), timestep_cond)
        if self.add_embedding is not None:
            assert text_embeds is not None and time_ids is not None, "this UNet needs both"
            sizes = self._waves(time_ids, self.config.addition_time_embed_dim or 0).flatten(1)
            added = torch.cat([text_embeds, sizes.to(text_embeds.dtype)], dim=-1)
            embedded = embedded + self.add_embedding(added.to(latents.dtype))
        return F.silu(embedded)

    def _waves(self, steps: Tensor, width: int) -> Tensor:
        return timestep_embedding(
            steps,
            width,
            flip_sin_to_cos=self.config.flip_sin_to_cos,
            freq_shift=self.config.freq_shift,
        )

    def _down_block(self, level: int, time_width: int) -> DownBlock:
        config, channels = self.config, self.config.block_out_channels
        out = channels[level]
        widths = (channels[max(level - 1, 0)], *[out] * (config.layers_per_block - 1))
        transformers = (
            [self._transformer(level) for _ in widths] if config.down_attention[level] else []
        )
        return DownBlock(
            [self._resnet(width, out, time_width) for width in widths],
            transformers,
            Downsample(out) if level < len(channels) - 1 else None,
        )

    def _mid_block(self, time_width: int) -> MidBlock:
        config, channels = self.config, self.config.block_out_channels[-1]
        if not config.mid_attention:
            return MidBlock([self._resnet(channels, channels, time_width)], [])
        depth = config.mid_transformer_layers
        return MidBlock(
            [self._resnet(channels, channels, time_width) for _ in range(2)],
            [self._transformer(len(config.block_out_channels) - 1, depth)],
        )

    def _up_block(self, level: int, time_width: int) -> UpBlock:
        config, channels = self.config, self.config.block_out_channels
        out = channels[level]
        # What comes up from the coarser level, then this level's own; beside it the skips, in the
        # reverse of the order in which the way down left them.
        widths = (channels[min(level + 1, len(channels) - 1)], *[out] * config.layers_per_block)
        skips = (*[out] * config.layers_per_block, channels[max(level - 1, 0)])
        has_attention = (config.up_attention or config.down_attention)[level]
        return UpBlock(
            [
                self._resnet(width + skip, out, time_width)
                for width, skip in zip(widths, skips, strict=True)
            ],
            [self._transformer(level) for _ in widths] if has_attention else [],
            Upsample(out) if level > 0 else None,
        )

    def _resnet(self, in_channels: int, out_channels: int, time_width: int) -> ResnetBlock:
        return ResnetBlock(
            in_channels,
            out_channels,
            time_width=time_width,
            num_groups=self.config.norm_num_groups,
            eps=self.config.norm_eps,
        )

    def _transformer(self, level: int, depth: int | None = None) -> SpatialTransformer:
        config = self.config
        return SpatialTransformer(
            config.block_out_channels[level],
            config.num_attention_heads[level],
            config.transformer_layers_per_block[level] if depth is None else depth,
            context_width=config.cross_attention_dim,
            num_groups=config.norm_num_groups,
            is_linear=config.use_linear_projection,
            upcast=config.upcast_attention,
        )
