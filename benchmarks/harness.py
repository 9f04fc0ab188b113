"""Time things side by side, fairly: warm up, take turns, report medians and ratios."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *(
        "diptych",
        "accelerate",
        "diffusers",
        "numpy",
        "onnxruntime",
        "openvino",
        "peft",
        "pillow",
        "torch",
    ),
    "transformers",
)


def take_turns(
    cases: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1
) -> dict[str, dict[str, float]]:
    """Run every case `repeats` times, one after the other in turn; seconds as median and min.

    Turns spread the machine's moods over all cases, so that their ratios mean something.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + repeats):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {
        name: {"median_s": statistics.median(several), "min_s": min(several)}
        for name, several in times.items()
    }


def whole_process(command: Sequence[str], repeats: int = 3) -> dict[str, float]:
    """Run a command as a fresh process; its median wall time and highest peak memory."""
    walls, peaks = [], []
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-c", _LAUNCHER, *command], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{command} failed: {done.stderr}")
        wall, peak = map(float, done.stdout.split())
        walls.append(wall)
        peaks.append(peak)
    return {"wall_s": statistics.median(walls), "peak_mib": max(peaks)}


# A small process in between: the peak that Linux reports of a child begins at its parent's size.
_LAUNCHER = """
import os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
child.returncode = os.waitstatus_to_exitcode(status)
print(time.perf_counter() - start, usage.ru_maxrss / 1024)
sys.exit(child.returncode)
"""


def machine() -> dict[str, Any]:
    """Say what was measured on: processor, cores, versions, commit."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "instructions": instructions(),
        "python": platform.python_version(),
        **versions,
        "commit": _commit(),
    }


def record(results: Sequence[Mapping[str, Any]], name: str) -> Path:
    """Append results with the machine to `benchmarks/results/<name>.jsonl`."""
    path = Path(__file__).parent / "results" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for result in results:
            rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}
            file.write(json.dumps({**rounded, "machine": machine()}) + "\n")
    return path


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def instructions() -> list[str]:
    """Return those of the processor's extensions that decide how fast 8 and 16 bits are."""
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return [name for name in wanted if name in flags]


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            check=False,
        )
    except OSError:  # no git here
        return "unknown"
    return done.stdout.strip() or "unknown"
