"""What the measures of style say of pictures whose order is known, and AlexNet's against a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter
from typer.testing import CliRunner

from diptych.cli import app
from diptych.evaluation.style_metrics import report, structure_distance, style_distance

PHOTOS = Path(__file__).resolve().parents[2] / "examples" / "photos"


@pytest.fixture(scope="module")
def pair() -> tuple[Image.Image, Image.Image]:
    return Image.open(PHOTOS / "chelsea.jpg"), Image.open(PHOTOS / "rocket.jpg")


def test_mixing_moves_from_one_to_the_other(pair: tuple[Image.Image, Image.Image]) -> None:
    content, style = (each.resize((160, 120)) for each in pair)
    mixed = [Image.blend(content, style, share) for share in (0, 0.3, 0.6, 1)]
    far = [structure_distance(content, each) for each in mixed]
    near = [style_distance(style, each) for each in mixed]
    assert far == sorted(far) and abs(far[0]) < 1e-9 and far[-1] > 0.5
    assert near == sorted(near, reverse=True) and near[-1] == 0
    assert structure_distance(content, content.filter(ImageFilter.GaussianBlur(3))) > 0.1
    assert structure_distance(content, Image.new("RGB", (9, 9))) == 1


def test_the_report_holds_those_that_do_nothing(pair: tuple[Image.Image, Image.Image]) -> None:
    content, style = pair
    made = Image.blend(content.resize((64, 64)), style.resize((64, 64)), 0.5)
    scores = report([(content, style, made)] * 2).as_dict()["scores"]
    assert scores["the content, as it is"]["structure"]["mean"] == pytest.approx(0, abs=1e-9)
    assert scores["the style, as it is"]["style"]["mean"] == 0
    result = scores["results"]
    expected = (1 + result["structure"]["mean"]) * (1 + result["style"]["mean"])
    assert result["joined"]["mean"] == pytest.approx(expected)


def test_alexnet_is_read_from_the_file_of_torchvision(tmp_path: Path, pair: Any) -> None:
    torch = pytest.importorskip("torch")
    from diptych.evaluation.perceptual import Perceptual

    torch.manual_seed(0)
    nn = torch.nn
    # The layers as torchvision builds them; its file holds the classifier, too.
    features = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    ).eval()  # fmt: skip
    state = {f"features.{name}": each for name, each in features.state_dict().items()}
    state |= {"classifier.1.weight": torch.zeros(4, 9), "classifier.1.bias": torch.zeros(4)}
    torch.save(state, tmp_path / "alexnet.pth")
    measure = Perceptual(tmp_path / "alexnet.pth")
    maps = measure._maps(pair[0])
    pixels = np.asarray(pair[0].resize((224, 224), Image.Resampling.LANCZOS), np.float32) / 255
    normed = (pixels - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    hidden = torch.tensor(normed, dtype=torch.float32).permute(2, 0, 1)[None]
    wanted = []
    with torch.no_grad():
        for layer in features:
            hidden = layer(hidden)
            wanted += [hidden] if isinstance(layer, nn.ReLU) else []
    for found, expected in zip(maps, wanted, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    assert measure.structure_distance(pair[0], pair[0]) == 0
    assert measure.structure_distance(*pair) > 0 < measure.style_distance(*pair)


def test_the_verb(tmp_path: Path, pair: Any) -> None:
    for name, picture in zip(("a.png", "b.png"), pair, strict=True):
        picture.resize((90, 70)).save(tmp_path / name)
    Image.blend(*(each.resize((90, 70)) for each in pair), 0.5).save(tmp_path / "c.png")
    lines = tmp_path / "pairs.jsonl"
    row = {"content": "a.png", "style": "b.png", "result": "c.png"}
    lines.write_text(json.dumps(row) + "\n\n")
    done = CliRunner().invoke(app, ["evaluate", "style", str(lines)])
    assert done.exit_code == 0 and "not comparable with ArtFID" in done.output
    told = json.loads(
        CliRunner().invoke(app, ["evaluate", "style", str(lines), "-f", "json"]).output
    )
    assert 0 < told["scores"]["results"]["structure"]["mean"] < 1
    lines.write_text('{"content": "a.png"}\n')
    done = CliRunner().invoke(app, ["evaluate", "style", str(lines)])
    assert "line 1: give an object with 'content' and 'style'" in str(done.exception)
