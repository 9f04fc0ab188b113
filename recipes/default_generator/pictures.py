"""Read the training pictures: emoji, flowers and rendered scenes, all 128x128, with captions."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scenes"))

from diptych.evaluation.scenes import paraphrase, parse_sentence, sample_scene, sentence
from duplicates import left_out
from render import render

SIDE = 128  # pixels of every picture
PART = 1000
FOLDERS = {
    "emoji": ("noto_emoji_128", "fxemoji_128"),
    "flowers": ("flowers_128",),
}


@dataclass(frozen=True, slots=True)
class Captioned:
    """Hold `pictures` uint8 [N, 128, 128, 3] and the sentences that describe each."""

    pictures: NDArray[np.uint8]
    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.captions)


def photographs(data: Path, domain: str, split: str) -> Captioned:
    """Read the pictures of a domain, transparent ones on white.

    Training pictures that show what a held-out one shows are left out, and so are captions that
    are sentences of scenes, such as "a red circle".
    """
    rows = _rows(data, domain, split)
    return Captioned(
        np.stack([_read(path) for path, _ in rows]), [captions for _, captions in rows]
    )


def captions(data: Path) -> dict[str, list[list[str]]]:
    """Read the sentences of the training pictures of each domain, alone."""
    return {
        domain: [captions for _, captions in _rows(data, domain, "train")] for domain in FOLDERS
    }


def ambiguous(data: Path) -> set[str]:
    """Return the captions of training emoji that are sentences of scenes as well."""
    rows = _told(data, "emoji", "train")
    return {said for _, captions in rows for said in captions if parse_sentence(said)}


def _rows(data: Path, domain: str, split: str) -> list[tuple[Path, list[str]]]:
    return [
        (path, [said for said in captions if not parse_sentence(said)])
        for path, captions in _told(data, domain, split)
    ]


def _told(data: Path, domain: str, split: str) -> list[tuple[Path, list[str]]]:
    found = []
    for folder in (data / name for name in FOLDERS[domain]):
        if not folder.is_dir():
            raise SystemExit(f"{folder}: no such folder: see 'The data' in the recipe's README")
        without = left_out(folder.name)
        with (folder / "captions.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        found += [
            (folder / row["file"], row["captions"])
            for row in rows
            if row["split"] == split and row["file"] not in without
        ]
    return found


def scene_parts(count: int, seed: int) -> Iterator[Captioned]:
    """Render `count` scenes in parts of at most 1,000, one process a processor."""
    parts = [(min(PART, count - start), seed, start // PART) for start in range(0, count, PART)]
    # Fresh processes: a fork of one that holds a GPU or threads may hang.
    with multiprocessing.get_context("spawn").Pool(min(len(parts), os.cpu_count() or 1)) as pool:
        for pictures, captions in pool.imap(_part, parts):
            yield Captioned(pictures, captions)


def _part(asked: tuple[int, int, int]) -> tuple[NDArray[np.uint8], list[list[str]]]:
    count, *seed = asked
    part = scenes(count, seed)
    return part.pictures, part.captions


def scenes(count: int, seed: int | Sequence[int]) -> Captioned:
    """Render `count` scenes that are not held out, each with paraphrases of its sentence."""
    rng = np.random.default_rng(seed)
    pictures, captions = [], []
    for _ in range(count):
        scene = sample_scene(rng)
        picture, _ = render(scene, rng)
        pictures.append(np.asarray(picture))
        captions.append([sentence(scene), *(paraphrase(scene, rng) for _ in range(3))])
    return Captioned(np.stack(pictures), captions)


def _read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB"))
