"""Draw a scene of coloured shapes, and say where everything is.

    python recipes/scenes/render.py some-folder --count 1000

writes pictures and `captions.jsonl`. Training calls `render` and needs no files.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from diptych.evaluation.scenes import (
    COLOURS,
    Group,
    Scene,
    paraphrase,
    parse_sentence,
    sample_scene,
    sentence,
)

SIZE = 128
OVERSAMPLE = 4
MARGIN = 4.0  # pixels free at every border
GAP = 5.0  # pixels free between two boxes
# Half the extent of a medium object, lowest and highest, by how many objects there are in all.
RADIUS = {1: (16, 20), 2: (14, 17), 3: (13, 15.5), 4: (12, 14), 5: (11, 12.5), 6: (10.5, 12)}
SCALE = {"small": 0.66, None: 1.0, "large": 1.42}
SMALLEST = 8.5  # an encoder with factor 8 loses what is smaller

Box = tuple[float, float, float, float]
Point = tuple[float, float]


@dataclass(frozen=True)
class Placed:
    """Hold one drawn object: what it is, its box (left, top, right, bottom) and its group."""

    colour: str
    shape: str
    size: str | None
    box: Box
    group: int


def render(scene: Scene, rng: np.random.Generator) -> tuple[Image.Image, list[Placed]]:
    """Draw a scene: an RGB picture of 128 × 128, and its objects, group by group."""
    outlines, owners = _arrange(scene, rng)
    canvas = Image.new("RGB", (SIZE * OVERSAMPLE,) * 2, _background(scene.background, rng))
    draw = ImageDraw.Draw(canvas)
    placed = []
    for outline, owner in zip(outlines, owners, strict=True):
        group = scene.groups[owner]
        draw.polygon((outline * OVERSAMPLE).ravel().tolist(), fill=_colour(group.colour, rng))
        box = (*outline.min(axis=0).tolist(), *outline.max(axis=0).tolist())
        placed.append(Placed(group.colour, group.shape, group.size, box, owner))
    return canvas.reduce(OVERSAMPLE), placed


# --- colours --------------------------------------------------------------------------------------


def _colour(name: str, rng: np.random.Generator) -> tuple[int, ...]:
    return _shifted(COLOURS[name], rng.integers(-8, 9, 3))


def _background(name: str | None, rng: np.random.Generator) -> tuple[int, ...]:
    if name is None:
        tint = ((252, 252, 252), (252, 252, 252), (236, 236, 236), (249, 244, 230))
        return _shifted(tint[rng.integers(len(tint))], rng.integers(-3, 4, 3))
    level = {"black": 10, "grey": 132, "white": 252}[name]
    spread = {"black": 10, "grey": 14, "white": 3}[name]
    return _shifted((level,) * 3, rng.integers(-spread, spread + 1) + rng.integers(-2, 3, 3))


def _shifted(colour: tuple[int, ...], shift: np.ndarray) -> tuple[int, ...]:
    return tuple(np.clip(np.add(colour, shift), 0, 255).tolist())


# --- outlines -------------------------------------------------------------------------------------


def _regular(corners: int, inner: float = 1.0) -> np.ndarray:
    """Return the corners of a regular polygon, or of a star, around 0, one corner at the top."""
    radii = np.where(np.arange(corners) % 2, inner, 1.0)
    angles = np.arange(corners) * (2.0 * math.pi / corners)
    outline = np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)
    return outline - (outline.min(axis=0) + outline.max(axis=0)) / 2.0


_SQUARE = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
# Scaled so that shapes of one radius look about equally large.
OUTLINES = {
    "circle": _regular(48),
    "square": _SQUARE * 0.9,
    "triangle": _regular(3) * 1.22,
    "star": _regular(10, inner=0.45) * 1.16,
}


def _outline(shape: str, radius: float, rng: np.random.Generator) -> np.ndarray:
    angle = math.radians(rng.uniform(-4.0, 4.0))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return OUTLINES[shape] @ turn * radius


# --- places ---------------------------------------------------------------------------------------


def _arrange(scene: Scene, rng: np.random.Generator) -> tuple[list[np.ndarray], list[int]]:
    """Return each object's corners on the canvas and the number of its group."""
    owners = [number for number, group in enumerate(scene.groups) for _ in range(group.count)]
    low, high = RADIUS[len(owners)]
    base = rng.uniform(low, high)
    radii = [_radius(scene.groups[owner], base, rng) for owner in owners]
    for _ in range(100):
        outlines = [
            _outline(scene.groups[owner].shape, radius, rng)
            for owner, radius in zip(owners, radii, strict=True)
        ]
        halves = [outline.max(axis=0) - outline.min(axis=0) for outline in outlines]
        places = _places([(half[0] / 2, half[1] / 2) for half in halves], owners, scene, rng)
        if places is not None:
            centres = [-(outline.min(axis=0) + outline.max(axis=0)) / 2 for outline in outlines]
            moved = zip(outlines, centres, places, strict=True)
            return [outline + centre + place for outline, centre, place in moved], owners
        radii = [max(SMALLEST, radius * 0.97) for radius in radii]
    raise RuntimeError(f"no room for {sentence(scene)}")


