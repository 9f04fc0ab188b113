"""Encode a picture as a row of vectors: the Vision Transformer and its distilled sibling DeiT."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diptych.models.fused_projections import FusedProjections
from diptych.models.layers import ACTIVATIONS, attention, split_heads

__all__ = ["INPUTS", "OUTPUTS", "ViT", "ViTConfig"]

INPUTS = {"pixel_values": "B C H W"}
OUTPUTS = {"encoder_hidden_states": "B P D"}


@dataclass(frozen=True, slots=True)
class ViTConfig:
    """Describe a ViT; the defaults are `google/vit-base-patch16-224-in21k`."""

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    distillation_token: bool = False  # DeiT carries a second learned token beside CLS
    stem_channels: tuple[int, ...] = ()  # one stride-2 stage each, before the transformer
    stem_blocks: int = 1  # residual blocks a stage
    dropout: float = 0.0

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Count the vectors that come out: CLS, DeiT's distillation token and the patches."""
        return self.num_patches + 1 + self.distillation_token

    @classmethod
    def tiny(cls) -> ViTConfig:
        return cls(
            image_size=32,
            patch_size=8,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
        )


class ViT(nn.Module):
    """Encode pictures as token vectors (Dosovitskiy et al. 2021; DeiT: Touvron et al. 2021)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map `pixel_values` [B, C, H, W] to `encoder_hidden_states` [B, P, D]."""
        hidden = self.embeddings(pixel_values)
        for layer in self.encoder.layer:
            hidden = layer(hidden)
        normed: Tensor = self.layernorm(hidden)
        return normed


class Embeddings(nn.Module):
    """Cut the picture into patches, put the learned tokens before them, add the positions."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.distillation_token: nn.Parameter | None = None
        if config.distillation_token:
            self.distillation_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.num_tokens, width))
        if config.stem_channels:
            self.patch_embeddings: nn.Module = ConvStem(
                config.num_channels, config.stem_channels, config.stem_blocks, width
            )
        else:
            self.patch_embeddings = PatchEmbeddings(config.num_channels, config.patch_size, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)
        tokens = [self.cls_token.expand(len(patches), -1, -1)]
        if self.distillation_token is not None:
            tokens.append(self.distillation_token.expand(len(patches), -1, -1))
        hidden = torch.cat([*tokens, patches], dim=1) + self.position_embeddings
        dropped: Tensor = self.dropout(hidden)
        return dropped


class PatchEmbeddings(nn.Module):
    """Project each patch linearly; [B, C, H, W] to [B, D, h, w]."""

    def __init__(self, num_channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(num_channels, width, patch_size, patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        projected: Tensor = self.projection(pixel_values)
        return projected


class ConvStem(nn.Module):
    """Replace the linear patches by a small residual network (Xiao et al. 2021).

    Each stage halves the picture, so `len(channels)` stages stand for patches of 2**len pixels.
    Convolutions bring the locality that a ViT would have to learn from millions of pictures.
    """

    def __init__(
        self, num_channels: int, channels: tuple[int, ...], blocks: int, width: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((num_channels, *channels[:-1]), channels, strict=True):
            layers += [ConvNorm(before, after, stride=2), nn.ReLU()]
            # The first stage works on the most pixels and sees only edges: no blocks there.
            if before != num_channels:
                layers += [ResidualBlock(after) for _ in range(blocks)]
        self.stages = nn.Sequential(*layers)
        self.projection = nn.Conv2d(channels[-1], width, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        projected: Tensor = self.projection(self.stages(pixel_values))
        return projected


class ConvNorm(nn.Sequential):
    """Convolve 3x3 and normalise by batch statistics."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after)
        )


class ResidualBlock(nn.Module):
    """Add two convolutions to the input (He et al. 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_1 = ConvNorm(channels, channels)
        self.conv_2 = ConvNorm(channels, channels)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.relu(hidden + self.conv_2(torch.relu(self.conv_1(hidden))))


class Encoder(nn.Module):
    """Hold the transformer layers."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))


class Layer(nn.Module):
    """Apply one pre-norm block; [B, P, D] to [B, P, D]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.layernorm_before = nn.LayerNorm(width, config.layer_norm_eps)
        self.attention = SelfAttention(width, config.num_attention_heads, config.qkv_bias)
        self.layernorm_after = nn.LayerNorm(width, config.layer_norm_eps)
        self.mlp = Mlp(width, config.intermediate_size, config.hidden_act)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.dropout(self.attention(self.layernorm_before(hidden)))
        hidden = hidden + self.dropout(self.mlp(self.layernorm_after(hidden)))
        return hidden


class SelfAttention(FusedProjections):
    """Let every token look at every token."""

    def __init__(self, width: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width, qkv_bias)
        self.key = nn.Linear(width, width, qkv_bias)
        self.value = nn.Linear(width, width, qkv_bias)
        self.output = nn.Linear(width, width)

    def reading_one(self) -> tuple[nn.Linear, ...]:
        return self.query, self.key, self.value

    def forward(self, hidden: Tensor) -> Tensor:
        head_size = hidden.shape[-1] // self.num_heads
        query, key, value = (split_heads(each, self.num_heads) for each in self.project(hidden))
        mixed, _ = attention(query, key, value, scale=head_size**-0.5)
        projected: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return projected


class Mlp(nn.Module):
    """Widen, bend, narrow."""

    def __init__(self, width: int, intermediate_size: int, hidden_act: str) -> None:
        super().__init__()
        self.intermediate = nn.Linear(width, intermediate_size)
        self.act = ACTIVATIONS[hidden_act]
        self.output = nn.Linear(intermediate_size, width)

    def forward(self, hidden: Tensor) -> Tensor:
        narrowed: Tensor = self.output(self.act(self.intermediate(hidden)))
        return narrowed
