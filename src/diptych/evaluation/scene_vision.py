"""Find the coloured shapes in a picture, with plain arithmetic on its pixels.

The background is what lies along the border. What differs from it falls into connected parts; a
part's colour is its hue, its shape is read from how far its edge lies from its middle, all round.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from diptych.evaluation.scenes import COLOURS

__all__ = ["FoundObject", "connected_parts", "find_objects"]

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

_SIDE = 128  # pictures are looked at in this size: what is smaller than a few pixels is noise
_DIFFERENT = 48.0  # RGB distance from the background, of 442
_SMALLEST_AREA = 45
_LEAST_SATURATION = 0.3
_FARTHEST_HUE = 40.0  # degrees; beyond, a colour has no name here


@dataclass(frozen=True, slots=True)
class FoundObject:
    """Hold one object: colour and shape by name (None where neither fits), centre and area.

    Centre (x, y) and area are in pixels of a picture of 128 × 128.
    """

    colour: str | None
    shape: str | None
    centre: tuple[float, float]
    area: float


def find_objects(picture: Image.Image) -> list[FoundObject]:
    """Return the objects of a scene, in no special order."""
    if picture.size != (_SIDE, _SIDE):
        picture = picture.resize((_SIDE, _SIDE), Image.Resampling.BOX)
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    background = _background(pixels)
    distance = np.sqrt(((pixels - background) ** 2).sum(axis=2))
    found = []
    for part in _large_parts(distance > _DIFFERENT):
        pieces = _pieces_by_colour(part, pixels)
        found += [_describe(piece, pixels, background, distance) for piece in pieces]
    return found


def _background(pixels: Floats) -> Floats:
    edge = np.concatenate([pixels[:2], pixels[-2:], pixels[:, :2].swapaxes(0, 1)], axis=None)
    sides = np.concatenate([edge, pixels[:, -2:].ravel()]).reshape(-1, 3)
    return np.asarray(np.median(sides, axis=0))


# --- parts ----------------------------------------------------------------------------------------


def connected_parts(mask: Bools) -> Ints:
    """Give the parts of a mask [H, W] numbers from 1, and 0 outside; corners do not connect."""
    height, width = mask.shape
    padded = np.zeros((height, width + 2), dtype=np.int8)
    padded[:, 1:-1] = mask
    steps = np.diff(padded, axis=1)
    rows, starts = np.nonzero(steps == 1)  # one run of set pixels each, row by row
    ends = np.nonzero(steps == -1)[1]
    parents = list(range(len(rows)))

    def root(run: int) -> int:
        while parents[run] != run:
            parents[run] = parents[parents[run]]
            run = parents[run]
        return run

    for upper, lower in _touching_runs(rows, starts, ends):
        first, second = sorted((root(upper), root(lower)))
        parents[second] = first
    roots = [root(run) for run in range(len(rows))]
    numbers = {each: number for number, each in enumerate(dict.fromkeys(roots), start=1)}
    labels = np.zeros((height, width), dtype=np.int64)
    for run, each in enumerate(roots):
        labels[rows[run], starts[run] : ends[run]] = numbers[each]
    return labels


def _touching_runs(rows: Ints, starts: Ints, ends: Ints) -> Iterator[tuple[int, int]]:
    """Yield the pairs of runs that lie on neighbouring rows and share a column."""
    first_of_row = np.searchsorted(rows, np.arange(rows.max(initial=0) + 2))
    for lower, row in enumerate(rows.tolist()):
        if row == 0:
            continue
        for upper in range(first_of_row[row - 1], first_of_row[row]):
            if starts[upper] < ends[lower] and starts[lower] < ends[upper]:
                yield upper, lower


def _large_parts(mask: Bools) -> Iterator[Bools]:
    labels = connected_parts(mask)
    areas = np.bincount(labels.ravel())
    for number in range(1, len(areas)):
        if areas[number] >= _SMALLEST_AREA:
            yield labels == number


def _pieces_by_colour(part: Bools, pixels: Floats) -> Iterator[Bools]:
    """Cut a part where two objects of different colours touch."""
    rows, columns = np.nonzero(part)
    names = _colour_numbers(pixels[rows, columns])
    shares = np.bincount(names + 1, minlength=len(COLOURS) + 1) / len(names)
    strong = np.nonzero(shares[1:] > 0.2)[0]
    if len(strong) < 2:
        yield part
        return
    for number in strong.tolist():
        piece = np.zeros_like(part)
        piece[rows[names == number], columns[names == number]] = True
        yield from _large_parts(piece)


# --- colour ---------------------------------------------------------------------------------------

_NAMES = tuple(COLOURS)
_HUES = np.array(
    [360.0 * colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)[0] for r, g, b in COLOURS.values()]
)


def _colour_numbers(colours: Floats) -> Ints:
    """Return the place in `COLOURS` of each of N colours, -1 for grey and for unnamed hues."""
    high, low = colours.max(axis=1), colours.min(axis=1)
    spread = np.maximum(high - low, 1e-6)
    red, green, blue = colours.T
    hue = np.select(
        [high == red, high == green],
        [(green - blue) / spread % 6.0, (blue - red) / spread + 2.0],
        (red - green) / spread + 4.0,
    )
    away = np.abs((hue[:, None] * 60.0 - _HUES + 180.0) % 360.0 - 180.0)
    nearest = away.argmin(axis=1)
    grey = spread < _LEAST_SATURATION * np.maximum(high, 60.0)
    return np.where(grey | (away.min(axis=1) > _FARTHEST_HUE), -1, nearest)


def _describe(piece: Bools, pixels: Floats, background: Floats, distance: Floats) -> FoundObject:
    """Name a piece's colour and shape."""
    inner = piece & (distance >= np.quantile(distance[piece], 0.5))
    core = np.median(pixels[inner], axis=0)
    number = int(_colour_numbers(core[None])[0])
    cover = _coverage(piece, pixels, background, core)
    y, x = (float((cover * axis).sum() / cover.sum()) for axis in np.indices(cover.shape))
    colour = None if number < 0 else _NAMES[number]
    return FoundObject(colour, _shape(cover, x, y), (x, y), float(cover.sum()))


