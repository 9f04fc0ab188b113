"""`diptych img2img`, `inpaint` and `stylize` as a person meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fake_generator import SIDE
from test_cli_generate import TESTS, Done, Run, run  # noqa: F401 (the fixture)


@pytest.fixture(autouse=True)
def pictures(run: Run) -> None:  # noqa: F811
    random = np.random.default_rng(0)
    Path("in").mkdir()
    for name in ("in/one.png", "in/two.png"):
        Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(name)
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (8, 8, 24, 24))
    mask.save("mask.png")


def test_a_folder_of_pictures(run: Run) -> None:  # noqa: F811
    done = run("img2img", "in", "-p", "red", "-o", "out", "--seed", 3, "--strength", 1)
    assert done.code == 0 and done.err == ""
    assert done.out.split() == ["out/0001-one-3.png", "out/0002-two-4.png"]
    with Image.open("out/0001-one-3.png") as made:
        assert np.asarray(made).mean((0, 1))[0] > 240
        assert "Denoising strength: 1" in made.info["parameters"]


def test_strengths_side_by_side(run: Run) -> None:  # noqa: F811
    done = run(
        *("img2img", "in", "-p", "red", "-o", "out", "--seed", 3, "--grid", "sheet.png"),
        *("--strengths", "0,0.5,1"),
    )
    assert done.code == 0 and done.err == "diptych: grid: sheet.png\n"
    names = [Path(line).name for line in done.out.split()]
    assert names[0] == "0001-one-0-3.png" and names[-1] == "0006-two-1-4.png"
    with Image.open("sheet.png") as sheet:
        # Two rows of the picture and three results, each with a line of words below.
        assert sheet.width == 4 * (SIDE + 4) + 4 and sheet.height > 2 * (SIDE + 4)
        top = np.asarray(sheet.convert("RGB"))[4 : 4 + SIDE]
        first, last = top[:, 4 : 4 + SIDE], top[:, -4 - SIDE : -4]
    with Image.open("in/one.png") as one:
        assert np.array_equal(first, np.asarray(one))
    assert last.mean((0, 1))[0] > 240 > 30 > last.mean((0, 1))[2]


def test_a_part_is_repainted(run: Run) -> None:  # noqa: F811
    done = run("inpaint", "in/one.png", "-k", "mask.png", "-p", "red", "-o", "x.png", "--seed", 1)
    assert done == Done(0, "x.png\n", "")
    with Image.open("x.png") as made, Image.open("in/one.png") as one, Image.open("mask.png") as k:
        outside = np.asarray(k) == 0
        assert np.array_equal(np.asarray(made)[outside], np.asarray(one)[outside])
        assert not np.array_equal(np.asarray(made), np.asarray(one))


def test_a_picture_is_extended(run: Run) -> None:  # noqa: F811
    done = run("inpaint", "in/one.png", "--extend", "left=16", "-p", "red", "-f", "json")
    (told,) = json.loads(done.out)
    assert told["options"]["extend"] == "left=16"
    with Image.open(told["file"]) as made:
        assert made.size == (SIDE + 16, SIDE)


def test_a_broken_picture_spares_the_others(run: Run) -> None:  # noqa: F811
    Path("in/three.png").write_bytes(b"nothing")
    done = run("img2img", "in/three.png", "in/one.png", "-p", "red", "--seed", 1)
    assert done.code == 3 and done.out == "one-2.png\n"
    assert "three.png" in done.err and done.err.count("\n") == 1


def test_a_full_disk_ends_the_work(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    tried: list[Path] = []

    def write_bytes(self: Path, data: bytes) -> int:
        tried.append(self)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    done = run("img2img", "in", "-p", "red", "-o", "out", "--strengths", "0.5,1")
    assert done.code == 1 and done.out == "" and len(tried) == 1
    assert done.err.count("No space left on device") == 1


def test_greys_of_16_bits_are_kept_and_shown(run: Run) -> None:  # noqa: F811
    deep = np.random.default_rng(1).integers(0, 65536, (SIDE, SIDE), dtype=np.uint16)
    Image.fromarray(deep).save("deep.png")
    done = run(
        *("inpaint", "deep.png", "-k", "mask.png", "-p", "red", "-o", "out.png"),
        *("--strengths", "1", "--grid", "sheet.png"),
    )
    assert done.code == 0
    with Image.open("out.png") as made, Image.open("mask.png") as mask:
        outside = np.asarray(mask) == 0
        assert np.array_equal(np.asarray(made)[outside], deep[outside])


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["inpaint", "in/one.png", "-p", "x"], 2, "nothing says where to paint: give --mask FILE"),
        (["img2img", "in/none.png"], 1, "none.png"),
        (["img2img", "in/one.png", "--strengths", "a"], 2, "--strengths is 'a': give numbers"),
        (["img2img", "in/one.png", "--strength", "2"], 2, "strength is 2.0: give a number from 0"),
        (["inpaint", "in/one.png", "-k", "in/none.png"], 1, "none.png"),
        (["stylize", "in/one.png"], 2, "style"),
        (["img2img", "in/one.png", "-o", "x.txt"], 2, "x.txt: give a name that ends in"),
    ],
)
def test_mistakes_get_one_line(run: Run, arguments: list[str], code: int, told: str) -> None:  # noqa: F811
    done = run(*arguments)
    assert done.code == code and told in done.err and done.out == ""


SLOW_DRAWING = """
import sys, time
sys.path.insert(0, {tests!r})
from diptych import ImageGenerator
from fake_generator import FakeNetwork, make_generator
import numpy as np
def unet(latents, **more):
    time.sleep(0.2)
    return (np.zeros_like(latents[:, :4]),)
