"""Hold the parts that several networks share: the one attention function, blocks, activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.models.fused_projections import FusedProjections

__all__ = [
    "ACTIVATIONS",
    "GegluFeedForward",
    "MultiHeadAttention",
    "ResnetBlock",
    "TimestepEmbedding",
    "Upsample",
    "attention",
    "causal_mask",
    "split_heads",
    "timestep_embedding",
    "to_map",
    "to_tokens",
]

# erf-GELU and tanh-GELU are different functions, and checkpoints depend on which one is meant.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend from `query` [B, heads, T, d] to `key`, `value` [B, heads, S, d].

    `mask` [T, S] is true where a query may look. Returns the mixed values [B, heads, T, d] and,
    with `need_weights`, the weights [B, heads, T, S] (else None). Vaswani et al. 2017, eq. 1.
    """
    if not need_weights and not _is_learnt_shortly(query, key):
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale
        )
        return mixed, None
    scores = (query * scale) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)  # in float32 within, whatever goes in and comes out
    mixed = F.dropout(weights, dropout) @ value if dropout else weights @ value
    return mixed, weights if need_weights else None


# Keys up to which the way back through torch's fused kernel takes longer than through three plain
# operations, on a processor: up to fifteen times in 16 bits (torch 2.13, benchmarks in lab-notes).
_SHORT, _SHORT_IN_16_BITS = 160, 512


def _is_learnt_shortly(query: Tensor, key: Tensor) -> bool:
    if query.device.type != "cpu" or not (torch.is_grad_enabled() and query.requires_grad):
        return False
    return key.shape[2] <= (_SHORT if query.dtype == torch.float32 else _SHORT_IN_16_BITS)


def causal_mask(new: int, total: int, device: torch.device) -> Tensor:
    """Return [new, total]: the last `new` of `total` positions see all up to themselves."""
    positions = torch.arange(total, device=device)
    return positions[None, :] <= positions[total - new :, None]


def timestep_embedding(
    timestep: Tensor, width: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0
) -> Tensor:
    """Spread `timestep` (any shape) over `width` sines and cosines: [*shape, width], float32.

    Ho et al. 2020, after Vaswani et al. 2017. Cosines come first with `flip_sin_to_cos`.
    """
    half = width // 2
    # In float32 whatever the network computes in: bfloat16 cannot tell 999 from 1000.
    steps = torch.arange(half, dtype=torch.float32, device=timestep.device)
    frequencies = torch.exp(-math.log(10000) / (half - freq_shift) * steps)
    angles = timestep.float()[..., None] * frequencies
    waves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(waves, dim=-1), (0, width % 2))


class TimestepEmbedding(nn.Module):
    """Turn what conditions every residual block into one vector: [B, in] to [B, width]."""

    def __init__(self, in_channels: int, width: int, cond_proj_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, width)
        self.linear_2 = nn.Linear(width, width)
        self.cond_proj: nn.Linear | None = None
        if cond_proj_dim is not None:
            self.cond_proj = nn.Linear(cond_proj_dim, in_channels, bias=False)

    def forward(self, hidden: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None and self.cond_proj is not None:
            hidden = hidden + self.cond_proj(condition)
        embedded: Tensor = self.linear_2(F.silu(self.linear_1(hidden)))
        return embedded


class ResnetBlock(nn.Module):
    """Add two normed convolutions to the input; [B, C, h, w] to [B, out, h, w].

    `time_width` is the size of the vector that is added between them, None where there is none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_width: int | None = None,
        num_groups: int = 32,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj: nn.Linear | None = None
        if time_width is not None:
            self.time_emb_proj = nn.Linear(time_width, out_channels)
        self.norm2 = nn.GroupNorm(num_groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, hidden: Tensor, time: Tensor | None = None) -> Tensor:
        """Take `time` [B, time_width] after its SiLU, which is the same for all blocks."""
        residual = hidden if self.conv_shortcut is None else self.conv_shortcut(hidden)
        hidden = self.conv1(F.silu(self.norm1(hidden)))
        if time is not None and self.time_emb_proj is not None:
            hidden = hidden + self.time_emb_proj(time)[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + residual


class Upsample(nn.Module):
    """Repeat pixels, then convolve; [B, C, h, w] to [B, C, *size], twice as large by default."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor, size: Sequence[int] | None = None) -> Tensor:
        if size is None:
            hidden = F.interpolate(hidden, scale_factor=2.0, mode="nearest")
        else:
            hidden = F.interpolate(hidden, size=tuple(size), mode="nearest")
        grown: Tensor = self.conv(hidden)
        return grown


class MultiHeadAttention(FusedProjections):
    """Let `hidden` [B, T, D] look at `context` [B, S, E], or at itself; gives [B, T, D].

    With a `context_width` (E) it takes a context, without one it has none.
    `upcast` computes the scores in float32 where float16 would overflow.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        context_width: int | None = None,
        qkv_bias: bool = False,
        upcast: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.upcast = upcast
        self.is_cross = context_width is not None
        self.to_q = nn.Linear(width, width, qkv_bias)
        self.to_k = nn.Linear(context_width or width, width, qkv_bias)
        self.to_v = nn.Linear(context_width or width, width, qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def reading_one(self) -> tuple[nn.Linear, ...]:
        return (self.to_k, self.to_v) if self.is_cross else (self.to_q, self.to_k, self.to_v)

    def forward(
        self,
        hidden: Tensor,
        context: Tensor | None = None,
        style: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend; `style` lets rows take from others, as `UNet.forward` tells."""
        if self.is_cross:
            key, value = self.project(hidden if context is None else context)
            query = self.to_q(hidden)
        else:
            query, key, value = self.project(hidden)
        if style is not None:
            key_rows, query_rows, share, temperature = style
            key, value = key[key_rows], value[key_rows]
            query = query + (query[query_rows] - query) * share[:, None, None].to(query.dtype)
            # The temperature multiplies the scores, and each row may have another one.
            query = query * temperature[:, None, None].to(query.dtype)
        query, key, value = (split_heads(each, self.num_heads) for each in (query, key, value))
        scale = query.shape[-1] ** -0.5
        if self.upcast and query.dtype == torch.float16:
            mixed, _ = attention(query.float(), key.float(), value.float(), scale=scale)
            mixed = mixed.to(query.dtype)
        else:
            mixed, _ = attention(query, key, value, scale=scale)
        projected: Tensor = self.to_out[0](mixed.transpose(1, 2).flatten(2))
        return projected


class GegluFeedForward(nn.Module):
    """Widen fourfold, gate one half by the other, narrow; [B, T, D] to [B, T, D]. Shazeer 2020."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The second place was a dropout's; the names in published files count it.
        self.net = nn.ModuleList(
            [Geglu(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)]
        )

    def forward(self, hidden: Tensor) -> Tensor:
        narrowed: Tensor = self.net[2](self.net[0](hidden))
        return narrowed


class Geglu(nn.Module):
    """Project to twice `out_features` and multiply one half by the GELU of the other."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, 2 * out_features)

    def forward(self, hidden: Tensor) -> Tensor:
        value, gate = self.proj(hidden).chunk(2, dim=-1)
        gated: Tensor = value * F.gelu(gate)
        return gated


def split_heads(hidden: Tensor, num_heads: int) -> Tensor:
    """Turn [B, T, D] into [B, heads, T, d]."""
    rows, words, width = hidden.shape
    return hidden.view(rows, words, num_heads, width // num_heads).transpose(1, 2)


def to_tokens(hidden: Tensor) -> Tensor:
    """Turn a map [B, C, h, w] into tokens [B, h*w, C]; free where it is channels-last."""
    return hidden.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """Turn tokens [B, h*w, C] into a channels-last map [B, C, h, w] of `size` (h, w)."""
    rows, _, channels = tokens.shape
    return tokens.transpose(1, 2).reshape(rows, channels, *size)
