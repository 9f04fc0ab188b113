"""Low-rank updates against the weight that they stand for, computed with NumPy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from diptych.models.lora import LowRank, UpdatedLayer, attach, detach, layers, refresh


def make_layer(kind: str) -> tuple[nn.Linear | nn.Conv2d, torch.Tensor, tuple[int, ...]]:
    """Return a layer, an input for it and the shape of a kernel."""
    if kind == "linear":
        return nn.Linear(5, 6), torch.randn(2, 7, 5), ()
    if kind == "1x1":
        return nn.Conv2d(5, 6, 1), torch.randn(2, 5, 8, 7), (1, 1)
    return nn.Conv2d(5, 6, 3, stride=2, padding=1), torch.randn(2, 5, 8, 7), (3, 3)


def make_update(kernel: tuple[int, ...], rank: int = 3, scale: float = 0.5) -> LowRank:
    ones = (1,) * len(kernel)
    down, up = torch.randn(rank, 5, *kernel), torch.randn(6, rank, *ones)
    return LowRank(down, up, scale)


def changed_copy(layer: nn.Module, updates: list[LowRank]) -> nn.Module:
    """Return `layer` with W + sum of scale * B A, by hand."""
    changed = copy.deepcopy(layer)
    weight = changed.weight.detach().numpy().astype(np.float64)
    for update in updates:
        down = update.down.detach().numpy().astype(np.float64)
        up = update.up.detach().numpy().astype(np.float64)
        product = up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)
        weight = weight + update.scale * product.reshape(weight.shape)
    changed.weight.data = torch.from_numpy(weight).float()
    return changed


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["linear", "1x1", "3x3 stride 2"])
def test_adds_what_the_product_says(kind: str, fused: bool) -> None:
    layer, hidden, kernel = make_layer(kind)
    updates = [make_update(kernel), make_update(kernel, rank=1, scale=-2.0)]
    before, kept, names = type(layer), layer.weight.detach().clone(), set(layer.state_dict())
    expected = [changed_copy(layer, updates[: count + 1])(hidden) for count in range(2)]
    plain = layer(hidden)
    for update, wanted in zip(updates, expected, strict=True):
        attach(layer, update, fused=fused)
        torch.testing.assert_close(layer(hidden), wanted, atol=1e-5, rtol=1e-5)
        assert names <= set(layer.state_dict())
    # The one that came first leaves first.
    detach(layer, updates[0])
    assert isinstance(layer, UpdatedLayer)
    detach(layer, updates[1])
    assert type(layer) is before
    assert torch.equal(layer.weight, kept)
    assert torch.equal(layer(hidden), plain)
    assert set(layer.state_dict()) == names


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_live_and_fused_stand_together(order: tuple[int, int, int]) -> None:
    layer, hidden, kernel = make_layer("3x3")
    kept = layer.weight.detach().clone()
    updates = [make_update(kernel) for _ in range(3)]
    original = copy.deepcopy(layer)
    for update, fused in zip(updates, (True, False, True), strict=True):
        attach(layer, update, fused=fused)
    left = list(updates)
    for number in order:
        wanted = changed_copy(original, left)(hidden)
        torch.testing.assert_close(layer(hidden), wanted, atol=1e-5, rtol=1e-5)
        detach(layer, updates[number])
        left.remove(updates[number])
    assert torch.equal(layer.weight, kept)


@pytest.mark.parametrize("fused", [False, True])
def test_follows_a_new_scale(fused: bool) -> None:
    layer, hidden, _ = make_layer("linear")
    original, update = copy.deepcopy(layer), make_update(())
    attach(layer, update, fused=fused)
    update.scale = 3.0
    refresh([layer])
    wanted = changed_copy(original, [update])(hidden)
    torch.testing.assert_close(layer(hidden), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_restores_half_precision_to_the_bit(dtype: torch.dtype) -> None:
    layer = nn.Linear(5, 6).to(dtype)
    kept = layer.weight.detach().clone()
    updates = [make_update(()) for _ in range(2)]
    for update in updates:
        attach(layer, update, fused=True)
    wanted = kept.float() + sum(update.delta() for update in updates)
    assert torch.equal(layer.weight, wanted.to(dtype))
    assert layer.weight.dtype == dtype
    for update in updates:
        detach(layer, update)
    assert torch.equal(layer.weight, kept)


def test_keeps_the_layout_of_a_kernel() -> None:
    layer = nn.Conv2d(5, 6, 3).to(memory_format=torch.channels_last)
    place = layer.weight.data_ptr()
    attach(layer, make_update((3, 3)), fused=True)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert layer.weight.data_ptr() == place


def test_trains_only_the_update() -> None:
    layer, hidden, _ = make_layer("linear")
    layer.requires_grad_(False)
    update = make_update(())
    attach(layer, update)
    layer(hidden).square().sum().backward()
    assert update.down.grad is not None and update.up.grad is not None
    assert layer.weight.grad is None


def test_survives_a_copy_and_a_subclass() -> None:
    class Doubled(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden)

    layer, hidden = Doubled(5, 6), torch.randn(2, 5)
    plain, update = layer(hidden), make_update(())
    attach(layer, update)
    added = update(hidden, layer)
    torch.testing.assert_close(layer(hidden), plain + added)
    twin = copy.deepcopy(layer)
    detach(layer, update)
    assert type(layer) is Doubled
    torch.testing.assert_close(twin(hidden), plain + added)


def test_lists_layers_by_path() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Conv2d(1, 1, 1)))
    assert list(layers(module)) == ["0", "2.0"]
