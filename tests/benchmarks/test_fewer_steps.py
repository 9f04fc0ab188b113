"""The benchmark of fewer and cheaper steps runs, with a tiny model, and its figures make sense."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny_pipelines import make_pipeline

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_ways_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "path", [*sys.path])
    script = importlib.import_module("fewer_steps")
    every = script.ways(4, "torch")
    assert len(every) == len(script.ways(4, "onnxruntime")) + 3, "no tokens are merged there"
    few = {name: every[name] for name in ("plain", "2 steps", "reuse_interval 2")}
    monkeypatch.setattr(script, "ways", lambda steps, runtime: few)
    written: list[Any] = []
    monkeypatch.setattr(script, "record", lambda results, name: written.append((name, results)))
    make_pipeline(
        *(tmp_path, "sd1", 0),
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    words = ["--quick", "--record", "--repeats", "1", "--size", "64"]
    results = script.main(["--model", str(tmp_path), *words])
    assert written == [("fewer_steps", results)]
    named = {each["way"]: each for each in results}
    assert list(named) == list(few)
    assert named["plain"]["psnr_db"] is None and named["plain"]["time_ratio"] == 1
    for name, each in named.items():
        assert each["size"] == 64 and each["min_s"] > 0
        assert name == "plain" or 0 < each["psnr_db"] < 100
