"""Find captions in the logits of a step function: greedy, sampling and beam search.

```
step → logits → filters → choose tokens → done? ─no→ step
```

Every image is searched by itself, in its own `State`; only the step sees a batch. So an image's
captions do not depend on its batch mates. Arrays are NumPy; no model or runtime is known here. A
step that can name the best tokens of each row is asked for those only, where they decide.
Shape letters: N rows of a call, R rows of one image, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from diptych.errors import BadInput, DiptychError
from diptych.image_to_text.candidates import (
    Candidates,
    Floats,
    Ids,
    best_of,
    log_softmax,
    rank,
    whole,
)
from diptych.image_to_text.filters import Filters, filters_of
from diptych.image_to_text.options import SearchOptions

__all__ = [
    "ChoosingStep",
    "Hypothesis",
    "State",
    "Step",
    "log_softmax",
    "rank",
    "search",
    "search_steps",
    "settled",
    "stream",
]

# Stands for "no score" in transformers' beam search; kept, because results depend on it.
_NONE = np.float32(-1e9)
# Asked for beyond the best that are needed: a runtime may take any of several equal ones there.
_SPARE = 8


class Step(Protocol):
    """Run the decoder one call further; hides model, runtime and cache.

    The rules a caller of `step` keeps, and an implementation may build on:
    - First call: `token_ids` `B P`, one row per image in order, `parents` None.
    - Later calls: `token_ids` `N 1`. Row i continues row `parents[i]` of the call before: rows may
      be repeated, reordered and dropped, so gather the cache with `parents` before adding to it.
    - Rows of one image are adjacent, images keep their order, and every image still searched has
      the same number of rows (num_beams, or num_return_sequences when sampling; 1 if greedy).
      Images that are done are dropped. Which image a row belongs to follows from `parents` alone.
    - Never called again once every image is done.
    """

    def __call__(self, token_ids: Ids, parents: Ids | None) -> Floats:
        """Feed tokens `N T`; return the logits after the last token, `N V`.

        The result is read before the next call and never written to, so a buffer may be reused.
        """
        ...


@runtime_checkable
class ChoosingStep(Step, Protocol):
    """Run the decoder like a `Step`, and keep the logits where they are if the best suffice."""

    def best(self, token_ids: Ids, parents: Ids | None, count: int) -> tuple[Ids, Floats, Floats]:
        """Feed tokens `N T`; return the `count` best tokens of each row (all, if there are fewer).

        They are `token_ids` `N K` in any order, their `logits` `N K`, and `N` logarithms of the
        sums of exp(logit - highest logit) over the whole vocabulary.
        """
        ...


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


Advance = Callable[[State, Candidates], State]


def search(
    step: Step,
    *,
    num_images: int,
    prompt_ids: Sequence[int],
    options: SearchOptions,
    eos_token_ids: Sequence[int],
) -> list[list[Hypothesis]]:
    """Return the captions of each image, best first, num_return_sequences of them.

    `prompt_ids` starts with the start token. Greedy and beam search give the token ids of
    transformers 5.23 `generate`; sampling gives its distribution, from streams of its own.
    Raises DiptychError when the logits are not numbers, or no token is left to draw.
    """
    states: list[State] = []
    for states in search_steps(  # noqa: B007 (the last states are the answer)
        step,
        num_images=num_images,
        prompt_ids=prompt_ids,
        options=options,
        eos_token_ids=eos_token_ids,
    ):
        pass
    return [list(state.ended[: options.num_return_sequences]) for state in states]


def stream(
    step: Step,
    *,
    prompt_ids: Sequence[int],
    options: SearchOptions,
    eos_token_ids: Sequence[int],
) -> Iterator[tuple[int, ...]]:
    """Yield the token ids of one image's best caption as soon as nothing can change them.

    Together they are `search(...)[0][0].token_ids`. Beam search settles a token when all captions
    that can still win share it, which may take until the end. Raises as `search` does, and BadInput
    for more than one caption.
    """
    if options.num_return_sequences > 1:
        raise BadInput(
            f"num_return_sequences is {options.num_return_sequences}, but only one caption can be "
            "streamed: give num_return_sequences=1."
        )
    given = 0
    for states in search_steps(
        step, num_images=1, prompt_ids=prompt_ids, options=options, eos_token_ids=eos_token_ids
    ):
        token_ids = settled(states[0])
        if len(token_ids) > given:
            yield token_ids[given:]
        given = len(token_ids)


def search_steps(
    step: Step,
    *,
    num_images: int,
    prompt_ids: Sequence[int],
    options: SearchOptions,
    eos_token_ids: Sequence[int],
) -> Iterator[list[State]]:
    """Yield the state of every image after each step; the last ones are all done."""
    prompt = np.asarray(prompt_ids, dtype=np.int64)
    if not num_images:
        return
    if not 0 < prompt.size < options.max_length:
        raise BadInput(
            f"max_length is {options.max_length} and the prompt has {prompt.size} tokens: "
            "a prompt needs at least the start token, and room after it."
        )
    # Some configs write "no end token" as -1.
    eos = np.unique([token for token in eos_token_ids if token >= 0]).astype(np.int64)
    start = _start(prompt, _rows_per_image(options))
    states = [start] * num_images
    filters = filters_of(options, eos)
    ask = _asking(step, options, eos, filters)
    advances = [_advance(options, eos, filters, image) for image in range(num_images)]
    active = list(range(num_images))
    token_ids, parents = np.tile(prompt, (num_images, 1)), None
    for index in count():
        candidates = ask(token_ids, parents, index)
        rows = len(token_ids) // len(active)
        for place, image in enumerate(active):
            # All rows of an image are alike at first, so one was enough to ask for.
            own = candidates.rows(place * rows, (place + 1) * rows, len(start.token_ids))
            states[image] = advances[image](states[image], own)
        yield list(states)
        places = [place for place, image in enumerate(active) if not states[image].done]
        if not places:
            return
        parents = np.concatenate(
            [place * rows + np.minimum(states[active[place]].parents, rows - 1) for place in places]
        )
        active = [active[place] for place in places]
        token_ids = np.concatenate([states[image].token_ids[:, -1:] for image in active])


def settled(state: State) -> tuple[int, ...]:
    """Return the generated ids that the best caption of this state is sure to begin with.

    The winner is the best caption that ended, or grows from one of the rows.
    """
    if state.done:
        return state.ended[0].token_ids
    rivals = state.token_ids[:, state.token_ids.shape[1] - state.token_logprobs.shape[1] :]
    if state.ended:
        best = np.asarray(state.ended[0].token_ids, dtype=np.int64)
        shared = rivals[:, : best.size]
        rivals = np.concatenate([shared, best[None, : shared.shape[1]]])
    same = (rivals == rivals[0]).all(axis=0)
    length = same.size if same.all() else int(same.argmin())
    return tuple(rivals[0, :length].tolist())


# What is asked of the step ---------------------------------------------------------------------

Ask = Callable[[Ids, Ids | None, int], Candidates]
"""(token_ids `N T`, parents, index of the step) → candidates of N rows."""


def _asking(step: Step, options: SearchOptions, eos: Ids, filters: Filters) -> Ask:
    """Return how to ask: for the best tokens of each row where they decide, else for whole rows."""
    reach = filters.reach
    if reach is None or not isinstance(step, ChoosingStep):
        return lambda token_ids, parents, index: whole(
            step(token_ids, parents), len(token_ids), index
        )
    needed = _num_ranked(options, eos) if options.num_beams > 1 else 1
    best = step.best
    before = 0

    def ask(token_ids: Ids, parents: Ids | None, index: int) -> Candidates:
        nonlocal before
        before += token_ids.shape[1]  # rows are as long as all that was fed
        found = best(token_ids, parents, needed + reach(before) + _SPARE)
        return best_of(*found, len(token_ids), index)

    return ask


# Three ways to advance a state ----------------------------------------------------------------


def _advance(options: SearchOptions, eos: Ids, filters: Filters, image: int) -> Advance:
    if options.do_sample:
        draw = _draws(options, image)
        return partial(_advance_rows, options=options, eos=eos, filters=filters, choose=draw)
    if options.num_beams > 1:
        return partial(_advance_beams, options=options, eos=eos, filters=filters)
    return partial(_advance_rows, options=options, eos=eos, filters=filters, choose=_most_likely)


def _rows_per_image(options: SearchOptions) -> int:
    return options.num_return_sequences if options.do_sample else options.num_beams


def _start(prompt: Ids, rows: int) -> State:
    # Beams start alike: the first counts, the others would only repeat its tokens.
    scores = np.full(rows, _NONE)
    scores[0] = 0
    return State(
        token_ids=np.tile(prompt, (rows, 1)),
        token_logprobs=np.zeros((rows, 0), np.float32),
        parents=np.arange(rows),
        scores=scores,
    )


Choose = Callable[[Floats, Ids], Ids]
"""(scores `r K`, rows `r`) → one column for each of these rows."""


def _advance_rows(
    state: State,
    candidates: Candidates,
    *,
    options: SearchOptions,
    eos: Ids,
    filters: Filters,
    choose: Choose,
) -> State:
    """Add one token to each row by itself: greedy search, or sampling."""
    # A row that ended repeats its end token until its sisters have ended too: when sampling, where
    # rows are whole and the column is the token.
    columns = state.token_ids[:, -1].copy()
    started = state.token_logprobs.shape[1] > 0
    growing = np.flatnonzero(~_among(columns, eos) | (not started))
    rows = np.arange(len(columns))
    own = candidates if len(growing) == len(rows) else Candidates(candidates.logits[growing])
    columns[growing] = choose(filters(own.logits, own, state.token_ids[growing]), growing)
    tokens = candidates.tokens(rows, columns)
    after = _extend(state, rows, tokens, candidates.logprobs_of(columns))
    if not (_among(tokens, eos).all() or after.token_ids.shape[1] >= options.max_length):
        return after
    found = [_cut(after, row, eos) for row in range(len(tokens))]
    best_first = tuple(sorted(found, key=lambda hypothesis: -hypothesis.score))
    return dataclasses.replace(after, ended=best_first, done=True)


def _most_likely(scores: Floats, rows: Ids) -> Ids:
    best: Ids = scores.argmax(axis=1)
    return best


def _draws(options: SearchOptions, image: int) -> Choose:
    """Return a choice at random, with one stream per image and row: `(seed + image, row)`."""
    streams = [
        np.random.Generator(np.random.PCG64((options.seed + image, row)))
        for row in range(options.num_return_sequences)
    ]

    def choose(scores: Floats, rows: Ids) -> Ids:
        chosen = [_draw(own, streams[row].random()) for own, row in zip(scores, rows, strict=True)]
        return np.array(chosen, dtype=np.int64)

    return choose


def _draw(scores: Floats, uniform: float) -> int:
    """Return the token at quantile `uniform` (0 to 1) of softmax(scores `V`)."""
    legal = np.flatnonzero(scores > -np.inf)
    if not legal.size:
        raise DiptychError(
            "no token is left to draw from: relax no_repeat_ngram_size or min_length."
        )
    weights = scores[legal].astype(np.float64)
    cumulative = np.exp(weights - weights.max()).cumsum()
    place = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(legal[min(place, legal.size - 1)])


def _advance_beams(
    state: State, candidates: Candidates, *, options: SearchOptions, eos: Ids, filters: Filters
) -> State:
    """Add one token to each beam: rank all continuations, keep the best num_beams.

    Twice as many are ranked (one more num_beams for each further end token), so that num_beams
    remain when the best ones end. Only captions that end among the first num_beams may be returned.
    """
    width = options.num_beams
    logprobs = candidates.logprobs()
    totals = filters(logprobs, candidates, state.token_ids) + state.scores[:, None]
    ranked = rank(totals.ravel(), _num_ranked(options, eos))
    totals_ranked = totals.ravel()[ranked]
    beams, columns = np.divmod(ranked, totals.shape[1])
    tokens = candidates.tokens(beams, columns)
    after = _extend(state, beams, tokens, logprobs[beams, columns])
    at_limit = after.token_ids.shape[1] >= options.max_length
    ends = _among(tokens, eos) | at_limit
    ended = _merge(after, np.flatnonzero(ends[:width]), totals_ranked, options)
    scores = totals_ranked + np.where(ends, _NONE, np.float32(0))
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


def _num_ranked(options: SearchOptions, eos: Ids) -> int:
    return int(max(2, 1 + eos.size) * options.num_beams)


def _merge(
    after: State, rows: Ids, totals: Floats, options: SearchOptions
) -> tuple[Hypothesis, ...]:
    """Add the captions that ended in `rows` to those before; keep the best num_beams."""
    new_tokens = after.token_logprobs.shape[1]
    scores = totals[rows] / np.float32(new_tokens**options.length_penalty)
    found = [
        _hypothesis(after, row, new_tokens, score)
        for row, score in zip(rows.tolist(), scores.tolist(), strict=True)
        if score > _NONE
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
    worst = ended[-1].score if full else float(_NONE)
    return bool(best / length**options.length_penalty > worst)


def _filled(ended: tuple[Hypothesis, ...], before: State) -> tuple[Hypothesis, ...]:
    """Fill places left open with the rows as they stood.

    Happens only when filters ban every token; transformers shows such rows too.
    """
    rows, length = before.token_logprobs.shape
    standing = [_hypothesis(before, row, length, float(_NONE)) for row in range(rows)]
    return (*ended, *standing[: rows - len(ended)])


# Rows and captions ----------------------------------------------------------------------------


def _extend(state: State, rows: Ids, tokens: Ids, logprobs: Floats) -> State:
    """Continue these rows of a state by one token each."""
    return dataclasses.replace(
        state,
        token_ids=np.concatenate([state.token_ids[rows], tokens[:, None]], axis=1),
        token_logprobs=np.concatenate([state.token_logprobs[rows], logprobs[:, None]], axis=1),
        parents=rows,
    )


def _cut(state: State, row: int, eos: Ids) -> Hypothesis:
    """Return a row up to its first generated end token, scored by its mean log-probability."""
    new_tokens = state.token_logprobs.shape[1]
    is_end = _among(state.token_ids[row, -new_tokens:], eos)
    length = int(is_end.argmax()) + 1 if is_end.any() else new_tokens
    return _hypothesis(state, row, length, float(state.token_logprobs[row, :length].mean()))


def _hypothesis(state: State, row: int, length: int, score: float) -> Hypothesis:
    prompt_length = state.token_ids.shape[1] - state.token_logprobs.shape[1]
    token_ids = state.token_ids[row, prompt_length : prompt_length + length]
    logprobs = state.token_logprobs[row, :length]
    return Hypothesis(tuple(token_ids.tolist()), tuple(logprobs.tolist()), score)


def _among(tokens: Ids, eos: Ids) -> NDArray[np.bool_]:
    """As np.isin, which takes longer than all else for a few numbers."""
    found: NDArray[np.bool_] = (tokens[:, None] == eos).any(axis=1)
    return found
