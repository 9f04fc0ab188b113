"""Measure a model where nothing else has run: a process of its own, its time and its memory."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diptych.runtimes.agreement import greedy_tokens, pictures_for
from diptych.runtimes.graph import weights_file
from diptych.runtimes.network import open_generator_networks, open_networks
from diptych.runtimes.picture_agreement import draw, sketch_for
from diptych.weights.diffusion import GeneratorFolder, resolve_generator
from diptych.weights.files import ModelFolder, describe

__all__ = ["measure", "peak_mib", "size_of"]

_REPEATS = 3
_STEPS = 2
_MARK = "figures: "
_COMMAND = "from diptych.runtimes.figures import _tell; import sys; _tell(*sys.argv[1:])"


def measure(model: ModelFolder | GeneratorFolder, runtime: str) -> dict[str, Any]:
    """Return what `model` costs in `runtime`, measured in a fresh process.

    `bytes` on disk, `open_s` until the networks are there, `run_s` for one caption of 16 words or
    one sketch of two steps (median of three), `peak_mib` of the whole process where the system
    tells it. With `error` in place of these where the process did not come to an end.
    """
    kind = "generator" if isinstance(model, GeneratorFolder) else "captioner"
    done = subprocess.run(
        # -P: nothing is imported from the folder that the user happens to be in.
        [sys.executable, "-P", "-c", _COMMAND, kind, str(model.path), runtime],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    told = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    figures = _figures(told[-1]) if told and not done.returncode else None
    if figures is None:
        return {"error": " ".join(done.stderr.split())[-200:] or f"exit code {done.returncode}"}
    return {"runtime": runtime, "bytes": size_of(model, runtime), **figures}


def _figures(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line.removeprefix(_MARK))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def size_of(model: ModelFolder | GeneratorFolder, runtime: str) -> int:
    """Count the bytes of the files that `runtime` reads of `model`."""
    weights = model.weights
    paths: Sequence[Path]
    if runtime == "torch":
        groups = weights.values() if isinstance(weights, dict) else [weights]
        paths = [path for group in groups for path in _paths(group)]
    else:
        paths = [
            each
            for path in model.networks.values()
            for each in (path, path.parent / weights_file(path))
        ]
    return sum(path.stat().st_size for path in dict.fromkeys(paths) if path.is_file())


def peak_mib() -> float | None:
    """Return the most memory that this process ever held, in MiB; None where it cannot be told."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        # Not getrusage: its figure begins at the size of the process that started this one.
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration, ValueError):
        return None


def _paths(group: Any) -> list[Path]:
    return [group] if isinstance(group, Path) else [Path(path) for path in group]


def _tell(kind: str, folder: str, runtime: str) -> None:
    """Print the figures of the model in `folder`: what the fresh process runs."""
    start = time.perf_counter()
    run = (_sketch if kind == "generator" else _caption)(folder, runtime)
    opened = time.perf_counter() - start
    run()
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    figures = {"open_s": opened, "run_s": statistics.median(times), "peak_mib": peak_mib()}
    told = {name: value and round(value, 4) for name, value in figures.items()}
    sys.stdout.write(f"{_MARK}{json.dumps(told)}\n")


def _caption(folder: str, runtime: str) -> Callable[[], object]:
    model = describe(Path(folder))
    networks = open_networks(model, runtime)
    images = pictures_for(model.config, model.preprocessing, None, 1)
    return lambda: greedy_tokens(networks, images, model.config, model.generation)


def _sketch(folder: str, runtime: str) -> Callable[[], object]:
    model = resolve_generator(folder)
    networks = open_generator_networks(model, runtime)
    sketch = sketch_for(model.configs, pictures=1, steps=_STEPS)
    return lambda: draw(networks, model.configs, model.schedule, sketch)
