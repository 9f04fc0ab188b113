"""Change the scores of tokens before one is chosen: bans and penalties, and what sampling keeps.

A *rule* edits a few tokens of each row, so it works on whole rows and on the best tokens of a row
alike. A *filter* of sampling looks at whole rows. Shape letters: R rows of one image, T tokens,
V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from diptych.image_to_text.candidates import Candidates, Floats, Ids, rank
from diptych.image_to_text.options import SearchOptions

__all__ = ["Filters", "Rule", "filters_of"]

Filter = Callable[[Floats], Floats]
"""scores `R V` → scores `R V`, in a new array."""


@dataclass(frozen=True, slots=True)
class Edit:
    """Say which `tokens` of which `rows` (as many) get what `change` makes of their scores.

    A token may be named twice; it is changed once.
    """

    rows: Ids
    tokens: Ids
    change: Callable[[Floats], Floats]


Rule = Callable[[Ids], Edit]
"""token_ids `R T` with the prompt → what it changes."""


@dataclass(frozen=True, slots=True)
class Filters:
    """Hold what one search does to the scores: rules first, then what sampling keeps.

    `reach` is how many tokens of a row the rules may make less likely, for a row of T tokens; None
    where that does not tell how far down the best can be found, so that whole rows are needed.
    """

    rules: Sequence[Rule]
    kept: Sequence[Filter]
    reach: Callable[[int], int] | None

    def __call__(self, scores: Floats, candidates: Candidates, token_ids: Ids) -> Floats:
        """Return the `scores` `R K` of `candidates` after all of them; the array given is kept."""
        if self.rules:
            scores = scores.copy()
        for rule in self.rules:
            edit = rule(token_ids)
            found, columns = candidates.find(edit.rows, edit.tokens)
            rows = edit.rows[found]
            scores[rows, columns] = edit.change(scores[rows, columns])
        for keep in self.kept:
            scores = keep(scores)
        return scores


def filters_of(options: SearchOptions, eos: Ids) -> Filters:
    """Return the filters these options ask for, in transformers' order."""
    rules: list[Rule] = []
    times, ends = 0, 0  # a row's tokens are edited how often, and the end tokens
    if options.repetition_penalty != 1:
        rules.append(partial(_penalise_repetition, penalty=options.repetition_penalty))
        times += 1
    if options.no_repeat_ngram_size:
        rules.append(partial(_ban_repeated_ngrams, size=options.no_repeat_ngram_size))
        times += 1
    if options.min_length and eos.size:
        rules.append(partial(_ban_early_end, min_length=options.min_length, eos=eos))
        ends = eos.size
    # A penalty below 1 is a reward: it may lift a token from anywhere.
    whole = options.do_sample or options.repetition_penalty < 1
    reach = None if whole else lambda length: times * length + ends
    return Filters(rules, _kept(options) if options.do_sample else (), reach)


def _kept(options: SearchOptions) -> list[Filter]:
    kept: list[Filter] = []
    if options.temperature != 1:
        kept.append(partial(_temper, temperature=options.temperature))
    if options.top_k:
        kept.append(partial(_keep_top_k, top_k=options.top_k))
    if options.top_p < 1:
        kept.append(partial(_keep_top_p, top_p=options.top_p))
    return kept


def _penalise_repetition(token_ids: Ids, *, penalty: float) -> Edit:
    """Make every token seen so far less likely (Keskar et al. 2019); the start token counts."""
    rows, length = token_ids.shape
    change = partial(_penalise, penalty=np.float32(penalty))
    return Edit(np.repeat(np.arange(rows), length), token_ids.ravel(), change)


def _penalise(scores: Floats, *, penalty: np.float32) -> Floats:
    return np.where(scores < 0, scores * penalty, scores / penalty)


def _ban_repeated_ngrams(token_ids: Ids, *, size: int) -> Edit:
    """Ban tokens that would complete a run of `size` tokens a second time."""
    length = token_ids.shape[1]
    if length < size:
        return _NOTHING
    windows = sliding_window_view(token_ids, size, axis=1)
    tail = token_ids[:, None, length - size + 1 :]
    rows, places = np.nonzero((windows[:, :, :-1] == tail).all(axis=2))
    return Edit(rows, windows[rows, places, -1], _ban)


def _ban_early_end(token_ids: Ids, *, min_length: int, eos: Ids) -> Edit:
    """Ban the end tokens while a row, prompt included, is shorter than `min_length`."""
    rows, length = token_ids.shape
    if length >= min_length:
        return _NOTHING
    return Edit(np.repeat(np.arange(rows), eos.size), np.tile(eos, rows), _ban)


def _ban(scores: Floats) -> Floats:
    return np.full_like(scores, -np.inf)


_NOTHING = Edit(np.zeros(0, np.int64), np.zeros(0, np.int64), _ban)


def _temper(scores: Floats, *, temperature: float) -> Floats:
    """Divide by the temperature."""
    return scores / np.float32(temperature)


def _keep_top_k(scores: Floats, *, top_k: int) -> Floats:
    """Keep the `top_k` best tokens of each row, and all that tie with the last of them."""
    count = min(top_k, scores.shape[1])
    last = np.stack([row[rank(row, count)[-1]] for row in scores])
    return np.where(scores < last[:, None], np.float32(-np.inf), scores)


def _keep_top_p(scores: Floats, *, top_p: float) -> Floats:
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
