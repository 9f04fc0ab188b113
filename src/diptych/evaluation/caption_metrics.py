"""Score captions against human references: BLEU, ROUGE-L and CIDEr-D, from their definitions.

A *hypothesis* is the sentence to judge; its *references* are what people wrote about the same
image. `bleu`, `rouge_l` and `cider_d` take lists of tokens, `score_captions` takes sentences. For
the same tokens the numbers are those of pycocoevalcap, without Java.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain

import numpy as np

from diptych.errors import BadInput
from diptych.evaluation.cider import CiderD, DocumentFrequency, cider_d
from diptych.evaluation.token_lists import (
    MAX_N,
    Gram,
    ImageScores,
    Tokens,
    check_groups,
    check_lengths,
    check_pairs,
    grams,
    image_scores,
)

__all__ = [
    "BleuScore",
    "CaptionScores",
    "CiderD",
    "DocumentFrequency",
    "ImageScores",
    "bleu",
    "bootstrap_interval",
    "cider_d",
    "rouge_l",
    "score_captions",
    "tokenize",
    "tokenize_words",
]

# --- tokens ---------------------------------------------------------------------------------------

_WORDS = re.compile(r"[a-z0-9']+")

# Curly quotes, the two dashes and the ellipsis.
_PLAIN = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u2026", "''\"\"--.")
_PTB = re.compile(
    r"""
      can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b) | 't(?=is\b|was\b)
    | [^\W\d_]+?(?=n't\b) | n't\b | '(?:s|m|d|re|ve|ll)\b           # do n't   it 's
    | '?n'(?=\s)                                                    # rock 'n' roll
    | (?:[^\W\d_]\.){2,} | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc)\.       # u.s.   mr.
    | \d+(?:[.,:/]\d+)+                                             # 1,000   5:30   1/2
    | [^\W_]+(?:(?:[-_/&.@]|'(?!(?:s|m|d|re|ve|ll)\b))[^\W_]+)*     # t-shirt   o'clock
    | [^\w\s]
    """,
    re.VERBOSE,
)
_PUNCTUATION = frozenset("'\"`.?!,:;-()[]{}")


def tokenize_words(sentence: str) -> list[str]:
    """Split a sentence into lower-case runs of `[a-z0-9']`, the scheme of the project's bars."""
    return _WORDS.findall(sentence.lower())


def tokenize(sentence: str) -> list[str]:
    """Split a sentence as the COCO tools do: Penn Treebank, lower case, punctuation removed.

    One expression in place of Stanford's PTBTokenizer: of 39,597 photo captions four differ.
    Brackets are dropped here, as the COCO script intends; it keeps them, for it looks for their
    capitals (-LRB-) after lower-casing. Runs of signs such as `?!` are dropped too.
    """
    tokens: list[str] = _PTB.findall(sentence.lower().translate(_PLAIN))
    return [token for token in tokens if token not in _PUNCTUATION]


# --- BLEU -----------------------------------------------------------------------------------------

# The reference scorer keeps BLEU finite by these two, and the published digits contain them.
_TINY, _SMALL = 1e-15, 1e-9


@dataclass(frozen=True, slots=True)
class BleuScore:
    """Hold corpus BLEU-1 to BLEU-4 (each 0 to 1) and the two lengths they were computed from."""

    bleu_1: float
    bleu_2: float
    bleu_3: float
    bleu_4: float
    hypothesis_length: int
    reference_length: int

    @property
    def length_ratio(self) -> float:
        """Divide the words of all hypotheses by those of their closest references."""
        return (self.hypothesis_length + _TINY) / (self.reference_length + _SMALL)


def bleu(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> BleuScore:
    """Compute corpus BLEU with the closest reference length, the shorter on ties.

    `hypotheses` B token lists, `references` B lists of token lists (Papineni et al. 2002).
    """
    check_pairs(hypotheses, references)
    matches, guesses = [0] * MAX_N, [0] * MAX_N
    hypothesis_length = reference_length = 0
    for hypothesis, group in zip(hypotheses, references, strict=True):
        length = len(hypothesis)
        hypothesis_length += length
        reference_length += min((abs(len(r) - length), len(r)) for r in group)[1]
        for n in range(1, MAX_N + 1):
            guesses[n - 1] += max(0, length - n + 1)
        for gram, count in _clipped_matches(hypothesis, group):
            matches[len(gram) - 1] += count
    scores = _geometric_means(matches, guesses, hypothesis_length, reference_length)
    return BleuScore(*scores, hypothesis_length, reference_length)


def _clipped_matches(hypothesis: Tokens, group: Sequence[Tokens]) -> Iterator[tuple[Gram, int]]:
    known = set(chain.from_iterable(map(grams, group)))
    for gram, count in Counter(grams(hypothesis)).items():
        if gram in known:
            # A gram said once cannot be said too often; only repeats need the references' counts.
            yield gram, 1 if count == 1 else min(count, _highest_count(gram, group))


def _highest_count(gram: Gram, group: Sequence[Tokens]) -> int:
    return max(list(grams(reference)).count(gram) for reference in group)


def _geometric_means(
    matches: Sequence[int], guesses: Sequence[int], hypothesis_length: int, reference_length: int
) -> tuple[float, float, float, float]:
    ratio = (hypothesis_length + _TINY) / (reference_length + _SMALL)
    brevity = math.exp(1.0 - 1.0 / ratio) if ratio < 1.0 else 1.0
    scores = []
    product = 1.0
    for n in range(1, MAX_N + 1):
        product *= (matches[n - 1] + _TINY) / (guesses[n - 1] + _SMALL)
        scores.append(brevity * product ** (1.0 / n))
    return scores[0], scores[1], scores[2], scores[3]


# --- ROUGE-L --------------------------------------------------------------------------------------

_ROUGE_BETA = 1.2


def rouge_l(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> ImageScores:
    """Compute ROUGE-L, 0 to 1, with beta 1.2, best precision and best recall chosen separately.

    `hypotheses` B token lists, `references` B lists of token lists (Lin 2004).
    """
    check_pairs(hypotheses, references)
    pairs = zip(hypotheses, references, strict=True)
    return image_scores([_rouge_l_of_image(hypothesis, group) for hypothesis, group in pairs])


def _rouge_l_of_image(hypothesis: Tokens, group: Sequence[Tokens]) -> float:
    # An empty sentence counts as one empty word, as the reference scorer splits it.
    hypothesis = hypothesis or [""]
    places = _places(hypothesis)
    precision = recall = 0.0
    for reference in (tokens or [""] for tokens in group):
        common = _longest_common_subsequence(places, len(hypothesis), reference)
        precision = max(precision, common / len(hypothesis))
        recall = max(recall, common / len(reference))
    if precision == 0.0:
        return 0.0
    weight = _ROUGE_BETA**2
    return (1.0 + weight) * precision * recall / (recall + weight * precision)


def _places(tokens: Tokens) -> dict[Hashable, int]:
    """Map each token to an integer that has bit i set where the token stands at place i."""
    places: dict[Hashable, int] = {}
    for index, token in enumerate(tokens):
        places[token] = places.get(token, 0) | 1 << index
    return places


def _longest_common_subsequence(places: Mapping[Hashable, int], length: int, other: Tokens) -> int:
    """Count with one row of bits in place of a table (Hyyrö 2004)."""
    everywhere = (1 << length) - 1
    row = everywhere
    for token in other:
        if match := row & places.get(token, 0):
            row = (row + match | row - match) & everywhere
    return length - row.bit_count()


# --- everything at once ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CaptionScores:
    """Hold the scores of a set of captions; BLEU and ROUGE-L 0 to 1, CIDEr-D 0 to 10."""

    bleu_1: float
    bleu_2: float
    bleu_3: float
    bleu_4: float
    rouge_l: float
    cider_d: float
    length_ratio: float
    num_images: int
    rouge_l_per_image: tuple[float, ...]
    cider_d_per_image: tuple[float, ...]

    def as_dict(self, *, per_image: bool = False) -> dict[str, object]:
        """Return plain numbers for JSON, with the two lists of B scores if `per_image`."""
        lists = ("rouge_l_per_image", "cider_d_per_image")
        return {
            name: list(value) if name in lists else value
            for name, value in asdict(self).items()
            if per_image or name not in lists
        }


def score_captions(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenizer: Callable[[str], Sequence[str]] = tokenize_words,
    document_frequency: DocumentFrequency | None = None,
) -> CaptionScores:
    """Compute BLEU-1 to 4, ROUGE-L and CIDEr-D of B sentences against B lists of references."""
    _check_sentences(hypotheses, references)
    words = [tokenizer(sentence) for sentence in hypotheses]
    reference_words = [[tokenizer(sentence) for sentence in group] for group in references]
    corpus = bleu(words, reference_words)
    rouge = rouge_l(words, reference_words)
    cider = cider_d(words, reference_words, document_frequency)
    return CaptionScores(
        bleu_1=corpus.bleu_1,
        bleu_2=corpus.bleu_2,
        bleu_3=corpus.bleu_3,
        bleu_4=corpus.bleu_4,
        rouge_l=rouge.mean,
        cider_d=cider.mean,
        length_ratio=corpus.length_ratio,
        num_images=len(words),
        rouge_l_per_image=rouge.per_image,
        cider_d_per_image=cider.per_image,
    )


def bootstrap_interval(
    per_image: Sequence[float], seed: int = 0, samples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean over B images (Efron 1979).

    Images are drawn with replacement while their scores stay: for CIDEr-D the n-gram weights are
    those of the whole set.
    """
    values = np.asarray(per_image, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise BadInput("bootstrap: expected a list of at least one finite score")
    if samples < 1 or not 0.0 < level < 1.0:
        raise BadInput(
            f"bootstrap: samples={samples} and level={level}; give samples of at least 1 and a "
            "level between 0 and 1"
        )
    generator = np.random.default_rng(seed)
    means = [
        values[generator.integers(values.size, size=values.size)].mean() for _ in range(samples)
    ]
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def _check_sentences(hypotheses: Sequence[object], references: Sequence[Sequence[object]]) -> None:
    if isinstance(hypotheses, str):
        raise BadInput("the hypotheses are one string; give a list with a sentence for each image")
    check_lengths(len(hypotheses), len(references))
    check_groups(references)
    for index, (hypothesis, group) in enumerate(zip(hypotheses, references, strict=True)):
        for sentence in (hypothesis, *group):
            if not isinstance(sentence, str):
                kind = type(sentence).__name__
                raise BadInput(f"image {index}: a caption is of type {kind}; give strings")
