"""Modules as networks, and the faster twin of a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from diptych.runtimes import on_torch
from diptych.runtimes.network import ChoosingNetwork, gather_rows
from diptych.runtimes.on_torch import (
    ChoosingDecoder,
    OneDnnLinear,
    faster,
    torch_networks,
    twin,
)

Make = Callable[..., Any]
VARIANTS = ["cross-attention", "prefix", "stem", "untied", "enc_to_dec_proj"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_faster_twin_computes_the_same(variant: str, module: Make) -> None:
    captioner = module(variant)
    fast = faster(captioner)
    assert fast is not captioner
    pixels, words = torch.randn(2, 3, 32, 32), torch.randint(0, 400, (2, 5))
    with torch.inference_mode():
        expected, found = captioner(pixels, words), fast(pixels, words)
        bridged = captioner.encode(pixels)
        steps = [each.step(words, bridged, None, True) for each in (captioner, fast)]
    assert torch.allclose(expected, found, atol=1e-4)
    for one, other in zip(*steps, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_twins_share_their_weights(module: Make) -> None:
    captioner = module("stem")
    fast = faster(captioner)
    kinds = {type(each) for each in fast.modules()}
    assert OneDnnLinear in kinds
    assert torch.nn.Linear not in kinds
    assert OneDnnLinear not in {type(each) for each in captioner.modules()}
    assert captioner.decoder.lm_head is None
    own = {tensor.data_ptr() for tensor in captioner.state_dict().values()}
    assert {tensor.data_ptr() for tensor in fast.state_dict().values()} == own
    assert twin(captioner).decoder.wte.weight is captioner.decoder.wte.weight


def test_without_onednn_the_module_itself_runs(
    module: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = module()
    monkeypatch.setattr(on_torch, "_multiply", lambda hidden, weight, bias: hidden @ weight.T + 2)
    assert faster(captioner) is captioner

    def missing(*_: Any) -> Any:
        raise AttributeError("_linear_pointwise")

    monkeypatch.setattr(on_torch, "_multiply", missing)
    assert faster(captioner) is captioner


def test_halves_run_as_they_are(module: Make, pictures: Make) -> None:
    captioner = module("cross-attention").to(torch.bfloat16)
    assert faster(captioner) is captioner
    networks = torch_networks(captioner)
    (bridged,) = networks["encoder"](pixel_values=pictures(1))
    logits, past = networks["decoder"](input_ids=np.array([[3]]), cross_key_values=bridged)
    assert (bridged.dtype, past.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (type(logits), logits.dtype, logits.shape) == (np.ndarray, np.float32, (1, 400))


def test_caches_stay_tensors_and_can_be_gathered(module: Make, pictures: Make) -> None:
    networks = torch_networks(module("cross-attention"))
    (bridged,) = networks["encoder"](pixel_values=pictures(2))
    assert isinstance(bridged, torch.Tensor)
    assert bridged.is_inference()
    _, past = networks["decoder"](input_ids=np.array([[1], [2]]), cross_key_values=bridged)
    rows = np.array([1, 0])
    gathered = gather_rows(past, rows)
    assert isinstance(gathered, torch.Tensor)
    assert torch.equal(gathered[:, :, 0], past[:, :, 1])
    crossed, _ = networks["decoder"](
        input_ids=np.array([[5], [6]]),
        past_key_values=gathered,
        cross_key_values=gather_rows(bridged, rows),
    )
    straight, _ = networks["decoder"](
        input_ids=np.array([[6], [5]]), past_key_values=past, cross_key_values=bridged
    )
    assert np.allclose(crossed, straight[::-1], atol=1e-5)


@pytest.mark.parametrize("variant", ["cross-attention", "prefix"])
def test_the_best_words_are_those_of_the_logits(variant: str, module: Make, pictures: Make) -> None:
    captioner = module(variant)
    networks = torch_networks(captioner)
    assert not isinstance(networks["decoder"], ChoosingNetwork), "NumPy ranks sooner on a CPU"
    choosing = ChoosingDecoder(captioner)
    assert isinstance(choosing, ChoosingNetwork)
    (bridged,) = networks["encoder"](pixel_values=pictures(3))
    given = {
        "input_ids": np.array([[1], [2], [3]]),
        next(iter(networks["encoder"].outputs)): bridged,
    }
    logits, past = networks["decoder"](**given)
    expected = torch.from_numpy(logits).log_softmax(1).sort(dim=1, descending=True)
    for count in (1, 7, 5000):
        token_ids, values, log_sums, present = choosing.best(count, **given)
        assert token_ids.shape == values.shape == (3, min(count, 400))
        assert torch.equal(present, past)
        found = values - values.max(1, keepdims=True) - log_sums[:, None]
        assert np.allclose(found, expected.values[:, :count], atol=1e-5)
        assert (logits[np.arange(3)[:, None], token_ids] == values).all()
    assert (token_ids[:, :5] == expected.indices[:, :5].numpy()).all()


def test_image_attention_is_computed_on_demand(module: Make, pictures: Make) -> None:
    for variant, tokens in (("cross-attention", 17), ("prefix", 17), ("deit", 18)):
        networks = torch_networks(module(variant))
        (bridged,) = networks["encoder"](pixel_values=pictures(1))
        name = next(iter(networks["encoder"].outputs))
        (seen,) = networks["decoder"](
            ("image_attention",), input_ids=np.array([[0, 1, 2]]), **{name: bridged}
        )
        assert (seen.shape, seen.dtype) == ((1, 3, tokens), np.float32)
        assert len(networks["decoder"](input_ids=np.array([[0]]), **{name: bridged})) == 2
