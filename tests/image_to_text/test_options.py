"""Caption options: ranges, precedence, and one clear sentence for whatever cannot be used."""

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
from diptych.image_to_text import options as module
from diptych.image_to_text.options import CaptionOptions, SearchOptions

FIELDS = {field.name: field for field in dataclasses.fields(CaptionOptions)}
SAMPLING = ("temperature", "top_k", "top_p", "seed")


# What doors read ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_describes_itself(name: str) -> None:
    metadata = FIELDS[name].metadata
    assert set(metadata) == {
        "kind", "help", "default", "low", "high", "choices", "hint", "from_model",
    }  # fmt: skip
    assert metadata["kind"] in (int, float, bool, str)
    text = metadata["help"]
    assert text[0].isupper()
    assert text.endswith(".")
    assert "\n" not in text
    assert FIELDS[name].default is (None if metadata["from_model"] else metadata["default"])
    if metadata["default"] is not None:
        CaptionOptions(**{name: metadata["default"]})


def test_every_search_option_is_a_caption_option() -> None:
    assert {field.name for field in dataclasses.fields(SearchOptions)} < set(FIELDS)


def test_options_need_neither_numpy_nor_torch() -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    assert not {"numpy", "torch"} & {str(name).split(".")[0] for name in names}


def test_options_cannot_be_changed_or_mistyped() -> None:
    options = CaptionOptions(num_beams=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.num_beams = 3  # type: ignore[misc]
    assert options == CaptionOptions(num_beams=2)
    assert hash(options) == hash(CaptionOptions(num_beams=2))


# Ranges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("num_beams", 0, "num_beams is 0: give a whole number from 1 to 1024."),
        ("num_beams", True, "num_beams is True: give a whole number from 1 to 1024."),
        ("num_beams", 2.0, "num_beams is 2.0: give a whole number from 1 to 1024."),
        ("num_beams", "4", "num_beams is '4': give a whole number from 1 to 1024."),
        ("length_penalty", float("nan"), "length_penalty is nan: give a number from -10 to 10."),
        ("length_penalty", float("inf"), "length_penalty is inf: give a number from -10 to 10."),
        ("length_penalty", True, "length_penalty is True: give a number from -10 to 10."),
        ("length_penalty", 11, "length_penalty is 11: give a number from -10 to 10."),
        ("early_stopping", 1, "early_stopping is 1: give one of False, True, 'never'."),
        ("early_stopping", "no", "early_stopping is 'no': give one of False, True, 'never'."),
        ("num_return_sequences", 0, "give a whole number of 1 or more"),
        ("do_sample", 1, "do_sample is 1: give True or False."),
        ("temperature", 0, "is 0: give a number from 0.001 to 1000, or do_sample=False"),
        ("temperature", -1.0, "give a number from 0.001"),
        ("top_k", -1, "top_k is -1: give a whole number of 0 or more."),
        ("top_p", 1.5, "top_p is 1.5: give a number from 0 to 1."),
        ("seed", -1, "seed is -1: give a whole number of 0 or more."),
        ("seed", 1.5, "seed is 1.5: give a whole number"),
        ("repetition_penalty", 0.0, "repetition_penalty is 0.0: give a number from 0.01 to 100."),
        ("no_repeat_ngram_size", -1, "give a whole number of 0 or more"),
        ("min_length", -1, "give a whole number of 0 or more"),
        ("max_length", 0, "give a whole number of 1 or more"),
        ("max_new_tokens", 0, "give a whole number of 1 or more"),
        ("prompt", None, "prompt is None: give a text."),
        ("prompt", 3, "prompt is 3: give a text."),
        ("strip", 0, "strip is 0: give True or False."),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(name: str, value: Any, wanted: str) -> None:
    with pytest.raises(BadInput) as caught:
        CaptionOptions(**{name: value})
    assert wanted in str(caught.value)
    with pytest.raises(BadInput):
        CaptionOptions().replace(**{name: value})


def test_numpy_numbers_become_plain_ones() -> None:
    options = CaptionOptions(
        num_beams=np.int64(3), length_penalty=np.float32(0.5), max_length=np.int32(9)
    ).resolve()
    assert json.loads(json.dumps(dataclasses.asdict(options)))["num_beams"] == 3
    assert type(options.length_penalty) is float


# Rules across options -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ({"num_beams": 2, "num_return_sequences": 3}, "give num_beams=3 or more"),
        (
            {"num_beams": 1, "do_sample": False, "num_return_sequences": 2},
            "greedy search finds one caption: give num_beams=2 or do_sample=True",
        ),
        ({"do_sample": False, "temperature": 0.7}, "temperature=0.7 needs sampling"),
        ({"do_sample": False, "seed": 0}, "seed=0 needs sampling"),
        ({"num_beams": 4, "do_sample": True}, "num_beams=4 and do_sample=True exclude each other"),
        ({"num_beams": 4, "top_p": 0.9}, "num_beams=4 and top_p=0.9 exclude each other"),
        ({"min_length": 9, "max_length": 8}, "min_length is 9, but a caption may have 8 tokens"),
    ],
)
def test_options_that_exclude_each_other_are_refused(words: dict[str, Any], wanted: str) -> None:
    with pytest.raises(BadInput) as caught:
        CaptionOptions(**words)
    assert wanted in str(caught.value)
    assert str(caught.value).endswith(".")


