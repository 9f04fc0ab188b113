"""A deeper UNet of the recipe begins as the shallower one."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.models.unet import UNet, UNetConfig

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "default_generator"


@pytest.fixture
def grow(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(RECIPE), *sys.path])
    import growth

    return growth.grow


def random_unet(seed: int, **changes: Any) -> UNet:
    torch.manual_seed(seed)
    plain = dataclasses.replace(
        UNetConfig.tiny(),
        block_out_channels=(16, 32, 32),
        down_attention=(False, True, True),
        up_attention=(True, True, True),
        transformer_layers_per_block=(1, 1, 1),
        num_attention_heads=(2, 4, 4),
    )
    unet = UNet(dataclasses.replace(plain, **changes))
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return unet.eval()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers_per_block": 2},
        {"layers_per_block": 4},
        {"transformer_layers_per_block": (1, 3, 2)},
        {"layers_per_block": 2, "transformer_layers_per_block": (2, 1, 2)},
    ],
)
def test_it_says_what_the_shallower_one_says(grow: Any, changes: Any, seed: int) -> None:
    former, deeper = random_unet(seed), random_unet(seed + 50, **changes)
    inputs = torch.randn(3, 4, 8, 8), torch.tensor([1.0, 300.0, 999.0]), torch.randn(3, 5, 32)
    with torch.no_grad():
        wanted = former(*inputs)
        assert (deeper(*inputs) - wanted).abs().max() > 0.1
        grow(deeper, former.state_dict())
        torch.testing.assert_close(deeper(*inputs), wanted, rtol=0, atol=1e-4)


def test_other_widths_are_refused(grow: Any) -> None:
    former, wider = random_unet(1), random_unet(2, block_out_channels=(16, 32, 48))
    with pytest.raises(SystemExit, match=r"has no place for .*: only depth may grow"):
        grow(wider, former.state_dict())
