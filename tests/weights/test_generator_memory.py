"""Loading holds the weights once: measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diptych.weights.diffusion import describe_generator
from diptych.weights.load_generator import build_module, load_generator
from diptych.weights.save_generator import save_generator
from tiny_pipelines import make_pipeline

# 60 M parameters: enough to tell one copy from two.
_WIDTHS = (128, 256, 256, 512)
_MEASURE = """
import sys
from diptych.weights.diffusion import describe_generator
from diptych.weights.load_generator import load_generator

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

# A first load imports all that it takes.
load_generator(describe_generator(sys.argv[2]))
before = peak()
modules = load_generator(describe_generator(sys.argv[1]), dtype=sys.argv[3])
weights = sum(t.nbytes for m in modules.values() for t in m.state_dict().values())
print(weights >> 10, peak() - before)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    make_pipeline(folder / "small", "sd1", seed=1, full_vocabulary=True)
    model = describe_generator(folder / "small")
    modules = load_generator(model)
    config = {**model.configs["unet"], "block_out_channels": _WIDTHS, "layers_per_block": 2}
    modules["unet"] = build_module("unet", config).to_empty(device="cpu")
    for parameter in modules["unet"].parameters():
        torch.nn.init.zeros_(parameter)
    save_generator(modules, model, folder / "float32")
    save_generator(modules, model, folder / "float16", dtype="float16")
    save_generator(modules, model, folder / "one.safetensors", layout="ldm")
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float32", "float32"), ("float16", "float32"), ("one", "float32"), ("one", "bfloat16")],
)
def test_weights_are_held_once(made: dict[str, Path], name: str, dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(made[name]), str(made["small"]), dtype],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    weights, extra = map(int, done.stdout.split())  # kB
    assert weights > 100_000
    assert extra < weights + 50_000
