"""Options of a picture: ranges, precedence, rounding, one clear sentence for what cannot be."""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych.errors import BadInput
from diptych.text_to_image import options as module
from diptych.text_to_image.options import (
    NOISE_SOURCES,
    SAMPLERS,
    SCHEDULES,
    SPACINGS,
    GenerateOptions,
    size_notes,
)

FIELDS = {field.name: field for field in dataclasses.fields(GenerateOptions)}
MAY_STAY_OPEN = {"negative_prompt", "timestep_spacing", "guidance_interval", "eta", "strength"}


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_describes_itself(name: str) -> None:
    metadata = FIELDS[name].metadata
    assert set(metadata) == {
        "kind", "help", "default", "low", "high", "choices", "hint", "from_model",
    }  # fmt: skip
    assert metadata["kind"] in (int, float, bool, str)
    text = metadata["help"]
    assert text[0].isupper() and text.endswith(".") and "\n" not in text
    assert FIELDS[name].default is (None if metadata["from_model"] else metadata["default"])
    if metadata["default"] is not None:
        GenerateOptions(**{name: metadata["default"]})


def test_options_need_neither_numpy_nor_torch() -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any("numpy" in str(n) or "schedules" in str(n) for n in names)


def test_choices_are_those_that_run() -> None:
    from diptych.text_to_image import schedules

    assert set(SAMPLERS) == set(schedules.SAMPLER_NAMES) - {"ddim_inversion"}
    assert schedules.SCHEDULES == SCHEDULES
    assert set(SPACINGS) == set(schedules.SPACINGS)
    from diptych.text_to_image.noise import NoiseSource

    for kind in NOISE_SOURCES:
        NoiseSource([0], kind)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("num_inference_steps", 0, "num_inference_steps is 0: give a whole number from 1 to 1000."),
        ("num_inference_steps", 1001, "give a whole number from 1 to 1000"),
        ("num_inference_steps", 20.0, "give a whole number"),
        ("num_inference_steps", True, "num_inference_steps is True"),
        ("guidance_scale", float("nan"), "guidance_scale is nan: give a number from 0 to 100."),
        ("guidance_scale", -1, "give a number from 0 to 100"),
        ("width", 8, "width is 8: give a whole number from 16 to 4096."),
        ("height", 4097, "height is 4097: give a whole number from 16 to 4096."),
        ("height", "512", "height is '512': give a whole number"),
        ("seed", -1, "seed is -1: give a whole number from 0 to 18446744073709551615."),
        ("seed", 2**64, "give a whole number from 0 to 18446744073709551615"),
        ("seed", 1.5, "seed is 1.5: give a whole number"),
        ("num_images_per_prompt", 0, "give a whole number from 1 to 1000"),
        ("num_images_per_prompt", None, "num_images_per_prompt is None"),
        ("sampler", "Euler a", "sampler is 'Euler a': give one of 'ddim', 'euler', 'euler_a'"),
        ("sampler", 3, "sampler is 3: give one of"),
        ("schedule", "ays", "schedule is 'ays': give one of 'normal', 'karras'"),
        ("clip_skip", -1, "give a whole number from 0"),
        ("strength", 1.01, "strength is 1.01: give a number from 0 to 1."),
        ("guidance_interval", "0.8,0.2", "guidance_interval is '0.8,0.2': give two numbers from 0"),
        ("guidance_interval", "0.2", "as in 0.2,0.8"),
        ("guidance_interval", "a,b", "as in 0.2,0.8"),
        ("guidance_interval", "0,nan", "as in 0.2,0.8"),
        ("guidance_interval", "0,1.5", "as in 0.2,0.8"),
        ("negative_prompt", 3, "negative_prompt is 3: give a text."),
        ("negative_prompt", ["a"], "give a text"),
        ("parse_weights", 1, "parse_weights is 1: give True or False."),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(name: str, value: Any, wanted: str) -> None:
    with pytest.raises(BadInput) as caught:
        GenerateOptions(**{name: value})
    assert wanted in str(caught.value)


