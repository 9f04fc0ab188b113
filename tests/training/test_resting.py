"""Networks that wait give their memory back, and come again as they were."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.training.generator import GeneratorTask
from diptych.training.memory import HALVES
from diptych.training.resting import Resting
from diptych.weights.diffusion import resolve_generator
from diptych.weights.generator_files import describe_generator
from diptych.weights.load_generator import load_generator
from training_tasks import make_task

SAMPLED = {"num_sample_images": 1, "sample_steps": 2}
WAITING = {"sd1": ["text_encoder", "vae"], "sdxl": ["text_encoder", "text_encoder_2", "vae"]}


def waiting(task: GeneratorTask) -> list[str]:
    return sorted(
        name
        for name, module in task.modules.items()
        if all(each.is_meta for each in module.parameters())
    )


def as_in_a_run(task: GeneratorTask) -> AbstractContextManager[Any]:
    half = HALVES.get(task.options.mixed_precision)
    return torch.autocast("cpu", half, enabled=half is not None)


def errors(task: GeneratorTask) -> torch.Tensor:
    with torch.no_grad(), as_in_a_run(task):
        found = task.validate()
        assert found is not None
        return torch.cat([task.losses(0, slice(None)), torch.tensor([*found.parts.values()])])


@pytest.mark.parametrize("family", WAITING)
@pytest.mark.parametrize("words", [{}, {"mixed_precision": "bf16", "random_flip": True}])
def test_steps_and_samples_stay_the_same(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    words: dict[str, Any],
) -> None:
    model = request.getfixturevalue(family)
    task = make_task(model, pictures, tmp_path / "rests", **SAMPLED, **words)
    assert waiting(task) == WAITING[family]
    found = errors(task)
    assert waiting(task) == WAITING[family], "nothing of a step needs them"
    with torch.no_grad(), as_in_a_run(task):
        task.sample(3)
    assert waiting(task) == WAITING[family]
    monkeypatch.setattr(Resting, "rest", lambda self: None)
    other = make_task(model, pictures, tmp_path / "stays", **SAMPLED, **words)
    assert waiting(other) == []
    assert torch.equal(found, errors(other))
    with torch.no_grad(), as_in_a_run(task):
        other.sample(3)
    drawn = [
        (tmp_path / name / "samples" / "step-00000003-0.png").read_bytes()
        for name in ("rests", "stays")
    ]
    assert drawn[0] == drawn[1]


def test_what_is_lost_is_encoded_again(tmp_path: Path, sd1: Path, pictures: Path) -> None:
    task = make_task(sd1, pictures, tmp_path / "run")
    found = errors(task)
    kept = [path for path in (tmp_path / "run" / "cache").rglob("*") if path.is_file()]
    assert kept
    for path in kept:
        path.unlink()
    assert torch.equal(found, errors(task))
    assert waiting(task) == []


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ({"train_text_encoder": True}, ["vae"]),
        ({"shuffle_caption": True}, ["vae"]),
        ({"cache_latents": False}, ["text_encoder"]),
        ({"method": "textual-inversion", "placeholder_token": "<it>"}, ["vae"]),
        ({"method": "dreambooth", "instance_prompt": "a thing"}, []),
        ({"method": "dreambooth", "instance_prompt": "a thing", "rank": 2}, WAITING["sd1"]),
        ({"method": "full"}, []),
    ],
)
def test_who_waits(
    tmp_path: Path, sd1: Path, pictures: Path, words: dict[str, Any], wanted: list[str]
) -> None:
    """Nobody who learns, nobody who is needed in a step, and nobody who is written in the end."""
    task = make_task(sd1, pictures, tmp_path / "run", **words)
    assert waiting(task) == wanted
    errors(task)
    assert waiting(task) == wanted


def test_they_come_back_in_their_type(sd1: Path) -> None:
    described = describe_generator(sd1)
    modules = load_generator(described, dtype="float32")
    modules["text_encoder"].to(torch.bfloat16)
    kept = {
        name: {key: each.clone() for key, each in modules[name].state_dict().items()}
        for name in WAITING["sd1"]
    }
    chosen = {name: modules[name] for name in WAITING["sd1"]}
    resting = Resting(described, chosen, torch.device("cpu"))
    resting.wake()
    resting.rest()
    resting.rest()
    resting.wake()
    for name, wanted in kept.items():
        state = modules[name].state_dict()
        assert state.keys() == wanted.keys()
        for key, each in wanted.items():
            assert state[key].dtype == each.dtype
            assert torch.equal(state[key], each)
        assert not any(each.requires_grad for each in modules[name].parameters())


@pytest.mark.parametrize("only", [{"vae", "text_encoder"}, {"unet"}])
def test_some_networks_of_an_edition(only: set[str]) -> None:
    """Its LoRA, which is of the UNet, is left out with it and goes into it."""
    edition = resolve_generator("default-turbo")
    assert edition.lora is not None
    whole = load_generator(edition, dtype="float32")
    some = load_generator(edition, dtype="float32", only=only)
    assert some.keys() == only
    for name, module in some.items():
        wanted = whole[name].state_dict()
        assert all(torch.equal(each, wanted[key]) for key, each in module.state_dict().items())
