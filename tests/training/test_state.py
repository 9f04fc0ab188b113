"""What an optimizer remembers comes back as it was, whatever it is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from diptych.training.state import Pace, pack_optimizer, unpack_optimizer


class EightBit(torch.optim.Optimizer):
    """As AdamW8bit of bitsandbytes 0.50: bytes, a plain count, and numbers hidden from FSDP."""

    hidden = "__bnb_optimizer_quant_state__"

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            state["state1"] = torch.arange(parameter.numel(), dtype=torch.uint8).view_as(parameter)
            state["qmap1"] = torch.linspace(-1, 1, 256)

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        for index, state in found["state"].items():
            bare = {"step": state["step"]}
            hidden = {name: each for name, each in state.items() if name != "step"}
            found["state"][index] = {**bare, self.hidden: hidden}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        parameters = self.param_groups[0]["params"]
        for index, state in state_dict["state"].items():
            self.state[parameters[index]] = dict(state)


@pytest.mark.parametrize("kind", [EightBit, torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_comes_back(kind: Any) -> None:
    parameters = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(()))]
    first, second = (kind(parameters) for _ in range(2))
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    for _ in range(3):
        first.step()
    packed = pack_optimizer(first)
    assert all(isinstance(each, torch.Tensor) for each in packed.values())
    unpack_optimizer(second, packed)
    for parameter in parameters:
        before, after = first.state[parameter], second.state[parameter]
        before = {name: each for name, each in before.items() if each is not None}
        assert before.keys() == after.keys()
        for name, each in before.items():
            assert type(each) is type(after[name])
            if isinstance(each, torch.Tensor):
                assert each.dtype == after[name].dtype
                assert torch.equal(each, after[name])
            else:
                assert each == after[name]


def test_a_pace_by_the_clock_ends_with_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("diptych.training.state.time.time", lambda: now)
    steps, clock, resumed = Pace(7), Pace(7, seconds=60), Pace(7, seconds=60, spent=45)
    assert [pace.total(0) for pace in (steps, clock)] == [7, 1]
    now += 15  # a quarter of the time for 5 steps foretells 20, whatever `steps` says
    assert (clock.total(5), clock.over(5), clock.spent) == (20, False, 15)
    assert resumed.over(5) and resumed.total(5) == 5
    assert not steps.over(6) and steps.over(7)
    now += 45
    assert clock.over(20) and clock.total(20) == 20
