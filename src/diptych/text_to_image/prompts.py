r"""Turn prompts into what the denoising network is told: weights, chunks, encoded words.

The grammar is the one that most prompts on the web are written in:

- `(words)` counts 1.1 times, `[words]` 1/1.1 times, `(words:1.3)` as often as it says; brackets
  nest, and one that is never closed reaches to the end. `\(` `\)` `\[` `\]` `\\` are characters.
- `BREAK`, alone and in capitals, begins a new chunk.
- A prompt of more tokens than the text encoder has places for goes on in a further chunk, if it can
  after a comma, and the network is told all chunks, one after the other.

Text with none of these is encoded exactly as it stands. Words of a prompt that other programs
exchange between the steps, `[from:to:0.5]` and `[one|other]`, are all read as words, inside
brackets; so is `<lora:name:1>`. A note in the log says so.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diptych.errors import BadInput
from diptych.runtimes.network import OpenNetworks
from diptych.text import ClipTokenizer

__all__ = [
    "Chunk",
    "Conditioning",
    "Piece",
    "PromptPair",
    "encode_prompts",
    "parse_prompt",
    "split_chunks",
]

logger = logging.getLogger("diptych")

Floats = NDArray[np.float32]

_MOST_CHUNKS = 100
_MOST_CHARACTERS = 100_000
_MOST_OPEN = 100  # brackets; also keeps the work of parsing linear
_MOST_WEIGHT = 100.0
_BRACKET = 1.1
_LEAST_MEAN = 0.01  # of the root mean square; CLIP ViT-L has about 0.1
_COMMA_REACH = 20  # tokens that may move to the next chunk, so that it begins after a comma

_MARK = re.compile(r"\\[\\()\[\]]|[()\[\]]|:\s*+([+-]?(?:\d++(?:\.\d*+)?|\.\d++))\s*+\)")
_BREAK = re.compile(r"\bBREAK\b")
_NOT_READ = (
    (re.compile(r"\[[^\[\]]*(?:\||:\s*[\d.]+\s*\])"), "exchanging words between the steps"),
    (
        re.compile(r"<(?:lora|lyco|hypernet):"),
        "loading weights from within a prompt (give --lora FILE:0.8, or load_lora)",
    ),
    (re.compile(r"(?<=\S )AND(?= \S)"), "composing several prompts"),
)

# Which tokenizer serves which text encoder; the order is that of the widths the UNet expects.
_ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


class Piece(NamedTuple):
    """Hold words, and how often they count."""

    text: str
    weight: float


class Chunk(NamedTuple):
    """Hold the ids that one call of a text encoder takes, with the weight of each."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """Hold what the network is told: `encoder_hidden_states` B T D and `pooled` B E, float32."""

    encoder_hidden_states: Floats
    pooled: Floats


@dataclass(frozen=True, slots=True, eq=False)
class PromptPair:
    """Hold one prompt and what it is pushed away from, both `1 T …` with the same T.

    `negative` is None where none was asked for.
    """

    positive: Conditioning
    negative: Conditioning | None


def encode_prompts(
    networks: OpenNetworks,
    tokenizers: Mapping[str, ClipTokenizer],
    prompts: Sequence[str],
    negative_prompts: Sequence[str | None] | None = None,
    *,
    clip_skip: int = 0,
    parse_weights: bool = True,
    force_zeros_for_empty_prompt: bool = False,
) -> list[PromptPair]:
    """Encode each prompt beside its negative prompt; None for all of these makes none.

    A negative prompt that is None is the empty text, or zeros with `force_zeros_for_empty_prompt`.
    Results do not depend on the prompts around: every chunk is a call of its own, and chunks that
    occur twice are encoded once. `parse_weights=False` takes prompts literally and cuts what is too
    long. Where there are two text encoders their vectors are joined, weights change them without
    restoring their mean, and `pooled` is that of the second, from the first chunk.
    `clip_skip` is for the prompts: negative ones keep all layers, as in diffusers' pipelines.
    Raises `BadInput` for a prompt that cannot be used.
    """
    encoders = {name: tokenizers[_ENCODERS[name]] for name in _ENCODERS if name in networks}

    def towers_that_skip(layers: int) -> list[_Tower]:
        restore_mean = "text_encoder_2" not in encoders
        return [
            _Tower(networks, name, tokenizer, layers, restore_mean=restore_mean)
            for name, tokenizer in encoders.items()
        ]

    towers = towers_that_skip(clip_skip)
    plain_towers = towers_that_skip(0) if clip_skip else towers
    split = split_chunks if parse_weights else _literal_chunk

    def encode(prompt: str, wants_negative: bool, negative: str | None) -> PromptPair:
        is_zero = negative is None and force_zeros_for_empty_prompt
        chunks = [split(prompt, tower.tokenizer) for tower in towers]
        against: list[list[Chunk]] = []
        if wants_negative and not is_zero:
            against = [split(negative or "", tower.tokenizer) for tower in towers]
        count = max(len(each) for each in (*chunks, *against))
        positive = _encode(towers, chunks, count)
        if not wants_negative:
            return PromptPair(positive, None)
        if is_zero:
            zeros = (np.zeros_like(positive.encoder_hidden_states), np.zeros_like(positive.pooled))
            return PromptPair(positive, Conditioning(*zeros))
        return PromptPair(positive, _encode(plain_towers, against, count))

    if negative_prompts is None:
        return [encode(prompt, False, None) for prompt in prompts]
    pairs = zip(prompts, negative_prompts, strict=True)
    return [encode(prompt, True, negative) for prompt, negative in pairs]


def parse_prompt(prompt: str) -> list[list[Piece]]:
    """Return the weighted pieces of a prompt, those of each `BREAK` apart.

    Raises `BadInput` for what is no text, is enormous, or weighs too much.
    """
    _check_text(prompt)
    pieces = [Piece(prompt, 1.0)]
    if any(bracket in prompt for bracket in "()[]"):
        pieces = _weighted(prompt)
        if heaviest := [piece for piece in pieces if abs(piece.weight) > _MOST_WEIGHT]:
            raise BadInput(
                f"the words {heaviest[0].text[:40]!r} of a prompt count {heaviest[0].weight:.4g} "
                f"times: give weights up to {_MOST_WEIGHT:g}"
            )
    sections: list[list[Piece]] = [[]]
    for text, weight in pieces:
        first, *others = _BREAK.split(text)
        sections[-1].append(Piece(first, weight))
        sections += [[Piece(other, weight)] for other in others]
    return [_merged(section) for section in sections]


def split_chunks(prompt: str, tokenizer: ClipTokenizer) -> list[Chunk]:
    """Return the chunks of a prompt, each `model_max_length` ids and weights; at least one.

    A chunk that is full ends after its last comma, if that is among its last 20 tokens. The vectors
    of one placeholder stay together. Raises `BadInput` as `parse_prompt`, and for too many chunks.
    """
    room = tokenizer.model_max_length - 2
    comma = _comma_of(tokenizer)
    chunks: list[Chunk] = []
    for section in parse_prompt(prompt):
        tokens: list[tuple[int, float]] = []
        for unit in _units(section, tokenizer):
            while len(tokens) + len(unit) > room and tokens:
                end = _end_of_chunk(tokens, comma, is_comma=unit[0][0] == comma)
                chunks.append(_framed(tokens[:end], tokenizer))
                tokens = tokens[end:]
            tokens += unit
            _check_count(len(chunks))
        chunks.append(_framed(tokens, tokenizer))
    if len(chunks) > 1 and not tokens:
        chunks.pop()  # a BREAK at the very end
    _check_count(len(chunks))
    return chunks


def _check_text(prompt: str) -> None:
    if not isinstance(prompt, str):
        raise BadInput(f"a prompt is {prompt!r:.60}: give a text")
    if len(prompt) > _MOST_CHARACTERS:
        raise BadInput(f"a prompt has {len(prompt)} characters: give at most {_MOST_CHARACTERS}")
    for pattern, meaning in _NOT_READ:
        if found := pattern.search(prompt):
            logger.warning("%r is read as words: %s is not done here", found[0][:60], meaning)


def _weighted(prompt: str) -> list[Piece]:
    """Return the pieces of a prompt with brackets."""
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    for text, mark, number in _marks(prompt):
        if text:
            texts.append(text)
            weights.append(1.0)
        if mark in opened:
            opened[mark].append(len(texts))
            if len(opened[mark]) > _MOST_OPEN:
                raise BadInput(f"more than {_MOST_OPEN} brackets of a prompt are open at once")
        elif number and opened["("]:
            multiply(opened["("].pop(), float(number))
        elif mark == ")" and opened["("]:
            multiply(opened["("].pop(), _BRACKET)
        elif mark == "]" and opened["["]:
            multiply(opened["["].pop(), 1 / _BRACKET)
        elif mark:
            texts.append(mark.removeprefix("\\") or mark)
            weights.append(1.0)
    for start in opened["("]:
        multiply(start, _BRACKET)
    for start in opened["["]:
        multiply(start, 1 / _BRACKET)
    return [Piece(*each) for each in zip(texts, weights, strict=True)]


def _marks(prompt: str) -> Iterator[tuple[str, str, str]]:
    """Yield the text before each mark, the mark, and the number of a mark like `:1.3)`."""
    place = 0
    for found in _MARK.finditer(prompt):
        yield prompt[place : found.start()], found[0], found[1] or ""
        place = found.end()
    yield prompt[place:], "", ""


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    """Join neighbours of one weight, so that words keep together what belongs together."""
    groups = groupby((piece for piece in pieces if piece.text), key=lambda piece: piece.weight)
    return [Piece("".join(piece.text for piece in group), weight) for weight, group in groups]


def _units(section: Sequence[Piece], tokenizer: ClipTokenizer) -> Iterator[list[tuple[int, float]]]:
    """Yield tokens with their weights: one by one, but the rows of a placeholder together."""
    for text, weight in section:
        unit: list[tuple[int, float]] = []
        for token in tokenizer.tokens(text):
            goes_on = unit and token >= tokenizer.vocab_size and token == unit[-1][0] + 1
            if unit and not (goes_on and unit[0][0] >= tokenizer.vocab_size):
                yield unit
                unit = []
            unit.append((token, weight))
            if len(unit) == tokenizer.model_max_length - 2:
                yield unit
                unit = []
        if unit:
            yield unit


def _comma_of(tokenizer: ClipTokenizer) -> int | None:
    tokens = tokenizer.tokens(",")
    is_known = len(tokens) == 1 and tokens[0] != tokenizer.eos_token_id
    return tokens[0] if is_known else None


def _end_of_chunk(tokens: Sequence[tuple[int, float]], comma: int | None, *, is_comma: bool) -> int:
    """Return how many of these tokens, which fill a chunk, it keeps."""
    reach = range(len(tokens) - 1, max(len(tokens) - _COMMA_REACH, 1) - 1, -1)
    after = [place + 1 for place in reach if tokens[place][0] == comma]
    return after[0] if after and not is_comma else len(tokens)


def _framed(tokens: Sequence[tuple[int, float]], tokenizer: ClipTokenizer) -> Chunk:
    ids = tokenizer.frame([token for token, _ in tokens])
    weights = [1.0, *(weight for _, weight in tokens)]
    return Chunk(tuple(ids), tuple(weights + [1.0] * (len(ids) - len(weights))))


def _check_count(count: int) -> None:
    if count > _MOST_CHUNKS:
        raise BadInput(
            f"a prompt fills more than {_MOST_CHUNKS} times what the text encoder reads at once: "
            "shorten it"
        )


def _literal_chunk(prompt: str, tokenizer: ClipTokenizer) -> list[Chunk]:
    """Return the one chunk of a prompt that is taken as it stands, and cut."""
    _check_text(prompt)
    tokens = tokenizer.tokens(prompt)
    room = tokenizer.model_max_length - 2
    if tokens[room:]:
        logger.warning("the prompt is cut before %r", tokenizer.decode(tokens[room:])[:60])
    return [_framed([(token, 1.0) for token in tokens[:room]], tokenizer)]


def _encode(
    towers: Sequence[_Tower], chunks: Sequence[Sequence[Chunk]], count: int
) -> Conditioning:
    """Encode with every tower its own chunks, `count` of each, and join the vectors."""
    made = [tower.encode(own, count) for tower, own in zip(towers, chunks, strict=True)]
    states = np.concatenate([states for states, _ in made], axis=-1)
    return Conditioning(states, made[-1][1])


class _Tower:
    """Run one text encoder, once for each chunk it meets."""

    def __init__(
        self,
        networks: OpenNetworks,
        name: str,
        tokenizer: ClipTokenizer,
        clip_skip: int,
        *,
        restore_mean: bool,
    ) -> None:
        self.tokenizer = tokenizer
        self._networks, self._network = networks, networks[name]
        self._clip_skip, self._restore_mean = clip_skip, restore_mean
        self._known: dict[tuple[int, ...], tuple[Floats, Floats]] = {}

    def encode(self, chunks: Sequence[Chunk], count: int) -> tuple[Floats, Floats]:
        """Return `1 (count · T) D`, filled up with empty chunks, and the first one's `1 E`."""
        filled = [*chunks, *[_framed([], self.tokenizer)] * (count - len(chunks))]
        states = [self._weigh(self._run(chunk.ids)[0], chunk.weights) for chunk in filled]
        return np.concatenate(states, axis=1), self._run(filled[0].ids)[1]

    def _run(self, ids: tuple[int, ...]) -> tuple[Floats, Floats]:
        # One row a call: with more, the last bits of a row depend on how many others there are.
        if ids not in self._known:
            networks = self._networks
            made = self._network(
                input_ids=networks.array(np.array([ids], np.int64)), clip_skip=self._clip_skip
            )
            self._known[ids] = networks.numpy(made[0]), networks.numpy(made[1])
        return self._known[ids]

    def _weigh(self, states: Floats, weights: Sequence[float]) -> Floats:
        if all(weight == 1 for weight in weights):
            return states
        weighted = states * np.array(weights, np.float32)[None, :, None]
        if not self._restore_mean:
            return weighted
        # Each chunk has its mean back, and with them the whole: nothing depends on other prompts.
        before, after = (float(each.mean(dtype=np.float64)) for each in (states, weighted))
        # Where vectors lie around zero the two are rounding, and their ratio could be anything.
        is_around_zero = abs(before) < _LEAST_MEAN * float(np.sqrt(np.mean(states**2)))
        return weighted if is_around_zero or not after else weighted * np.float32(before / after)
