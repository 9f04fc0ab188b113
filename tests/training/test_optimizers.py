"""Learning rates beside diffusers' schedules."""

from __future__ import annotations

import pytest
import torch

from diptych.training.optimizers import Group, learning_rate_factor, make_optimizer
from diptych.training.options import GeneratorTrainOptions
from diptych.training.parallel import Workers


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


def test_muon_leaves_words_and_places_to_adam() -> None:
    names = ("decoder.wte.weight", "decoder.wpe.weight", "encoder.vectors", "unet.conv_in.weight")
    matrices = {name: torch.nn.Parameter(torch.randn(32, 32)) for name in (*names, "a.b.weight")}
    options = GeneratorTrainOptions(optimizer="muon", max_train_steps=1)
    made = make_optimizer([Group(matrices, 1e-3)], options, Workers.alone())
    turned, plain = (group["params"] for group in made.param_groups)
    assert [id(each) for each in turned] == [id(matrices["a.b.weight"])]
    assert len(plain) == len(names)