def _radius(group: Group, base: float, rng: np.random.Generator) -> float:
    return max(SMALLEST, base * SCALE[group.size] * rng.uniform(0.97, 1.03))


def _places(
    halves: list[Point], owners: list[int], scene: Scene, rng: np.random.Generator
) -> list[Point] | None:
    """Find a centre for every box so that none overlap and the relation holds, or None."""
    upright = scene.relation in ("above", "below")
    swapped = scene.relation in ("right of", "below")
    sides = [0 if (owner == 0) != swapped else 1 for owner in owners]
    if upright:  # "above" is "left of" with the axes exchanged
        halves = [(half[1], half[0]) for half in halves]
    for _ in range(12):
        limits = (
            _limits(halves, sides, rng) if scene.relation else [(0.0, float(SIZE))] * len(sides)
        )
        places = _scatter(halves, limits, rng)
        if places is not None and (scene.relation is None or _beside(places, sides)):
            return [(y, x) for x, y in places] if upright else places
    return None


def _limits(
    halves: list[Point], sides: list[int], rng: np.random.Generator
) -> list[tuple[float, float]]:
    """Cut the canvas in two where both sides fit; return each object's part of the x axis."""
    widest = [
        max(2 * half[0] for half, side in zip(halves, sides, strict=True) if side == this)
        for this in (0, 1)
    ]
    low, high = MARGIN + widest[0], SIZE - MARGIN - GAP - widest[1]
    cut = rng.uniform(low, high) if high > low else low
    # The margin at the cut is given back: the gap alone parts the two sides.
    return [(0.0, cut + MARGIN) if side == 0 else (cut + GAP - MARGIN, SIZE) for side in sides]


def _scatter(
    halves: list[Point], limits: list[tuple[float, float]], rng: np.random.Generator
) -> list[Point] | None:
    places: list[Point] = []
    for number, ((half_x, half_y), (left, right)) in enumerate(zip(halves, limits, strict=True)):
        for u, v in rng.random((12, 2)).tolist():
            x = left + MARGIN + half_x + u * (right - left - 2 * (MARGIN + half_x))
            y = MARGIN + half_y + v * (SIZE - 2 * (MARGIN + half_y))
            if all(
                abs(x - other_x) >= half_x + halves[i][0] + GAP
                or abs(y - other_y) >= half_y + halves[i][1] + GAP
                for i, (other_x, other_y) in enumerate(places[:number])
            ):
                places.append((x, y))
                break
        else:
            return None
    return places


def _beside(places: list[Point], sides: list[int]) -> bool:
    """Tell whether the two groups lie clearly beside, not diagonally above, each other."""
    means = [
        np.mean([place for place, side in zip(places, sides, strict=True) if side == this], axis=0)
        for this in (0, 1)
    ]
    across, along = np.abs(means[1] - means[0])
    return bool(along <= 0.7 * across)


# --- to files -------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompt", help="draw this scene, instead of random ones")
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    asked = parse_sentence(arguments.prompt) if arguments.prompt else None
    if arguments.prompt and asked is None:
        parser.error(f"{arguments.prompt!r} is not a sentence of the scene grammar")
    (arguments.folder / "images").mkdir(parents=True, exist_ok=True)
    with (arguments.folder / "captions.jsonl").open("w", encoding="utf-8") as rows:
        for index in range(arguments.count):
            scene = asked or sample_scene(rng)
            picture, placed = render(scene, rng)
            file = f"images/{index:06}.png"
            picture.save(arguments.folder / file)
            captions = [sentence(scene), paraphrase(scene, rng)]
            objects = [asdict(each) for each in placed]
            rows.write(json.dumps({"file": file, "captions": captions, "objects": objects}) + "\n")


if __name__ == "__main__":
    main()
