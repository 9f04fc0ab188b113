"""Find the same picture twice, in training and in what training is judged by.

    python recipes/duplicates.py [data]

writes `duplicates.json` beside this file: every pair found, by file name, and under `left_out` the
training pictures that show what a validation or test picture shows. The recipes leave those out.

Pictures are compared as grey thumbnails of 32 x 32 without their mean and contrast, each with each,
as they are and mirrored; training pictures and held-out ones also with crops of the other. Their
correlation plays the part of a perceptual hash and of its confirmation in one: it does not see
exposure and tint, and unlike the bits of a hash it survives flat and symmetrical pictures. Emoji
that differ in a digit or a colour correlate, too, so for them the colours have to be equal as well.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FOUND = Path(__file__).with_suffix(".json")
SETS = {
    "photos": ("flickr8k_224", "pascal_sentences_224"),
    "flowers": ("flowers_128",),
    "emoji": ("noto_emoji_128", "fxemoji_128"),
}
TRAINED_ON = ("train", "extra")
# Chosen by eye. Two photos of unlike things with a bright sky reach 0.957, one photo in two tints
# 0.991; drawings of one thing are 1.3 levels apart, an eight and a three 2.1.
LIKENESS = 0.98
DIFFERENCE = {"emoji": 1.5}
KEPT, SIDE, ROWS = 64, 32, 1000
Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
CROPS: list[Box] = [
    (x * (1 - share), y * (1 - share), x * (1 - share) + share, y * (1 - share) + share)
    for share in (0.9, 0.8)
    for x, y in ((0.5, 0.5), (0, 0), (0, 1), (1, 0), (1, 1))
]


@cache
def left_out(folder: str) -> frozenset[str]:
    """Return the files of a set, as its rows name them, that no training may see."""
    return frozenset(json.loads(FOUND.read_text(encoding="utf-8"))["left_out"].get(folder, ()))


@dataclass(frozen=True, slots=True)
class Thumbnails:
    """Hold names and splits of N pictures, and their pixels uint8 [N, 64, 64, 3]."""

    names: list[str]
    splits: list[str]
    pixels: NDArray[np.uint8]

    def part(self, held_out: bool) -> Thumbnails:
        """Return the held-out pictures, or those that are trained on."""
        rows = [i for i, split in enumerate(self.splits) if (split not in TRAINED_ON) == held_out]
        names, splits = ([each[i] for i in rows] for each in (self.names, self.splits))
        return Thumbnails(names, splits, self.pixels[rows])

    def seen(self, box: Box, mirrored: bool = False) -> NDArray[np.uint8]:
        """Return what a box of each picture shows, [N, 32, 32, 3]."""
        edges = tuple(KEPT * edge for edge in box)
        small = [
            np.asarray(Image.fromarray(each).resize((SIDE, SIDE), Image.Resampling.BOX, edges))
            for each in self.pixels
        ]
        cut = np.array(small, dtype=np.uint8).reshape(-1, SIDE, SIDE, 3)
        return cut[:, :, ::-1] if mirrored else cut


@dataclass(frozen=True, slots=True)
class Pair:
    """Say that two pictures show the same, and by how much they differ."""

    first: str
    second: str
    splits: tuple[str, str]
    likeness: float  # correlation of the grey thumbnails
    difference: float  # mean absolute difference of the colours, in levels of 255
    mirrored: bool
    cropped: bool


def read(data: Path, folders: tuple[str, ...]) -> Thumbnails:
    """Read whole sets, transparent pictures on white."""
    names, splits, pixels = [], [], []
    for folder in folders:
        with (data / folder / "captions.jsonl").open(encoding="utf-8") as file:
            for row in map(json.loads, file):
                names.append(f"{folder}/{row['file']}")
                splits.append(row["split"])
                pixels.append(_thumbnail(data / names[-1]))
    return Thumbnails(names, splits, np.stack(pixels))


def _thumbnail(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture).convert("RGB")
    return np.asarray(flat.resize((KEPT, KEPT), Image.Resampling.BOX))


def pairs(pictures: Thumbnails, difference: float = np.inf) -> list[Pair]:
    """Return every pair of pictures that show the same, once, the likeliest first."""
    trained, held = pictures.part(held_out=False), pictures.part(held_out=True)
    found: dict[frozenset[str], Pair] = {}
    for mirrored in (False, True):
        compared = [(pictures, pictures, WHOLE, WHOLE)]
        for crop in CROPS:
            compared += [(trained, held, crop, WHOLE), (trained, held, WHOLE, crop)]
        for first, second, box, other in compared:
            views = first.seen(box), second.seen(other, mirrored)
            for a, b, likeness, apart in _alike(*views, difference):
                name, key = first.names[a], frozenset((first.names[a], second.names[b]))
                splits = first.splits[a], second.splits[b]
                pair = Pair(name, second.names[b], splits, likeness, apart, mirrored, box != other)
                if len(key) == 2 and (key not in found or found[key].likeness < likeness):
                    found[key] = pair
    return sorted(found.values(), key=lambda pair: (-pair.likeness, pair.first))


def _alike(
    first: NDArray[np.uint8], second: NDArray[np.uint8], difference: float
) -> Iterator[tuple[int, int, float, float]]:
    """Yield rows of both that show the same, with likeness and difference."""
    ones, others = _plain(first), _plain(second)
    for start in range(0, len(ones), ROWS):
        likeness = ones[start : start + ROWS] @ others.T
        for row, b in np.argwhere(likeness >= LIKENESS).tolist():
            a = start + row
            apart = float(np.abs(first[a].astype(int) - second[b]).mean())
            if apart <= difference:
                yield a, b, round(float(likeness[row, b]), 4), round(apart, 2)


def _plain(views: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return grey pictures without mean and of length 1, [N, 1024]; flat ones stay zero."""
    grey = views.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    grey = grey.reshape(len(grey), -1)
    grey -= grey.mean(1, keepdims=True)
    return grey / np.maximum(np.linalg.norm(grey, axis=1, keepdims=True), 1.0)


def report(found: dict[str, list[Pair]]) -> dict[str, Any]:
    """Return what is written: training pictures to leave out, and all pairs, by kind."""
    leave: dict[str, set[str]] = {}
    for pair in (pair for several in found.values() for pair in several):
        trained = [split in TRAINED_ON for split in pair.splits]
        if any(trained) and not all(trained):
            folder, file = (pair.first if trained[0] else pair.second).split("/", 1)
            leave.setdefault(folder, set()).add(file)
    return {
        "left_out": {folder: sorted(files) for folder, files in leave.items()},
        "pairs": {kind: [asdict(pair) for pair in several] for kind, several in found.items()},
    }


def main() -> None:
    data = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("data")
    found = {}
    for kind, folders in SETS.items():
        found[kind] = pairs(read(data, folders), DIFFERENCE.get(kind, np.inf))
        across = sum(len({split in TRAINED_ON for split in p.splits}) == 2 for p in found[kind])
        print(f"{kind}: {len(found[kind])} pairs, {across} between training and held-out pictures")
    written = report(found)
    FOUND.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    for folder, files in written["left_out"].items():
        print(f"{folder}: {len(files)} training pictures left out")


if __name__ == "__main__":
    main()
