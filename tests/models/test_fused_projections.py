"""Fused projections give what the layers give one by one, whatever happens to the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diptych.models import clip_text, vit
from diptych.models.fused_projections import FusedProjections, fuse_projections
from diptych.models.layers import MultiHeadAttention
from diptych.models.lora import LowRank, attach, detach
from diptych.models.unet import UNet, UNetConfig

Made = tuple[FusedProjections, tuple[Tensor, ...], int]


def to_itself() -> Made:
    return MultiHeadAttention(12, 3), (torch.randn(2, 7, 12),), 2


def to_itself_with_biases() -> Made:
    return MultiHeadAttention(12, 3, qkv_bias=True), (torch.randn(2, 7, 12),), 2


def to_words() -> Made:
    attend = MultiHeadAttention(12, 3, context_width=8)
    return attend, (torch.randn(2, 7, 12), torch.randn(2, 5, 8)), 3


def of_vit() -> Made:
    return vit.SelfAttention(12, 3, qkv_bias=True), (torch.randn(2, 7, 12),), 2


def of_clip() -> Made:
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    return clip_text.SelfAttention(12, 3), (torch.randn(2, 7, 12), mask), 2


KINDS = [to_itself, to_itself_with_biases, to_words, of_vit, of_clip]


class Products(TorchFunctionMode):
    """Count the linear layers that run."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is F.linear
        return func(*args, **(kwargs or {}))


def run(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, int]:
    with torch.inference_mode(), Products() as products:
        return module(*inputs), products.count


def by_hand(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Run a copy that was never fused, with the weights that `module` has by name."""
    plain = copy.deepcopy(module)
    for layer in plain.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, nn.Parameter(parameter.detach().clone()))
    found, products = run(plain, inputs)
    assert products == 4
    return found


def first(module: FusedProjections) -> nn.Linear:
    return module.reading_one()[-1]


@pytest.mark.parametrize("make", KINDS)
def test_one_product_gives_the_same(make: Callable[[], Made]) -> None:
    torch.manual_seed(1)
    module, inputs, products = make()
    wanted, before = run(module, inputs)
    kept = {name: each.clone() for name, each in module.state_dict().items()}
    fuse_projections(module)
    found, after = run(module, inputs)
    assert (before, after) == (4, products)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert module.state_dict().keys() == kept.keys()
    assert all(torch.equal(each, kept[name]) for name, each in module.state_dict().items())


@pytest.mark.parametrize("make", KINDS)
def test_changes_in_place_are_seen(make: Callable[[], Made]) -> None:
    torch.manual_seed(2)
    module, inputs, products = make()
    fuse_projections(module)
    others = {name: torch.randn_like(each) for name, each in module.state_dict().items()}
    module.load_state_dict(others)
    found, count = run(module, inputs)
    assert count == products
    torch.testing.assert_close(found, by_hand(module, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", KINDS)
def test_loras_come_and_go(make: Callable[[], Made]) -> None:
    torch.manual_seed(3)
    module, inputs, products = make()
    fuse_projections(module)
    before, _ = run(module, inputs)
    layer = first(module)
    update = LowRank(torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2))
    changed = by_hand(module, inputs)
    attach(layer, update)
    live, count = run(module, inputs)
    assert count > products
    detach(layer, update)
    attach(layer, update, fused=True)
    fused, count = run(module, inputs)
    assert count == products
    torch.testing.assert_close(fused, live, rtol=0, atol=1e-5)
    assert (fused - changed).abs().max() > 1e-3
    detach(layer, update)
    after, count = run(module, inputs)
    assert count == products
    assert torch.equal(after, before)


@pytest.mark.parametrize("make", KINDS)
def test_other_memory_undoes_it(make: Callable[[], Made]) -> None:
    torch.manual_seed(4)
    module, inputs, products = make()
    fuse_projections(module)
    replaced = copy.deepcopy(module)
    layer = first(replaced)
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    fuse_projections(module)  # again, and nothing else
    assert run(module, inputs)[1] == products
    moved = copy.deepcopy(module).double()
    with torch.inference_mode():
        doubles = tuple(x.double() if x.is_floating_point() else x for x in inputs)
        torch.testing.assert_close(
            moved(*doubles).float(), run(module, inputs)[0], rtol=0, atol=1e-5
        )
    found, count = run(replaced, inputs)
    assert count == 4
    torch.testing.assert_close(found, by_hand(replaced, inputs), rtol=0, atol=1e-5)
    # A replaced parameter within a fused module, not in a copy of one.
    layer = first(module)
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))
    found, count = run(module, inputs)
    assert count == 4
    torch.testing.assert_close(found, by_hand(module, inputs), rtol=0, atol=1e-5)


def test_a_copy_is_a_copy() -> None:
    torch.manual_seed(5)
    module, inputs, products = to_itself()
    fuse_projections(module)
    before, _ = run(module, inputs)
    other = copy.deepcopy(module)
    with torch.no_grad():
        first(other).weight.zero_()
    assert torch.equal(run(module, inputs)[0], before)
    assert not torch.equal(run(other, inputs)[0], before)
    fuse_projections(other)
    assert run(other, inputs)[1] == products


def test_layers_learn_by_themselves() -> None:
    torch.manual_seed(6)
    module, inputs, _ = to_itself()
    fuse_projections(module)
    module(*inputs).square().sum().backward()
    for layer in module.reading_one():
        assert layer.weight.grad is not None
        assert layer.weight.grad.abs().sum() > 0


def test_layers_of_two_kinds_stay_apart() -> None:
    torch.manual_seed(7)
    module, inputs, _ = to_words()
    layer = first(module)
    attach(layer, LowRank(torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)))
    fuse_projections(module)
    assert run(module, inputs)[1] == 6


def test_a_whole_unet() -> None:
    torch.manual_seed(8)
    unet = UNet(UNetConfig.tiny()).eval()
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0]), torch.randn(2, 7, 32))
    wanted, before = run(unet, inputs)
    fuse_projections(unet)
    found, after = run(unet, inputs)
    blocks = sum(name.endswith("attn1") for name, _ in unet.named_modules())
    assert blocks > 0
    assert after == before - 3 * blocks  # two fewer where points look at points, one at words
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
