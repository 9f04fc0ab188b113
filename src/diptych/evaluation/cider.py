"""Score captions by CIDEr-D (Vedantam et al. 2015), once or many times against one set."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from diptych.errors import BadInput
from diptych.evaluation.token_lists import (
    MAX_N,
    Gram,
    ImageScores,
    Tokens,
    check_hypotheses,
    check_lengths,
    check_pairs,
    check_references,
    grams,
    image_scores,
)

__all__ = ["CiderD", "DocumentFrequency", "cider_d"]

_CIDER_SIGMA = 6.0


@dataclass(frozen=True, slots=True)
class DocumentFrequency:
    """Hold in how many of `num_images` images some reference contains each 1- to 4-gram.

    Grams are tuples of tokens. One made from a training set scores any sample against that set.
    """

    counts: Mapping[Gram, int]
    num_images: int

    def __post_init__(self) -> None:
        if self.num_images < max(self.counts.values(), default=1):
            raise BadInput(
                f"document frequency: num_images is {self.num_images}, fewer than the images in "
                "which its most frequent n-gram was counted; count both over the same images"
            )

    @classmethod
    def from_references(cls, references: Sequence[Sequence[Tokens]]) -> DocumentFrequency:
        """Count each gram once per image over B lists of reference token lists."""
        check_references(references)
        seen = (set(chain.from_iterable(map(grams, group))) for group in references)
        return cls(Counter(chain.from_iterable(seen)), len(references))


class CiderD:
    """Score many hypotheses against the same references (CIDEr-D, Vedantam et al. 2015).

    `references` B lists of token lists. Their n-grams are counted once, so that `score` costs one
    pass over the hypothesis: made for self-critical training (Rennie et al. 2017), where tokens
    may be ids (plain integers) and the end-of-sentence token may count as a word. Weights come
    from `document_frequency`, by default that of the references themselves; with a single image
    every weight, and so every score, is then 0. Takes about 20 kB an image: where that is too
    much, make one object per batch, all from one document frequency.
    """

    def __init__(
        self,
        references: Sequence[Sequence[Tokens]],
        document_frequency: DocumentFrequency | None = None,
    ) -> None:
        check_references(references)
        # Counting twice is faster than holding every count while the frequencies are summed.
        frequency = document_frequency or DocumentFrequency.from_references(references)
        self._weights = _SquaredWeights(frequency)
        self._images = [_ImageIndex(group, self._weights) for group in references]

    def __len__(self) -> int:
        return len(self._images)

    def score(self, image: int, hypothesis: Tokens) -> float:
        """Compute CIDEr-D, 0 to 10, of one token list against the references of image `image`."""
        return self._images[image].score(hypothesis, self._weights)

    def score_all(self, hypotheses: Sequence[Tokens]) -> ImageScores:
        """Score hypothesis i against image i, for B token lists and B images."""
        check_hypotheses(hypotheses)
        check_lengths(len(hypotheses), len(self))
        return image_scores([self.score(i, tokens) for i, tokens in enumerate(hypotheses)])


def cider_d(
    hypotheses: Sequence[Tokens],
    references: Sequence[Sequence[Tokens]],
    document_frequency: DocumentFrequency | None = None,
) -> ImageScores:
    """Compute CIDEr-D, 0 to 10 for each image (Vedantam et al. 2015).

    `hypotheses` B token lists, `references` B lists of token lists. Weights depend on the set of
    references: compare scores of the same images only. One image alone scores 0.
    """
    check_pairs(hypotheses, references)
    return CiderD(references, document_frequency).score_all(hypotheses)


class _SquaredWeights(dict[Gram, float]):
    """Map a gram to the square of its weight, log(images / images with the gram)."""

    def __init__(self, frequency: DocumentFrequency) -> None:
        log_images = math.log(frequency.num_images)
        # Most grams are in one image only; leaving those out saves most of the memory.
        super().__init__(
            (gram, (log_images - math.log(count)) ** 2)
            for gram, count in frequency.counts.items()
            if count > 1
        )
        self.rare = log_images**2


class _ImageIndex:
    """Find in one look-up all references of an image that contain a gram.

    A slot is 4 * reference + n - 1, so each reference has one for its grams of n tokens.
    """

    __slots__ = ("_inverse_norms", "_lengths", "_postings")

    def __init__(self, group: Sequence[Tokens], weights: _SquaredWeights) -> None:
        squares = [0.0] * (MAX_N * len(group))
        firsts = [((slot, 1),) for slot in range(len(squares))]
        postings: dict[Gram, tuple[tuple[int, int], ...]] = {}  # gram → (slot, count) …
        weight_of, rare = weights.get, weights.rare
        for number, tokens in enumerate(group):
            before = MAX_N * number - 1
            for gram, count in Counter(grams(tokens)).items():
                slot = before + len(gram)
                squares[slot] += weight_of(gram, rare) * count * count
                if gram in postings or count > 1:
                    postings[gram] = (*postings.get(gram, ()), (slot, count))
                else:
                    # By far the most frequent case shares its tuple: less time, half the memory.
                    postings[gram] = firsts[slot]
        self._postings = postings
        self._inverse_norms = tuple(map(_inverse_root, squares))
        self._lengths = tuple(map(len, group))

    def score(self, hypothesis: Tokens, weights: _SquaredWeights) -> float:
        squares = [0.0] * MAX_N
        overlaps = [0.0] * len(self._inverse_norms)
        # No weight is negative, so min(h, r) * r is weight² * min(counts) * count in r.
        for gram, count in Counter(grams(hypothesis)).items():
            weight = weights.get(gram, weights.rare)
            squares[len(gram) - 1] += weight * count * count
            for slot, times in self._postings.get(gram, ()):
                overlaps[slot] += weight * min(count, times) * times
        return self._mean_similarity(overlaps, squares, len(hypothesis))

    def _mean_similarity(
        self, overlaps: Sequence[float], squares: Sequence[float], length: int
    ) -> float:
        inverse_norms = [_inverse_root(square) for square in squares]
        total = 0.0
        for number, reference_length in enumerate(self._lengths):
            cosine = 0.0
            for n in range(MAX_N):
                slot = MAX_N * number + n
                cosine += overlaps[slot] * self._inverse_norms[slot] * inverse_norms[n]
            # The reference scorer measures length in bigrams: one word and none are the same.
            distance = max(length, 1) - max(reference_length, 1)
            total += cosine * math.exp(-(distance**2) / (2.0 * _CIDER_SIGMA**2))
        return 10.0 * total / (MAX_N * len(self._lengths))


def _inverse_root(square: float) -> float:
    return 1.0 / math.sqrt(square) if square > 0.0 else 0.0
