"""The optimizer that turns matrices: its step in closed form, and that it saves and goes on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402

from diptych.training.muon import Muon, orthogonalized  # noqa: E402
from diptych.training.parallel import Workers  # noqa: E402
from diptych.training.state import Average, load_state, save_state  # noqa: E402


@pytest.mark.parametrize("shape", [(24, 24), (24, 40), (24, 200), (200, 24)])
def test_a_step_turns_all_directions_about_equally_far(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    left, values, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = left @ torch.diag(torch.logspace(0, -1, len(values))) @ right
    found, other = orthogonalized(torch.stack([matrix, -matrix.flip(0)]))
    assert torch.allclose(other, -found.flip(0), atol=1e-4)
    # The same singular vectors: what is left of them is diagonal, and near one.
    turned = left.T @ found @ right.T
    diagonal = turned.diagonal()
    assert (turned - torch.diag(diagonal)).abs().max() < 1e-3
    assert diagonal.min() > 0.5 and diagonal.max() < 1.3
    # Both ways of the iteration, that over the Gram matrix and the plain one.
    wide = matrix.double() if shape[0] <= shape[1] else matrix.double().T
    wide = wide / wide.norm()
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    expected = wide if shape[0] <= shape[1] else wide.T
    assert torch.allclose(found.double(), expected, atol=1e-4)


def model() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3), torch.nn.SiLU(), torch.nn.Conv2d(32, 32, 3),
        torch.nn.GroupNorm(4, 32), torch.nn.Flatten(), torch.nn.Linear(32, 4),
    )  # fmt: skip


def train(module: torch.nn.Module, optimizer: Muon, steps: range) -> float:
    loss = torch.zeros(())
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        pixels = torch.randn(16, 3, 5, 5, generator=generator)
        wanted = pixels.mean((2, 3)) @ torch.ones(3, 4) + 1
        loss = (module(pixels) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def take_steps(workers: Workers) -> torch.nn.Module:
    """Take three steps, each process on its rows; gradients are averaged, matrices shared."""
    module = model()
    optimizer = Muon(module.named_parameters(), 0.01, workers=workers)
    for step in range(3):
        pixels = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(step))
        own = pixels[workers.share(8)]
        loss = (module(own) - own.mean((1, 2, 3))[:, None]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        workers.average(module.parameters())
        optimizer.step()
    return module


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    alone = take_steps(Workers.alone()).state_dict()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_muon import Workers, take_steps\n"
        "from safetensors.torch import save_file\n"
        "workers = Workers()\n"
        "state = take_steps(workers).state_dict()\n"
        f"save_file(state, {str(tmp_path)!r} + f'/{{workers.rank}}.safetensors')\n"
        "workers.close()\n"
    )
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, **shared, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    start = model().state_dict()
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        for name, one in alone.items():
            assert torch.allclose(one, found[name], atol=1e-5)
            assert not torch.equal(one, start[name])


def test_it_learns_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole, halves = model(), model()
    optimizer = Muon(whole.named_parameters(), 0.01, plain=("5.",))
    first = train(whole, optimizer, range(1))
    assert train(whole, optimizer, range(1, 120)) < 0.2 * first
    path = tmp_path / "state.safetensors"
    optimizer = Muon(halves.named_parameters(), 0.01, plain=("5.",))
    train(halves, optimizer, range(60))
    save_state(path, halves, Average(halves, 0.9), optimizer, {"step": 60})
    again = model()
    optimizer = Muon(again.named_parameters(), 0.01, plain=("5.",))
    assert load_state(path, again, Average(again, 0.9), optimizer)["step"] == 60
    train(again, optimizer, range(60, 120))
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
