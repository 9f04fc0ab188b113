"""The same picture twice, and readers that leave out what training must not see."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, ImageFilter

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def recipe(monkeypatch):
    """Load a recipe's file by path, and forget afterwards what it put on the path."""
    monkeypatch.setattr(sys, "path", [str(RECIPES), *sys.path])
    before = set(sys.modules)

    def load(path: str) -> ModuleType:
        name = "recipe_" + path.removesuffix(".py").replace("/", "_")
        spec = importlib.util.spec_from_file_location(name, RECIPES / path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in set(sys.modules) - before:
        if name in ("duplicates", "render", "pictures") or name.startswith("recipe_"):
            del sys.modules[name]


def photo(seed: int, size: int = 128) -> Image.Image:
    """Draw smooth noise: something at every scale, and like no other seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


def written(folder: Path, pictures: dict[str, tuple[str, Image.Image]]) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as rows:
        for name, (split, picture) in pictures.items():
            picture.save(folder / name)
            rows.write(json.dumps({"file": name, "captions": [name], "split": split}) + "\n")
    return folder


def test_a_picture_is_known_again_in_other_light_mirrored_cropped_and_compressed(recipe, tmp_path):
    duplicates = recipe("duplicates.py")
    darker = Image.fromarray((np.asarray(photo(1)) * 0.6 + 30).astype(np.uint8))
    whole = photo(4, 160)
    pictures = {
        "images/plain.png": ("train", photo(1)),
        "images/darker.png": ("val", darker),
        "images/turned.png": ("train", photo(2).transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        "images/right.png": ("test", photo(2)),
        "images/soft.png": ("extra", photo(3).filter(ImageFilter.GaussianBlur(2))),
        "images/sharp.png": ("train", photo(3)),
        "images/whole.png": ("train", whole),
        "images/corner.png": ("val", whole.crop((0, 0, 144, 144)).resize((128, 128))),
        **{f"images/other{i}.png": ("train" if i % 2 else "val", photo(10 + i)) for i in range(20)},
        "images/flat.png": ("train", Image.new("RGB", (128, 128), "grey")),
        "images/flat2.png": ("val", Image.new("RGB", (128, 128), "grey")),
    }
    written(tmp_path / "flowers_128", pictures)
    found = duplicates.pairs(duplicates.read(tmp_path, ("flowers_128",)))

    def short(pair):
        return frozenset(Path(name).stem for name in (pair.first, pair.second))

    assert {short(pair): (pair.mirrored, pair.cropped) for pair in found} == {
        frozenset(["plain", "darker"]): (False, False),
        frozenset(["turned", "right"]): (True, False),
        frozenset(["soft", "sharp"]): (False, False),
        frozenset(["whole", "corner"]): (False, True),
    }
    report = duplicates.report({"flowers": found})
    # The blurred one and its original are both trained on, and stay.
    assert report["left_out"] == {
        "flowers_128": ["images/plain.png", "images/turned.png", "images/whole.png"]
    }


def test_likeness_is_a_correlation(recipe, tmp_path):
    duplicates = recipe("duplicates.py")
    noisy = np.asarray(photo(1)) + np.random.default_rng(0).normal(0, 20, (128, 128, 3))
    second = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    written(tmp_path / "x", {"images/a.png": ("train", photo(1)), "images/b.png": ("val", second)})
    (pair,) = duplicates.pairs(duplicates.read(tmp_path, ("x",)))
    small = [
        np.asarray(each, np.float64).reshape(32, 4, 32, 4, 3).mean((1, 3)) @ (0.299, 0.587, 0.114)
        for each in (photo(1), second)
    ]
    expected = np.corrcoef(small[0].ravel(), small[1].ravel())[0, 1]
    assert pair.likeness == pytest.approx(expected, abs=2e-3)


def test_drawings_of_one_outline_in_two_colours_are_two(recipe, tmp_path):
    duplicates = recipe("duplicates.py")
    red, green = (Image.new("RGBA", (128, 128), (0, 0, 0, 0)) for _ in range(2))
    red.paste((200, 0, 0, 255), (30, 40, 90, 100))
    green.paste((0, 102, 0, 255), (30, 40, 90, 100))
    pictures = {"images/red.png": ("train", red), "images/green.png": ("val", green)}
    written(tmp_path / "noto_emoji_128", pictures)
    thumbnails = duplicates.read(tmp_path, ("noto_emoji_128",))
    assert duplicates.pairs(thumbnails, duplicates.DIFFERENCE["emoji"]) == []
    assert len(duplicates.pairs(thumbnails)) == 1


def test_readers_leave_out_what_the_list_names(recipe, tmp_path):
    duplicates = recipe("duplicates.py")
    (name, *_) = sorted(duplicates.left_out("flowers_128"))
    pictures = {name: ("train", photo(1)), "images/other.png": ("train", photo(2))}
    folder = written(tmp_path / "flowers_128", pictures)
    assert duplicates.left_out("another_set") == frozenset()

    generator = recipe("default_generator/pictures.py")
    assert generator.photographs(tmp_path, "flowers", "train").captions == [["images/other.png"]]

    pytest.importorskip("torch")
    captioner = recipe("default_captioner/pictures.py")
    read = captioner.captioned(folder, {"train", "extra"}, 32)
    assert read.captions == [["images/other.png"]]
    assert len(read.pixels) == 1
