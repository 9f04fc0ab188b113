"""What an export says of itself: bytes, memory and seconds of fresh processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import diptych
from diptych.runtimes import figures
from diptych.runtimes.figures import measure, size_of
from diptych.weights.files import describe
from tiny_models import make_captioner

Make = Callable[..., Any]


@pytest.mark.figures
def test_an_export_measures_itself(tmp_path: Path) -> None:
    make_captioner(tmp_path / "checkpoint", 0)
    report = diptych.export(tmp_path / "checkpoint", tmp_path / "out", quantize="int8", force=True)
    told = json.loads((tmp_path / "out" / "export.json").read_text())
    assert told["measured"] == report["measured"]
    before, after = report["measured"]["before"], report["measured"]["after"]
    weights = (tmp_path / "checkpoint" / "model.safetensors").stat().st_size
    files = [*(tmp_path / "out").glob("*.onnx*")]
    assert before["bytes"] == weights
    assert after["bytes"] == sum(path.stat().st_size for path in files)
    for each in (before, after):
        assert 0 < each["run_s"] < 60
        assert each["open_s"] > 0
        assert each["peak_mib"] is None or each["peak_mib"] > 30
    if before["peak_mib"] is not None:
        assert after["peak_mib"] < before["peak_mib"]  # no torch in that process
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_a_model_that_cannot_be_run_is_said(artifacts: Make, tmp_path: Path) -> None:
    model = describe(artifacts("prefix") / "fp32")
    assert "no PyTorch weights" in measure(model, "torch")["error"]
    assert size_of(model, "torch") == 0


def test_peak_is_of_this_process() -> None:
    found = figures.peak_mib()
    assert found is None or found > 20
