"""GPT-2's tokenizer: ids of the reference, whole characters in streams, spans that add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diptych.errors import UnsupportedModel
from diptych.text import END_OF_TEXT, Gpt2Tokenizer
from tiny_models import make_tokenizer

SENTENCES = [
    "a man riding a wave on top of a surfboard ",
    "two dogs, one cat's tail; 3 naïve cafés",
    "  leading and  double spaces",
    "日本語の写真 and emoji 🐶🏽 mixed",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(path)
    return path


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_ids_and_text_are_those_of_transformers(folder: Path, name: str) -> None:
    from transformers import GPT2Tokenizer

    reference = GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    ours = Gpt2Tokenizer.load(folder / name)
    for sentence in SENTENCES:
        ids = reference(sentence, add_special_tokens=False).input_ids
        assert ours.encode(sentence) == ids
        assert ours.decode(ids) == sentence
        assert ours.decode([*ids, 0]) == reference.decode([*ids, 0], skip_special_tokens=True)


@pytest.mark.parametrize("sentence", SENTENCES)
def test_stream_yields_whole_characters_that_add_up(folder: Path, sentence: str) -> None:
    tokenizer = Gpt2Tokenizer.load(folder / "tokenizer.json")
    pieces = list(tokenizer.stream(tokenizer.encode(sentence)))
    assert "".join(pieces) == sentence
    assert all("\ufffd" not in piece and piece for piece in pieces)


def test_stream_ends_with_what_never_became_a_character(folder: Path) -> None:
    tokenizer = Gpt2Tokenizer.load(folder / "tokenizer.json")
    half = tokenizer.encode("🐶")[:-1]
    assert "".join(tokenizer.stream(half)) == tokenizer.decode(half)


def test_spans_cover_the_text(folder: Path) -> None:
    tokenizer = Gpt2Tokenizer.load(folder / "tokenizer.json")
    ids = tokenizer.encode(SENTENCES[0])
    spans = tokenizer.spans(ids)
    text = tokenizer.decode(ids)
    assert "".join(text[a:b] for a, b in spans) == text
    assert spans[0][0] == 0 and spans[-1][1] == len(text)


def test_special_tokens_are_not_text(folder: Path) -> None:
    tokenizer = Gpt2Tokenizer.load(folder / "vocab.json")
    end = json.loads((folder / "vocab.json").read_text())[END_OF_TEXT]
    assert tokenizer.decode([end, *tokenizer.encode("a dog"), end]) == "a dog"


@pytest.mark.parametrize("content", ["", "{}", "[1, 2", '{"model": {"type": "evil"}}'])
def test_unreadable_tokenizer_is_one_clear_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json"):
        Gpt2Tokenizer.load(path)
