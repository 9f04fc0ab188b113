"""Measure a generator on emoji and flowers, and its autoencoder on pictures it has not seen.

    python recipes/default_generator/evaluate.py default --scorer runs/scorer.pt

Scenes are measured by `diptych evaluate images`. Here the scorer (`scorer.py`) looks at generated
pictures and picks the right prompt among ten; beside it stands how often it does so for the
original pictures of the same prompts, which bounds what can be told.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych import ImageGenerator
from diptych.evaluation.adherence import report
from diptych.evaluation.image_metrics import Retrieval, psnr, retrieval, ssim
from diptych.evaluation.scenes import evaluation_prompts, sample_scene, sentence
from pictures import SIDE, Captioned, photographs
from render import render
from scorer import Scorer, different, load, on_originals

Draw = Callable[[Sequence[str]], list[Image.Image]]


# --- prompts --------------------------------------------------------------------------------------


def prompt_sets(data: Path, count: int, seed: int) -> dict[str, Captioned]:
    """Choose `count` originals each: unseen emoji, emoji of the training split, unseen flowers."""
    return {
        "emoji, held-out prompts": _some(photographs(data, "emoji", "val"), count, seed),
        "emoji, training prompts": _some(photographs(data, "emoji", "train"), count, seed),
        "flowers": _some(photographs(data, "flowers", "val"), count, seed),
    }


def _some(originals: Captioned, count: int, seed: int) -> Captioned:
    rows = np.random.default_rng(seed).permutation(len(originals))[:count]
    return Captioned(originals.pictures[rows], [originals.captions[row] for row in rows])


def on_generated(scorer: Scorer, originals: Captioned, draw: Draw) -> Retrieval:
    """Draw a picture for the first caption of every original, and find the prompt again."""
    prompts, right = different(originals.captions)
    return retrieval(scorer.scores(draw([each[0] for each in originals.captions]), prompts), right)


def drawer(generator: ImageGenerator, save: Path | None, **options: Any) -> Draw:
    """Return a function that draws prompts, picture i from seed + i, and keeps what it drew."""

    def draw(prompts: Sequence[str]) -> list[Image.Image]:
        drawn = []
        for made in generator.images(prompts, on_error="raise", **options):
            if save is not None:
                place = save / made.prompt.replace(" ", "_").replace("/", "_")
                place.mkdir(parents=True, exist_ok=True)
                made.save(place / f"{made.seed}.png")
            drawn.append(made.image)
        return drawn

    return draw


# --- the autoencoder ------------------------------------------------------------------------------


def unseen(data: Path, count: int, seed: int) -> dict[str, Captioned]:
    """Choose `count` pictures of each domain that no training has seen."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, held=True) for _ in range(count)]
    drawn = np.stack([np.asarray(render(scene, rng)[0]) for scene in scenes])
    return {
        "emoji": _some(photographs(data, "emoji", "val"), count, seed),
        "flowers": _some(photographs(data, "flowers", "val"), count, seed),
        "scenes": Captioned(drawn, [[sentence(scene)] for scene in scenes]),
    }


def through(generator: ImageGenerator, picture: NDArray[np.uint8]) -> Image.Image:
    """Encode and decode a picture [H, W, 3]."""
    pixels = picture.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1.0
    (made,) = generator.decode(generator.encode(pixels))
    return made


def scenes_ceiling(generator: ImageGenerator, count: int, seed: int) -> dict[str, Any]:
    """Judge true drawings that went through the autoencoder: what its generator can reach."""
    rng = np.random.default_rng(seed)
    prompts = evaluation_prompts(count)
    drawn = [through(generator, np.asarray(render(each.scene, rng)[0])) for each in prompts]
    return report(prompts, drawn).as_dict()["overall"]


def reconstruction(generator: ImageGenerator, originals: Captioned) -> dict[str, float]:
    """Encode and decode; return the means over pictures of PSNR (dB) and SSIM, and the worst."""
    scores = []
    for picture in originals.pictures:
        made = through(generator, picture)
        scores.append((psnr(made, picture), ssim(made, picture)))
    decibels, likeness = np.array(scores).T
    return {
        "psnr": float(decibels.mean()),
        "psnr_lowest": float(decibels.min()),
        "ssim": float(likeness.mean()),
        "pictures": len(scores),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="default")
    parser.add_argument("--scorer", type=Path, default=Path("runs/scorer.pt"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--count", type=int, default=130, help="pictures of each kind")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--output", type=Path, help="write the figures there, as JSON")
    parser.add_argument("--save", type=Path, help="keep the pictures in this folder")
    parser.add_argument("--only-autoencoder", action="store_true")
    arguments = parser.parse_args()
    generator = ImageGenerator.load(arguments.model, runtime=arguments.runtime)
    found: dict[str, Any] = {"autoencoder": {}, "retrieval": {}}
    for domain, originals in unseen(arguments.data, arguments.count, arguments.seed).items():
        score = reconstruction(generator, originals)
        found["autoencoder"][domain] = score
        print(
            f"autoencoder, {domain}: PSNR {score['psnr']:.2f} dB (lowest "
            f"{score['psnr_lowest']:.2f}), SSIM {score['ssim']:.3f}, {score['pictures']} pictures",
            flush=True,
        )
    found["scenes through the autoencoder"] = scenes_ceiling(
        generator, arguments.count, arguments.seed
    )
    for name, score in found["scenes through the autoencoder"].items():
        print(f"true scenes through the autoencoder, {name}: {score['share']:.1%}", flush=True)
    if not arguments.only_autoencoder:
        options = {
            "seed": arguments.seed,
            "num_inference_steps": arguments.steps,
            "guidance_scale": arguments.guidance,
            "width": SIDE,
            "height": SIDE,
        }
        scorer = load(arguments.scorer)
        draw = drawer(generator, arguments.save, **options)
        sets = prompt_sets(arguments.data, arguments.count, arguments.seed)
        for name, originals in sets.items():
            pair = {
                "generated": on_generated(scorer, originals, draw),
                "originals": on_originals(scorer, originals),
            }
            found["retrieval"][name] = {kind: asdict(score) for kind, score in pair.items()}
            for kind, score in pair.items():
                print(f"{name}, {kind}: {score}", flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
