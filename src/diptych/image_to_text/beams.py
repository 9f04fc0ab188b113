"""Advance beams: rank all continuations of an image's rows, keep the best of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diptych.image_to_text.candidates import Candidates, Floats, Ids, rank
from diptych.image_to_text.filters import Filters
from diptych.image_to_text.options import SearchOptions
from diptych.image_to_text.states import (
    NO_SCORE,
    Hypothesis,
    State,
    among,
    extend,
    hypothesis_of,
)

__all__ = ["advance_beams", "num_ranked"]


def advance_beams(
    state: State, candidates: Candidates, *, options: SearchOptions, eos: Ids, filters: Filters
) -> State:
    """Add one token to each beam: rank all continuations, keep the best num_beams.

    Twice as many are ranked (one more num_beams for each further end token), so that num_beams
    remain when the best ones end. Only captions that end among the first num_beams may be returned.
    """
    width = options.num_beams
    logprobs = candidates.logprobs()
    totals = filters(logprobs, candidates, state.token_ids) + state.scores[:, None]
    ranked = rank(totals.ravel(), num_ranked(options, eos))
    totals_ranked = totals.ravel()[ranked]
    beams, columns = np.divmod(ranked, totals.shape[1])
    tokens = candidates.tokens(beams, columns)
    after = extend(state, beams, tokens, logprobs[beams, columns])
    at_limit = after.token_ids.shape[1] >= options.max_length
    ends = among(tokens, eos) | at_limit
    ended = _merge(after, np.flatnonzero(ends[:width]), totals_ranked, options)
    scores = totals_ranked + np.where(ends, NO_SCORE, np.float32(0))
    kept = rank(scores, width)
    best = float(scores[kept[0]])
    done = bool(ends.all()) or not _may_improve(best, after, ended, options)
    return State(
        token_ids=after.token_ids[kept],
        token_logprobs=after.token_logprobs[kept],
        parents=beams[kept],
        scores=scores[kept],
        ended=_filled(ended, state) if done else ended,
        done=done,
    )


def num_ranked(options: SearchOptions, eos: Ids) -> int:
    """Return how many continuations of an image are ranked."""
    return int(max(2, 1 + eos.size) * options.num_beams)


def _merge(
    after: State, rows: Ids, totals: Floats, options: SearchOptions
) -> tuple[Hypothesis, ...]:
    """Add the captions that ended in `rows` to those before; keep the best num_beams."""
    new_tokens = after.token_logprobs.shape[1]
    scores = totals[rows] / np.float32(new_tokens**options.length_penalty)
    found = [
        hypothesis_of(after, row, new_tokens, score)
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True)
        if score > NO_SCORE
    ]
    merged = sorted([*after.ended, *found], key=lambda hypothesis: -hypothesis.score)
    return tuple(merged[: options.num_beams])


def _may_improve(
    best: float, after: State, ended: Sequence[Hypothesis], options: SearchOptions
) -> bool:
    """Tell whether a beam with the sum `best` may still enter the captions that ended."""
    full = len(ended) == options.num_beams
    if full and options.early_stopping is True:
        return False
    length = new_tokens = after.token_logprobs.shape[1]
    if options.early_stopping == "never" and options.length_penalty > 0:
        # Sums only fall, so the kindest guess divides by the longest length.
        prompt_length = after.token_ids.shape[1] - new_tokens
        length = options.max_length - prompt_length
    worst = ended[-1].score if full else float(NO_SCORE)
    return bool(best / length**options.length_penalty > worst)


def _filled(ended: tuple[Hypothesis, ...], before: State) -> tuple[Hypothesis, ...]:
    """Fill places left open with the rows as they stood.

    Happens only when filters ban every token; transformers shows such rows too.
    """
    rows, length = before.token_logprobs.shape
    standing = [hypothesis_of(before, row, length, float(NO_SCORE)) for row in range(rows)]
    return (*ended, *standing[: rows - len(ended)])