def test_rules_wait_for_the_models_defaults() -> None:
    several = CaptionOptions(num_return_sequences=3)
    assert several.resolve({"num_beams": 4}).num_beams == 4
    assert several.resolve({"do_sample": True}).do_sample is True
    with pytest.raises(BadInput, match="greedy search finds one caption"):
        several.resolve()
    with pytest.raises(BadInput, match="num_beams=2 can return only 2"):
        several.resolve({"num_beams": 2})
    with pytest.raises(BadInput, match="min_length is 30"):
        CaptionOptions(max_length=20).resolve({"min_length": 30})
    with pytest.raises(BadInput, match="num_beams=3 and do_sample=True exclude"):
        CaptionOptions().resolve({"num_beams": 3, "do_sample": True})


def test_replace_knows_the_words() -> None:
    options = CaptionOptions(num_beams=2)
    assert options.replace(num_beams=3, prompt="a dog") == CaptionOptions(
        num_beams=3, prompt="a dog"
    )
    for wrong, right in [
        ("beams", "num_beams"),
        ("numbeams", "num_beams"),
        ("max_tokens", "max_new_tokens"),
        ("temp", "temperature"),
        ("topk", "top_k"),
    ]:
        with pytest.raises(BadInput, match=rf"^{wrong} is not .*: did you mean {right}\?$"):
            options.replace(**{wrong: 1})
    with pytest.raises(BadInput, match=r"xyzzy is not a caption option: choose from num_beams, "):
        options.replace(xyzzy=1)
    with pytest.raises(BadInput, match="num_beams=2 can return only 2"):
        options.replace(num_return_sequences=3)


# Precedence -----------------------------------------------------------------------------------


def test_with_nothing_set_the_library_decides() -> None:
    options = CaptionOptions().resolve()
    for name, field in FIELDS.items():
        if name not in SAMPLING:
            assert getattr(options, name) == field.metadata["default"], name
    assert [getattr(options, name) for name in SAMPLING] == [None] * 4
    search = options.for_search()
    assert search.max_length == 21, "20 new tokens after the start token, as in transformers"
    assert (search.num_beams, search.do_sample, search.top_k, search.top_p) == (1, False, 50, 1.0)


def test_explicit_options_win_over_the_model_and_the_model_over_the_library() -> None:
    model = {"num_beams": 4, "length_penalty": 2, "max_length": 16, "vocab_size": 7, "top_p": None}
    options = CaptionOptions(length_penalty=0.5).resolve(model)
    assert (options.num_beams, options.length_penalty, options.max_length) == (4, 0.5, 16)
    assert options.early_stopping is False
    assert options.max_new_tokens is None


@pytest.mark.parametrize(
    ("asked", "model", "longest"),
    [
        ({}, {}, 20 + 3),
        ({}, {"max_length": 16}, 16),
        ({}, {"max_length": 16, "max_new_tokens": 5}, 5 + 3),
        ({"max_length": 9}, {}, 9),
        ({"max_length": 9}, {"max_length": 16}, 9),
        # transformers lets the model's max_new_tokens win here, over what the caller asked.
        ({"max_length": 9}, {"max_new_tokens": 30}, 9),
        ({"max_new_tokens": 4}, {"max_length": 5}, 4 + 3),
        ({"max_new_tokens": 4, "max_length": 50}, {}, 4 + 3),
    ],
)
def test_lengths(asked: dict[str, Any], model: dict[str, Any], longest: int) -> None:
    options = CaptionOptions(**asked).resolve(model)
    assert (options.max_length is None) != (options.max_new_tokens is None)
    assert options.for_search(prompt_length=3).max_length == longest


