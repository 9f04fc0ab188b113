"""The verb `bench`: a line for each runtime and each kind of work, and what auto takes."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from diptych.cli import app
from diptych.errors import BadInput
from diptych.evaluation import speed
from diptych.evaluation.speed import Timing, time_in_turns


def test_turns_alternate_and_warm_up_is_not_counted() -> None:
    ran: list[str] = []
    cases = [
        (Timing("m", "a", "onnxruntime", "float32", None, True, ""), lambda: ran.append("a")),
        (Timing("m", "b", "torch", "float32", None, False, ""), lambda: ran.append("b")),
        (Timing("m", "", "openvino", "", None, False, "not installed"), None),
    ]
    found = time_in_turns(cases, repeats=2)
    assert ran == ["a", "b"] * 3
    assert [each.median_s is None for each in found] == [False, False, True]
    assert found[2].note == "not installed"


def test_the_default_captioner_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_CAPTIONS", {"1 photo, greedy": (1, 1)})
    done = CliRunner().invoke(
        app, ["bench", "default", "--panel", "image-to-text", "--repeats", "1", "-f", "json"]
    )
    assert done.exit_code == 0, done.output
    rows = {row["runtime"]: row for row in json.loads(done.stdout)}
    assert set(rows) == {"onnxruntime", "openvino", "torch"}
    assert rows["onnxruntime"]["median_s"] > 0
    assert sum(row["chosen"] for row in rows.values()) == 1
    assert all(row["median_s"] or row["note"] for row in rows.values())
    table = CliRunner().invoke(app, ["bench", "--panel", "image-to-text", "--repeats", "1"])
    assert "auto takes this one" in table.stdout


def test_an_unknown_task_is_said() -> None:
    done = CliRunner().invoke(app, ["bench", "--panel", "words"])
    assert isinstance(done.exception, BadInput)