_ALIKE = 1e-6  # squared, of colours from 0 to 1


def _coverage(piece: Bools, pixels: Floats, background: Floats, core: Floats) -> Floats:
    """Return how much of each pixel [H, W] the object covers, 0 to 1, from its blended colour."""
    towards = core - background
    apart = float(towards @ towards)
    if apart < _ALIKE:  # its middle colour is that of the ground: stripes, say
        return np.where(piece, 1.0, 0.0)
    cover = ((pixels - background) @ towards) / apart
    near = piece.copy()  # and one pixel around
    near[1:] |= piece[:-1]
    near[:-1] |= piece[1:]
    near[:, 1:] |= piece[:, :-1]
    near[:, :-1] |= piece[:, 1:]
    return np.where(near, np.clip(cover, 0.0, 1.0), 0.0)


# --- shape ----------------------------------------------------------------------------------------

_RAYS = 72


def _shape(cover: Floats, x: float, y: float) -> str | None:
    """Name the shape from the waves in its radius: three for a triangle, four for a square."""
    one, two, three, four, five = _radius_waves(cover, x, y)[1:6].tolist()
    if max(one, two) > 0.12:
        return None
    strongest = max(three, four, five)
    if strongest < 0.065:
        return "circle"
    if strongest == five and five > 0.08:
        return "star"
    if strongest == three and three > 0.15:
        return "triangle"
    return "square" if strongest == four else None


def _radius_waves(cover: Floats, x: float, y: float) -> Floats:
    """Return the amplitudes of the waves 0 to 7 in the radius around (x, y), over its mean."""
    angles = np.arange(_RAYS) * (2.0 * np.pi / _RAYS)
    steps = np.arange(0.25, 64.0, 0.5)
    columns = x + np.outer(np.cos(angles), steps)
    rows = y + np.outer(np.sin(angles), steps)
    radius = _sampled(cover, rows, columns).sum(axis=1) * 0.5
    spectrum = np.abs(np.fft.rfft(radius))[:8]
    return np.asarray(2.0 * spectrum / max(float(spectrum[0]), 1e-6))


def _sampled(values: Floats, rows: Floats, columns: Floats) -> Floats:
    """Read between the pixels, bilinearly; 0 outside."""
    padded = np.pad(values, 1)
    rows = np.clip(rows + 1.0, 0.0, padded.shape[0] - 1.001)
    columns = np.clip(columns + 1.0, 0.0, padded.shape[1] - 1.001)
    top, left = rows.astype(np.int64), columns.astype(np.int64)
    down, right = rows - top, columns - left
    upper = padded[top, left] * (1 - right) + padded[top, left + 1] * right
    lower = padded[top + 1, left] * (1 - right) + padded[top + 1, left + 1] * right
    return np.asarray(upper * (1 - down) + lower * down)
