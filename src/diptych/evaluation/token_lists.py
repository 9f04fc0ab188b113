"""Hold what all scores of captions share: lists of tokens, their n-grams, one score an image."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from diptych.errors import BadInput

__all__ = [
    "MAX_N",
    "Gram",
    "ImageScores",
    "Tokens",
    "check_groups",
    "check_hypotheses",
    "check_lengths",
    "check_pairs",
    "check_references",
    "grams",
    "image_scores",
]

# Words or token ids: training scores ids without decoding them.
Tokens = Sequence[Hashable]
Gram = tuple[Hashable, ...]

MAX_N = 4


@dataclass(frozen=True, slots=True)
class ImageScores:
    """Hold one score for each image and their mean."""

    mean: float
    per_image: tuple[float, ...]


def grams(tokens: Tokens) -> Iterator[Gram]:
    """Yield the 1-, 2-, 3- and 4-grams, each a tuple of tokens."""
    tails = [tokens[start:] for start in range(MAX_N)]
    return chain.from_iterable(zip(*tails[:n], strict=False) for n in range(1, MAX_N + 1))


def image_scores(scores: Sequence[float]) -> ImageScores:
    """Return scores with their mean."""
    return ImageScores(math.fsum(scores) / len(scores), tuple(scores))


def check_pairs(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> None:
    """Raise `BadInput` unless each hypothesis has references, and all are lists of tokens."""
    check_hypotheses(hypotheses)
    check_lengths(len(hypotheses), len(references))
    check_references(references)


def check_hypotheses(hypotheses: Sequence[Tokens]) -> None:
    """Raise `BadInput` for a string among the lists of tokens."""
    if isinstance(hypotheses, str) or any(isinstance(tokens, str) for tokens in hypotheses):
        raise BadInput("a hypothesis is a string where a list of tokens is expected; tokenize it")


def check_references(references: Sequence[Sequence[Tokens]]) -> None:
    """Raise `BadInput` unless each image has references, all of them lists of tokens."""
    check_groups(references)
    for index, group in enumerate(references):
        if any(isinstance(tokens, str) for tokens in group):
            raise BadInput(
                f"image {index}: a reference is a string where a list of tokens is expected; "
                "tokenize it"
            )


def check_groups(references: Sequence[Sequence[object]]) -> None:
    """Raise `BadInput` unless there are images, and each has a reference."""
    if not references:
        raise BadInput("there are no captions to score; give at least one image")
    for index, group in enumerate(references):
        if isinstance(group, str):
            raise BadInput(f"image {index}: its references are one string; give a list of them")
        if not group:
            raise BadInput(f"image {index} has no reference; give at least one or leave it out")


def check_lengths(hypotheses: int, references: int) -> None:
    """Raise `BadInput` for another number of hypotheses than of images."""
    if hypotheses != references:
        raise BadInput(
            f"{hypotheses} hypotheses but references of {references} images; give one hypothesis "
            "for each image"
        )
