"""Settings of a caption: what the caller asks for, and what one search runs with."""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diptych.errors import BadInput
from diptych.option_fields import (
    check_value,
    check_values,
    library,
    option,
    plain,
    replace,
    setting,
    values,
)

__all__ = ["CaptionOptions", "EarlyStopping", "SearchOptions"]

logger = logging.getLogger("diptych")

EarlyStopping = bool | Literal["never"]

_SAMPLING = ("temperature", "top_k", "top_p", "seed")
_LENGTHS = ("max_length", "max_new_tokens")
# Words of a generation config that change transformers' output and have no counterpart here,
# each with the value at which it does nothing.
_NOT_APPLIED: dict[str, object] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "min_new_tokens": 0,
    "min_p": None,
    "num_beam_groups": 1,
    "penalty_alpha": None,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "sequence_bias": None,
    "suppress_tokens": None,
    "top_h": None,
    "typical_p": 1.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """Hold every setting of one search, all decided; lengths count the prompt tokens."""

    max_length: int
    min_length: int
    num_beams: int
    length_penalty: float
    early_stopping: EarlyStopping
    num_return_sequences: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    seed: int
    repetition_penalty: float
    no_repeat_ngram_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionOptions:
    """Say how to caption; None leaves the choice to the model's generation config.

    Precedence: what is set here, then the model's generation config, then `metadata["default"]`.
    Every field's metadata holds `kind`, `help`, `default`, `low` and `high` (inclusive), `choices`,
    `hint` and `from_model`; doors build their flags and schemas from it. Words and meanings are
    those of transformers' `generate`, except that naming temperature, top_k, top_p or seed turns
    sampling on, and that `seed` is an option. Raises BadInput when a value cannot be used.
    """

    num_beams: int | None = option(
        int, "Captions kept alive by beam search; 1 is greedy.", library=1, low=1, high=1024
    )
    length_penalty: float | None = option(
        float,
        "Exponent of the length that divides a beam's score; above 0 favours long captions.",
        library=1.0,
        low=-10.0,
        high=10.0,
    )
    early_stopping: bool | Literal["never"] | None = option(
        bool,
        "When beam search ends: True once num_beams captions are complete, False when better ones "
        "are unlikely, never only when none can come.",
        library=False,
        choices=(False, True, "never"),
    )
    num_return_sequences: int | None = option(
        int, "Captions returned per image, best first.", library=1, low=1
    )
    do_sample: bool | None = option(
        bool, "Draw words at random instead of taking the most likely.", library=False
    )
    temperature: float | None = option(
        float,
        "Sampling: divides the logits; below 1 is safer, above 1 more varied.",
        library=1.0,
        low=0.001,
        high=1000.0,
        hint=", or do_sample=False for the most likely words",
    )
    top_k: int | None = option(
        int, "Sampling: draw from the k most likely words; 0 is no limit.", library=50, low=0
    )
    top_p: float | None = option(
        float,
        "Sampling: draw from the fewest words whose probabilities add up to p; 1 is no limit.",
        library=1.0,
        low=0.0,
        high=1.0,
    )
    seed: int | None = option(
        int, "Sampling: image i draws from stream seed + i; none draws a seed.", low=0
    )
    repetition_penalty: float | None = option(
        float,
        "Penalty on words already in the caption; 1 is none.",
        library=1.0,
        low=0.01,
        high=100.0,
    )
    no_repeat_ngram_size: int | None = option(
        int, "Never repeat a run of this many tokens; 0 allows it.", library=0, low=0
    )
    min_length: int | None = option(
        int,
        "Fewest tokens before a caption may end, start token and prompt counted.",
        library=0,
        low=0,
    )
    max_length: int | None = option(
        int, "Most tokens of a caption, start token and prompt counted.", low=1
    )
    max_new_tokens: int | None = option(
        int, "Most tokens after the prompt; wins over max_length.", library=20, low=1
    )
    prompt: str = setting(str, "Text that the caption must continue.", default="")
    strip: bool = setting(bool, "Strip white space around the caption.", default=True)

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise BadInput for a value out of range, or for two that exclude each other.

        Rules that need a value still None wait until `resolve` has filled it.
        """
        check_values(self)
        self._check_sampling()
        self._check_returned()
        if None not in (self.min_length, self.max_length) and self.max_new_tokens is None:
            _check_lengths(self.min_length or 0, self.max_length or 0)

    def replace(self, **overrides: object) -> CaptionOptions:
        """Return a copy with these options changed; BadInput for a word that is no option."""
        return replace(self, overrides, "a caption option")

    def resolve(self, defaults: Mapping[str, object] | None = None) -> CaptionOptions:
        """Fill every open choice from a model's generation config, then from the library.

        A default gives way to an option that contradicts it. In the result exactly one of
        max_length and max_new_tokens is set, and the sampling words are set if and only if
        do_sample is; a seed left open is drawn. Resolving again changes nothing.
        Raises BadInput when the outcome cannot be run.
        """
        asked = {name: value for name, value in values(self).items() if value is not None}
        if any(word in asked for word in _SAMPLING):
            asked["do_sample"] = True
        given = _usable(defaults or {}, asked)
        merged = {**library(CaptionOptions), **given, **asked}
        if not ("max_new_tokens" in asked or "max_length" in asked) and "max_length" in given:
            merged["max_new_tokens"] = given.get("max_new_tokens")
        if "max_length" in asked and "max_new_tokens" not in asked:
            merged["max_new_tokens"] = None
        if merged["max_new_tokens"] is not None:
            merged["max_length"] = None
        if not merged["do_sample"]:
            merged.update(dict.fromkeys(_SAMPLING))
        elif merged["seed"] is None:
            merged["seed"] = secrets.randbelow(2**32)
        return CaptionOptions(**{name: plain(value) for name, value in merged.items()})

    def for_search(self, prompt_length: int = 1, max_positions: int | None = None) -> SearchOptions:
        """Decide the settings of one search.

        `prompt_length` counts the start token and the prompt's tokens; `max_positions` is how many
        tokens the decoder can hold. Raises BadInput when the lengths do not fit each other.
        """
        resolved = values(self.resolve())
        chosen = {
            name: library(CaptionOptions)[name] if resolved[name] is None else resolved[name]
            for name in (field.name for field in dataclasses.fields(SearchOptions))
        }
        if resolved["max_new_tokens"] is not None:
            chosen["max_length"] = prompt_length + resolved["max_new_tokens"]
        longest = chosen["max_length"]
        if max_positions is not None and prompt_length > max_positions:
            raise BadInput(
                f"start token and prompt take {prompt_length} tokens, but the decoder holds "
                f"{max_positions}: give a shorter prompt."
            )
        if longest <= prompt_length:
            raise BadInput(
                f"max_length is {longest}, but start token and prompt already take {prompt_length} "
                f"tokens: give max_length={prompt_length + 1} or more, or max_new_tokens."
            )
        # The last token is never fed back, so it needs no position.
        if max_positions is not None and longest > max_positions + 1:
            raise BadInput(
                f"{longest} tokens do not fit the decoder, which holds {max_positions}: "
                f"give max_length={max_positions} or less."
            )
        _check_lengths(chosen["min_length"], longest)
        # Nothing is drawn without sampling, and a search wants a number all the same.
        chosen["seed"] = chosen["seed"] or 0
        return SearchOptions(**chosen)

    def _check_sampling(self) -> None:
        words = [f"{word}={getattr(self, word)}" for word in _SAMPLING if _is_set(self, word)]
        if words and self.do_sample is False:
            raise BadInput(
                f"{words[0]} needs sampling, but do_sample is False: leave one of the two out."
            )
        if (words or self.do_sample) and self.num_beams is not None and self.num_beams > 1:
            cause = "do_sample=True" if self.do_sample else words[0]
            raise BadInput(
                f"num_beams={self.num_beams} and {cause} exclude each other: give num_beams=1 to "
                "sample, or do_sample=False and no sampling option for beam search."
            )

    def _check_returned(self) -> None:
        wanted, beams = self.num_return_sequences, self.num_beams
        if wanted is None or beams is None or wanted <= beams:
            return
        if beams > 1:
            raise BadInput(
                f"num_return_sequences is {wanted}, but num_beams={beams} can return only {beams}: "
                f"give num_beams={wanted} or more."
            )
        if self.do_sample is False:
            raise BadInput(
                f"num_return_sequences is {wanted}, but greedy search finds one caption: "
                f"give num_beams={wanted} or do_sample=True."
            )


def _is_set(options: CaptionOptions, name: str) -> bool:
    return getattr(options, name) is not None


def _usable(defaults: Mapping[str, object], asked: Mapping[str, Any]) -> dict[str, object]:
    """Return the model's defaults that apply beside what was asked; BadInput if one is invalid."""
    for word, neutral in _NOT_APPLIED.items():
        if defaults.get(word) not in (None, neutral, [], {}):
            logger.warning(
                "the model's generation config sets %s=%r, which diptych does not apply",
                word,
                defaults[word],
            )
    fields = {f.name: f for f in dataclasses.fields(CaptionOptions) if f.metadata["from_model"]}
    given = {
        name: value
        for name, value in defaults.items()
        if name in fields and name not in asked and value is not None
    }
    if asked.get("do_sample"):
        given.pop("num_beams", None)
    elif asked.get("num_beams", 1) > 1:
        given.pop("do_sample", None)
    if any(word in asked for word in _LENGTHS):
        given = {name: value for name, value in given.items() if name not in _LENGTHS}
    if not asked.get("do_sample", given.get("do_sample", False)):
        # Files often carry sampling words beside do_sample=False, at values that mean nothing.
        given = {name: value for name, value in given.items() if name not in _SAMPLING}
    for name, value in given.items():
        check_value(fields[name], value, "in the model's generation config ")
    return given


def _check_lengths(shortest: int, longest: int) -> None:
    if shortest > longest:
        raise BadInput(
            f"min_length is {shortest}, but a caption may have {longest} tokens at most: "
            "lower min_length or raise max_length."
        )
