"""`diptych generate` as a person meets it, around a generator of plain functions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from command_line import Done, call
from diptych import ImageGenerator
from fake_generator import SIDE, make_generator

TESTS = Path(__file__).resolve().parent


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Return `diptych` as a function of its arguments, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ImageGenerator, "load", lambda *_, **__: make_generator())

    return partial(call, monkeypatch, capsys)


def colour(path: Path | str) -> str:
    with Image.open(path) as image:
        red, green, blue = np.asarray(image.convert("RGB"), float).mean((0, 1))
    return max((red, "red"), (green, "green"), (blue, "blue"))[1]


def test_one_prompt_one_file(run: Run) -> None:
    done = run("generate", "a red door", "-o", "door.png", "--seed", 3)
    assert done == Done(0, "door.png\n", "")
    assert colour("door.png") == "red"
    assert run("generate", "blue", "-o", "door.png", "--seed", 3).code == 0
    assert colour("door.png") == "blue"  # a name given in full is written over


def test_without_a_name_nothing_is_written_over(run: Run) -> None:
    for name in ("a-red-door-3.png", "a-red-door-3-2.png", "a-red-door-3-3.png"):
        assert run("generate", "A red, door!", "--seed", 3).out == f"{name}\n"
        assert colour(name) == "red"


def test_a_folder_of_pictures(run: Run) -> None:
    done = run(
        "generate", "red", "blue", "-o", "new/folder", "--num-images-per-prompt", 2, "--seed", 0
    )
    names = ["0001-red-0.png", "0002-red-1.png", "0003-blue-2.png", "0004-blue-3.png"]
    assert done.out.splitlines() == [f"new/folder/{name}" for name in names]
    assert [colour(line) for line in done.out.splitlines()] == ["red", "red", "blue", "blue"]
    again = run("generate", "red", "-o", "new/folder", "--seed", 0)
    assert again.out == "new/folder/0001-red-0-2.png\n"
    assert len(list(Path("new/folder").iterdir())) == 5


def test_several_pictures_of_one_name_are_numbered(run: Run) -> None:
    done = run("generate", "red", "blue", "-o", "x.jpg", "--seed", 0)
    assert done.out.split() == ["x-1.jpg", "x-2.jpg"]
    with Image.open("x-1.jpg") as image:
        assert image.format == "JPEG"


def test_prompts_from_a_file_and_from_standard_input(run: Run, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("\ufeffa green door\n\n  blue \n", encoding="utf-8")
    done = run("generate", "red", "--prompts", "words.txt", "-o", "out", "--seed", 1)
    assert [colour(line) for line in done.out.splitlines()] == ["red", "green", "blue"]
    piped = run("generate", "-", "-o", "out2", "--seed", 1, stdin="blue\nrote Tür\n".encode())
    assert [Path(line).name for line in piped.out.splitlines()] == [
        "0001-blue-1.png",
        "0002-rote-tür-2.png",
    ]


def test_json_and_jsonl(run: Run) -> None:
    words = ("generate", "red", "blue", "-o", "out", "--seed", 5, "--steps", 2)
    records = [json.loads(line) for line in run(*words, "-f", "jsonl").out.splitlines()]
    assert [(each["prompt"], each["seed"]) for each in records] == [("red", 5), ("blue", 6)]
    assert [colour(each["file"]) for each in records] == ["red", "blue"]
    assert records[0]["options"]["num_inference_steps"] == 2
    whole = json.loads(run(*words, "-f", "json").out)
    assert [each["prompt"] for each in whole] == ["red", "blue"]


def test_options_are_flags(run: Run) -> None:
    (record,) = json.loads(
        run(
            "generate", "red", "-f", "json", "--steps", 3, "--sampler", "dpmpp_2m", "--schedule",
            "karras", "--guidance-scale", 2, "--negative-prompt", "true", "--width", 48,
            "--no-parse-weights",
        ).out
    )  # fmt: skip
    wanted = {
        "num_inference_steps": 3,
        "sampler": "dpmpp_2m",
        "schedule": "karras",
        "guidance_scale": 2.0,
        "negative_prompt": "true",
        "width": 48,
        "parse_weights": False,
    }
    assert wanted.items() <= record["options"].items()
    with Image.open(record["file"]) as image:
        assert image.size == (48, SIDE)


def test_a_grid_and_a_preview(run: Run) -> None:
    done = run(
        "generate", "red", "green", "blue", "-o", "out", "--grid", "sheet.png", "--preview",
        "now.jpg",
    )  # fmt: skip
    assert done.code == 0 and "sheet.png" in done.err
    with Image.open("sheet.png") as sheet:
        assert sheet.width >= 2 * SIDE and sheet.height >= 2 * SIDE
    with Image.open("now.jpg") as preview:
        assert preview.width >= SIDE


def test_a_preview_by_a_tiny_vae(run: Run) -> None:
    from safetensors.torch import save_file

    from diptych.models.tiny_vae import TinyVae, TinyVaeConfig

    Path("tiny").mkdir()
    config = {"decoder_block_out_channels": [8] * 4, "num_decoder_blocks": [1] * 4}
    told = {"_class_name": "AutoencoderTiny", **config}
    Path("tiny/config.json").write_text(json.dumps(told))
    module = TinyVae(TinyVaeConfig(num_channels=8, num_blocks=(1, 1, 1, 1)))
    save_file(module.state_dict(), "tiny/diffusion_pytorch_model.safetensors")
    shown = {}
    for name, words in (("plain.png", ()), ("tiny.png", ("--preview-vae", "tiny"))):
        assert run("generate", "red", "-o", "out.png", "--preview", name, *words).code == 0
        shown[name] = Path(name).read_bytes()
    assert shown["plain.png"] != shown["tiny.png"]
    done = run("generate", "red", "--preview", "now.png", "--preview-vae", "nowhere")
    assert done.code == 1 and "nowhere holds no tiny VAE" in done.err


def test_a_failed_prompt_keeps_the_others(run: Run) -> None:
    Path("words.txt").write_text("red\n" + "word " * 40_000 + "\nblue\n")
    done = run("generate", "--prompts", "words.txt", "-o", "out", "-f", "jsonl")
    records = [json.loads(line) for line in done.out.splitlines()]
    assert done.code == 3
    assert ["error" in each for each in records] == [False, True, False]
    assert [each["file"] is None for each in records] == [False, True, False]
    assert len(done.err.splitlines()) == 1 and "100000" in done.err
    assert run("generate", "word " * 40_000).code == 1


def test_a_full_disk_keeps_the_finished(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.write_bytes

    def write_bytes(self: Path, data: bytes) -> int:
        if len(list(self.parent.glob("*.png"))) == 2:
            real(self, data[:10])
            raise OSError(28, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    words = ("red door", "green", "blue", "red")
    done = run("generate", *words, "-o", "out", "--batch-size", 1)
    assert done.code == 3
    assert len(done.out.splitlines()) == 2
    assert len(done.err.splitlines()) == 1 and "No space left" in done.err
    # Nothing half-written, hidden files included.
    assert sorted(path.name[:4] for path in Path("out").iterdir()) == ["0001", "0002"]


def test_a_rounded_size_is_told_once(run: Run) -> None:
    done = run("generate", "red", "blue", "--width", 35, "-o", "out", "--batch-size", 1)
    assert done.code == 0 and done.err.count("35") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["generate"], 2, "no prompt"),
        (["generate", ""], 2, "empty"),
        (["generate", "--prompts", "gone.txt"], 2, "gone.txt"),
        (["generate", "-"], 2, "no prompt"),
        (["generate", "red", "--steps", "0"], 2, "num_inference_steps"),
        (["generate", "red", "--steps", "many"], 2, "steps"),
        (["generate", "red", "--sampler", "magic"], 2, "magic"),
        (["generate", "red", "--strength", "0.5"], 2, "strength"),
        (["generate", "red", "--width", "1000000"], 2, "width"),
        (["generate", "red", "-o", "x.gif"], 2, ".png"),
        (["generate", "red", "-o", "gone/x.png"], 2, "gone"),
        (["generate", "red", "-o", "file.txt/x"], 2, "file.txt"),
        (["generate", "red", "--grid", "x.txt"], 2, "x.txt"),
        (["generate", "red", "--lora", "a.safetensors:0.5"], 1, "runtime='torch'"),
        (["generate", "red", "--embedding", "a.pt"], 1, "runtime='torch'"),
        (["generate", "red", "--seed", "-1"], 2, "seed"),
        (["generate", "red", "--sampler", "lcm", "--steps", "400"], 2, "lcm"),
    ],
)
def test_mistakes_get_one_clear_line(run: Run, arguments: list[str], code: int, words: str) -> None:
    Path("file.txt").write_text("a file")
    done = run(*arguments)
    assert done.code == code, done.err
    assert words in done.err and "Traceback" not in done.err
    assert done.out == ""
    assert [path.name for path in Path().iterdir()] == ["file.txt"]


def test_an_unknown_model(tmp_path: Path) -> None:
    done = process("generate", "red", "-m", "no-such-model", cwd=tmp_path, fake=False)
    _, complaint = done.communicate(timeout=120)
    assert done.returncode == 1
    assert b"no-such-model" in complaint and b"Traceback" not in complaint


def test_interruption_leaves_whole_files(tmp_path: Path) -> None:
    many = tmp_path / "words.txt"
    many.write_text("red\n" * 5000)
    with (tmp_path / "list.json").open("wb") as listed:
        started = process(
            "generate", "--prompts", many, "-o", "out", "-f", "json", "--batch-size", "1",
            cwd=tmp_path, stdout=listed,
        )  # fmt: skip
        deadline = time.monotonic() + 150
        while time.monotonic() < deadline and len(list(tmp_path.glob("out/*.png"))) < 5:
            time.sleep(0.02)
        started.send_signal(signal.SIGINT)
        _, complaint = started.communicate(timeout=120)
    assert started.returncode == 130
    assert b"interrupted" in complaint and b"Traceback" not in complaint
    files = sorted((tmp_path / "out").iterdir())
    assert 5 <= len(files) < 5000
    assert {path.suffix for path in files} == {".png"}
    for path in files:
        with Image.open(path) as image:
            image.load()
    records = json.loads((tmp_path / "list.json").read_text())
    assert len(files) - 1 <= len(records) <= len(files)


def process(*arguments: object, cwd: Path, fake: bool = True, **words: Any) -> Any:
    patch = (
        "from diptych import ImageGenerator; from fake_generator import make_generator; "
        "ImageGenerator.load = lambda *_, **__: make_generator(); "
    )
    script = f"import sys; {patch if fake else ''}from diptych.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        stderr=subprocess.PIPE,
        **{"stdout": subprocess.PIPE, **words},
    )


def test_one_result_is_not_written_over_another(run: Run) -> None:
    done = run("generate", "red", "-o", "a.png", "--grid", "a.png")
    assert done.code == 2 and "--grid a.png is what --output names" in done.err


def test_words_without_quotes_are_noted(run: Run) -> None:
    done = run("generate", "red", "green", "blue", "-o", "out")
    assert done.code == 0 and "3 prompts of one word each are drawn" in done.err
    done = run("generate", "a red door", "green", "-o", "out")
    assert done.code == 0 and done.err == ""


def test_a_size_that_is_rounded_is_told_once(run: Run) -> None:
    done = run("generate", "red", "--width", SIDE + 1, "-o", "a.png")
    assert done.code == 0 and done.err.count("became") == 1 and done.err.startswith("diptych: ")


def test_a_negative_prompt_without_guidance_is_noted(run: Run) -> None:
    done = run("generate", "red", "--guidance-scale", 1, "--negative-prompt", "blue", "-o", "a.png")
    assert done.code == 0 and "has no effect, for guidance_scale is 1" in done.err


def test_settings_are_shown_as_they_were_written(run: Run) -> None:
    run("generate", "a red door", "--seed", 7, "--steps", 3, "--sampler", "euler_a", "-o", "a.png")
    Image.new("RGB", (8, 8)).save("plain.png")
    done = run("settings", "a.png")
    assert done.code == 0 and done.out.startswith("a red door\n")
    assert "Sampler: Euler a" in done.out and "Seed: 7" in done.out
    done = run("settings", "a.png", "plain.png", "--format", "jsonl")
    assert done.code == 3 and done.err == "diptych: plain.png: this picture holds no settings\n"
    (told,) = (json.loads(line) for line in done.out.splitlines())
    assert (told["file"], told["prompt"]) == ("a.png", "a red door")
    assert told["options"]["num_inference_steps"] == 3 and told["options"]["sampler"] == "euler_a"


@pytest.mark.parametrize(
    ("given", "meant"), [("Euler a", "euler_a"), ("DPM++ 2M Karras", "dpmpp_2m"), ("ddm", "ddim")]
)
def test_names_of_other_programs_are_understood(run: Run, given: str, meant: str) -> None:
    done = run("generate", "red", "--sampler", given)
    assert done.code == 2 and f"Did you mean {meant!r}?" in done.err
