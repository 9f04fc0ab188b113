"""Masks of every convention, seams, and the way back into a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diptych.canvas import crop_region, extend, fit, paste_back
from diptych.errors import BadImage, BadInput
from diptych.images import open_image
from diptych.masks import at_latents, open_mask, seam

SIZE = (6, 4)
RANDOM = np.random.default_rng(0)


def levels() -> Any:
    grey = np.zeros((4, 6), np.uint8)
    grey[1:3, 2:5] = 255
    return grey


def rgba(colour: tuple[int, int, int], alpha: Any) -> Image.Image:
    values = np.zeros((4, 6, 4), np.uint8)
    values[..., :3], values[..., 3] = colour, alpha
    return Image.fromarray(values)


@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray(levels()),
        Image.fromarray(levels()).convert("RGB"),
        Image.fromarray(levels()).convert("1"),
        Image.fromarray(levels().astype(np.uint16) * 257),
        levels() > 0,
        levels() / 255.0,
        rgba((0, 0, 0), 255 - levels()),  # transparent is repainted where no colour tells
        rgba((255, 255, 255), 255 - levels()),
        Image.merge("RGBA", [*[Image.fromarray(levels())] * 3, Image.new("L", SIZE, 255)]),
        Image.merge("RGBA", [*[Image.fromarray(levels())] * 3, Image.fromarray(levels())]),
    ],
)
def test_every_convention_says_the_same(mask: Any) -> None:
    found, notes = open_mask(mask, SIZE)
    assert np.array_equal(found, levels() / 255) and notes == ()
    inverted, _ = open_mask(mask, SIZE, invert=True)
    assert np.array_equal(inverted, 1 - levels() / 255)


def test_alpha_can_be_asked_for() -> None:
    """As OpenAI's edits: the picture itself, with a hole in it."""
    colours = RANDOM.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(np.dstack([colours, 255 - levels()]))
    found, _ = open_mask(picture, SIZE, "alpha")
    assert np.array_equal(found, levels() / 255)
    with pytest.raises(BadInput, match="the mask has no transparency"):
        open_mask(Image.fromarray(levels()), SIZE, "alpha")


def test_another_size_is_told(tmp_path: Path) -> None:
    found, (note,) = open_mask(Image.fromarray(levels()), (12, 8))
    assert found.shape == (8, 12) and found.max() == 1 and found.min() == 0
    assert note == "the mask is 6x4, the picture 12x8: the mask was resized"
    (tmp_path / "mask.png").write_bytes(b"no picture")
    with pytest.raises(BadImage):
        open_mask(tmp_path / "mask.png", SIZE)


def test_latents_are_picked_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    mask = (RANDOM.random((32, 48)) > 0.5).astype(np.float32)
    for down in (4, 8):
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(mask)[None, None], scale_factor=1 / down
        )
        assert np.array_equal(at_latents(mask, down), expected[0, 0].numpy())
    line = np.zeros((32, 48), np.float32)
    line[:, 13] = 1  # between the picked pixels: lost, were it not for the second look
    assert at_latents(line, 8)[:, 1].all() and at_latents(line, 8).sum() == 4
    soft = at_latents(np.full((16, 16), 0.25, np.float32), 8, is_soft=True)
    assert soft.shape == (2, 2) and np.allclose(soft, 0.25)