inputs = {{"latents": "", "timestep": "", "encoder_hidden_states": ""}}
ImageGenerator.load = lambda *a, **k: make_generator(networks={{"unet": FakeNetwork(unet, inputs)}})
from diptych.cli import main
main()
"""


def test_interruption_leaves_no_half_file(tmp_path: Path) -> None:
    command: list[Any] = [sys.executable, "-c", SLOW_DRAWING.format(tests=str(TESTS))]
    command += ["inpaint", "in", "-k", "mask.png", "-p", "red", "-o", "out", "--seed", "1", "-q"]
    command += ["--num-images-per-prompt", "8"]  # as many as are made at once, twice
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "out/0001-one-1.png\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.endswith("diptych: interrupted\n")
    made = sorted((tmp_path / "out").iterdir())
    assert [each.name for each in made] == [f"000{n}-one-{n}.png" for n in range(1, 9)]
    for path in made:
        with Image.open(path) as image:
            image.load()


def test_strengths_are_compared_with_one_seed(run: Run) -> None:  # noqa: F811
    done = run("img2img", "in/one.png", "-p", "red", "-o", "out", "--strengths", "0.5,0.7,1")
    assert done.code == 0
    seeds = [Path(line).stem.rpartition("-")[2] for line in done.out.split()]
    assert len(seeds) == 3 and len(set(seeds)) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["img2img", "in/one.png", "-p", "red", "-o", "in/one.png"],
        ["img2img", "in/one.png", "-p", "red", "--grid", "./in/../in/one.png", "--strengths", "1"],
        ["inpaint", "in/one.png", "--mask", "mask.png", "-o", "mask.png"],
        ["stylize", "in/one.png", "--style", "in/two.png", "-o", "in/two.png"],
    ],
)
def test_what_is_read_is_not_written_over(run: Run, words: list[str]) -> None:  # noqa: F811
    before = {path: path.read_bytes() for path in [*Path("in").iterdir(), Path("mask.png")]}
    done = run(*words)
    assert done.code == 2 and "is a file that is read: give another name" in done.err
    assert {path: path.read_bytes() for path in before} == before


def test_a_picture_without_words_is_noted_once(run: Run) -> None:  # noqa: F811
    done = run("img2img", "in", "-o", "out", "--strengths", "0.5,1")
    assert done.code == 0 and done.err.count("no --prompt is given") == 1