def test_replace_knows_the_words_and_those_of_others() -> None:
    options = GenerateOptions(seed=3)
    assert options.replace(width=64) == GenerateOptions(seed=3, width=64)
    for wrong, right in [
        ("steps", "num_inference_steps"),
        ("cfg_scale", "guidance_scale"),
        ("scheduler", "sampler"),
        ("denoising_strength", "strength"),
        ("guidance", "guidance_scale"),
        ("negativ_prompt", "negative_prompt"),
        ("hight", "height"),
    ]:
        with pytest.raises(BadInput, match=rf"^{wrong} is not .*: did you mean {right}\?$"):
            options.replace(**{wrong: 1})
    with pytest.raises(BadInput, match=r"xyzzy is not an option of generate: choose from"):
        options.replace(xyzzy=1)


def test_with_nothing_set_the_library_decides() -> None:
    options = GenerateOptions().resolve()
    for name, field in FIELDS.items():
        if name != "seed":
            assert getattr(options, name) == field.metadata["default"], name
        if name not in MAY_STAY_OPEN:
            assert getattr(options, name) is not None, name


def test_explicit_options_win_over_the_model_and_the_model_over_the_library() -> None:
    model = {
        "width": 128, "height": 128, "sampler": "dpmpp_2m", "guidance_scale": 5, "seed": 1,
        "num_images_per_prompt": 4, "something_else": 1, "schedule": None,
    }  # fmt: skip
    options = GenerateOptions(width=64).resolve(model)
    assert (options.width, options.height, options.sampler) == (64, 128, "dpmpp_2m")
    assert (options.guidance_scale, options.schedule) == (5, "normal")
    assert options.num_images_per_prompt == 1, "no model decides how many pictures are made"
    with pytest.raises(BadInput, match="in the model's defaults sampler is 'plms'"):
        GenerateOptions().resolve({"sampler": "plms"})
    assert GenerateOptions(sampler="lms").resolve({"sampler": "plms"}).sampler == "lms"


def test_resolving_again_changes_nothing() -> None:
    options = GenerateOptions(width=100, eta=0.5).resolve({"guidance_scale": 3.0})
    assert options.resolve({"guidance_scale": 9.0, "width": 64}) == options


def test_sizes_are_rounded_with_a_note(caplog: pytest.LogCaptureFixture) -> None:
    asked = GenerateOptions(width=100, height=515)
    with caplog.at_level(logging.WARNING, "diptych"):
        resolved = asked.resolve()
    assert (resolved.width, resolved.height) == (104, 512)
    assert [record.getMessage() for record in caplog.records] == list(size_notes(asked, resolved))
    assert "width 100 became 104" in caplog.text and "height 515 became 512" in caplog.text
    caplog.clear()
    assert GenerateOptions(width=512).resolve({"height": 100}).height == 104
    assert not caplog.records
    for multiple_of, pixels, made in [(8, 16, 16), (64, 16, 64), (64, 4095, 4096), (4, 18, 20)]:
        resolved = GenerateOptions(width=pixels).resolve(multiple_of=multiple_of)
        assert resolved.width == made


def test_seed_0_is_a_seed_and_no_seed_is_drawn() -> None:
    assert GenerateOptions(seed=0).resolve().seed == 0
    assert len({GenerateOptions().resolve().seed for _ in range(5)}) == 5
    assert GenerateOptions(seed=2**64 - 1).resolve().seed == 2**64 - 1
    with pytest.raises(BadInput, match="give a lower seed"):
        GenerateOptions(seed=2**64 - 1, num_images_per_prompt=2)


def test_options_are_frozen_and_plain() -> None:
    options = GenerateOptions(seed=np.int64(7), guidance_scale=np.float32(2.5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.seed = 3  # type: ignore[misc]
    resolved = options.resolve()
    assert json.loads(json.dumps(dataclasses.asdict(resolved)))["seed"] == 7
    assert type(resolved.guidance_scale) is float
    assert hash(resolved) == hash(resolved.replace())


def test_the_empty_negative_prompt_is_not_none() -> None:
    assert GenerateOptions(negative_prompt="").resolve().negative_prompt == ""
    assert GenerateOptions().resolve().negative_prompt is None