def test_a_seam_is_inside_and_whole_in_the_middle() -> None:
    mask = np.zeros((40, 50), bool)
    mask[10:30, 15:50] = True  # touches the right edge of the picture
    found = seam(mask, 4)
    assert not found[~mask].any() and (found[mask] > 0).all()
    assert np.allclose(found[20, 15:21], [0.2, 0.4, 0.6, 0.8, 1, 1])
    assert found[20, 49] == 1  # the edge of the picture is no seam
    assert np.array_equal(seam(mask, 0), mask)
    thin = np.zeros((40, 50), bool)
    thin[5, 5:20] = True
    assert np.array_equal(seam(thin, 9), thin)  # a line is painted in full
    assert not seam(np.zeros((3, 3), bool), 4).any()


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "I;16", "L", "P", "LA", "1"])
def test_pixels_outside_come_back(kind: str, tmp_path: Path) -> None:
    colours = RANDOM.integers(0, 256, (21, 17, 4), dtype=np.uint8)
    if kind == "I;16":
        source = Image.fromarray(RANDOM.integers(0, 65536, (21, 17), dtype=np.uint16))
    else:
        source = Image.fromarray(colours).convert(kind)
    source.save(tmp_path / "source.png")
    original = open_image(tmp_path / "source.png", alpha="keep")
    assert original.mode == {"I;16": "I;16", "RGB": "RGB", "L": "RGB", "1": "RGB"}.get(kind, "RGBA")
    same = source if kind == "I;16" else source.convert(original.mode)
    assert np.array_equal(np.asarray(original), np.asarray(same))
    weights = np.zeros((21, 17), np.float32)
    weights[3:9, 4:12] = RANDOM.random((6, 8))
    painted = Image.fromarray(RANDOM.integers(0, 256, (21, 17, 3), dtype=np.uint8))
    result = paste_back(original, painted, weights)
    result.save(tmp_path / "result.png")
    with Image.open(tmp_path / "result.png") as read:
        kept = np.asarray(read)[weights == 0]
    assert np.array_equal(kept, np.asarray(original)[weights == 0])
    assert not np.array_equal(np.asarray(result), np.asarray(original))
    whole = paste_back(original, painted, np.ones_like(weights))
    if kind == "RGB":
        assert np.array_equal(np.asarray(whole), np.asarray(painted))
    if kind in ("RGBA", "LA"):
        assert (np.asarray(whole)[..., 3] == 255).all()


def test_the_region_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.image_processor.VaeImageProcessor.get_crop_region
    for _ in range(200):
        height, width = RANDOM.integers(8, 90, 2)
        mask = np.zeros((height, width), np.uint8)
        top, left = RANDOM.integers(0, height - 1), RANDOM.integers(0, width - 1)
        mask[top : top + RANDOM.integers(1, 40), left : left + RANDOM.integers(1, 40)] = 255
        size = tuple(RANDOM.integers(16, 128, 2).tolist())
        padding = int(RANDOM.integers(0, 30))
        expected = reference(Image.fromarray(mask), *size, pad=padding)
        assert crop_region(mask, padding, size) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "theirs"), [("resize", "default"), ("crop", "crop"), ("pad", "fill")]
)
def test_sizes_are_fitted_as_by_diffusers(mode: str, theirs: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    processor = diffusers.image_processor.VaeImageProcessor()
    picture = Image.fromarray(RANDOM.integers(0, 256, (40, 64, 3), dtype=np.uint8))
    for size in ((32, 32), (64, 24), (96, 80)):
        found = fit(picture, size, mode)
        expected = processor.resize(picture, height=size[1], width=size[0], resize_mode=theirs)
        assert found.size == size
        difference = np.abs(np.asarray(found, int) - np.asarray(expected, int))
        assert difference.max() <= (0 if mode != "pad" else 1)


def test_extending_repeats_edges() -> None:
    picture = Image.fromarray(RANDOM.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    found = np.asarray(extend(picture, left=2, bottom=3))
    assert found.shape == (7, 8, 3)
    assert np.array_equal(found[:4, 2:], np.asarray(picture))
    assert np.array_equal(found[5, 2:], np.asarray(picture)[-1])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_white_mask_that_is_nowhere_transparent_is_white(mode: str) -> None:
    found, _ = open_mask(Image.new(mode, SIZE, "white"), SIZE)
    assert found.min() == 1
    found, _ = open_mask(Image.new(mode, SIZE, "black"), SIZE)
    assert found.max() == 0


def test_long_and_thin_pictures_are_cropped_without_being_scaled_whole() -> None:
    """40,000 x 1 pixels to 512 x 512 would be ten thousand million of them on the way."""
    wide = Image.fromarray(RANDOM.integers(0, 256, (1, 40_000, 3), dtype=np.uint8))
    assert fit(wide, (512, 512), "crop").size == (512, 512)


def test_a_crop_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ((90, 40), (40, 90), (37, 81)):
        rough = Image.fromarray(RANDOM.integers(0, 256, (9, 7, 3), dtype=np.uint8))
        picture = rough.resize(size, Image.Resampling.BICUBIC)
        monkeypatch.setattr("diptych.canvas._MOST_SCALED", 1 << 26)
        whole = np.asarray(fit(picture, (64, 64), "crop"), np.int16)
        monkeypatch.setattr("diptych.canvas._MOST_SCALED", 0)
        part = np.asarray(fit(picture, (64, 64), "crop"), np.int16)
        assert np.abs(whole - part).max() <= 2
