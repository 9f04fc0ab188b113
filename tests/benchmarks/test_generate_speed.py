"""The benchmark of pictures runs, with a tiny model, and its figures make sense."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # processes of two wait for each other
    monkeypatch.setattr(sys, "path", [*sys.path])
    return importlib.import_module("generate_speed")


def test_both_sides_draw_the_same(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    monkeypatch.setattr(script, "record", lambda results, name: written.append((name, results)))
    words = "--quick --record --repeats 1 --size 64 --narrow-size 32 --parts float32 bfloat16 cuda"
    results = script.main([*words.split(), "--keep", str(tmp_path)])
    assert written == [("generate_speed", results)]
    assert [(each["part"], each["task"], each["side"]) for each in results] == [
        (dtype, task, side)
        for dtype in ("float32", "bfloat16")
        for task in ("step", "vae", "picture")
        for side in ("ours", "diffusers")
    ]
    for each in results:
        assert each["size"] == (64 if each["dtype"] == "float32" else 32)
        assert each["min_s"] > 0
        if each["side"] == "diffusers":
            assert each["speed_ratio"] == 1
        # Other networks or inputs on one side would be far off.
        if each["task"] == "picture":
            assert each["psnr_db"] > (40 if each["dtype"] == "float32" else 20)
        else:
            assert each["difference"] < (1e-4 if each["dtype"] == "float32" else 0.1)


def test_eight_bits_stay_close(script: ModuleType, tmp_path: Path) -> None:
    words = "--quick --repeats 1 --size 64 --narrow-size 64 --parts int8"
    *timed, picture = script.main([*words.split(), "--keep", str(tmp_path)])
    assert [each["task"] for each in timed] == ["step", "step", "vae", "vae", "picture", "picture"]
    assert 0.001 < timed[0]["difference"] < 0.3
    assert picture["beside"] == "diffusers float32"
    assert picture["psnr_db"] > 18


def test_processes_tell_what_they_took(script: ModuleType, tmp_path: Path) -> None:
    words = "--quick --sides ours --repeats 1 --size 32 --narrow-size 32 --parts memory import"
    results = script.main([*words.split(), "--keep", str(tmp_path)])
    float32, bfloat16, bare, ours = results
    assert (float32["dtype"], bfloat16["dtype"]) == ("float32", "bfloat16")
    for each in (float32, bfloat16):
        assert 0 < each["import_s"] + each["load_s"] < each["wall_s"]
        assert each["peak_mib"] > ours["peak_mib"], "torch alone is larger"
    assert (bare["side"], ours["side"]) == ("bare python", "ours")
    assert bare["wall_s"] < ours["wall_s"]
