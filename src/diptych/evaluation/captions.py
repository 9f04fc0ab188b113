"""Measure a captioner on pictures with human captions, beside baselines that see nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from diptych.errors import BadInput
from diptych.evaluation.caption_metrics import CaptionScores, bootstrap_interval, score_captions

__all__ = [
    "CaptionReport",
    "Described",
    "read_captions",
    "read_json_lines",
    "read_references",
    "report",
]


@dataclass(frozen=True, slots=True)
class Described:
    """Hold a picture's path and what people wrote about it."""

    path: Path
    captions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CaptionReport:
    """Hold a captioner's scores, their 95 % interval, and those of two blind baselines.

    `blind` are the same captions dealt to the wrong pictures: what fluent words without sight are
    worth; None for a single picture. `constant` is the single caption that fits best everywhere.
    """

    scores: CaptionScores
    cider_d_interval: tuple[float, float]
    blind: CaptionScores | None
    constant: CaptionScores
    constant_caption: str
    num_different: int

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.scores.as_dict(),
            "cider_d_interval": list(self.cider_d_interval),
            "num_different": self.num_different,
            "blind": None if self.blind is None else self.blind.as_dict(),
            "constant": {"caption": self.constant_caption, **self.constant.as_dict()},
        }


def read_references(path: Path, images: Path | None = None, split: str = "") -> list[Described]:
    """Read JSON lines with `file` and `captions` (or `file_name` and `text`), and maybe `split`.

    Picture paths are relative to `images`, by default the file's own folder. With `split` only
    rows of that split are read. Raises `BadInput` naming the line that cannot be used.
    """
    folder = path.parent if images is None else images
    described = []
    for number, row in read_json_lines(path):
        if split and row.get("split") != split:
            continue
        name = row.get("file", row.get("file_name"))
        captions = row.get("captions", row.get("text"))
        captions = [captions] if isinstance(captions, str) else captions
        if "token_ids" in row and "token_logprobs" in row:
            raise BadInput(
                f"{path} is what `diptych caption` wrote: give people's captions as references, "
                f"and this with --captions {path.name}"
            )
        if not isinstance(name, str) or not isinstance(captions, list) or not _texts(captions):
            raise BadInput(
                f"{path}, line {number}: needs a picture's 'file' and its 'captions', a list of "
                "at least one text"
            )
        described.append(Described(folder / name, tuple(captions)))
    if not described:
        where = f" with split {split!r}" if split else ""
        raise BadInput(f"{path}: has no captions{where}")
    return described


def read_captions(path: Path, described: Sequence[Described]) -> list[str]:
    """Read the captions to be judged, one a picture, as `diptych caption --format jsonl` writes.

    Rows are matched by `file`, the whole path or its last parts; the order does not matter.
    Raises `BadInput` where one is missing, or two fit.
    """
    found: dict[str, dict[str, str]] = {}  # last part of the path → whole path → caption
    for number, row in read_json_lines(path):
        name, text = row.get("file"), row.get("text", "" if "error" in row else None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise BadInput(f"{path}, line {number}: needs 'file' and 'text'")
        if found.setdefault(Path(name).name, {}).setdefault(name, text) != text:
            raise BadInput(f"{path}, line {number}: has a second caption for {name}")
    return [_caption_of(each.path, found.get(each.path.name, {}), path) for each in described]


def _caption_of(picture: Path, found: dict[str, str], path: Path) -> str:
    """Return the caption whose path shares the most last parts with the picture's."""
    shared: dict[int, list[str]] = {}
    for name, text in found.items():
        pairs = zip(reversed(picture.parts), reversed(Path(name).parts), strict=False)
        count = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        # All of the shorter path has to fit: `a/1.jpg` says nothing of `b/1.jpg`.
        if count == min(len(picture.parts), len(Path(name).parts)):
            shared.setdefault(count, []).append(text)
    best = shared[max(shared)] if shared else []
    if len(best) != 1:
        number = "no caption" if not best else f"{len(best)} captions"
        raise BadInput(f"{path}: has {number} for {picture}")
    return best[0]


def report(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    seed: int = 0,
    tokenizer: Callable[[str], list[str]] | None = None,
) -> CaptionReport:
    """Score `captions` against several `references` each, and the blind baselines beside them."""
    options: dict[str, Any] = {} if tokenizer is None else {"tokenizer": tokenizer}
    scores = score_captions(captions, references, **options)
    # A shuffle that gives every picture another picture's caption: one long cycle.
    order = np.random.default_rng(seed).permutation(len(captions))
    dealt = [""] * len(captions)
    for here, there in zip(order, np.roll(order, 1), strict=True):
        dealt[here] = captions[there]
    constant, constant_scores = _best_constant(captions, references, options)
    return CaptionReport(
        scores=scores,
        cider_d_interval=bootstrap_interval(scores.cider_d_per_image, seed=seed),
        blind=score_captions(dealt, references, **options) if len(captions) > 1 else None,
        constant=constant_scores,
        constant_caption=constant,
        num_different=len(set(captions)),
    )


def _best_constant(
    captions: Sequence[str], references: Sequence[Sequence[str]], options: dict[str, Any]
) -> tuple[str, CaptionScores]:
    """Try the captions that were given most often, each for every picture."""
    counts: dict[str, int] = {}
    for text in captions:
        counts[text] = counts.get(text, 0) + 1
    tried = sorted(counts, key=lambda text: -counts[text])[:10]
    scored = [
        (text, score_captions([text] * len(captions), references, **options)) for text in tried
    ]
    return max(scored, key=lambda pair: pair[1].cider_d)


def read_json_lines(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """Yield line numbers from 1 and objects of a file of JSON lines, blank lines left out."""
    try:
        # By line feeds alone: a text may hold other characters that end lines elsewhere.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: cannot be read as text ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}, line {number}: is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise BadInput(f"{path}, line {number}: is not a JSON object")
        yield number, row


def _texts(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) for value in values)
