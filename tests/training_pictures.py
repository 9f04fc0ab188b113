"""Draw small captioned pictures to train on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = ("red bird", "green house", "blue boat", "a man on a wave", "two cats", "a street")


def draw_pictures(
    folder: Path, count: int, seed: int, size: tuple[int, int] = (64, 64), **metadata: str
) -> Path:
    """Write `count` smooth random pictures with one caption each in `metadata.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        name = f"{number:03}.png"
        small.resize(size, Image.Resampling.BICUBIC).save(folder / name)
        text = f"{WORDS[number % len(WORDS)]}, number {number}"
        lines.append(json.dumps({"file_name": name, "text": text, **metadata}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder
