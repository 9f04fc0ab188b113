"""Hold the parts that several networks share: the one attention function and the activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "attention", "causal_mask"]

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
    if not need_weights:
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale
        )
        return mixed, None
    scores = (query * scale) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.float().softmax(-1).to(query.dtype)
    return weights @ value, weights


def causal_mask(new: int, total: int, device: torch.device) -> Tensor:
    """Return [new, total]: the last `new` of `total` positions see all up to themselves."""
    positions = torch.arange(total, device=device)
    return positions[None, :] <= positions[total - new :, None]
