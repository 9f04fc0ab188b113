"""Measure how much a generator varies with the seed, and whether it copies training pictures.

    python recipes/default_generator/variety.py MODEL [--sheet docs/models/...-nearest.png]

Differences are root mean squares over thumbnails of 32 x 32, in levels of 255, and over the latents
of the model's own autoencoder. A generator that ignores its seed shows up in the first table, one
that copies in the second: beside its distances to the nearest training picture stand those of
held-out originals, and what is left between a training picture and itself after the autoencoder.

The sheet shows scenes, which are ours, unless `--shown` names more: no picture of the data sets is
kept in the repository.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import configs
from diptych import ImageGenerator
from diptych.evaluation.scenes import Scene, evaluation_prompts, parse_sentence, sample_scene
from pictures import SIDE, Captioned, ambiguous, photographs, scene_parts
from render import render

Floats = NDArray[np.float32]
Pictures = NDArray[np.uint8]
Looked = dict[str, tuple[Floats, Pictures]]
SMALL = 32
SEEDS = 4
# Kinds that are looked for among the same training pictures: a sentence can be both, as "a red
# circle" is.
DRAWN, PHOTOGRAPHED = ("scenes", "emoji", "unseen emoji"), ("flowers",)


# --- prompts and originals ------------------------------------------------------------------------


class Originals:
    """Know the pictures that a generator was trained on, and others like them."""

    def __init__(self, data: Path, config: dict[str, Any], scenes: int, seed: int) -> None:
        # "a red circle" is an emoji, too: what ships was taught so, and draws one.
        self._taken = ambiguous(data)
        self._config, self._scenes = config, min(scenes, config["train"]["scenes"])
        self._rng = np.random.default_rng(seed)
        self.train, self.val = (
            {name: photographs(data, name, split) for name in ("emoji", "flowers")}
            for split in ("train", "val")
        )

    def prompts(self, count: int) -> dict[str, list[str]]:
        """Choose `count` prompts of each kind."""
        scenes = [each.prompt for each in evaluation_prompts(2 * count)]
        flowers = sorted({text for texts in self.train["flowers"].captions for text in texts})
        return {
            "scenes": [prompt for prompt in scenes if prompt not in self._taken][:count],
            "emoji": self._some(self.train["emoji"], count),
            "unseen emoji": self._some(self.val["emoji"], count),
            "flowers": [str(text) for text in self._rng.permutation(flowers)[:count]],
        }

    def _some(self, pictures: Captioned, count: int) -> list[str]:
        rows = self._rng.permutation(len(pictures))[:count]
        return [pictures.captions[row][0] for row in rows]

    def parts(self, kinds: Sequence[str]) -> Iterator[Pictures]:
        """Yield the training pictures of some kinds, photographs and emoji mirrored, too."""
        for name in ("emoji", "flowers"):
            if name in kinds:
                yield self.train[name].pictures
                yield self.train[name].pictures[:, :, ::-1]
        if "scenes" in kinds:
            for part in scene_parts(self._scenes, self._config["seed"]):
                yield part.pictures

    def held_out(self, kind: str, count: int) -> Pictures:
        """Return `count` pictures that were not trained on."""
        if kind == "scenes":
            return self._drawn([sample_scene(self._rng, held=True) for _ in range(count)])
        whole = self.val[kind.split()[-1]].pictures
        return whole[self._rng.permutation(len(whole))[:count]]

    def groups(self, kind: str, prompts: Sequence[str]) -> list[Pictures]:
        """Return originals that each prompt fits; for emoji, which fit one prompt each, any."""
        if kind == "scenes":
            scenes = [scene for text in prompts if (scene := parse_sentence(text))]
            return [self._drawn([scene] * SEEDS) for scene in scenes]
        whole = self.train[kind.split()[-1]]
        fitting = [
            [row for row, texts in enumerate(whole.captions) if kind != "flowers" or text in texts]
            for text in prompts
        ]
        return [whole.pictures[self._rng.choice(rows, SEEDS, replace=False)] for rows in fitting]

    def _drawn(self, several: Sequence[Scene]) -> Pictures:
        return np.stack([np.asarray(render(scene, self._rng)[0]) for scene in several])

    def twins(self) -> list[Pictures]:
        """Return the pairs of emoji that both sets draw of one thing."""
        known: dict[str, list[int]] = {}
        for row, captions in enumerate(self.train["emoji"].captions):
            known.setdefault(captions[-1], []).append(row)
        return [self.train["emoji"].pictures[rows] for rows in known.values() if len(rows) == 2]


# --- differences ----------------------------------------------------------------------------------


def thumbnails(pictures: Pictures) -> Floats:
    """Return pictures [N, H, W, 3] as rows [N, 3072] of levels."""
    count, height, width, _ = pictures.shape
    boxes = pictures.reshape(count, SMALL, height // SMALL, SMALL, width // SMALL, 3)
    return boxes.mean((2, 4), dtype=np.float32).reshape(count, -1)


def latents(generator: ImageGenerator, pictures: Pictures) -> Floats:
    """Return the latents of pictures as rows."""
    return np.concatenate([generator.encode(_pixels(each)) for each in pictures]).reshape(
        len(pictures), -1
    )


def _pixels(picture: Pictures) -> Floats:
    return picture.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1.0


def apart(rows: Floats, others: Floats) -> Floats:
    """Return the root mean square differences [A, B] of rows [A, D] and [B, D]."""
    squares = (rows**2).mean(1)[:, None] + (others**2).mean(1) - 2 * rows @ others.T / rows.shape[1]
    return np.sqrt(squares.clip(min=0.0))


def spread(groups: Iterable[Floats]) -> float:
    """Return the mean difference of two of one group, over all groups."""
    means = []
    for rows in groups:
        upper = np.triu_indices(len(rows), 1)
        means.append(float(apart(rows, rows)[upper].mean()))
    return float(np.mean(means))


def nearest(pictures: Pictures, parts: Iterable[Pictures]) -> tuple[Floats, Pictures]:
    """Return how far the nearest training picture of each picture is, and that picture."""
    rows = thumbnails(pictures)
    distances = np.full(len(rows), np.inf, np.float32)
    found = np.zeros_like(pictures)
    for part in parts:
        between = apart(rows, thumbnails(part))
        best = between.argmin(1)
        nearer = between[np.arange(len(rows)), best] < distances
        distances[nearer] = between.min(1)[nearer]
        found[nearer] = part[best[nearer]]
    return distances, found


# --- figures --------------------------------------------------------------------------------------


def drawn(generator: ImageGenerator, prompts: Sequence[str], seed: int) -> Pictures:
    """Draw every prompt from as many seeds, [prompts, seeds, H, W, 3]."""
    asked = [prompt for prompt in prompts for _ in range(SEEDS)]
    made = generator.images(asked, seed=seed, width=SIDE, height=SIDE, on_error="raise")
    pictures = np.stack([np.asarray(each.image.convert("RGB")) for each in made])
    return pictures.reshape(len(prompts), SEEDS, *pictures.shape[1:])


def variety(generator: ImageGenerator, groups: Iterable[Pictures]) -> dict[str, float]:
    groups = list(groups)
    return {
        "pixels": spread(thumbnails(each) for each in groups),
        "latents": spread(latents(generator, each) for each in groups),
    }


def distances(far: Floats) -> dict[str, float]:
    return {"lowest": float(far.min()), "median": float(np.median(far))}


def copies(generator: ImageGenerator, pictures: Pictures) -> Floats:
    """Return how far pictures are from what the autoencoder makes of them."""
    through = [generator.decode(generator.encode(_pixels(each)))[0] for each in pictures]
    made = thumbnails(np.stack([np.asarray(each.convert("RGB")) for each in through]))
    return np.diagonal(apart(thumbnails(pictures), made))


def sheet(pairs: dict[str, tuple[Pictures, ...]], side: int = 88, columns: int = 4) -> Image.Image:
    """Lay out samples, each with its nearest training picture on its right."""
    tiles = [
        np.concatenate([made, near], 1)
        for samples, found in pairs.values()
        for made, near in zip(samples, found, strict=True)
    ]
    across, gap = 2 * side, 8
    rows = -(-len(tiles) // columns)
    page = Image.new("RGB", (columns * (across + gap) - gap, rows * (side + gap) - gap), "#888888")
    for place, tile in enumerate(tiles):
        small = Image.fromarray(tile).resize((across, side), Image.Resampling.LANCZOS)
        page.paste(small, (place % columns * (across + gap), place // columns * (side + gap)))
    return page


def looked_up(samples: dict[str, Pictures], parts: Iterable[Pictures]) -> Looked:
    """Return for every name how far the nearest training pictures are, and these."""
    far, near = nearest(np.concatenate(list(samples.values())), parts)
    ends = np.cumsum([len(each) for each in samples.values()])[:-1]
    split = zip(samples, np.split(far, ends), np.split(near, ends), strict=True)
    return {name: (distance, found) for name, distance, found in split}


def measure(
    generator: ImageGenerator, originals: Originals, prompts: dict[str, list[str]], seed: int
) -> tuple[dict[str, Any], dict[str, tuple[Pictures, Pictures]]]:
    """Return the figures of every kind, and samples with the nearest training pictures."""
    made = {
        kind: drawn(generator, texts, seed + 1000 * number)
        for number, (kind, texts) in enumerate(prompts.items())
    }
    flat = {kind: each.reshape(-1, *each.shape[2:]) for kind, each in made.items()}
    held = {kind: originals.held_out(kind, len(each)) for kind, each in flat.items()}
    looked: Looked = {}
    for kinds in (DRAWN, PHOTOGRAPHED):
        samples = {kind: flat[kind] for kind in kinds} | {f"held {k}": held[k] for k in kinds}
        looked |= looked_up(samples, originals.parts(kinds))
    found = {}
    for kind, texts in prompts.items():
        groups = originals.groups(kind, texts)
        found[kind] = {
            "prompts": texts,
            "generated": variety(generator, made[kind]),
            "originals": variety(generator, groups),
            "nearest to generated": distances(looked[kind][0]),
            "nearest to held-out": distances(looked[f"held {kind}"][0]),
            "a copy": distances(copies(generator, np.concatenate(groups))),
        }
    found["emoji"]["twins"] = variety(generator, originals.twins()[:32])
    return found, {kind: (flat[kind], looked[kind][1]) for kind in DRAWN}


def table(found: dict[str, Any]) -> str:
    """Return the figures as two tables of markdown."""
    lines = [
        "| kind | pixels: generated | originals | latents: generated | originals |",
        "|---|---|---|---|---|",
    ]
    for kind, of in found.items():
        made, real = of["generated"], of["originals"]
        cells = [made["pixels"], real["pixels"], made["latents"], real["latents"]]
        lines.append(f"| {kind} | " + " | ".join(f"{cell:.3g}" for cell in cells) + " |")
    columns = ("nearest to generated", "nearest to held-out", "a copy")
    lines += ["", f"| kind | {' | '.join(columns)} |", "|---|---|---|---|"]
    for kind, of in found.items():
        cells = [f"{of[name]['median']:.1f} (lowest {of[name]['lowest']:.1f})" for name in columns]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    twins = found["emoji"]["twins"]
    lines += ["", f"One thing in both emoji sets: {twins['pixels']:.3g}, {twins['latents']:.3g}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="default")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("gpu.toml"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--count", type=int, default=8, help="prompts of each kind")
    parser.add_argument("--scenes", type=int, default=20000, help="training scenes to look at")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--sheet", type=Path, help="where to draw samples beside the nearest")
    parser.add_argument("--shown", nargs="+", default=["scenes"], help="kinds on the sheet")
    parser.add_argument("--output", type=Path, help="write the figures there, as JSON")
    asked = parser.parse_args()
    generator = ImageGenerator.load(asked.model, runtime=asked.runtime)
    config = configs.read(asked.config)
    originals = Originals(asked.data, config, asked.scenes, asked.seed)
    found, pairs = measure(generator, originals, originals.prompts(asked.count), asked.seed)
    print(table(found))
    if asked.output is not None:
        asked.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if asked.sheet is not None:
        shown = {kind: tuple(each[::2] for each in pairs[kind]) for kind in asked.shown}
        sheet(shown).quantize(256, kmeans=4).save(asked.sheet, optimize=True)


if __name__ == "__main__":
    main()
