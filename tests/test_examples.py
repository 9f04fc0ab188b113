"""Every example runs as its first reader runs it: in a copy of the folder, by its file name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import diptych
from diptych import Captioner, export
from tiny_models import make_captioner
from tiny_pipelines import make_pipeline

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "docs" / "quickstart.md"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_captioner(folder, 3)
    return folder


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "tiny"
    Captioner.load(checkpoint).export(folder)
    return folder


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    make_pipeline(folder, "sd1", 3, scheduler="sd2", sample_size=4)
    artifact = tmp_path_factory.mktemp("artifact") / "generator"
    export(folder, artifact)
    return artifact


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a folder that holds `examples/`, where an example may write what it likes."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    return tmp_path


def run(clone: Path, name: str, *arguments: object) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", f"examples/{name}.py", *map(str, arguments)],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(Path(diptych.__file__).resolve().parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    # Not splitlines: the words of a random model hold rarer line ends, too.
    return done.stdout.removesuffix("\n").split("\n")


def test_caption_folder_overwrites_nothing(clone: Path, artifact: Path) -> None:
    photos = clone / "examples" / "photos"
    (photos / "coffee.txt").write_text("mine")
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    Image.new("RGB", (40, 30), "red").save(photos / "rocket.png")
    lines = run(clone, "caption_folder", "--model", artifact)
    assert lines[0] == "6 pictures, 5 without a text"
    assert (photos / "coffee.txt").read_text() == "mine"
    expected = Captioner.load(artifact).caption(photos / "chelsea.jpg").text
    assert (photos / "chelsea.txt").read_text() == expected + "\n"
    assert sum("broken.jpg" in line for line in lines) == 1
    assert sum("rocket.png gets no text" in line for line in lines) == 1
    written = {path: path.read_bytes() for path in photos.glob("*.txt")}
    assert run(clone, "caption_folder", "--model", artifact)[0] == "6 pictures, 1 without a text"
    assert {path: path.read_bytes() for path in photos.glob("*.txt")} == written


def test_drop_in_pipeline(clone: Path, artifact: Path) -> None:
    lines = run(clone, "drop_in_pipeline", "--model", artifact)
    assert lines[0].startswith("a path: [{'generated_text': ")
    assert lines[1].count("generated_text") == lines[2].count("generated_text") == 2
    assert len(lines) == 3 + 4


def test_stream_words(clone: Path, artifact: Path) -> None:
    *pieces, whole = run(clone, "stream_words", "--model", artifact)
    assert "".join(eval(piece.split("s  ", 1)[1]) for piece in pieces) == whole


def test_alternatives_with_scores(clone: Path, artifact: Path) -> None:
    lines = run(clone, "alternatives_with_scores", "--model", artifact)
    scores = [float(line.split()[1]) for line in lines[1:4]]
    assert scores == sorted(scores, reverse=True)
    assert len(lines) > 9


def test_heatmap(clone: Path, artifact: Path) -> None:
    lines = run(clone, "heatmap", "--model", artifact)
    assert lines[-1] == "drawn in heatmap.png"
    with Image.open(clone / "heatmap.png") as image:
        assert image.width > 300
    assert sum("looked most at row" in line for line in lines) == len(lines) - 2 > 0


def test_export_and_run_without_torch(clone: Path, checkpoint: Path) -> None:
    lines = run(clone, "export_and_run_without_torch", "--model", checkpoint, "--out", "onnx")
    *_, with_torch, without_torch = lines
    assert with_torch.split(":", 1)[1].strip() == without_torch.split(":", 1)[1].strip()
    assert (clone / "onnx" / "export.json").is_file()


def test_generate_picture(clone: Path, generator: Path) -> None:
    words = ("two green triangles", "--model", generator, "--count", 3, "--steps", 2, "--seed", 5)
    lines = run(clone, "generate_picture", *words)
    assert lines[0] == f"{Path('pictures/5.png')}: 32 x 32, seed 5"
    assert lines[3] == f"all of them: {Path('pictures/sheet.png')}"
    assert lines[4] == "drawn again from the file alone, it is the same: True"
    files = [(clone / "pictures" / f"{seed}.png").read_bytes() for seed in (5, 6, 7)]
    assert len(set(files)) == 3
    with Image.open(clone / "pictures" / "sheet.png") as sheet:
        assert sheet.width > 64 and sheet.height > 64


def test_denoising_preview(clone: Path, generator: Path) -> None:
    lines = run(clone, "denoising_preview", "--model", generator, "--steps", 4)
    assert [line.split("s  ")[1].split(",")[0] for line in lines[:-1]] == [
        f"step {number} of 4" for number in (1, 2, 3, 4)
    ]
    assert lines[-1] == "4 previews and the picture: steps.png"
    words = ("--model", generator, "--steps", 4, "--stop-after", 2, "--out", "early.png")
    early = run(clone, "denoising_preview", *words)
    assert early[-1] == "2 previews and the picture: early.png"
    with Image.open(clone / "steps.png") as whole, Image.open(clone / "early.png") as stopped:
        assert whole.width > stopped.width > 64


def test_examples_are_short_and_all_alike() -> None:
    assert EXAMPLES, "they moved"
    for path in EXAMPLES:
        source = path.read_text(encoding="utf-8")
        assert f"def test_{path.stem}" in Path(__file__).read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 40, path.name
        assert 'add_argument("--model", default="default"' in source, path.name
        assert f"`{path.name}`" in QUICKSTART.read_text(encoding="utf-8")


def test_edit_pictures(clone: Path, generator: Path) -> None:
    lines = run(clone, "edit_pictures", "--model", generator, "--steps", 3, "--out", "sheet.png")
    assert lines == ["4 pictures: sheet.png"]
    with Image.open(clone / "sheet.png") as sheet:
        assert sheet.width > 4 * 100
