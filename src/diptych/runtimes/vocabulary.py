"""Cut a vocabulary to the tokens that captions use: GPT-2's has 50,257, captions a tenth of them.

What is kept spells every word as before: with a token stay the tokens that it was merged from, and
all single bytes, so that any text can still be written.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.errors import UnsupportedModel
from diptych.text import Gpt2Tokenizer

__all__ = ["caption_words", "cut_generation", "cut_weights", "kept_tokens", "write_tokenizer"]

Ids = NDArray[np.int64]

_TABLES = ("decoder.wte.weight", "decoder.lm_head.weight")


@cache
def caption_words() -> tuple[str, ...]:
    """Return the words that captions are written with: those of photos of everyday things."""
    packed = files("diptych.weights.embedded").joinpath("caption_words.txt.gz").read_bytes()
    return tuple(gzip.decompress(packed).decode().split())


def kept_tokens(
    tokenizer: Path, generation: Mapping[str, Any], words: Iterable[str], vocab_size: int
) -> Ids:
    """Return the ids, in order, of the tokens that `words` need, and of those that end a caption.

    Every word counts as it stands at the start of a caption, after a space, and capitalised. Ids
    for which a model of `vocab_size` has no row are left out.
    """
    read = Gpt2Tokenizer.load(tokenizer)
    document = _document(read)
    vocabulary: dict[str, int] = document["model"]["vocab"]
    names = {number: token for token, number in vocabulary.items()}
    kept = {token for token in vocabulary if len(token) == 1}
    for word in words:
        for form in (word, f" {word}", word.capitalize()):
            kept |= {names[number] for number in read.encode(form) if number in names}
    _add_parts(kept, document["model"]["merges"])
    ids = {vocabulary[token] for token in kept}
    ids |= {entry["id"] for entry in document["added_tokens"]}
    for value in _ids_in(generation).values():
        ids |= set(value if isinstance(value, list) else [value])
    return np.array(sorted(each for each in ids if each < vocab_size), np.int64)


def write_tokenizer(source: Path, target: Path, kept: Ids) -> None:
    """Write the tokenizer at `source` with the tokens `kept` only, numbered from 0, to `target`."""
    document = _document(Gpt2Tokenizer.load(source))
    new = {int(old): number for number, old in enumerate(kept)}
    model = document["model"]
    model["vocab"] = {token: new[old] for token, old in model["vocab"].items() if old in new}
    left = model["vocab"]
    model["merges"] = [
        pair for pair in map(_pair, model["merges"]) if {*pair, "".join(pair)} <= left.keys()
    ]
    known = [entry for entry in document["added_tokens"] if entry["id"] in new]
    document["added_tokens"] = [{**entry, "id": new[entry["id"]]} for entry in known]
    if (document.get("post_processor") or {}).get("type") != "ByteLevel":
        document["post_processor"] = None  # a template of special tokens, which captions leave out
    target.write_text(json.dumps(document, ensure_ascii=False), "utf-8")


def cut_weights(weights: Mapping[str, NDArray[Any]], kept: Ids) -> dict[str, NDArray[Any]]:
    """Return `weights` of a captioner with the rows of the words `kept`; tied ones stay tied."""
    made: dict[int, NDArray[Any]] = {}
    cut = dict(weights)
    for name in _TABLES:
        if name in cut:
            place = cut[name].__array_interface__["data"][0]
            cut[name] = made.setdefault(place, np.ascontiguousarray(cut[name][kept]))
    return cut


def cut_generation(generation: Mapping[str, Any], kept: Ids) -> dict[str, Any]:
    """Return `generation` with its token ids numbered anew; lists of other words are left out."""
    new = {int(old): number for number, old in enumerate(kept)}
    changed = {
        word: [new[each] for each in value if each in new]
        if isinstance(value, list)
        else new.get(value)
        for word, value in _ids_in(generation).items()
    }
    dropped = ("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens")
    return {word: value for word, value in generation.items() if word not in dropped} | changed


def _ids_in(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the words of `generation` that are a token id, or a list of some."""
    return {
        word: value
        for word, value in generation.items()
        if word.endswith("_token_id") and value is not None
    }


def _add_parts(kept: set[str], merges: Iterable[Any]) -> None:
    """Add to `kept` what its tokens are merged from."""
    parts: dict[str, set[str]] = {}
    for merge in merges:
        pair = _pair(merge)
        parts.setdefault("".join(pair), set()).update(pair)
    waiting = list(kept)
    while waiting:
        for part in parts.get(waiting.pop(), ()):
            if part not in kept:
                kept.add(part)
                waiting.append(part)


def _pair(merge: Any) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _document(tokenizer: Gpt2Tokenizer) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(tokenizer.to_json())
    if document["model"].get("type") != "BPE":
        raise UnsupportedModel("only a BPE tokenizer's vocabulary can be cut")
    return document
