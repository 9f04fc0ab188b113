"""Merging tokens: against loops, and where it must change nothing."""

from __future__ import annotations

import dataclasses
import math
from itertools import product

import numpy as np
import pytest
import torch

from diptych.models.token_merging import TokenMerging
from diptych.models.unet import UNet, UNetConfig


def by_loops(tokens: np.ndarray, fixed: list[int], ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Return [T, D] after merging and undoing it, and how many tokens were left."""
    unit = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    others = [place for place in range(len(tokens)) if place not in fixed]
    best = {place: max(fixed, key=lambda to: unit[place] @ unit[to]) for place in others}
    ranked = sorted(others, key=lambda place: -(unit[place] @ unit[best[place]]))
    going = ranked[: min(len(others), int(len(tokens) * ratio))]
    result = tokens.copy()
    for to in fixed:
        group = [to, *(place for place in going if best[place] == to)]
        result[group] = tokens[group].mean(0)
    return result, len(tokens) - len(going)


@pytest.mark.parametrize("size", [(4, 4), (6, 8), (5, 7), (2, 3)])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.75])
def test_merges_those_most_alike(size: tuple[int, int], ratio: float) -> None:
    count = math.prod(size)
    tokens = torch.randn(2, count, 5)
    merging = TokenMerging(tokens, size, ratio)
    merged = merging.merge(tokens)
    found = merging.unmerge(merged)
    fixed = merging._fixed.tolist()
    assert len(fixed) == (size[0] // 2) * (size[1] // 2)
    for row in range(2):
        expected, left = by_loops(tokens[row].numpy(), fixed, ratio)
        assert merged.shape == (2, left, 5)
        np.testing.assert_allclose(found[row], expected, atol=1e-6)


def test_one_point_of_each_four_stays() -> None:
    fixed = TokenMerging(torch.randn(1, 48, 3), (6, 8), 0.5)._fixed.tolist()
    cells = {(place // 8 // 2, place % 8 // 2) for place in fixed}
    assert cells == set(product(range(3), range(4)))
    assert fixed == TokenMerging(torch.randn(1, 48, 3), (6, 8), 0.5)._fixed.tolist()
    assert len({(place // 8 % 2, place % 2) for place in fixed}) > 1, "not always the same corner"


def test_equal_tokens_merge_without_error() -> None:
    cells = torch.randint(1, 9, (1, 3, 4, 6)).float()
    tokens = cells.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    merging = TokenMerging(tokens, (6, 8), 0.75)
    assert merging.merge(tokens).shape == (1, 12, 6)
    torch.testing.assert_close(merging.unmerge(merging.merge(tokens)), tokens)


@pytest.mark.parametrize(
    "changes",
    [{}, {"down_attention": (False, True)}, {"down_attention": (False, False)},
     {"down_attention": (False, False), "up_attention": (True, False)}],
)  # fmt: skip
def test_in_the_network(changes: dict[str, tuple[bool, ...]]) -> None:
    model = UNet(dataclasses.replace(UNetConfig.tiny(), **changes)).eval()
    inputs = {
        "latents": torch.randn(2, 4, 8, 6),
        "timestep": torch.tensor([500.0, 20.0]),
        "encoder_hidden_states": torch.randn(2, 5, 32),
    }
    seen: list[tuple[str, int]] = []
    for name, module in model.named_modules():
        if name.endswith("attn1"):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.append((name, args[0].shape[1]))
            )
    with torch.no_grad():
        plain = model(**inputs)
        before = dict(seen)
        seen.clear()
        zero, deep = model.predict(**inputs, token_merging_ratio=0.0)
        half, _ = model.predict(**inputs, token_merging_ratio=0.5)
        assert torch.equal(zero, plain)
        levels = {name: n for name, n in before.items() if not name.startswith("mid_block")}
        finest = {name: n // 2 for name, n in levels.items() if n == max(levels.values())}
        expected = {**before, **finest}
        assert dict(seen[len(before) :]) == expected
        assert half.isfinite().all() and torch.equal(half, plain) == (not levels)
        assert (half - plain).norm() < 0.3 * plain.norm()
        alone = {name: each[:1] for name, each in inputs.items()}
        single, _ = model.predict(**alone, token_merging_ratio=0.5)
        torch.testing.assert_close(single, half[:1], atol=1e-5, rtol=1e-5)
        model.predict(**inputs, deep_features=deep, token_merging_ratio=0.75)
        line = {**inputs, "latents": inputs["latents"][:, :, :1]}
        assert torch.equal(model.predict(**line, token_merging_ratio=0.5)[0], model(**line))
