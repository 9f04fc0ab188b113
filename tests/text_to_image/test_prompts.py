"""Prompts: the grammar of weights, chunks of what does not fit, and vectors that are exact."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.errors import BadInput
from diptych.runtimes.network import OpenNetworks
from diptych.text import ClipTokenizer
from diptych.text_to_image.prompts import (
    encode_prompts,
    parse_prompt,
    split_chunks,
)

MERGES = (
    Path(__file__).resolve().parents[2]
    / "src/diptych/weights/embedded/clip_tokenizer/bpe_simple_vocab_16e6.txt.gz"
)
TOKENIZER = ClipTokenizer.from_merges(MERGES)
TWO = {"tokenizer": TOKENIZER, "tokenizer_2": ClipTokenizer.from_merges(MERGES, pad_token="!")}
BOS, EOS, COMMA = 49406, 49407, 267


# Grammar --------------------------------------------------------------------------------------

PARSED = [
    ("", []),
    ("a cat", [("a cat", 1)]),
    ("a (cat)", [("a ", 1), ("cat", 1.1)]),
    ("a [cat]", [("a ", 1), ("cat", 1 / 1.1)]),
    ("((a)) b", [("a", 1.1 * 1.1), (" b", 1)]),
    ("[[a]]", [("a", 1 / 1.1 / 1.1)]),
    ("([a])", [("a", 1)]),
    ("(a:1.3)", [("a", 1.3)]),
    ("(a : 1.3 )b", [("a ", 1.3), ("b", 1)]),
    ("(a:.5)(b:+2)(c:-1)(d:3.)", [("a", 0.5), ("b", 2), ("c", -1), ("d", 3)]),
    ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1), (" c", 0.5)]),
    ("(a (b) c)", [("a ", 1.1), ("b", 1.1 * 1.1), (" c", 1.1)]),
    ("(a:1) b", [("a b", 1)]),
    ("(a)(b)", [("ab", 1.1)]),
    (r"\(a\) \[b\] \\(c)", [("(a) [b] \\", 1), ("c", 1.1)]),
    (r"(a\:1.2)", [("a\\", 1.2)]),
    ("a (b c", [("a ", 1), ("b c", 1.1)]),
    ("a ((b c", [("a ", 1), ("b c", 1.1 * 1.1)]),
    ("[a (b", [("a ", 1 / 1.1), ("b", 1)]),
    ("a) b]", [("a) b]", 1)]),
    ("a:1.3) b", [("a:1.3) b", 1)]),
    ("(a:1.3", [("a:1.3", 1.1)]),
    ("[a:1.3)]", [("a:1.3)", 1 / 1.1)]),
    ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
    ("(a:b)", [("a:b", 1.1)]),
    ("(:1.3)", []),
    ("()", []),
    ("12:30 a:1", [("12:30 a:1", 1)]),
    ("(漢字:1.5)é", [("漢字", 1.5), ("é", 1)]),
]


@pytest.mark.parametrize(("prompt", "pieces"), PARSED)
def test_weights(prompt: str, pieces: list[tuple[str, float]]) -> None:
    ((*found,),) = parse_prompt(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


def test_break_parts_a_prompt() -> None:
    assert parse_prompt("a BREAK b") == [[("a ", 1)], [(" b", 1)]]
    assert parse_prompt("(a BREAK b:2) c") == [[("a ", 2)], [(" b", 2), (" c", 1)]]
    assert parse_prompt("break BREAKS xBREAK") == [[("break BREAKS xBREAK", 1)]]
    assert parse_prompt("a,BREAK") == [[("a,", 1)], []]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (cat:1000)", r"the words 'cat' of a prompt count 1000 times: give weights up to 100"),
        ("(" + "(a:90)" + ":90)", "count 8100 times"),
        ("(a:" + "9" * 5000 + ")", "count inf times"),
        ("(" * 101 + "a", "more than 100 brackets"),
        ("x" * 100_001, "has 100001 characters"),
        (3, "a prompt is 3: give a text"),
        (None, "a prompt is None"),
    ],
)
def test_prompts_that_cannot_be_used(prompt: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        parse_prompt(prompt)


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "prompt",
    [" " * 100_000, "()" * 50_000, "(a)" * 30_000, ":1" * 50_000, "[|" * 50, "\\(" * 50_000,
     "(:" + "1" * 90_000, "(a" * 40 + "b)" * 40_000, "<" * 100_000, "[" + ":." * 40_000],
)  # fmt: skip
def test_hostile_prompts_take_no_time(prompt: str) -> None:
    parse_prompt(prompt)


@given(st.text(alphabet="ab ,()[]:\\.1B|<", max_size=40))
@settings(max_examples=300, deadline=None)
def test_no_prompt_breaks_the_grammar(prompt: str) -> None:
    # A weight of 111 or so is refused, and that is another test's business.
    prompt = prompt.replace("11", "1.")
    ((*pieces,),) = parse_prompt(prompt)
    # Every character that is no mark is kept, in order.
    kept = "".join(text for text, _ in pieces)
    assert [char for char in kept if char in "ab,B|<"] == [c for c in prompt if c in "ab,B|<"]
    if not set("()[]") & set(prompt):
        assert kept == prompt
    escaped = "".join("\\" + char if char in "\\()[]" else char for char in prompt)
    if set("()[]") & set(prompt):
        ((*literal,),) = parse_prompt(escaped)
        assert literal == [(prompt, 1.0)]


@pytest.mark.parametrize("prompt", ["a [cat:dog:0.5]", "[cat|dog]", "a cat <lora:style:0.8>"])
def test_what_is_not_done_is_said(prompt: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "diptych"):
        parse_prompt(prompt)
    assert "is read as words" in caplog.text


# Chunks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    ["", "a photo of a cat", "wow!!! don't  STOP", "日本語の写真 🐶🏽", "a" * 300, "12:30, a:1.3"],
)
def test_plain_prompts_have_the_ids_of_the_tokenizer(prompt: str) -> None:
    for tokenizer in TWO.values():
        chunks = split_chunks(prompt, tokenizer)
        assert list(chunks[0].ids) == tokenizer.encode(prompt)
        assert set(chunks[0].weights) == {1.0}


def words(count: int, start: int = 0) -> str:
    names = ("red", "blue", "green", "cat", "dog", "house", "tree")  # one token each
    return " ".join(names[(start + i) % 7] for i in range(count))


def contents(prompt: str, tokenizer: ClipTokenizer = TOKENIZER) -> list[list[int]]:
    """The tokens of each chunk, after a check of what frames them."""
    found = []
    for ids, weights in split_chunks(prompt, tokenizer):
        assert len(ids) == len(weights) == tokenizer.model_max_length
        assert ids[0] == tokenizer.bos_token_id
        end = ids.index(tokenizer.eos_token_id)
        assert set(ids[end + 1 :]) <= {tokenizer.pad_token_id}
        assert weights[0] == 1 and set(weights[end:]) == {1.0}
        found.append(list(ids[1:end]))
    return found


@pytest.mark.parametrize(
    ("prompt", "lengths"),
    [
        (words(75), [75]),
        (words(76), [75, 1]),
        (words(150), [75, 75]),
        (words(151), [75, 75, 1]),
        # A comma among the last 20 of a full chunk ends it; one before that does not.
        (f"{words(55)}, {words(30)}", [56, 30]),
        (f"{words(54)}, {words(30)}", [75, 10]),
        (f"{words(60)}, {words(10)}, {words(30)}", [72, 30]),
        (f"{words(74)}, {words(30)}", [75, 30]),
        (f"{words(60)}, {words(14)}, {words(5)}", [75, 6]),  # the comma itself does not fit
        (f"{words(60)}, {words(14)}", [75]),  # it fits: nothing moves
        ("a BREAK b", [1, 1]),
        (f"{words(80)} BREAK b", [75, 5, 1]),
        ("a BREAK", [1]),
        ("BREAK a", [0, 1]),
        ("BREAK", [0]),
        ("", [0]),
    ],
)
def test_chunks(prompt: str, lengths: list[int]) -> None:
    found = contents(prompt)
    assert [len(chunk) for chunk in found] == lengths
    assert list(chain.from_iterable(found)) == TOKENIZER.tokens(prompt.replace("BREAK", ""))


def test_weights_stand_at_their_tokens() -> None:
    ((ids, weights),) = split_chunks("a (red cat:1.5), [[x", TOKENIZER)
    a, red, cat, x = (TOKENIZER.tokens(word)[0] for word in ("a", "red", "cat", "x"))
    assert ids[:8] == (BOS, a, red, cat, COMMA, x, EOS, EOS)
    assert weights[:8] == pytest.approx((1, 1, 1.5, 1.5, 1, 1 / 1.21, 1, 1))
    # They go along into the next chunk.
    first, second = split_chunks(f"{words(70)}, (dog:2) {words(10)}", TOKENIZER)
    assert set(first.weights) == {1.0}
    assert second.weights[1:3] == (2, 1)


def test_other_lengths() -> None:
    tokenizer = ClipTokenizer.from_merges(MERGES, model_max_length=8, pad_token="!")
    assert [len(chunk) for chunk in contents(words(14), tokenizer)] == [6, 6, 2]
    assert [len(chunk) for chunk in contents("red, red red red red red", tokenizer)] == [2, 5]


def test_vectors_of_a_placeholder_stay_together() -> None:
    tokenizer = TOKENIZER.with_placeholders({"<cat>": range(49408, 49412)})
    prompt = f"{words(73)} <cat> red"
    first, second = contents(prompt, tokenizer)
    assert len(first) == 73
    assert second[:4] == [49408, 49409, 49410, 49411]
    ((ids, weights),) = split_chunks("(<cat>:1.2) <cat>", tokenizer)
    assert ids[1:9] == (49408, 49409, 49410, 49411) * 2
    assert weights[1:9] == (1.2,) * 4 + (1.0,) * 4


def test_enormous_prompts_are_refused() -> None:
    assert len(split_chunks(words(7500), TOKENIZER)) == 100
    with pytest.raises(BadInput, match="more than 100 times"):
        split_chunks(words(7501), TOKENIZER)
    with pytest.raises(BadInput, match="more than 100 times"):
        split_chunks("BREAK " * 101 + "a", TOKENIZER)


# Vectors --------------------------------------------------------------------------------------


Call = Callable[[Any, int], tuple[Any, Any]]


def made_up_tower(width: int, pooled_width: int, mean: float, seed: int) -> Call:
    """A text encoder of the same habits: causal, pooled at the end, its last bits vary by batch."""
    draw = np.random.default_rng(seed)
    table = draw.standard_normal((1021, width), np.float32)
    positions = draw.standard_normal((77, width), np.float32)
    projection = draw.standard_normal((width, pooled_width), np.float32)

    def call(ids: Any, skip: int) -> tuple[Any, Any]:
        ids = np.asarray(ids)
        hidden = table[ids % 1021] + positions * (1 + skip)
        hidden = hidden.cumsum(1, dtype=np.float32) / np.arange(1, 78, dtype=np.float32)[:, None]
        ends = (ids == EOS).argmax(1)
        pooled = hidden[np.arange(len(ids)), ends] @ projection * (1 + len(ids) * 1e-6)
        hidden = hidden - hidden.mean((1, 2), keepdims=True) + mean
        return hidden * np.float32(1 + len(ids) * 1e-6), pooled.astype(np.float32)

    return call


@pytest.fixture(scope="module")
def towers() -> dict[str, Call]:
    return {
        "one": made_up_tower(16, 16, 0.25, 1),
        "centred": made_up_tower(16, 16, 0.0, 2),
        "one_xl": made_up_tower(16, 16, 0.25, 3),
        "two_xl": made_up_tower(20, 12, 0.25, 4),
    }


class Tower:
    """Count the calls of a text encoder."""

    inputs, outputs = {"input_ids": "B T"}, {"encoder_hidden_states": "B T D", "pooled": "B D"}

    def __init__(self, call: Call) -> None:
        self.call, self.calls = call, 0

    def __call__(self, wanted: Sequence[str] | None = None, /, **arrays: Any) -> tuple[Any, ...]:
        self.calls += 1
        assert arrays["input_ids"].dtype == np.int64
        return self.call(arrays["input_ids"], arrays["clip_skip"])


def opened(**networks: Any) -> OpenNetworks:
    each = {name: Tower(call) for name, call in networks.items()}
    return OpenNetworks(each, runtime="onnxruntime", device="cpu", dtype="float32", reason="")


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_plain_prompts_are_encoded_as_by_one_direct_call(towers: Any, clip_skip: int) -> None:
    networks = opened(text_encoder=towers["one"])
    prompts = ["a cat", "", words(75), "a (cat:1.0)"]
    pairs = encode_prompts(networks, TWO, prompts, ["", None, "ugly", ""], clip_skip=clip_skip)
    for pair, prompt, negative in zip(
        pairs, [*prompts[:3], "a cat"], ["", "", "ugly", ""], strict=True
    ):
        for made, text, skip in ((pair.positive, prompt, clip_skip), (pair.negative, negative, 0)):
            states, pooled = towers["one"]([TOKENIZER.encode(text)], skip)
            assert made is not None
            assert np.array_equal(made.encoder_hidden_states, states)
            assert np.array_equal(made.pooled, pooled)


def test_every_chunk_is_encoded_once(towers: Any) -> None:
    networks = opened(text_encoder=towers["one"])
    encode_prompts(networks, TWO, ["a", "b", "a", "(a:2)"], ["ugly"] * 4)
    assert networks["text_encoder"].calls == 3  # type: ignore[attr-defined]
    assert encode_prompts(networks, TWO, ["a"])[0].negative is None


def test_neighbours_change_nothing(towers: Any) -> None:
    networks = opened(text_encoder=towers["one"])
    prompts = ["a (cat:1.4)", words(100), "x", "(b:0.2) BREAK c"]
    together = encode_prompts(networks, TWO, prompts, ["ugly", None, words(160), ""])
    for pair, prompt, negative in zip(
        together, prompts, ["ugly", None, words(160), ""], strict=True
    ):
        (alone,) = encode_prompts(networks, TWO, [prompt], [negative])
        for ours, other in ((pair.positive, alone.positive), (pair.negative, alone.negative)):
            assert ours is not None and other is not None
            assert np.array_equal(ours.encoder_hidden_states, other.encoder_hidden_states)
            assert np.array_equal(ours.pooled, other.pooled)


def test_weights_multiply_vectors_and_keep_the_mean(towers: Any) -> None:
    networks = opened(text_encoder=towers["one"])
    (pair,) = encode_prompts(networks, TWO, ["a (red cat:1.5) [x]"])
    plain, pooled = towers["one"]([TOKENIZER.encode("a red cat x")], 0)
    expected = plain.astype(np.float64)
    expected[0, 2:4] *= 1.5
    expected[0, 4] /= 1.1
    expected *= plain.astype(np.float64).mean() / expected.mean()
    np.testing.assert_allclose(pair.positive.encoder_hidden_states, expected, rtol=2e-5, atol=1e-6)
    assert np.array_equal(pair.positive.pooled, pooled)


def test_vectors_around_zero_are_not_blown_up(towers: Any) -> None:
    networks = opened(text_encoder=towers["centred"])
    (pair,) = encode_prompts(networks, TWO, ["a (red cat:1.5)"])
    expected, _ = towers["centred"]([TOKENIZER.encode("a red cat")], 0)
    assert abs(expected.mean()) < 1e-6
    expected[0, 2:4] *= np.float32(1.5)
    assert np.array_equal(pair.positive.encoder_hidden_states, expected)


def test_long_prompts_are_chunks_one_after_the_other(towers: Any) -> None:
    networks = opened(text_encoder=towers["one"])
    (pair,) = encode_prompts(networks, TWO, [f"{words(75)} {words(20, 3)}"], ["ugly"])
    assert pair.positive.encoder_hidden_states.shape == (1, 154, 16)
    first, pooled = towers["one"]([TOKENIZER.encode(words(75))], 0)
    second, _ = towers["one"]([TOKENIZER.encode(words(20, 3))], 0)
    expected = np.concatenate([first, second], 1)
    assert np.array_equal(pair.positive.encoder_hidden_states, expected)
    assert np.array_equal(pair.positive.pooled, pooled)
    # The shorter of the two is filled up with empty chunks.
    assert pair.negative is not None
    ugly, empty = (towers["one"]([TOKENIZER.encode(text)], 0)[0] for text in ("ugly", ""))
    assert np.array_equal(pair.negative.encoder_hidden_states, np.concatenate([ugly, empty], 1))


def test_two_encoders_are_joined(towers: Any) -> None:
    networks = opened(text_encoder=towers["one_xl"], text_encoder_2=towers["two_xl"])
    # "!" is padding for the second tokenizer: three tokens there, one in the first.
    prompt = f"(wow:2)!!! {words(73)}"
    (pair,) = encode_prompts(
        networks,
        TWO,
        [
            prompt,
        ],
        clip_skip=1,
    )
    one, two = (TWO[name] for name in ("tokenizer", "tokenizer_2"))
    ids = one.tokens(f"wow !!! {words(73)}")
    first, _ = towers["one_xl"]([one.frame(ids)], 1)
    rest, _ = towers["one_xl"]([one.frame([])], 1)
    first[0, 1] *= 2
    expected = [np.concatenate([first, rest], 1)]
    ids = two.tokens(f"wow !!! {words(73)}")
    first, pooled = towers["two_xl"]([two.frame(ids[:75])], 1)
    rest, _ = towers["two_xl"]([two.frame(ids[75:])], 1)
    first[0, 1] *= 2
    expected.append(np.concatenate([first, rest], 1))
    states = pair.positive.encoder_hidden_states
    assert states.shape == (1, 154, 36)
    # Exactly: no mean is restored.
    assert np.array_equal(states, np.concatenate(expected, -1))
    assert np.array_equal(pair.positive.pooled, pooled)
    assert pair.positive.pooled.shape == (1, 12)


def test_zeros_stand_for_no_negative_prompt_only(towers: Any) -> None:
    networks = opened(text_encoder=towers["one_xl"], text_encoder_2=towers["two_xl"])
    none, empty = encode_prompts(
        networks, TWO, ["a", "a"], [None, ""], force_zeros_for_empty_prompt=True
    )
    assert none.negative is not None and empty.negative is not None
    for made, like in (
        (none.negative.encoder_hidden_states, none.positive.encoder_hidden_states),
        (none.negative.pooled, none.positive.pooled),
    ):
        assert made.shape == like.shape and not made.any()
    assert empty.negative.encoder_hidden_states.any() and empty.negative.pooled.any()
    (plain,) = encode_prompts(networks, TWO, ["a"], [None])
    assert plain.negative is not None and plain.negative.pooled.any()


def test_weights_can_be_left_unread(towers: Any, caplog: pytest.LogCaptureFixture) -> None:
    networks = opened(text_encoder=towers["one"])
    prompt = "a (cat:1.5) BREAK " + words(80)
    with caplog.at_level(logging.WARNING, "diptych"):
        (pair,) = encode_prompts(networks, TWO, [prompt], parse_weights=False)
    states, _ = towers["one"]([TOKENIZER.encode(prompt)], 0)
    assert np.array_equal(pair.positive.encoder_hidden_states, states)
    assert "the prompt is cut before" in caplog.text


def test_torch_networks_give_the_same(towers: Any) -> None:
    import torch

    def call(ids: Any, skip: int) -> tuple[Any, Any]:
        assert isinstance(ids, torch.Tensor)
        return tuple(torch.tensor(each) for each in towers["one"](ids.numpy(), skip))

    class TorchTower(Tower):
        def __call__(self, wanted: Any = None, /, **arrays: Any) -> tuple[Any, ...]:
            return call(arrays["input_ids"], arrays["clip_skip"])

    networks = OpenNetworks(
        {"text_encoder": TorchTower(call)},
        runtime="torch",
        device="cpu",
        dtype="float32",
        reason="",
    )
    (ours,) = encode_prompts(networks, TWO, ["a (cat:1.5)"], ["x"])
    (other,) = encode_prompts(opened(text_encoder=towers["one"]), TWO, ["a (cat:1.5)"], ["x"])
    assert np.array_equal(ours.positive.encoder_hidden_states, other.positive.encoder_hidden_states)
