"""What `Replay` does without a GPU; tests/gpu compares recorded steps with plain ones."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from diptych.training.replay import Replay, set_rate  # noqa: E402


def test_on_a_processor_a_step_stays_as_it_is():
    def step(x):
        return (x + 1,)

    assert Replay("cpu")(step) is step


@pytest.mark.parametrize("in_tensors", [False, True])
def test_rates_are_set_in_place_where_they_are_tensors(in_tensors):
    groups = [
        {
            "params": [torch.nn.Parameter(torch.zeros(2))],
            "share": name,
            "lr": torch.zeros(()) if in_tensors else 0.0,
        }
        for name in ("slow", "fast")
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    before = [group["lr"] for group in optimizer.param_groups]
    set_rate(optimizer, 0.5, {"slow": 0.1, "fast": 1.0, "other": 7.0})
    after = [group["lr"] for group in optimizer.param_groups]
    assert [float(rate) for rate in after] == pytest.approx([0.05, 0.5])
    assert [a is b for a, b in zip(before, after, strict=True)] == [in_tensors] * 2
    set_rate(optimizer, 0.25)
    assert {float(group["lr"]) for group in optimizer.param_groups} == {0.25}
