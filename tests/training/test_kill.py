"""Runs killed with SIGKILL at random moments end with the weights of one never disturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from command_line import call
from diptych.training.journal import read_rows
from training_kills import Runs

GENERATOR: dict[str, Any] = {
    "resolution": 64,
    "max_train_steps": 8,
    "checkpointing_steps": 2,
    "validation_steps": 3,
    "sample_steps": 3,
    "num_sample_images": 1,
    "train_batch_size": 2,
    "ema_decay": 0.9,
    "keep_best": True,
    "random_flip": True,
    "logging_steps": 1,
}
CAPTIONER: dict[str, Any] = {
    "max_train_steps": 12,
    "checkpointing_steps": 2,
    "validation_steps": 5,
    "train_batch_size": 4,
    "self_critical_steps": 4,
    "freeze": "encoder",
    "logging_steps": 1,
}
RESULTS = {"generator": "pytorch_lora_weights.safetensors", "captioner": "model/model.safetensors"}


def compare(runs: Runs, tmp_path: Path, kills: int, seed: int) -> None:
    whole = tmp_path / "whole"
    seconds = runs.whole(whole)
    for killed in runs.killed(tmp_path / "killed", kills, within_s=seconds, seed=seed):
        name = RESULTS[runs.kind]
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
        assert measured(whole) == measured(killed)
        left = [path for path in killed.rglob("*") if "partial" in path.name or ".old" in path.name]
        assert not left, "nothing half-made stays behind"


def measured(folder: Path) -> list[dict[str, Any]]:
    """Return what a run measured, but for what the clock says."""
    timed = ("images_per_s", "memory_mb", "eta_s")
    return [
        {name: value for name, value in row.items() if name not in timed}
        for row in read_rows(folder / "metrics.jsonl")
    ]


def test_killed_generators_are_what_they_would_be(
    tmp_path: Path, sd1: Path, pictures: Path
) -> None:
    compare(Runs("generator", pictures, sd1, GENERATOR), tmp_path, kills=3, seed=1)


def test_killed_captioners_are_what_they_would_be(
    tmp_path: Path, vit_gpt2: Path, pictures: Path
) -> None:
    compare(Runs("captioner", pictures, vit_gpt2, CAPTIONER), tmp_path, kills=2, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("kind", ["generator", "captioner"])
def test_many_kills(
    tmp_path: Path, sd1: Path, vit_gpt2: Path, pictures: Path, kind: str, seed: int
) -> None:
    model, words = (sd1, GENERATOR) if kind == "generator" else (vit_gpt2, CAPTIONER)
    compare(Runs(kind, pictures, model, words), tmp_path, kills=60, seed=seed)


def test_what_a_kill_left_is_removed_wherever_it_lies(tmp_path: Path) -> None:
    from diptych.training.finetune import _tidy

    kept = [tmp_path / "model" / "config.json", tmp_path / "notes.partial"]
    # Of the user: a run may be asked to write to a folder that holds other things.
    kept += [
        tmp_path / "docs" / ".thesis.docx.partial",
        tmp_path / ".thesis.docx.partial",
        tmp_path / "checkpoints" / ".git" / "HEAD",
        # Of a process that is at work.
        tmp_path / "cache" / "ab" / f".ab02.safetensors.{os.getpid()}.0a1b2c",
        tmp_path / "cache" / "ab" / "ab03.safetensors",
    ]
    left = [
        tmp_path / ".model.0a1b2c3d.partial" / "config.json",
        tmp_path / f".{tmp_path.name}.0a1b2c3d.partial" / "x.safetensors",
        tmp_path / "model" / ".model.0a1b2c3d.partial" / "unet" / "config.json",
        tmp_path / "checkpoints" / ".step-00000002.old" / "state",
        tmp_path / "checkpoints" / ".step-00000004.0a1b2c3d.partial" / "state",
        tmp_path / ".metrics.jsonl.partial",
        tmp_path / "cache" / "ab" / ".ab01.safetensors.999999999.0a1b2c",
    ]
    for path in (*kept, *left):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    _tidy(tmp_path)  # no run was here
    assert all(path.is_file() for path in (*kept, *left))
    kept.append(tmp_path / "run.json")
    kept[-1].write_text("{}")
    _tidy(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


def command(sd1: Path, pictures: Path, folder: Path) -> list[str]:
    return [
        *("finetune", "generator", str(pictures)),
        *("--model", str(sd1), "--output", str(folder), "--resolution", "64"),
        *("--max-train-steps", "400", "--num-sample-images", "0", "--train-batch-size", "2"),
        *("--checkpointing-steps", "1000"),
    ]


def test_ctrl_c_saves_and_says_how_to_go_on(
    tmp_path: Path,
    sd1: Path,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And meanwhile a second run in the folder is refused."""
    folder = tmp_path / "run"
    words = command(sd1, pictures, folder)
    process = subprocess.Popen(
        [sys.executable, "-m", "diptych", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    for _ in range(600):
        if read_rows(folder / "metrics.jsonl"):
            break
        time.sleep(0.1)
    second = call(monkeypatch, capsys, *words, "--resume")
    assert second.code == 2
    assert "another run is at work there" in second.err
    os.kill(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped at step" in told
    assert "--resume" in told
    again = call(monkeypatch, capsys, *words)
    assert again.code == 2
    assert "holds a run that is at step" in again.err
