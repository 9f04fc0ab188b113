"""Hold the words for one picture, and the way back to what the model saw."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from diptych.errors import BadImage, BadInput
from diptych.image_to_text.options import CaptionOptions
from diptych.images import Alpha, ImageInput, ImageLimits

__all__ = ["WORD", "Caption", "Reading", "View", "stripped"]


@dataclass(frozen=True, slots=True)
class Caption:
    """Hold the words for one picture.

    `token_ids` are the generated ids without start token and prompt; `token_logprobs` the model's
    log-probability of each; `score` what the search ranked by (with beams transformers'
    `sequences_scores`, else the mean log-probability). `alternatives` are the further captions
    of `num_return_sequences`, best first. `error` is set, and the text empty, for a picture of a
    list that could not be read.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    score: float = math.nan
    token_logprobs: tuple[float, ...] = ()
    alternatives: tuple[Caption, ...] = ()
    options: CaptionOptions | None = None
    error: BadImage | None = None
    _view: View | None = field(default=None, repr=False, compare=False)

    @property
    def probability(self) -> float:
        """Return the geometric mean of the tokens' probabilities, 0..1; nan without tokens."""
        if not self.token_logprobs:
            return math.nan
        return math.exp(sum(self.token_logprobs) / len(self.token_logprobs))

    @property
    def words(self) -> list[str]:
        """Return the words of the text, in order."""
        return [match.group() for match in WORD.finditer(self.text)]

    def heatmap(self, word: str | int | None = None) -> NDArray[np.float32]:
        """Return where the decoder looked, [h, w] over the picture's patches, mean of layers.

        `word` is a word of the text (its first occurrence), its number from 0 in `words`, or None
        for the mean of all. The picture is read and encoded once more, for nothing is kept of it.
        Raises `BadInput` for a word that is not in the caption.
        """
        if self._view is None:
            raise BadInput(f"{self.text!r} was not made from a picture at hand: caption it anew")
        return self._view.captioner.look(self, self._view, word)

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold: text, scores, tokens and alternatives, or the error."""
        if self.error is not None:
            return {"error": self.error.reason}
        record: dict[str, Any] = {
            "text": self.text,
            "probability": self.probability,
            "score": self.score,
            "token_ids": list(self.token_ids),
            "token_logprobs": list(self.token_logprobs),
        }
        if self.options is not None and self.options.seed is not None:
            record["seed"] = self.options.seed
        if self.alternatives:
            record["alternatives"] = [other.as_dict() for other in self.alternatives]
        return record

    def __reduce__(self) -> tuple[Any, ...]:
        # A caption that travels to another process leaves its captioner behind.
        values = (self.text, self.token_ids, self.score, self.token_logprobs)
        return type(self), (*values, self.alternatives, self.options, self.error)


WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")


class Looker(Protocol):
    """Find out where a captioner looked; `Captioner` does."""

    def look(self, caption: Caption, view: View, word: str | int | None) -> NDArray[np.float32]:
        """Return the weights [h, w] behind a word of the caption."""
        ...


@dataclass(frozen=True, slots=True)
class Reading:
    """Say how pictures are to be read."""

    alpha: Alpha
    limits: ImageLimits
    allow_urls: bool


@dataclass(frozen=True, slots=True)
class View:
    """Remember which picture a caption was made from, and by whom."""

    captioner: Looker
    image: ImageInput
    reading: Reading


def stripped(pieces: Iterable[str]) -> Iterator[str]:
    """Strip a text that arrives in pieces: white space waits until something follows it."""
    waiting, begun = "", False
    for piece in pieces:
        text = waiting + piece
        if not begun:
            text = text.lstrip()
        kept = text.rstrip()
        waiting = text[len(kept) :]
        if kept:
            begun = True
            yield kept
