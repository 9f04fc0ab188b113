"""What do guidance intervals, reused features, merged tokens and fewer steps save, and cost?

    python benchmarks/fewer_steps.py [--model FOLDER] [--runtime auto torch …] [--device auto]
        [--dtype auto] [--size 512] [--steps 20] [--ways reuse_interval …] [--repeats 3]
        [--adherence 30] [--record] [--quick]

Each way draws the same eight prompts from the same seeds. Ways take turns, so that the machine's
moods fall on all of them; times are medians beside those of the plain run, by the clock and of the
processor, which is what to look at where other work runs besides (on one core: `taskset -c 0`, for
threads that wait for each other count). The cost in quality is
the mean PSNR to the plain pictures, and with `--adherence N` the share of N scenes that show
everything their prompts say. `--quick` draws two prompts in four steps, to see that all this works.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from diptych import ImageGenerator
from diptych.evaluation.adherence import report
from diptych.evaluation.scenes import evaluation_prompts
from harness import machine, record, take_turns

PROMPTS = (
    *("a photo of a sunflower", "a photo of a rose", "a slice of pizza", "a red apple"),
    *("a red circle left of a blue square", "two green triangles"),
    *("a yellow star above a purple circle", "three orange stars on a black background"),
)
SEED = 7
Words = Mapping[str, Any]


def ways(steps: int, runtime: str) -> dict[str, Words]:
    """Name what is compared, the plain run first."""
    found: dict[str, Words] = {"plain": {}}
    for share in (0.7, 0.5, 0.35):
        found[f"{round(steps * share)} steps"] = {"num_inference_steps": round(steps * share)}
    for interval in ("0,0.8", "0.1,1", "0.1,0.7", "0.2,0.8"):
        found[f"guidance_interval {interval}"] = {"guidance_interval": interval}
    for interval in (2, 3, 5):
        found[f"reuse_interval {interval}"] = {"reuse_interval": interval}
    both = {"guidance_interval": "0,0.8", "reuse_interval": 2}
    found["guidance_interval 0,0.8, reuse_interval 2"] = both
    if runtime == "torch":
        for ratio in (0.25, 0.5, 0.75):
            found[f"token_merging_ratio {ratio}"] = {"token_merging_ratio": ratio}
    return found


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = _parse(arguments)
    results = []
    for runtime in options.runtime:
        generator = ImageGenerator.load(
            options.model, runtime=runtime, device=options.device, dtype=options.dtype
        )
        results += measure(generator, options)
    print(machine())
    if options.record:
        print(record(results, "fewer_steps"))
    return results


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="default")
    parser.add_argument("--runtime", nargs="+", default=["auto"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--size", type=int, help="pixels of an edge; else the model's")
    parser.add_argument("--steps", type=int, help="else the model's")
    parser.add_argument("--ways", nargs="+", default=[""], help="only those that begin so")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--adherence", type=int, default=0, help="scenes to judge for each way")
    parser.add_argument("--quick", action="store_true", help="few prompts in few steps")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    return parser.parse_args(arguments)


def measure(generator: ImageGenerator, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Draw every way in turn; print and return what each saves and costs."""
    prompts = PROMPTS[:2] if options.quick else PROMPTS
    steps = 4 if options.quick else options.steps or generator.options.num_inference_steps
    common: dict[str, Any] = {"num_inference_steps": steps}
    if options.size is not None:
        common |= {"width": options.size, "height": options.size}
    made: dict[str, list[Image.Image]] = {}
    spent: dict[str, list[float]] = {}
    named = {
        name: words
        for name, words in ways(steps, generator.networks.runtime).items()
        if name == "plain" or name.startswith(tuple(options.ways))
    }
    cases = {
        name: _case(generator, prompts, {**common, **words}, made, spent.setdefault(name, []), name)
        for name, words in named.items()
    }
    # What all ways have in common: files are opened, words and layers met once.
    generator.generate(prompts[0], **{**common, "num_inference_steps": 3, "reuse_interval": 2})
    times = take_turns(cases, options.repeats, warmup=0)
    results = []
    for name, words in named.items():
        result: dict[str, Any] = {
            "model": generator.model.name,
            "runtime": generator.networks.runtime,
            "device": generator.networks.device,
            "dtype": generator.networks.dtype,
            "size": generator.options.width if options.size is None else options.size,
            "steps": steps,
            "way": name,
            "pictures": len(prompts),
            **times[name],
            "processor_s": statistics.median(spent[name]),
            "time_ratio": times[name]["median_s"] / times["plain"]["median_s"],
            "processor_ratio": statistics.median(spent[name]) / statistics.median(spent["plain"]),
            "psnr_db": psnr(made["plain"], made[name]),
        }
        if options.adherence:
            result |= adherence(generator, {**common, **words}, options.adherence)
        results.append(result)
        print(_told(result), flush=True)
    return results


def _case(
    generator: ImageGenerator,
    prompts: Sequence[str],
    words: Words,
    made: dict[str, list[Image.Image]],
    spent: list[float],
    name: str,
) -> Callable[[], None]:
    def draw() -> None:
        start = time.process_time()
        pictures = generator.generate(prompts, batch_size=1, seed=SEED, on_error="raise", **words)
        made[name] = [each.image for each in pictures]
        spent.append(time.process_time() - start)

    return draw


def psnr(plain: Sequence[Image.Image], found: Sequence[Image.Image]) -> float | None:
    """Return the mean over the pictures in dB; None where all are equal."""
    pairs = zip(plain, found, strict=True)
    errors = [float(((np.asarray(a, float) - np.asarray(b, float)) ** 2).mean()) for a, b in pairs]
    if not any(errors):
        return None
    return sum(10 * math.log10(255**2 / max(error, 1e-3)) for error in errors) / len(errors)


def adherence(generator: ImageGenerator, words: Words, count: int) -> dict[str, float]:
    """Return the shares of scenes that show the right objects, and everything."""
    prompts = evaluation_prompts(count, 2024)
    texts = [each.prompt for each in prompts]
    pictures = [each.image for each in generator.images(texts, seed=0, on_error="raise", **words)]
    found = report(prompts, pictures).overall
    return {
        "scenes": count,
        "objects": found["object + colour"].share,
        "everything": found["everything"].share,
    }


def _told(result: Mapping[str, Any]) -> str:
    decibels = "same" if result["psnr_db"] is None else f"{result['psnr_db']:.1f} dB"
    told = f"{result['runtime']:12} {result['way']:45} {result['median_s']:8.2f} s"
    told += f" {result['time_ratio']:6.2f} {result['processor_ratio']:6.2f} {decibels:>9}"
    if "everything" in result:
        told += f"  objects {result['objects']:.0%}, everything {result['everything']:.0%}"
    return told


if __name__ == "__main__":
    main()
