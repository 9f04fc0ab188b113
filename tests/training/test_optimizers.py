"""Learning rates beside diffusers' schedules."""

from __future__ import annotations

import pytest
import torch

from diptych.training.optimizers import learning_rate_factor


@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "polynomial"]
)
@pytest.mark.parametrize(("total", "warmup"), [(20, 0), (20, 5), (3, 1), (50, 49)])
def test_rates_are_those_of_diffusers(name: str, total: int, warmup: int) -> None:
    from diffusers.optimization import get_scheduler

    if name == "constant" and warmup:
        name = "constant_with_warmup"  # theirs leaves the warm-up out under this name
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        wanted = optimizer.param_groups[0]["lr"]
        found = 0.3 * learning_rate_factor(name, step, total, warmup, 0.3)
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12)
        optimizer.step()
        scheduler.step()
