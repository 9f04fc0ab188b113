"""Read how a checkpoint wants its captions to be searched, as transformers reads it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from diptych.errors import UnsupportedModel

__all__ = ["filter_words", "generation_defaults"]

logger = logging.getLogger("diptych")

_TOKENS = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
# Everything in a generation config that changes what comes out; the panel says what it applies.
_WORDS = frozenset(
    {
        *_TOKENS,
        "bad_words_ids",
        "begin_suppress_tokens",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "guidance_scale",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "min_p",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "penalty_alpha",
        "remove_invalid_values",
        "renormalize_logits",
        "repetition_penalty",
        "sequence_bias",
        "suppress_tokens",
        "temperature",
        "top_h",
        "top_k",
        "top_p",
        "typical_p",
    }
)


def generation_defaults(
    config: Mapping[str, Any], words: Mapping[str, Any] | None, vocab_size: int
) -> dict[str, Any]:
    """Merge a `config.json` and a `generation_config.json` (None if there is none).

    With a generation config, that one decides alone, as in transformers; only token ids that it
    does not name are taken from the config, and its `bos_token_id` starts captions. Without one,
    the config's own words count, and those of its decoder where it has none.
    `task_specific_params` is for another task, and ignored.
    """
    decoder = config.get("decoder")
    decoder = decoder if isinstance(decoder, dict) else {}
    older = {
        word: config[word] if config.get(word) is not None else decoder.get(word) for word in _WORDS
    }
    if words is not None:
        older = {word: older[word] for word in _TOKENS}
        if words.get("bos_token_id") is not None:
            older.pop("decoder_start_token_id")  # captions start with this one then
    return filter_words(
        {**older, **{k: v for k, v in (words or {}).items() if v is not None}}, vocab_size
    )


def filter_words(words: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Keep the words that say how to search, with usable token ids, and always a start token."""
    found = {word: words[word] for word in sorted(_WORDS) if words.get(word) is not None}
    for word in _TOKENS:
        if word in found:
            found[word] = _tokens(word, found[word])
    found.setdefault("decoder_start_token_id", found.get("bos_token_id"))
    start = found["decoder_start_token_id"]
    if type(start) is not int or not 0 <= start < vocab_size:
        raise UnsupportedModel(
            f"decoder_start_token_id is {start}, not one of the {vocab_size} tokens: "
            "name it in generation_config.json"
        )
    if unread := sorted(set(words) - _WORDS):
        logger.debug("generation config: not read: %s", ", ".join(unread)[:400])
    return found


def _tokens(word: str, value: Any) -> Any:
    several = value if isinstance(value, list) else [value]
    if not several or not all(type(item) is int for item in several):
        raise UnsupportedModel(f"{word} is {str(value)[:40]!r}, not a token id")
    if isinstance(value, list) and word != "eos_token_id":
        raise UnsupportedModel(f"{word} is {str(value)[:40]!r}, not one token id")
    return value
