"""Time a model on this machine: every runtime that is installed, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diptych.errors import DiptychError
from diptych.image_to_text.captioner import Captioner
from diptych.runtimes.cores import available_cores
from diptych.runtimes.network import RUNTIMES
from diptych.text_to_image.generator import ImageGenerator

__all__ = ["Timing", "captioner_cases", "generator_cases", "time_in_turns"]

Case = Callable[[], object]

_WORDS: Mapping[str, Any] = {"max_new_tokens": 16, "min_length": 17}
_CAPTIONS: Mapping[str, tuple[int, int]] = {  # work → pictures and beams
    "1 photo, greedy": (1, 1),
    "1 photo, 4 beams": (1, 4),
    "8 photos, greedy": (8, 1),
}
_STEPS = 4


@dataclass(frozen=True, slots=True)
class Timing:
    """Hold one line of the table: seconds for `work`, and why a runtime has none."""

    model: str
    work: str
    runtime: str
    dtype: str
    median_s: float | None
    chosen: bool  # by runtime="auto"
    note: str

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "cores": available_cores()}


def captioner_cases(name: str | Path) -> list[tuple[Timing, Case | None]]:
    """Return what there is to time of a captioner: 16 words, from a photo to text."""
    photos = [_photo(seed) for seed in range(8)]

    def works(captioner: Captioner) -> Mapping[str, Case]:
        def case(count: int, beams: int) -> Case:
            return lambda: captioner.caption(photos[:count], num_beams=beams, **_WORDS)

        return {work: case(*how) for work, how in _CAPTIONS.items()}

    return _cases(name, Captioner.load, works)


def generator_cases(name: str | Path) -> list[tuple[Timing, Case | None]]:
    """Return what there is to time of a generator: four steps with guidance, and the decoder."""

    def works(generator: ImageGenerator) -> Mapping[str, Case]:
        def draw() -> object:
            return generator.generate("a red circle", num_inference_steps=_STEPS, seed=0)

        return {f"{_STEPS} guided steps and a picture": draw}

    return _cases(name, ImageGenerator.load, works)


def time_in_turns(
    cases: Sequence[tuple[Timing, Case | None]],
    repeats: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Run every case once to warm up and `repeats` times in turns; fill in the medians.

    Turns spread the machine's moods over all cases, so that they can be compared.
    """
    times: dict[int, list[float]] = {place: [] for place in range(len(cases))}
    for turn in range(repeats + 1):
        for place, (_, case) in enumerate(cases):
            if case is None:
                continue
            start = time.perf_counter()
            case()
            if turn:
                times[place].append(time.perf_counter() - start)
            advance()
    return [
        Timing(**{**asdict(timing), "median_s": statistics.median(times[place]) if case else None})
        for place, (timing, case) in enumerate(cases)
    ]


def _cases(
    name: str | Path, load: Callable[..., Any], works: Callable[[Any], Mapping[str, Case]]
) -> list[tuple[Timing, Case | None]]:
    found: list[tuple[Timing, Case | None]] = []
    chosen = load(name).networks
    for runtime in RUNTIMES[1:]:
        try:
            opened = load(name, runtime=runtime)
        except DiptychError as error:  # not installed, or the model has nothing for it
            found.append((Timing(str(name), "", runtime, "", None, False, str(error)), None))
            continue
        networks = opened.networks
        best = networks.runtime == chosen.runtime
        for work, case in works(opened).items():
            note = chosen.reason if best else ""
            timing = Timing(str(name), work, runtime, networks.dtype, None, best, note)
            found.append((timing, case))
    return found


def _photo(seed: int) -> Image.Image:
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((640, 480), Image.Resampling.BICUBIC)
