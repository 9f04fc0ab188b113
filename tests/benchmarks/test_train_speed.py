"""The benchmark of training runs on a tiny model, all three sides of it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_three_sides_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])
    script = importlib.import_module("train_speed")
    [result] = script.main(["--models", "small", "--steps", "1", "--keep", str(tmp_path)])
    for side in ("ours", "script", "peft"):
        assert result[side]["steps_per_s"] > 0
        assert result[side]["peak_mib"] > 100
    # Encoding anew at every step is no gift.
    assert result["script_speed_ratio"] > 0.8 * result["speed_ratio"] > 0
