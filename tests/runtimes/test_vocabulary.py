"""The cut vocabulary: the same words in fewer tokens' names, and captions that still agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych.runtimes.artifact import network_size
from diptych.runtimes.vocabulary import (
    caption_words,
    cut_generation,
    kept_tokens,
    write_tokenizer,
)
from diptych.text import Gpt2Tokenizer
from diptych.weights.files import describe, verify

Make = Callable[..., Any]
CAPTION = "a brown dog runs over the grass"
DEFAULT = Path(__file__).parents[2] / "src/diptych/weights/embedded/captioner/tokenizer.json"


def test_words_are_those_of_photos() -> None:
    words = set(caption_words())
    assert {"a", "dog", "giraffe", "pizza", "skateboard", "of"} <= words
    assert len(words) > 3000


def test_kept_words_are_written_with_the_same_tokens(tmp_path: Path) -> None:
    whole = Gpt2Tokenizer.load(DEFAULT)
    generation = {"decoder_start_token_id": 0, "eos_token_id": [0], "max_length": 9}
    kept = kept_tokens(DEFAULT, generation, CAPTION.split(), 1 << 20)
    assert 256 < len(kept) < 400
    write_tokenizer(DEFAULT, tmp_path / "tokenizer.json", kept)
    cut = Gpt2Tokenizer.load(tmp_path / "tokenizer.json")
    assert cut.vocab_size == len(kept)
    for text in (CAPTION, CAPTION.capitalize(), "a a dog dog", f"{CAPTION} {CAPTION}"):
        assert [int(kept[token]) for token in cut.encode(text)] == whole.encode(text)
        assert cut.decode(cut.encode(text)) == whole.decode(whole.encode(text))
    other = "Zebras, über 9000 naïve クジラ!\n"
    assert cut.decode(cut.encode(other)).strip() == other.strip()
    assert len(cut.encode(other)) > len(whole.encode(other))


def test_special_tokens_are_numbered_anew(tmp_path: Path) -> None:
    kept = np.array([3, 7, 9], np.int64)
    generation = {
        "decoder_start_token_id": 9,
        "eos_token_id": [7, 9],
        "pad_token_id": None,
        "num_beams": 4,
        "suppress_tokens": [1, 2],
    }
    assert cut_generation(generation, kept) == {
        "decoder_start_token_id": 2,
        "eos_token_id": [1, 2],
        "pad_token_id": None,
        "num_beams": 4,
    }


@pytest.mark.parametrize("variant", ["cross-attention", "prefix", "untied"])
def test_a_cut_model_says_the_same_in_kept_words(
    variant: str, module: Make, export: Make, tmp_path: Path
) -> None:
    """Where every token is kept nothing changes; where few are, they are the likeliest of those."""
    from diptych.runtimes.agreement import greedy_tokens
    from diptych.runtimes.network import open_networks

    captioner = module(variant)
    report = export(captioner, tmp_path / "cut", words=["dog", "grass"], force=True)
    cut = describe(tmp_path / "cut")
    verify(cut)
    vocabulary = report["vocabulary"]
    assert cut.config["decoder"]["vocab_size"] == vocabulary["kept"] < vocabulary["of"] == 400
    assert Gpt2Tokenizer.load(cut.tokenizer).vocab_size == vocabulary["kept"]
    export(captioner, tmp_path / "whole")
    whole = describe(tmp_path / "whole")
    rows = whole.config["decoder"]["vocab_size"]
    kept = kept_tokens(whole.tokenizer, whole.generation, ["dog", "grass"], rows)
    images = np.random.default_rng(1).standard_normal((3, 3, 32, 32)).astype(np.float32)
    networks = open_networks(whole)
    logits = []
    for model, opened in ((whole, networks), (cut, open_networks(cut))):
        (bridged,) = opened["encoder"](pixel_values=images)
        start = np.full((3, 1), model.generation["decoder_start_token_id"])
        bridge = next(iter(opened["encoder"].outputs))
        logits.append(opened["decoder"](input_ids=start, **{bridge: bridged})[0])
    assert np.abs(logits[0][:, kept] - logits[1]).max() < 1e-5
    assert greedy_tokens(open_networks(cut), images, cut.config, cut.generation)
    assert network_size(cut.networks["decoder"]) < network_size(whole.networks["decoder"])


def test_the_edge_profile_is_small_and_told(module: Make, export: Make, tmp_path: Path) -> None:
    from diptych.runtimes import conversion

    report = export(
        module("cross-attention"),
        tmp_path / "edge",
        mode="int4",
        words=caption_words(),
        most_bytes=conversion._EDGE_BYTES,
        force=True,
    )
    model = describe(tmp_path / "edge")
    assert model.precision == "int4"
    assert report["int4"]["bits"]["usual"] == 4
    stated = json.loads((tmp_path / "edge" / "export.json").read_text())
    assert stated["vocabulary"] == report["vocabulary"]
    assert not [path for path in (tmp_path / "edge").iterdir() if path.is_dir()]


def test_ids_without_a_row_are_left_out() -> None:
    generation = {"decoder_start_token_id": 0, "eos_token_id": 50256, "pad_token_id": [0, 50256]}
    rows = 300
    kept = kept_tokens(DEFAULT, generation, CAPTION.split(), rows)
    assert kept.max() < rows
    cut = cut_generation(generation, kept)
    assert cut["eos_token_id"] is None and cut["pad_token_id"] == [0]
