"""Find captions in the logits of a step function: greedy, sampling and beam search.

```
step → logits → filters → choose tokens → done? ─no→ step
```

Every image is searched by itself, in its own `State`; only the step sees a batch. So an image's
captions do not depend on its batch mates. Arrays are NumPy; no model or runtime is known here.
Shape letters: N rows of a call, R rows of one image, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from diptych.errors import BadInput, DiptychError
from diptych.image_to_text.options import SearchOptions

__all__ = [
    "Filter",
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

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
Filter = Callable[[Floats, Ids], Floats]
"""(scores `R V`, token_ids `R T` with the prompt) → scores `R V`, in a new array."""

# Stands for "no score" in transformers' beam search; kept, because results depend on it.
_NONE = np.float32(-1e9)


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


Advance = Callable[[State, Floats], State]


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
    advances = [_advance(options, eos, image) for image in range(num_images)]
    active = list(range(num_images))
    token_ids, parents = np.tile(prompt, (num_images, 1)), None
    for index in count():
        logits = _checked(step(token_ids, parents), len(token_ids), index)
        rows = len(logits) // len(active)
        for place, image in enumerate(active):
            own = logits[place * rows : (place + 1) * rows]
            # All rows of an image are alike at first, so one was enough to ask for.
            own = np.broadcast_to(own, (len(start.token_ids), own.shape[1]))
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


# Three ways to advance a state ----------------------------------------------------------------


def _advance(options: SearchOptions, eos: Ids, image: int) -> Advance:
    filters = _filters(options, eos)
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
"""(scores `r V`, rows `r`) → one token id for each of these rows."""


def _advance_rows(
    state: State,
    logits: Floats,
    *,
    options: SearchOptions,
    eos: Ids,
    filters: Sequence[Filter],
    choose: Choose,
) -> State:
    """Add one token to each row by itself: greedy search, or sampling."""
    tokens = state.token_ids[:, -1].copy()
    started = state.token_logprobs.shape[1] > 0
    # A row that ended repeats its end token until its sisters have ended too.
    growing = np.flatnonzero(~np.isin(tokens, eos) | (not started))
    scores = _apply(filters, logits[growing], state.token_ids[growing])
    tokens[growing] = choose(scores, growing)
    logprobs = _pick(logits, tokens) - _log_sum_exp(logits)
    after = _extend(state, np.arange(len(tokens)), tokens, logprobs)
    if not (np.isin(tokens, eos).all() or after.token_ids.shape[1] >= options.max_length):
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
    state: State, logits: Floats, *, options: SearchOptions, eos: Ids, filters: Sequence[Filter]
) -> State:
    """Add one token to each beam: rank all continuations, keep the best num_beams.

    Twice as many are ranked (one more num_beams for each further end token), so that num_beams
    remain when the best ones end. Only captions that end among the first num_beams may be returned.
    """
    width, vocabulary = logits.shape
    logprobs = log_softmax(logits)
    totals = _apply(filters, logprobs, state.token_ids) + state.scores[:, None]
    ranked = rank(totals.ravel(), max(2, 1 + eos.size) * width)
    totals_ranked = totals.ravel()[ranked]
    beams, tokens = np.divmod(ranked, vocabulary)
    after = _extend(state, beams, tokens, logprobs[beams, tokens])
    at_limit = after.token_ids.shape[1] >= options.max_length
    ends = np.isin(tokens, eos) | at_limit
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
    is_end = np.isin(state.token_ids[row, -new_tokens:], eos)
    length = int(is_end.argmax()) + 1 if is_end.any() else new_tokens
    return _hypothesis(state, row, length, float(state.token_logprobs[row, :length].mean()))


def _hypothesis(state: State, row: int, length: int, score: float) -> Hypothesis:
    prompt_length = state.token_ids.shape[1] - state.token_logprobs.shape[1]
    token_ids = state.token_ids[row, prompt_length : prompt_length + length]
    logprobs = state.token_logprobs[row, :length]
    return Hypothesis(tuple(token_ids.tolist()), tuple(logprobs.tolist()), score)


# Filters --------------------------------------------------------------------------------------


def _filters(options: SearchOptions, eos: Ids) -> list[Filter]:
    """Return the filters these options ask for, in transformers' order."""
    filters: list[Filter] = []
    if options.repetition_penalty != 1:
        filters.append(partial(_penalise_repetition, penalty=options.repetition_penalty))
    if options.no_repeat_ngram_size:
        filters.append(partial(_ban_repeated_ngrams, size=options.no_repeat_ngram_size))
    if options.min_length and eos.size:
        filters.append(partial(_ban_early_end, min_length=options.min_length, eos=eos))
    if options.do_sample:
        if options.temperature != 1:
            filters.append(partial(_temper, temperature=options.temperature))
        if options.top_k:
            filters.append(partial(_keep_top_k, top_k=options.top_k))
        if options.top_p < 1:
            filters.append(partial(_keep_top_p, top_p=options.top_p))
    return filters


