"""Hold the tokens that each row may go on with, and rank them.

They are whole rows of logits, or the best of each row, where a runtime that keeps the logits to
itself has picked them. Shape letters: R rows, K candidates of each, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diptych.errors import DiptychError

__all__ = ["Candidates", "Floats", "Ids", "best_of", "log_softmax", "rank", "whole"]

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Hold the `logits` `R K` of some tokens of each row, by rising id, its best one among them.

    `token_ids` `R K` names them, and `log_sums` `R` are the logarithms of the sums, over the whole
    vocabulary, of exp(logit - highest logit). Both are None for whole rows, where K is V.
    """

    logits: Floats
    token_ids: Ids | None = None
    log_sums: Floats | None = None

    def rows(self, start: int, stop: int, count: int) -> Candidates:
        """Return `count` rows: those from `start` to `stop`, or this one repeated."""

        def part(array: NDArray[Any]) -> NDArray[Any]:
            own = array[start:stop]
            return own if len(own) == count else np.broadcast_to(own, (count, *own.shape[1:]))

        token_ids, log_sums = self.token_ids, self.log_sums
        return Candidates(
            part(self.logits),
            None if token_ids is None else part(token_ids),
            None if log_sums is None else part(log_sums),
        )

    def tokens(self, rows: Ids, columns: Ids) -> Ids:
        """Return the tokens in these places."""
        return columns if self.token_ids is None else self.token_ids[rows, columns]

    def find(self, rows: Ids, tokens: Ids) -> tuple[Ids, Ids]:
        """Return which of these tokens of `rows` (as many) are here, and in which columns."""
        if self.token_ids is None:
            found = np.flatnonzero(tokens < self.logits.shape[1])
            return found, tokens[found]
        found, columns = np.nonzero(self.token_ids[rows] == tokens[:, None])
        return found, columns

    def logprobs(self) -> Floats:
        """Return the model's own log-probabilities `R K`."""
        if self.log_sums is None:
            return log_softmax(self.logits)
        shifted: Floats = self.logits - self.logits.max(axis=1, keepdims=True)
        shifted -= self.log_sums[:, None]
        return shifted

    def logprobs_of(self, columns: Ids) -> Floats:
        """Return those of one column of each row, `R`."""
        highest: Floats = self.logits.max(axis=1)
        log_sums = self.log_sums
        if log_sums is None:
            log_sums = np.log(np.exp(self.logits - highest[:, None]).sum(axis=1))
        picked: Floats = self.logits[np.arange(len(columns)), columns] - (highest + log_sums)
        return picked


def whole(logits: Floats, rows: int, index: int) -> Candidates:
    """Return the whole `logits` `rows V` of step `index`; DiptychError unless they are numbers."""
    logits = np.asarray(logits, dtype=np.float32)
    assert logits.shape == (rows, logits.shape[-1]), (logits.shape, rows)
    _check(logits, index)
    return Candidates(logits)


def best_of(token_ids: Ids, logits: Floats, log_sums: Floats, rows: int, index: int) -> Candidates:
    """Return the best tokens `rows K` of step `index`, by rising id; raises as `whole` does."""
    assert token_ids.shape == logits.shape == (rows, logits.shape[-1]), (logits.shape, rows)
    _check(logits, index)
    # Among equal scores the lowest token wins, as in whole rows.
    order = token_ids.argsort(axis=1)
    return Candidates(
        np.take_along_axis(logits, order, axis=1),
        np.take_along_axis(token_ids, order, axis=1),
        log_sums,
    )


def log_softmax(logits: Floats) -> Floats:
    """Return log-probabilities `N V` of logits `N V`, in float32."""
    shifted: Floats = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def rank(scores: Floats, count: int) -> Ids:
    """Return the places of the `count` best of `scores` `M`, best first, lower place on a tie."""
    width = 256
    blocks = scores.size // width
    if blocks <= count:
        places = np.arange(scores.size)
    else:
        # At least `count` values reach the count-th best block maximum: look no further.
        maxima = scores[: blocks * width].reshape(blocks, width).max(axis=1)
        places = np.flatnonzero(scores >= np.partition(maxima, -count)[-count])
    return places[np.argsort(-scores[places], kind="stable")[:count]]


def _check(logits: Floats, index: int) -> None:
    """Raise unless each row's highest is a number.

    -inf for some tokens is a way to ban them, so only NaN, inf and rows without a number are wrong.
    """
    wrong = np.flatnonzero(~np.isfinite(logits.max(axis=1)))
    if wrong.size:
        raise DiptychError(
            f"the decoder's logits are not finite at step {index + 1} (row {wrong[0]} of "
            f"{len(logits)}): the weights or the pixel values hold NaN or inf, or a half-precision "
            "run overflowed."
        )
