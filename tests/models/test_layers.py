"""The one attention function, held against torch's own: values, gradients, dropout."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.models.layers import attention, causal_mask


def arrays(seed: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = [(2, 3, 7, 8), (2, 3, keys, 8), (2, 3, keys, 8)]
    return [torch.randn(*shape, generator=random).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [7, 33, 160, 161, 513])
def test_values_and_gradients(keys: int, dtype: torch.dtype, masked: bool) -> None:
    mask = causal_mask(7, keys, torch.device("cpu")) if masked else None
    ours, theirs = arrays(keys, keys, dtype), arrays(keys, keys, torch.float32)
    slope = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(9))
    mixed, weights = attention(*ours, scale=0.3, mask=mask)
    with torch.no_grad():
        told, _ = attention(*ours, scale=0.3, mask=mask)
    assert weights is None
    wanted = F.scaled_dot_product_attention(
        *(each.to(dtype).float() for each in theirs), attn_mask=mask, scale=0.3
    )
    bound = {"rtol": 0, "atol": 2e-6 if dtype == torch.float32 else 3e-2}
    for found in (mixed, told):
        torch.testing.assert_close(found.float(), wanted, **bound)
    (mixed.float() * slope).sum().backward()
    (wanted * slope).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad.float(), other.grad, **bound)


@pytest.mark.parametrize("keys", [20, 300])
def test_dropout_takes_weights_away_and_keeps_the_mean(keys: int) -> None:
    query, key, _ = arrays(3, keys, torch.float32)
    # With these values an answer is the sum of the weights that are left.
    ones = torch.ones(2, 3, keys, 8, requires_grad=True)
    torch.manual_seed(0)
    drawn = torch.stack(
        [attention(query, key, ones, scale=0.3, dropout=0.4)[0].detach() for _ in range(200)]
    )
    assert drawn.std(0).min() > 0.01
    assert drawn.mean().item() == pytest.approx(1, abs=0.02)
    none, _ = attention(query, key, ones, scale=0.3, dropout=0.0)
    torch.testing.assert_close(none, torch.ones_like(none))


def test_weights_are_those_of_the_values() -> None:
    query, key, value = arrays(4, 9, torch.float32)
    mixed, weights = attention(query, key, value, scale=1 / math.sqrt(8), need_weights=True)
    assert weights is not None
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7))
    torch.testing.assert_close(weights @ value, mixed)
    torch.testing.assert_close(mixed, F.scaled_dot_product_attention(query, key, value))
