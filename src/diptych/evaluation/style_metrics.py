"""Measure a style transfer: how far from the content's structure, how near to the style.

Two sets of measures. Those of this file need no weights: likeness of edges, and statistics of
fixed random features and of colours. They order the results of one method by strength, and can be
compared with nothing that others publish. With the weights of AlexNet (`perceptual`) both come from
what that network sees. In the manner of ArtFID (Wright and Ommer 2022) both are joined as
(1 + structure) · (1 + style); less is better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.canvas import fit
from diptych.evaluation.caption_metrics import bootstrap_interval

__all__ = ["OFFLINE", "StyleReport", "StyleScore", "report", "structure_distance", "style_distance"]

Floats = NDArray[np.float64]
Distance = Callable[[Image.Image, Image.Image], float]

OFFLINE = "offline statistics: edges, random features and colours; not comparable with ArtFID"

_SIDE = 128
_CHANNELS = (16, 32)


@dataclass(frozen=True, slots=True)
class StyleScore:
    """Hold the distances of one result from its content and its style."""

    structure: float
    style: float

    @property
    def joined(self) -> float:
        return (1 + self.structure) * (1 + self.style)


@dataclass(frozen=True, slots=True)
class StyleReport:
    """Hold the mean scores of results, and of two that do nothing: the content, and the style."""

    measures: str
    results: tuple[StyleScore, ...]
    contents: tuple[StyleScore, ...]
    styles: tuple[StyleScore, ...]

    def rows(self) -> dict[str, tuple[StyleScore, ...]]:
        return {
            "results": self.results,
            "the content, as it is": self.contents,
            "the style, as it is": self.styles,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {
            "measures": self.measures,
            "pictures": len(self.results),
            "scores": {
                name: {
                    part: {
                        "mean": float(np.mean(values)),
                        "interval": list(bootstrap_interval(values)),
                    }
                    for part in ("structure", "style", "joined")
                    if (values := [getattr(score, part) for score in scores])
                }
                for name, scores in self.rows().items()
            },
        }


def report(
    triples: Sequence[tuple[Image.Image, Image.Image, Image.Image]],
    structure: Distance | None = None,
    style: Distance | None = None,
    measures: str = OFFLINE,
) -> StyleReport:
    """Score (content, style, result) pictures; other distances may take the place of these."""
    far, near = structure or structure_distance, style or style_distance

    def scores(picks: Sequence[tuple[Any, Any, Any]]) -> tuple[StyleScore, ...]:
        return tuple(
            StyleScore(far(content, made), near(painting, made))
            for content, painting, made in picks
        )

    return StyleReport(
        measures,
        scores(triples),
        scores([(content, painting, content) for content, painting, _ in triples]),
        scores([(content, painting, painting) for content, painting, _ in triples]),
    )


def structure_distance(content: Image.Image, result: Image.Image) -> float:
    """Return 1 minus the correlation of both pictures' edges; 0 for the same edges."""
    sizes = [fit(each.convert("L"), (_SIDE, _SIDE)) for each in (content, result)]
    ours, theirs = (_edges(np.asarray(each, np.float64)) for each in sizes)
    ours, theirs = ours - ours.mean(), theirs - theirs.mean()
    norm = float(np.sqrt((ours**2).sum() * (theirs**2).sum()))
    return 1.0 if norm == 0 else 1 - float((ours * theirs).sum()) / norm


def style_distance(style: Image.Image, result: Image.Image) -> float:
    """Return the distance of Gram matrices of fixed random features, and of colours."""
    ours, theirs = (
        _statistics(np.asarray(fit(each.convert("RGB"), (_SIDE, _SIDE), "crop"), np.float64))
        for each in (style, result)
    )
    return float(np.linalg.norm(ours - theirs))


def _edges(grey: Floats) -> Floats:
    return np.hypot(np.diff(grey, axis=0)[:, :-1], np.diff(grey, axis=1)[:-1])


def _statistics(pixels: Floats) -> Floats:
    """Return Gram matrices of two layers of random kernels, and colours' means and deviations."""
    random = np.random.default_rng(0)
    hidden = pixels / 127.5 - 1
    parts: list[Floats] = [hidden.mean((0, 1)), hidden.std((0, 1))]
    for channels in _CHANNELS:
        kernel = random.standard_normal((channels, hidden.shape[2], 3, 3))
        kernel /= np.sqrt((kernel**2).sum((1, 2, 3), keepdims=True))
        windows = np.lib.stride_tricks.sliding_window_view(hidden, (3, 3), (0, 1))[::2, ::2]
        hidden = np.maximum(np.einsum("hwcij,ocij->hwo", windows, kernel, optimize=True), 0)
        flat = hidden.reshape(-1, channels)
        parts.append((flat.T @ flat / len(flat)).ravel())
    return np.concatenate(parts)
