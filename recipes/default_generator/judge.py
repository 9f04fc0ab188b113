"""Judge what stage 4 has learnt so far, on validation prompts of scenes.

    python recipes/default_generator/judge.py [config.toml]

Appends a row to `judge.jsonl`: shares of objects with their colours, of counts, of everything.
"""

from __future__ import annotations

import sys
import tempfile
import tomllib
from pathlib import Path

import torch

from diptych import ImageGenerator
from diptych.evaluation.adherence import report
from diptych.evaluation.scenes import evaluation_prompts
from diptych.training.state import Log
from diptych.weights.save_generator import save_generator
from ship import described, networks

COUNT, SEED = 300, 7  # another seed than the prompts of the card


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("config.toml")
    config = tomllib.loads(path.read_text())
    with tempfile.TemporaryDirectory() as temporary:
        modules = networks(config)
        save_generator(modules, described(config, modules, Path(temporary)), Path(temporary))
        generator = ImageGenerator.load(temporary, runtime="torch", dtype="float32")
        prompts = evaluation_prompts(COUNT, SEED)
        options = {**config["defaults"], "seed": 0, "width": 128, "height": 128}
        texts = [each.prompt for each in prompts]
        drawn = list(generator.images(texts, on_error="raise", batch_size=50, **options))
    found = report(prompts, [each.image for each in drawn]).as_dict()
    overall = {name: round(score["share"], 4) for name, score in found["overall"].items()}
    Log(Path(config["output"]) / "judge.jsonl").write(prompts=COUNT, **overall)


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True
    main()
