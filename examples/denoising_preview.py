"""Show how a picture comes out of noise, step by step, and stop early if you like."""

import argparse
import time
from pathlib import Path

from diptych import ImageGenerator
from diptych.images import contact_sheet

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("prompt", nargs="?", default="a photo of a sunflower")
parser.add_argument("--model", default="default")
parser.add_argument("--steps", type=int, help="else what the model prefers")
parser.add_argument("--stop-after", type=int, help="give up after this many steps")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--out", type=Path, default=Path("steps.png"))
arguments = parser.parse_args()

generator = ImageGenerator.load(arguments.model)
previews = []
start = time.perf_counter()
for step in generator.denoising_steps(
    arguments.prompt, num_inference_steps=arguments.steps, seed=arguments.seed
):
    # A preview needs no autoencoder: it costs next to nothing.
    previews.append(step.preview())
    seconds = time.perf_counter() - start
    print(f"{seconds:7.3f} s  step {step.index + 1} of {step.total}, sigma {step.sigma:.2f}")
    if step.index + 1 == arguments.stop_after:
        break

# What the network sees now: at the last step, the finished picture.
previews.append(step.result().image)
contact_sheet(previews, columns=6).save(arguments.out)
print(f"{len(previews) - 1} previews and the picture: {arguments.out}")
