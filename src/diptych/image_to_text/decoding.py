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
from functools import partial
from itertools import count
from typing import Protocol, runtime_checkable

import numpy as np

from diptych.errors import BadInput, DiptychError
from diptych.image_to_text.beams import advance_beams, num_ranked
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
from diptych.image_to_text.states import NO_SCORE, Hypothesis, State, among, cut, extend

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
    needed = num_ranked(options, eos) if options.num_beams > 1 else 1
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
        return partial(advance_beams, options=options, eos=eos, filters=filters)
    return partial(_advance_rows, options=options, eos=eos, filters=filters, choose=_most_likely)


def _rows_per_image(options: SearchOptions) -> int:
    return options.num_return_sequences if options.do_sample else options.num_beams


def _start(prompt: Ids, rows: int) -> State:
    # Beams start alike: the first counts, the others would only repeat its tokens.
    scores = np.full(rows, NO_SCORE)
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
    growing = np.flatnonzero(~among(columns, eos) | (not started))
    rows = np.arange(len(columns))
    own = candidates if len(growing) == len(rows) else Candidates(candidates.logits[growing])
    columns[growing] = choose(filters(own.logits, own, state.token_ids[growing]), growing)
    tokens = candidates.tokens(rows, columns)
    after = extend(state, rows, tokens, candidates.logprobs_of(columns))
    if not (among(tokens, eos).all() or after.token_ids.shape[1] >= options.max_length):
        return after
    found = [cut(after, row, eos) for row in range(len(tokens))]
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