def _apply(filters: Sequence[Filter], scores: Floats, token_ids: Ids) -> Floats:
    for keep_legal in filters:
        scores = keep_legal(scores, token_ids)
    return scores


def _penalise_repetition(scores: Floats, token_ids: Ids, *, penalty: float) -> Floats:
    """Make every token seen so far less likely (Keskar et al. 2019); the start token counts."""
    scores = scores.copy()
    seen = np.take_along_axis(scores, token_ids, axis=1)
    seen = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))
    np.put_along_axis(scores, token_ids, seen, axis=1)
    return scores


def _ban_repeated_ngrams(scores: Floats, token_ids: Ids, *, size: int) -> Floats:
    """Ban tokens that would complete a run of `size` tokens a second time."""
    length = token_ids.shape[1]
    if length < size:
        return scores
    windows = sliding_window_view(token_ids, size, axis=1)
    tail = token_ids[:, None, length - size + 1 :]
    rows, places = np.nonzero((windows[:, :, :-1] == tail).all(axis=2))
    scores = scores.copy()
    scores[rows, windows[rows, places, -1]] = -np.inf
    return scores


def _ban_early_end(scores: Floats, token_ids: Ids, *, min_length: int, eos: Ids) -> Floats:
    """Ban the end tokens while a row, prompt included, is shorter than `min_length`."""
    if token_ids.shape[1] >= min_length:
        return scores
    scores = scores.copy()
    scores[:, eos[eos < scores.shape[1]]] = -np.inf
    return scores


def _temper(scores: Floats, token_ids: Ids, *, temperature: float) -> Floats:
    """Divide by the temperature."""
    return scores / np.float32(temperature)


def _keep_top_k(scores: Floats, token_ids: Ids, *, top_k: int) -> Floats:
    """Keep the `top_k` best tokens of each row, and all that tie with the last of them."""
    count = min(top_k, scores.shape[1])
    last = np.stack([row[rank(row, count)[-1]] for row in scores])
    return np.where(scores < last[:, None], np.float32(-np.inf), scores)


def _keep_top_p(scores: Floats, token_ids: Ids, *, top_p: float) -> Floats:
    """Keep the fewest tokens of each row that hold `top_p` of the probability, at least one.

    Holtzman et al. 2020. Of tokens that tie at the border, lower ids stay.
    """
    scores = scores.copy()
    for row in scores:
        ordered = np.sort(row)
        if ordered[-1] == -np.inf:
            continue
        weights = np.exp(ordered - ordered[-1])
        cumulative = (weights / weights.sum()).cumsum(dtype=np.float64).astype(np.float32)
        removed = int(np.count_nonzero(cumulative[:-1] <= np.float32(1 - top_p)))
        border = ordered[removed]
        ties = np.flatnonzero(row == border)
        row[row < border] = -np.inf
        surplus = removed - int(np.searchsorted(ordered, border))
        row[ties[ties.size - surplus :]] = -np.inf
    return scores


# Numbers --------------------------------------------------------------------------------------


def log_softmax(logits: Floats) -> Floats:
    """Return log-probabilities `N V` of logits `N V`, in float32."""
    shifted: Floats = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def rank(scores: Floats, count: int) -> Ids:
    """Return the places of the `count` best of `scores` `M`, best first, lower place on a tie."""
    width, places = 256, np.arange(scores.size)
    blocks = scores.size // width
    if blocks > count:
        # At least `count` values reach the count-th best block maximum: look no further.
        maxima = scores[: blocks * width].reshape(blocks, width).max(axis=1)
        places = np.flatnonzero(scores >= np.partition(maxima, -count)[-count])
    return places[np.argsort(-scores[places], kind="stable")[:count]]


def _log_sum_exp(logits: Floats) -> Floats:
    highest: Floats = logits.max(axis=1)
    total: Floats = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    return total


def _pick(logits: Floats, tokens: Ids) -> Floats:
    picked: Floats = logits[np.arange(len(tokens)), tokens]
    return picked


def _checked(logits: Floats, rows: int, index: int) -> Floats:
    """Return logits as float32 `rows V`; DiptychError unless each row's highest is a number.

    -inf for some tokens is a way to ban them, so only NaN, inf and rows without a number are wrong.
    """
    logits = np.asarray(logits, dtype=np.float32)
    assert logits.shape == (rows, logits.shape[-1]), (logits.shape, rows)
    wrong = np.flatnonzero(~np.isfinite(logits.max(axis=1)))
    if wrong.size:
        raise DiptychError(
            f"the decoder's logits are not finite at step {index + 1} (row {wrong[0]} of {rows}): "
            "the weights or the pixel values hold NaN or inf, or a half-precision run overflowed."
        )
    return logits
