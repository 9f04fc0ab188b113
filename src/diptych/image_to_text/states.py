"""Hold one image's search between two steps: the rows that grow, and the captions that ended.

Shape letters: R rows of one image, T tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diptych.image_to_text.candidates import Floats, Ids

__all__ = ["NO_SCORE", "Hypothesis", "State", "among", "cut", "extend", "hypothesis_of"]

# Stands for "no score" in transformers' beam search; kept, because results depend on it.
NO_SCORE = np.float32(-1e9)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """Hold one caption of an image.

    `token_ids` are the generated ids without the prompt, the end token included if there is one.
    `token_logprobs` are the model's own log-probabilities of them, before any filter.
    `score` orders captions: with beams the sum of filtered log-probabilities divided by
    length ** length_penalty (transformers' `sequences_scores`), otherwise the mean of
    `token_logprobs`.
    """

    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    score: float


@dataclass(frozen=True, slots=True)
class State:
    """Hold one image's search between two steps.

    `token_ids` `R T` with the prompt and `token_logprobs` `R n` of the n generated ones are the
    rows still growing; `parents` `R` says which rows of the state before they continue; `scores`
    `R` are the sums that rank beams. `ended` are the captions found so far, best first; once
    `done`, they are the answer.
    """

    token_ids: Ids
    token_logprobs: Floats
    parents: Ids
    scores: Floats
    ended: tuple[Hypothesis, ...] = ()
    done: bool = False


def extend(state: State, rows: Ids, tokens: Ids, logprobs: Floats) -> State:
    """Continue these rows of a state by one token each."""
    return dataclasses.replace(
        state,
        token_ids=np.concatenate([state.token_ids[rows], tokens[:, None]], axis=1),
        token_logprobs=np.concatenate([state.token_logprobs[rows], logprobs[:, None]], axis=1),
        parents=rows,
    )


def cut(state: State, row: int, eos: Ids) -> Hypothesis:
    """Return a row up to its first generated end token, scored by its mean log-probability."""
    new_tokens = state.token_logprobs.shape[1]
    is_end = among(state.token_ids[row, -new_tokens:], eos)
    length = int(is_end.argmax()) + 1 if is_end.any() else new_tokens
    return hypothesis_of(state, row, length, float(state.token_logprobs[row, :length].mean()))


def hypothesis_of(state: State, row: int, length: int, score: float) -> Hypothesis:
    """Return the first `length` generated tokens of a row."""
    prompt_length = state.token_ids.shape[1] - state.token_logprobs.shape[1]
    token_ids = state.token_ids[row, prompt_length : prompt_length + length]
    logprobs = state.token_logprobs[row, :length]
    return Hypothesis(tuple(token_ids.tolist()), tuple(logprobs.tolist()), score)


def among(tokens: Ids, eos: Ids) -> NDArray[np.bool_]:
    """As np.isin, which takes longer than all else for a few numbers."""
    found: NDArray[np.bool_] = (tokens[:, None] == eos).any(axis=1)
    return found