def test_lengths_must_fit() -> None:
    assert CaptionOptions(max_length=7).for_search(6).max_length == 7
    with pytest.raises(BadInput, match=r"max_length is 6, .* take 6 tokens: give max_length=7"):
        CaptionOptions(max_length=6).for_search(6)
    # As many positions as tokens that are fed: the last one never is.
    assert CaptionOptions(max_length=33).for_search(1, max_positions=32).max_length == 33
    with pytest.raises(BadInput, match=r"34 tokens do not fit the decoder, which holds 32"):
        CaptionOptions(max_length=34).for_search(1, max_positions=32)
    with pytest.raises(BadInput, match=r"34 tokens do not fit"):
        CaptionOptions(max_new_tokens=30).for_search(4, max_positions=32)
    with pytest.raises(BadInput, match=r"min_length is 9, but a caption may have 7 tokens"):
        CaptionOptions(min_length=9, max_new_tokens=3).for_search(4)


# Sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}, {"seed": 0}, {"do_sample": True}]
)
def test_sampling_words_turn_sampling_on(words: dict[str, Any]) -> None:
    options = CaptionOptions(**words).resolve()
    assert options.do_sample is True
    assert options.top_k == words.get("top_k", 50), "as in transformers, also with top_p alone"
    assert isinstance(options.seed, int)
    assert options.for_search().seed == options.seed


def test_seed_0_is_a_seed_and_no_seed_is_drawn() -> None:
    assert CaptionOptions(seed=0).resolve().seed == 0
    drawn = {CaptionOptions(do_sample=True).resolve().seed for _ in range(5)}
    assert len(drawn) == 5
    options = CaptionOptions(do_sample=True).resolve()
    assert options.resolve({"num_beams": 1, "temperature": 9.0}) == options


def test_defaults_give_way_to_options_that_contradict_them() -> None:
    assert CaptionOptions(top_p=0.9).resolve({"num_beams": 4}).num_beams == 1
    assert CaptionOptions(num_beams=4).resolve({"do_sample": True}).do_sample is False
    greedy = CaptionOptions().resolve({"do_sample": False, "temperature": 0.0, "top_k": 7})
    assert (greedy.temperature, greedy.top_k) == (None, None)
    sampled = CaptionOptions().resolve({"do_sample": True, "temperature": 0.5, "top_k": 7})
    assert (sampled.temperature, sampled.top_k) == (0.5, 7)


@pytest.mark.parametrize(
    ("asked", "model"),
    [
        ({}, {}),
        ({"num_beams": 3, "num_return_sequences": 2}, {"max_length": 16, "length_penalty": 2.0}),
        ({"top_p": 0.5}, {"num_beams": 4}),
        ({"max_new_tokens": 3, "max_length": 40, "prompt": "a", "strip": False}, {}),
    ],
)
def test_resolving_again_changes_nothing(asked: dict[str, Any], model: dict[str, Any]) -> None:
    options = CaptionOptions(**asked).resolve(model)
    assert options.resolve(model) == options
    assert options.resolve({"num_beams": 2, "max_length": 3}) == options


def test_bad_defaults_name_their_source() -> None:
    with pytest.raises(BadInput, match=r"in the model's generation config num_beams is 0"):
        CaptionOptions().resolve({"num_beams": 0})
    CaptionOptions(num_beams=2).resolve({"num_beams": 0})


def test_defaults_that_are_not_applied_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    neutral = {"bad_words_ids": None, "typical_p": 1.0, "suppress_tokens": [], "num_beam_groups": 1}
    with caplog.at_level(logging.WARNING, "diptych"):
        CaptionOptions().resolve(neutral)
        assert not caplog.records
        CaptionOptions().resolve({"bad_words_ids": [[7]]})
    assert "bad_words_ids=[[7]]" in caplog.text
