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

# Words or token ids: training scores ids without decoding them.
Tokens = Sequence[Hashable]
Gram = tuple[Hashable, ...]

_MAX_N = 4

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
    _check_pairs(hypotheses, references)
    matches, guesses = [0] * _MAX_N, [0] * _MAX_N
    hypothesis_length = reference_length = 0
    for hypothesis, group in zip(hypotheses, references, strict=True):
        length = len(hypothesis)
        hypothesis_length += length
        reference_length += min((abs(len(r) - length), len(r)) for r in group)[1]
        for n in range(1, _MAX_N + 1):
            guesses[n - 1] += max(0, length - n + 1)
        for gram, count in _clipped_matches(hypothesis, group):
            matches[len(gram) - 1] += count
    scores = _geometric_means(matches, guesses, hypothesis_length, reference_length)
    return BleuScore(*scores, hypothesis_length, reference_length)


def _clipped_matches(hypothesis: Tokens, group: Sequence[Tokens]) -> Iterator[tuple[Gram, int]]:
    known = set(chain.from_iterable(map(_grams, group)))
    for gram, count in Counter(_grams(hypothesis)).items():
        if gram in known:
            # A gram said once cannot be said too often; only repeats need the references' counts.
            yield gram, 1 if count == 1 else min(count, _highest_count(gram, group))


def _highest_count(gram: Gram, group: Sequence[Tokens]) -> int:
    return max(list(_grams(reference)).count(gram) for reference in group)


def _geometric_means(
    matches: Sequence[int], guesses: Sequence[int], hypothesis_length: int, reference_length: int
) -> tuple[float, float, float, float]:
    ratio = (hypothesis_length + _TINY) / (reference_length + _SMALL)
    brevity = math.exp(1.0 - 1.0 / ratio) if ratio < 1.0 else 1.0
    scores = []
    product = 1.0
    for n in range(1, _MAX_N + 1):
        product *= (matches[n - 1] + _TINY) / (guesses[n - 1] + _SMALL)
        scores.append(brevity * product ** (1.0 / n))
    return scores[0], scores[1], scores[2], scores[3]


# --- ROUGE-L --------------------------------------------------------------------------------------

_ROUGE_BETA = 1.2


@dataclass(frozen=True, slots=True)
class ImageScores:
    """Hold one score for each image and their mean."""

    mean: float
    per_image: tuple[float, ...]


def rouge_l(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> ImageScores:
    """Compute ROUGE-L, 0 to 1, with beta 1.2, best precision and best recall chosen separately.

    `hypotheses` B token lists, `references` B lists of token lists (Lin 2004).
    """
    _check_pairs(hypotheses, references)
    pairs = zip(hypotheses, references, strict=True)
    return _image_scores([_rouge_l_of_image(hypothesis, group) for hypothesis, group in pairs])


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


# --- CIDEr-D --------------------------------------------------------------------------------------

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
        _check_references(references)
        seen = (set(chain.from_iterable(map(_grams, group))) for group in references)
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
        _check_references(references)
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
        _check_hypotheses(hypotheses)
        _check_lengths(len(hypotheses), len(self))
        return _image_scores([self.score(i, tokens) for i, tokens in enumerate(hypotheses)])


def cider_d(
    hypotheses: Sequence[Tokens],
    references: Sequence[Sequence[Tokens]],
    document_frequency: DocumentFrequency | None = None,
) -> ImageScores:
    """Compute CIDEr-D, 0 to 10 for each image (Vedantam et al. 2015).

    `hypotheses` B token lists, `references` B lists of token lists. Weights depend on the set of
    references: compare scores of the same images only. One image alone scores 0.
    """
    _check_pairs(hypotheses, references)
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
        squares = [0.0] * (_MAX_N * len(group))
        firsts = [((slot, 1),) for slot in range(len(squares))]
        postings: dict[Gram, tuple[tuple[int, int], ...]] = {}  # gram → (slot, count) …
        weight_of, rare = weights.get, weights.rare
        for number, tokens in enumerate(group):
            before = _MAX_N * number - 1
            for gram, count in Counter(_grams(tokens)).items():
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
        squares = [0.0] * _MAX_N
        overlaps = [0.0] * len(self._inverse_norms)
        # No weight is negative, so min(h, r) * r is weight² * min(counts) * count in r.
        for gram, count in Counter(_grams(hypothesis)).items():
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
            for n in range(_MAX_N):
                slot = _MAX_N * number + n
                cosine += overlaps[slot] * self._inverse_norms[slot] * inverse_norms[n]
            # The reference scorer measures length in bigrams: one word and none are the same.
            distance = max(length, 1) - max(reference_length, 1)
            total += cosine * math.exp(-(distance**2) / (2.0 * _CIDER_SIGMA**2))
        return 10.0 * total / (_MAX_N * len(self._lengths))


def _inverse_root(square: float) -> float:
    return 1.0 / math.sqrt(square) if square > 0.0 else 0.0


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


# --- shared ---------------------------------------------------------------------------------------


def _grams(tokens: Tokens) -> Iterator[Gram]:
    """Yield the 1-, 2-, 3- and 4-grams, each a tuple of tokens."""
    tails = [tokens[start:] for start in range(_MAX_N)]
    return chain.from_iterable(zip(*tails[:n], strict=False) for n in range(1, _MAX_N + 1))


def _image_scores(scores: Sequence[float]) -> ImageScores:
    return ImageScores(math.fsum(scores) / len(scores), tuple(scores))


def _check_pairs(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> None:
    _check_hypotheses(hypotheses)
    _check_lengths(len(hypotheses), len(references))
    _check_references(references)


def _check_hypotheses(hypotheses: Sequence[Tokens]) -> None:
    if isinstance(hypotheses, str) or any(isinstance(tokens, str) for tokens in hypotheses):
        raise BadInput("a hypothesis is a string where a list of tokens is expected; tokenize it")


def _check_references(references: Sequence[Sequence[Tokens]]) -> None:
    _check_groups(references)
    for index, group in enumerate(references):
        if any(isinstance(tokens, str) for tokens in group):
            raise BadInput(
                f"image {index}: a reference is a string where a list of tokens is expected; "
                "tokenize it"
            )


def _check_sentences(hypotheses: Sequence[object], references: Sequence[Sequence[object]]) -> None:
    if isinstance(hypotheses, str):
        raise BadInput("the hypotheses are one string; give a list with a sentence for each image")
    _check_lengths(len(hypotheses), len(references))
    _check_groups(references)
    for index, (hypothesis, group) in enumerate(zip(hypotheses, references, strict=True)):
        for sentence in (hypothesis, *group):
            if not isinstance(sentence, str):
                kind = type(sentence).__name__
                raise BadInput(f"image {index}: a caption is of type {kind}; give strings")


def _check_groups(references: Sequence[Sequence[object]]) -> None:
    if not references:
        raise BadInput("there are no captions to score; give at least one image")
    for index, group in enumerate(references):
        if isinstance(group, str):
            raise BadInput(f"image {index}: its references are one string; give a list of them")
        if not group:
            raise BadInput(f"image {index} has no reference; give at least one or leave it out")


def _check_lengths(hypotheses: int, references: int) -> None:
    if hypotheses != references:
        raise BadInput(
            f"{hypotheses} hypotheses but references of {references} images; give one hypothesis "
            "for each image"
        )
