"""Pictures in, numbers out: against transformers, against closed forms, and against nonsense."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
import urllib.parse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.image_utils import load_image
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from diptych import images
from diptych.errors import BadImage, BadInput, DiptychError, UnsupportedModel
from diptych.images import (
    ImageLimits,
    Preprocessing,
    contact_sheet,
    open_image,
    overlay_heatmap,
    preprocess,
    to_pixels,
)

Noise = Callable[..., Image.Image]


def noise(mode: str = "RGB", size: tuple[int, int] = (37, 23), seed: int = 0) -> Image.Image:
    """A picture of smooth colours with noise, in any mode of Pillow."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 6, 4), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize(size)).astype(np.int16)
    values = np.clip(smooth + rng.integers(-20, 21, smooth.shape), 0, 255).astype(np.uint8)
    rgba = Image.fromarray(values)
    if mode == "La":
        return rgba.convert("LA").convert("La")
    if mode in ("CMYK", "YCbCr", "LAB", "HSV", "1", "P", "I"):
        return rgba.convert("RGB").convert(mode)
    if mode == "PA":
        picture = rgba.convert("RGB").quantize(64).convert("PA")
        picture.putalpha(rgba.getchannel("A"))
        return picture
    if mode.startswith("I;16"):
        return Image.frombytes(mode, size, rng.bytes(2 * size[0] * size[1]))
    if mode == "F":
        return Image.fromarray(rng.random((size[1], size[0]), dtype=np.float32))
    return rgba.convert(mode)


def encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    return stream.getvalue()


def same(left: Image.Image, right: Image.Image) -> bool:
    return (
        left.mode == right.mode == "RGB"
        and left.size == right.size
        and left.tobytes() == right.tobytes()
    )


# Modes.

EIGHT_BIT = ["1", "L", "LA", "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB"]
EIGHT_BIT += ["HSV"]


@pytest.mark.parametrize("mode", EIGHT_BIT)
def test_drop_equals_transformers_in_every_mode(mode: str) -> None:
    picture = noise(mode)
    assert same(open_image(picture, alpha="drop"), load_image(picture))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"])
def test_white_changes_nothing_without_transparency(mode: str) -> None:
    picture = noise(mode)
    assert same(open_image(picture), load_image(picture))


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_transparency_lies_on_white(mode: str) -> None:
    picture = noise(mode)
    straight = picture.convert("LA") if mode == "La" else picture
    rgba = np.asarray(straight.convert("RGBA")).astype(np.float64)
    weight = rgba[..., 3:] / 255
    expected = rgba[..., :3] * weight + 255 * (1 - weight)
    got = np.asarray(open_image(picture))
    assert np.abs(got - expected).max() <= 1
    assert open_image(picture, alpha="drop").mode == "RGB"


def test_transparency_is_exact_at_both_ends() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    pixels[:4, :, 3] = 0
    pixels[4:, :, 3] = 255
    got = np.asarray(open_image(Image.fromarray(pixels)))
    assert (got[:4] == 255).all()
    assert np.array_equal(got[4:], pixels[4:, :, :3])


@pytest.mark.parametrize(
    ("mode", "key", "hidden"),
    [
        ("P", 3, 3),
        ("P", bytes([255, 255, 255, 0]), 3),
        ("L", 3, 3),
        ("1", 0, 0),
        ("RGB", (3, 3, 3), (3, 3, 3)),
        ("I;16", 771, 771),
    ],
)
def test_a_transparent_colour_of_a_png_becomes_white(mode: str, key: Any, hidden: Any) -> None:
    visible = {"RGB": (90, 90, 90), "I;16": 23130, "1": 255}.get(mode, 7)
    picture = Image.new(mode, (6, 4), visible)
    if mode == "P":
        picture.putpalette([10 * index for index in range(24)])
    picture.paste(hidden, (0, 0, 3, 4))
    data = encoded(picture, "PNG", transparency=key)
    if mode == "I;16":
        # Pillow does not write the chunk for 16 bits.
        assert b"tRNS" not in data or open_image(data)
        picture.info["transparency"] = key
        white = open_image(picture)
    else:
        assert b"tRNS" in data
        white = open_image(data)
        assert same(open_image(data, alpha="drop"), load_image(Image.open(io.BytesIO(data))))
    assert white.getpixel((0, 0)) == (255, 255, 255)
    shown = {"P": (210, 220, 230), "RGB": (90, 90, 90), "I;16": (90, 90, 90), "1": (255,) * 3}
    assert white.getpixel((5, 3)) == shown.get(mode, (7, 7, 7))


def test_the_callers_picture_is_left_alone() -> None:
    picture = noise("RGB")
    picture.getexif()[0x0112] = 6
    picture.info["comment"] = b"private"
    before = picture.tobytes()
    got = open_image(picture)
    got.paste("black", (0, 0, 5, 5))
    assert got.size == (23, 37)
    assert got.info == {}
    assert picture.tobytes() == before
    assert picture.size == (37, 23)
    plain = noise("RGB")
    open_image(plain).paste("black", (0, 0, 5, 5))
    assert plain.tobytes() == before


# Greys deeper than a byte.

RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)
SCALED = np.rint(RAMP / 257).astype(np.uint8)


@pytest.mark.parametrize("alpha", ["white", "drop"])
@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_16_bit_greys_are_scaled_in_every_byte_order(mode: str, alpha: Any) -> None:
    order = {"I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2")
    picture = Image.frombytes(mode, (256, 256), RAMP.astype(order).tobytes())
    got = np.asarray(open_image(picture, alpha=alpha))
    assert np.array_equal(got, np.repeat(SCALED[..., None], 3, axis=2))
    # What this is for: Pillow makes nearly all of it white.
    assert (np.asarray(picture.convert("RGB")) == 255).mean() > 0.99


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PGM", "big-endian TIFF", "JPEG2000"])
def test_16_bit_files_are_scaled(kind: str) -> None:
    picture = Image.fromarray(RAMP.astype("<u2").view(np.uint16))
    picture = Image.frombytes("I;16", (256, 256), RAMP.astype("<u2").tobytes())
    if kind == "PGM":
        data = b"P5 256 256 65535\n" + RAMP.astype(">u2").tobytes()
    elif kind == "big-endian TIFF":
        swapped = Image.frombytes("I;16B", (256, 256), RAMP.astype(">u2").tobytes())
        data = encoded(swapped, "TIFF")
    else:
        options = {"JPEG2000": {"irreversible": False}}.get(kind, {})
        data = encoded(picture, kind, **options)
    assert np.array_equal(np.asarray(open_image(data))[..., 0], SCALED)


def test_a_dark_16_bit_picture_stays_dark() -> None:
    dark = (RAMP // 300).astype("<u2")
    data = encoded(Image.frombytes("I;16", (256, 256), dark.tobytes()), "PNG")
    assert np.asarray(open_image(data)).max() == 1
    pgm = b"P5 256 256 65535\n" + dark.astype(">u2").tobytes()
    assert Image.open(io.BytesIO(pgm)).mode == "I"
    assert np.asarray(open_image(pgm)).max() == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 128, 255], [0, 128, 255]),
        ([0, 257, 65535], [0, 1, 255]),
        ([0, 500_000, 1_000_000], [0, 128, 255]),
        ([-1000, 0, 1000], [0, 128, 255]),
        ([-5, 100, 255], [0, 100, 255]),
        ([100_000] * 3, [255] * 3),
        ([-(2**31), 0, 2**31 - 1], [0, 128, 255]),
        ([0, 0, 0], [0, 0, 0]),
        ([-7, -7, -7], [0, 0, 0]),
    ],
)
def test_32_bit_integers(values: list[int], expected: list[int]) -> None:
    picture = Image.fromarray(np.array([values], np.int32))
    assert picture.mode == "I"
    assert np.asarray(open_image(picture))[0, :, 1].tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([-0.5, 0.25, 1.0], [0, 64, 255]),
        ([0.0, 100.7, 255.0], [0, 100, 255]),
        ([0.0, 257.0, 65535.0], [0, 1, 255]),
        ([0.0, 5e5, 1e6], [0, 128, 255]),
        ([-1e38, 0.0, 1e38], [0, 128, 255]),
        ([np.nan, 0.5, 1.0], [0, 128, 255]),
        ([-np.inf, 0.5, np.inf], [0, 128, 255]),
        ([np.nan, np.inf, -np.inf], [0, 255, 0]),
        ([np.nan] * 3, [0] * 3),
    ],
)
def test_floats(values: list[float], expected: list[int]) -> None:
    got = open_image(Image.fromarray(np.array([values], np.float32)))
    assert np.asarray(got)[0, :, 2].tolist() == expected


def test_float_files() -> None:
    picture = noise("F")
    assert same(open_image(encoded(picture, "TIFF")), open_image(picture))


def test_deep_greys_of_many_rows_are_cut_into_blocks() -> None:
    wide = np.tile(RAMP, (1, 20))
    got = np.asarray(open_image(wide))[..., 0]
    assert np.array_equal(got, np.tile(SCALED, (1, 20)))


# Orientation.


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(), format, exif=exif)
    reference = load_image(Image.open(io.BytesIO(data)))
    assert same(open_image(data), reference)
    assert same(open_image(Image.open(io.BytesIO(data))), reference)
    assert reference.size == ((37, 23) if orientation < 5 else (23, 37))


def test_orientation_in_closed_form() -> None:
    corners = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [9, 9, 9]]], np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the first row is on the right: turn clockwise
    turned = open_image(encoded(Image.fromarray(corners), "PNG", exif=exif))
    assert np.array_equal(np.asarray(turned), np.rot90(corners, -1))


@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(range(200)),
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\x01\0\0\0\xff\xff\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0six\0",
        b"Exif\0\0garbage",
    ],
)
def test_a_broken_exif_block_does_not_cost_the_picture(block: bytes) -> None:
    plain = encoded(noise(), "JPEG")
    data = encoded(noise(), "JPEG", exif=block)
    assert data != plain
    assert same(open_image(data), open_image(plain))


# Files.

FILES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jpeg": ("JPEG", "RGB", {}),
    "jpeg grey": ("JPEG", "L", {}),
    "jpeg progressive": ("JPEG", "RGB", {"progressive": True}),
    "jpeg 4:4:4": ("JPEG", "RGB", {"subsampling": 0, "quality": 95}),
    "jpeg cmyk": ("JPEG", "CMYK", {}),
    "jpeg cmyk progressive": ("JPEG", "CMYK", {"progressive": True}),
    "png": ("PNG", "RGB", {}),
    "png 1": ("PNG", "1", {}),
    "png palette": ("PNG", "P", {}),
    "png grey": ("PNG", "L", {}),
    "png alpha": ("PNG", "RGBA", {}),
    "png grey alpha": ("PNG", "LA", {}),
    "gif": ("GIF", "P", {}),
    "bmp": ("BMP", "RGB", {}),
    "bmp palette": ("BMP", "P", {}),
    "tiff": ("TIFF", "RGB", {}),
    "tiff lzw": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "tiff deflate": ("TIFF", "RGBA", {"compression": "tiff_adobe_deflate"}),
    "tiff jpeg": ("TIFF", "RGB", {"compression": "jpeg"}),
    "tiff fax": ("TIFF", "1", {"compression": "group4"}),
    "tiff cmyk": ("TIFF", "CMYK", {}),
    "tiff lab": ("TIFF", "LAB", {}),
    "webp": ("WEBP", "RGB", {}),
    "webp alpha": ("WEBP", "RGBA", {"lossless": True}),
    "avif": ("AVIF", "RGB", {}),
    "avif alpha": ("AVIF", "RGBA", {}),
    "jpeg 2000": ("JPEG2000", "RGB", {}),
    "jpeg 2000 codestream": ("JPEG2000", "RGB", {"no_jp2": True}),
    "icon": ("ICO", "RGBA", {"sizes": [(32, 23)]}),
    "icon of a bitmap": ("ICO", "RGBA", {"sizes": [(32, 23)], "bitmap_format": "bmp"}),
    "ppm": ("PPM", "RGB", {}),
    "pgm": ("PPM", "L", {}),
    "pbm": ("PPM", "1", {}),
    "pfm": ("PPM", "F", {}),
    "tga": ("TGA", "RGB", {}),
    "tga rle": ("TGA", "RGBA", {"compression": "tga_rle"}),
    "qoi": ("QOI", "RGB", {}),
    "mpo": ("MPO", "RGB", {"save_all": True, "append_images": [noise(seed=9)]}),
}


@pytest.fixture(scope="module", params=FILES, ids=lambda name: name.replace(" ", "-"))
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    format, mode, options = FILES[request.param]
    path = tmp_path_factory.mktemp("files") / f"{request.param}.picture"
    path.write_bytes(encoded(noise(mode), format, **options))
    return path


def test_files_equal_transformers(file: Path) -> None:
    if file.stem == "pfm":
        pytest.skip("floats are scaled, not clipped")
    # Opened here, because theirs leaves the file open.
    with file.open("rb") as stream:
        assert same(open_image(file, alpha="drop"), load_image(Image.open(stream)))


def test_every_way_to_give_a_file_is_the_same(file: Path) -> None:
    data = file.read_bytes()
    expected = open_image(file)
    payload = base64.b64encode(data).decode()
    for source in (
        str(file),
        data,
        bytearray(data),
        memoryview(data),
        io.BytesIO(data),
        Image.open(io.BytesIO(data)),
        f"data:image/whatever;base64,{payload}",
        "data:," + urllib.parse.quote_from_bytes(data),
    ):
        assert same(open_image(source), expected)  # type: ignore[arg-type]
    with file.open("rb") as stream:
        stream.read(7)
        assert same(open_image(stream), expected)
    with file.open("rb", buffering=0) as raw:
        assert same(open_image(raw), expected)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO"])
def test_animations_show_their_first_frame(format: str) -> None:
    frames = [noise(seed=seed) for seed in range(3)]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    opened = Image.open(io.BytesIO(data))
    assert opened.n_frames == 3
    assert same(open_image(data), load_image(Image.open(io.BytesIO(data))))
    first, second = (np.asarray(frame).astype(float) for frame in frames[:2])
    got = np.asarray(open_image(data)).astype(float)
    assert np.abs(got - first).mean() < np.abs(got - second).mean() / 3


def test_a_stream_that_cannot_be_rewound_is_read_from_where_it_stands() -> None:
    data = encoded(noise(), "PNG")
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "wb") as writer:
        thread = threading.Thread(target=lambda: (writer.write(data), writer.close()))
        thread.start()
        assert same(open_image(reader), noise())
        thread.join()


# Data URLs.


@pytest.mark.parametrize(
    "make",
    [
        lambda data: "data:image/png;base64," + base64.b64encode(data).decode(),
        lambda data: "DATA:image/png;charset=x;BASE64," + base64.b64encode(data).decode(),
        lambda data: "data:;base64," + base64.urlsafe_b64encode(data).decode().rstrip("="),
        lambda data: "data:;base64," + urllib.parse.quote(base64.b64encode(data).decode(), safe=""),
        lambda data: "data:;base64,\n" + base64.encodebytes(data).decode(),
        lambda data: "data:image/png," + urllib.parse.quote_from_bytes(data, safe=""),
    ],
)
def test_data_urls(make: Callable[[bytes], str]) -> None:
    assert same(open_image(make(encoded(noise(), "PNG"))), noise())


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,", "is empty"),
        ("data:,", "is empty"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,a", "not valid base64"),
        ("data:image/png;base64,iVBORw0KGgo=", "is a damaged PNG"),
        ("data:text/plain,hello", "is not a picture"),
    ],
)
def test_bad_data_urls(url: str, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as caught:
        open_image(url)
    assert caught.value.name == "<data URL>"


# Arrays.

ARRAY = np.asarray(noise())


@pytest.mark.parametrize(
    "array",
    [
        ARRAY,
        np.ascontiguousarray(np.moveaxis(ARRAY, 2, 0)),
        np.asfortranarray(ARRAY),
        ARRAY[:, ::-1][:, ::-1],
        ARRAY.astype(np.uint16) * 257,
        (ARRAY.astype(np.uint16) * 257).astype(">u2"),
        ARRAY / 255,
        (ARRAY / 255).astype(np.float32),
        np.moveaxis(ARRAY / 255, 2, 0),
    ],
)
def test_arrays_of_colour(array: np.ndarray) -> None:
    assert same(open_image(array), noise())


@pytest.mark.parametrize("shape", [(23, 37), (23, 37, 1), (1, 23, 37)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float64, bool])
def test_arrays_of_grey(shape: tuple[int, ...], dtype: Any) -> None:
    grey = np.asarray(noise("1")) if dtype is bool else np.asarray(noise("L"))
    values = {np.uint16: grey.astype(np.uint16) * 257, np.uint8: grey, bool: grey}.get(dtype)
    array = (grey / 255).astype(dtype) if values is None else values
    expected = Image.fromarray(grey).convert("RGB")
    assert same(open_image(array.reshape(shape)), expected)


def test_arrays_with_alpha() -> None:
    picture = noise("RGBA")
    array = np.asarray(picture)
    assert same(open_image(array), open_image(picture))
    assert same(open_image(np.moveaxis(array, 2, 0)), open_image(picture))
    assert same(open_image(array, alpha="drop"), picture.convert("RGB"))
    assert same(open_image(array / 255), open_image(picture))


def test_an_array_of_both_layouts_is_read_channels_last() -> None:
    assert open_image(np.zeros((3, 9, 3), np.uint8)).size == (9, 3)
    assert open_image(np.zeros((3, 9, 5), np.uint8)).size == (5, 9)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((0, 5, 3), np.uint8), "has no pixels"),
        (np.zeros((5, 0), np.uint8), "has no pixels"),
        (np.zeros((3, 0, 5), np.uint8), "has no pixels"),
        (np.zeros(5, np.uint8), "shape 5;"),
        (np.array(4, np.uint8), r"shape \(\);"),
        (np.zeros((1, 5, 5, 3), np.uint8), "shape 1 x 5 x 5 x 3;"),
        (np.zeros((5, 5, 2), np.uint8), "shape 5 x 5 x 2;"),
        (np.zeros((5, 5), np.int64), "dtype int64"),
        (np.zeros((5, 5), np.int8), "dtype int8"),
        (np.zeros((5, 5), complex), "dtype complex"),
        (np.full((5, 5), "a"), "dtype <U1"),
        (np.full((5, 5), None), "dtype object"),
        (np.full((5, 5), 200.0), r"floats must lie in 0\.\.1"),
        (np.full((5, 5), -0.1), r"floats must lie in 0\.\.1"),
        (np.full((5, 5), np.nan), "NaN or infinity"),
        (np.array([[0.5, np.inf]]), "NaN or infinity"),
    ],
)
def test_bad_arrays(array: np.ndarray, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as caught:
        open_image(array)
    assert caught.value.name == "<array>"


# What cannot be read.


def test_bad_paths(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "note.png").write_text("hello")
    for path, reason in {
        tmp_path / "missing.png": "no such file",
        tmp_path / "empty.png" / "below.png": "no such file",
        tmp_path: "is a folder",
        tmp_path / "empty.png": "is empty",
        tmp_path / "note.png": "is not a picture that can be read",
        "nul\0byte.png": "is not a usable file name",
        "x" * 5000: "cannot be read (File name too long)",
        Path("/dev/zero"): "is not a regular file",
    }.items():
        with pytest.raises(BadImage) as caught:
            open_image(path)
        assert reason in caught.value.reason
        assert caught.value.name[:100] == str(path)[:100]
        assert len(str(caught.value)) < 400


def test_a_pipe_by_name_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadImage, match="not a regular file"):
        open_image(tmp_path / "pipe")


def test_permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "secret.png"
    path.write_bytes(encoded(noise(), "PNG"))
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BadImage, match="permission denied"):
        open_image(path)


@pytest.mark.parametrize("source", [None, 3, 1.5, [], ["a.png"], {}, object(), Image, ...])
def test_what_is_no_source(source: Any) -> None:
    with pytest.raises(BadImage, match="is not a picture: give a path"):
        open_image(source)


class Broken(io.RawIOBase):
    def __init__(self, error: Exception | None, answer: Any = None) -> None:
        self.error, self.answer = error, answer

    def read(self, *_: Any) -> Any:
        if self.error:
            raise self.error
        return self.answer

    def seek(self, *_: Any) -> int:
        return 0


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (io.StringIO("text"), "opened as text"),
        (io.BytesIO(), "is empty"),
        (Broken(None), "is empty"),
        (Broken(OSError("gone")), "cannot be read .gone."),
        (Broken(ZeroDivisionError()), "cannot be read .ZeroDivisionError."),
        (Broken(None, 17), "cannot be read"),
    ],
)
def test_bad_streams(stream: Any, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        open_image(stream)


def test_a_closed_file_and_a_closed_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(noise(), "PNG"))
    with path.open("rb") as stream:
        pass
    with pytest.raises(BadImage, match="closed file"):
        open_image(stream)
    with Image.open(path) as picture:
        pass
    with pytest.raises(BadImage):
        open_image(picture)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"%PDF-1.7 ...", "is a PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is a PostScript"),
        (b"\n <svg xmlns='x'></svg>", "is an SVG"),
        (b"<!DOCTYPE html><p>404", "is a web page"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "is a HEIC photo"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "is a film"),
        (b"8BPS\0\1", "is a Photoshop file"),
        (b"\x89PNG\r\n\x1a\n", "is a damaged PNG"),
        (b"\xd7\xcd\xc6\x9a" + bytes(100), "is not a picture that can be read"),
        (b"SIMPLE  =                    T" + bytes(3000), "is not a picture that can be read"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "is not a picture that can be read"),
        (bytes(100), "is not a picture that can be read"),
    ],
)
def test_other_kinds_of_file_are_named(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        open_image(data)


def test_only_listed_decoders_run(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    Image.init()
    for format in set(Image.OPEN) - set(images.FORMATS):
        factory = lambda *_, format=format: called.append(format)  # noqa: E731
        monkeypatch.setitem(Image.OPEN, format, (factory, lambda _: True))
    with pytest.raises(BadImage):
        open_image(b"anything at all")
    assert called == []
    assert "EPS" not in images.FORMATS
    only_png = ImageLimits(formats=("PNG",))
    assert open_image(encoded(noise(), "PNG"), limits=only_png)
    with pytest.raises(BadImage):
        open_image(encoded(noise(), "GIF"), limits=only_png)


@pytest.mark.parametrize(
    "error",
    [OSError("a\nb"), ValueError(), SyntaxError("x"), NotImplementedError(), KeyError("k"),
     IndexError(), EOFError(), MemoryError(), ZeroDivisionError(), OverflowError(), TypeError(),
     Image.DecompressionBombError("bomb"), RecursionError(), AssertionError(), StopIteration()],
)  # fmt: skip
def test_whatever_a_decoder_throws(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(BadImage) as caught:
        open_image(encoded(noise(), "PNG"))
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error or isinstance(error, StopIteration)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass(stop: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: Any) -> None:
        raise stop

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", interrupt)
    with pytest.raises(stop):
        open_image(encoded(noise(), "PNG"))


def test_alpha_has_three_values() -> None:
    with pytest.raises(BadInput, match="alpha must be 'white', 'drop' or 'keep', not 'black'"):
        open_image(noise(), alpha="black")  # type: ignore[arg-type]


# Limits.


def png_header(width: int, height: int) -> bytes:
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data = encoded(Image.new("RGB", (1, 1)), "PNG")
    header = b"IHDR" + size + data[24:29]
    import zlib

    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


@pytest.mark.parametrize("size", [(60_000, 60_000), (11_000, 11_000), (8001, 8000), (70_000, 1)])
def test_pixels_are_counted_before_decoding(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> None:
        pytest.fail("the picture was decoded")

    open_image(png_header(1, 1))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    started = time.process_time()
    with pytest.raises(BadImage, match="limit"):
        open_image(png_header(*size))
    assert time.process_time() - started < 0.05


def test_limits_are_configurable() -> None:
    picture = noise()
    data = encoded(picture, "PNG")
    exact = ImageLimits(max_pixels=37 * 23, max_bytes=len(data), max_side=37)
    assert same(open_image(data, limits=exact), picture)
    tight = [{"max_pixels": 37 * 23 - 1}, {"max_side": 36}]
    for words in tight:
        for source in (data, picture, np.asarray(picture)):
            with pytest.raises(BadImage, match="has 37 x 23 pixels; the limit is"):
                open_image(source, limits=ImageLimits(**words))


def test_more_than_pillows_own_warning_limit_opens_quietly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800)
    assert same(open_image(encoded(noise(), "PNG")), noise())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(BadImage, match="far more pixels"):
        open_image(encoded(noise(), "PNG"))


def test_bytes_are_counted_before_they_are_read(tmp_path: Path) -> None:
    data = encoded(noise(), "PNG")
    limits = ImageLimits(max_bytes=len(data) - 1)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    url = "data:;base64," + base64.b64encode(data).decode()
    percent = "data:," + "".join(f"%{byte:02x}" for byte in data)
    for source in (path, data, io.BytesIO(data), url, percent):
        with pytest.raises(BadImage, match="is larger than"):
            open_image(source, limits=limits)
    assert same(open_image(percent, limits=ImageLimits(max_bytes=len(data))), noise())
    with (tmp_path / "sparse.png").open("wb") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(BadImage, match="is larger than 67,108,864 bytes"):
        open_image(tmp_path / "sparse.png")


def test_a_stream_without_end_is_left() -> None:
    asked: list[int] = []

    class Endless:
        def read(self, size: int) -> bytes:
            asked.append(size)
            return bytes(min(size, 1000))

    with pytest.raises(BadImage, match=r"<file>: is larger than 10,000 bytes"):
        open_image(Endless(), limits=ImageLimits(max_bytes=10_000))  # type: ignore[arg-type]
    assert len(asked) == 11


@pytest.mark.parametrize(
    "words",
    [{"max_bytes": 0}, {"max_pixels": -1}, {"max_side": "9"}, {"timeout_s": 0},
     {"timeout_s": float("nan")}, {"formats": ("PNG", "EPS")}],
)  # fmt: skip
def test_bad_limits(words: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=f"ImageLimits.{next(iter(words))}"):
        ImageLimits(**words)


# URLs; what happens when they are allowed is in test_remote_images.py.


@pytest.mark.parametrize("url", ["http://example.invalid/a.png?token=s", "HTTPS://a.invalid/a.png"])
def test_urls_are_off(url: str) -> None:
    with pytest.raises(BadImage, match=r"allow_urls=True / --allow-urls") as caught:
        open_image(url)
    assert "token" not in str(caught.value)


@pytest.mark.parametrize("allow_urls", [False, True])
@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://a/b.png", "gopher://a", "s3://a/b"])
def test_other_schemes_are_never_read(url: str, allow_urls: bool) -> None:
    with pytest.raises(BadImage, match="addresses are not read"):
        open_image(url, allow_urls=allow_urls)


def test_a_path_is_not_taken_for_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("http_a.png", "data.png", "file:a.png", "a:b.png"):
        Path(name).write_bytes(encoded(noise(), "PNG"))
        assert same(open_image(name), noise())


# Side effects.


def test_pillows_warnings_neither_escape_nor_hurt() -> None:
    noisy = [
        encoded(noise("P"), "PNG", transparency=bytes(range(40))),
        encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0" + bytes(range(90))),
    ]
    for data in noisy:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            load_image(Image.open(io.BytesIO(data)))
        assert seen, "the sample does not make Pillow warn any more"
        for action in ("error", "always"):
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter(action)  # type: ignore[arg-type]
                before = list(warnings.filters)
                open_image(data, alpha="drop")
                with pytest.raises(BadImage):
                    open_image(data[: len(data) // 2], alpha="drop")
                assert list(warnings.filters) == before
            assert seen == []


def test_threads_do_not_disturb_each_other() -> None:
    quiet = encoded(noise(), "PNG")
    noisy = encoded(noise("P"), "PNG", transparency=bytes(range(40)))
    expected = open_image(noisy, alpha="drop")
    before = list(warnings.filters)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(25):
                assert same(open_image(noisy, alpha="drop"), expected)
                assert same(open_image(quiet), noise())
                with pytest.raises(BadImage):
                    open_image(noisy[:-30])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(warnings.filters) == before


def test_pillows_settings_are_untouched() -> None:
    from PIL import ImageFile

    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, ImageFile.MAXBLOCK)
    for data in (encoded(noise(), "JPEG"), png_header(60_000, 60_000), b"x"):
        with __import__("contextlib").suppress(BadImage):
            open_image(data)
    after = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, ImageFile.MAXBLOCK)
    assert after == before


def test_importing_does_little() -> None:
    code = (
        "import sys; from diptych import images; from PIL import Image;"
        "print(Image._initialized, [m for m in ('torch', 'transformers', 'ssl', 'http.client',"
        " 'socket', 'PIL.ImageDraw') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.stdout == "0 []\n", run.stderr


def test_every_error_is_one_of_ours() -> None:
    assert issubclass(BadImage, DiptychError)
    assert issubclass(BadImage, ValueError)


# Preprocessing.

VIT_GPT2 = {
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ViTFeatureExtractor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "size": 224,
}


def theirs(picture: Image.Image, config: dict[str, Any], deit: bool = False) -> np.ndarray:
    words = {key: value for key, value in config.items() if not key.endswith("_type")}
    kind = DeiTImageProcessorPil if deit else ViTImageProcessorPil
    pixels: np.ndarray = kind(**words)(picture, return_tensors="np")["pixel_values"][0]
    return pixels


def random_config(rng: np.random.Generator) -> dict[str, Any]:
    def triple(low: float, high: float) -> list[float]:
        return [float(value) for value in rng.uniform(low, high, 3)]

    def side() -> int:
        return int(rng.integers(1, 90))

    kind = rng.integers(0, 4)
    size: Any = [side(), {"height": side(), "width": side()}, {"shortest_edge": side()}, [7, 9]]
    config: dict[str, Any] = {
        "size": size[kind],
        "resample": int(rng.integers(0, 6)),
        "image_mean": triple(0, 1) if rng.random() < 0.8 else float(rng.random()),
        "image_std": triple(0.05, 2),
        "rescale_factor": float(rng.choice([1 / 255, 1 / 127.5, 0.0039, 1.0, rng.random()])),
        "do_resize": bool(rng.random() < 0.9),
        "do_rescale": bool(rng.random() < 0.8),
        "do_normalize": bool(rng.random() < 0.8),
    }
    config = {key: value for key, value in config.items() if rng.random() < 0.9}
    if rng.random() < 0.4:
        config |= {"do_center_crop": True, "crop_size": {"height": side(), "width": side()}}
    return config


@pytest.mark.parametrize("seed", range(12))
def test_pixels_equal_transformers_bit_for_bit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for trial in range(20):
        config = random_config(rng)
        size = (int(rng.integers(1, 150)), int(rng.integers(1, 150)))
        picture = noise(size=size, seed=trial)
        preprocessing = Preprocessing.from_config(config)
        got = to_pixels(picture, preprocessing)
        assert got.dtype == np.float32
        assert np.array_equal(got, theirs(picture, config)), config
        assert preprocessing.output_size in (None, got.shape[1:])
        # What we write says the same, to us and to them.
        assert Preprocessing.from_config(preprocessing.to_config()) == preprocessing
        json.dumps(preprocessing.to_config())
        if trial % 5 == 0:
            assert np.array_equal(got, theirs(picture, preprocessing.to_config()))


@pytest.mark.parametrize("size", [(640, 480), (1, 1), (224, 224), (17, 1999), (1200, 3)])
def test_pixels_of_published_configs(size: tuple[int, int]) -> None:
    picture = noise(size=size)
    got = to_pixels(picture, Preprocessing.from_config(VIT_GPT2))
    assert got.shape == (3, 224, 224)
    assert got.flags.c_contiguous
    assert np.array_equal(got, theirs(picture, VIT_GPT2))
    deit = {"image_processor_type": "DeiTImageProcessor"}
    assert np.array_equal(
        to_pixels(picture, Preprocessing.from_config(deit)), theirs(picture, deit, deit=True)
    )


def test_pixels_in_closed_form() -> None:
    every_byte = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(np.stack([every_byte] * 3, axis=2))
    got = to_pixels(picture, Preprocessing(height=16, width=16))
    exact = every_byte.astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert np.array_equal(got[0], exact)
    raw = Preprocessing(do_resize=False, do_rescale=False, do_normalize=False)
    assert np.array_equal(to_pixels(picture, raw)[2], every_byte)


def test_a_processor_of_theirs_reads_what_we_write() -> None:
    ours = Preprocessing(height=30, width=40, crop=(50, 20), mean=(0.1, 0.2, 0.3))
    reread = ViTImageProcessorPil.from_dict(ours.to_config()).to_dict()
    assert Preprocessing.from_config(reread) == ours
    tall = Preprocessing(height=31, width=31, shortest_edge=31, crop=(24, 24))
    assert (
        Preprocessing.from_config(ViTImageProcessorPil.from_dict(tall.to_config()).to_dict())
        == tall
    )


def test_preprocess_is_open_and_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise("RGBA").save(path)
    plain = Preprocessing()
    for alpha in ("white", "drop"):
        expected = to_pixels(open_image(path, alpha=alpha), plain)  # type: ignore[arg-type]
        assert np.array_equal(preprocess(path, plain, alpha=alpha), expected)  # type: ignore[arg-type]
    reference = theirs(load_image(str(path)), VIT_GPT2)
    assert np.array_equal(preprocess(path, plain, alpha="drop"), reference)
    with pytest.raises(BadImage):
        preprocess(path, plain, limits=ImageLimits(max_pixels=4))
    assert to_pixels(noise("L"), plain).shape == (3, 224, 224)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, Preprocessing()),
        (VIT_GPT2, Preprocessing()),
        ({"image_processor_type": "ViTImageProcessorFast"}, Preprocessing()),
        ({"image_processor_type": "ViTImageProcessorPil", "size": [3, 4]},
         Preprocessing(height=3, width=4)),
        ({"image_processor_type": "ViTImageProcessor", "feature_extractor_type": "Other"},
         Preprocessing()),
        ({"feature_extractor_type": "DeiTFeatureExtractor", "crop_size": 200},
         Preprocessing(height=256, width=256, resample=3, crop=(200, 200))),
        ({"image_processor_type": "DeiTImageProcessor", "do_center_crop": False, "resample": None},
         Preprocessing(height=256, width=256, resample=3)),
        ({"size": 30, "default_to_square": False},
         Preprocessing(height=30, width=30, shortest_edge=30)),
        ({"size": {"shortest_edge": 30, "longest_edge": None}, "crop_size": 8},
         Preprocessing(height=30, width=30, shortest_edge=30)),
        ({"image_mean": 0, "image_std": 1, "do_convert_rgb": True, "processor_class": "X",
          "do_pad": False, "pad_size": None, "data_format": "channels_first"},
         Preprocessing(mean=(0, 0, 0), std=(1, 1, 1))),
    ],
)  # fmt: skip
def test_configs_of_every_age(config: dict[str, Any], expected: Preprocessing) -> None:
    assert Preprocessing.from_config(config) == expected


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "image_processor_type 'CLIP"),
        ({"feature_extractor_type": "BeitFeatureExtractor"}, "feature_extractor_type 'Beit"),
        ({"image_processor_type": 7}, "image_processor_type 7"),
        ({"size": {"longest_edge": 5}}, "size="),
        ({"size": {"shortest_edge": 5, "longest_edge": 9}}, "size="),
        ({"size": {"max_height": 5, "max_width": 9}}, "size="),
        ({"size": "224"}, "size="),
        ({"size": [1, 2, 3]}, "size="),
        ({"size": 0}, "size"),
        ({"size": 4097}, "size"),
        ({"size": 10**30}, "size"),
        ({"size": True}, "size"),
        ({"size": {"height": 5.5, "width": 5}}, "size"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 5}}, "crop_size="),
        ({"do_center_crop": True, "crop_size": 5000}, "crop_size"),
        ({"do_center_crop": True}, "crop_size"),
        ({"resample": 6}, "resample"),
        ({"resample": -1}, "resample"),
        ({"resample": "bilinear"}, "resample"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"rescale_factor": float("inf")}, "rescale_factor"),
        ({"rescale_factor": "1/255"}, "rescale_factor"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "image_mean"),
        ({"image_mean": "abc"}, "image_mean"),
        ({"image_std": [1, 1, 0]}, "image_std"),
        ({"image_std": [1, 1, 1e-46]}, "image_std"),
        ({"image_std": [1, 1, 1, 1]}, "image_std"),
        ({"do_resize": "yes"}, "do_resize"),
        ({"do_pad": True}, "do_pad"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order"),
        ({"crop_pct": 0.9}, "crop_pct"),
        ("nonsense", "JSON object"),
        ([], "JSON object"),
    ],
)
def test_configs_that_ask_for_something_else(config: Any, key: str) -> None:
    with pytest.raises(UnsupportedModel, match=key):
        Preprocessing.from_config(config)


def test_a_thread_of_a_picture_is_not_blown_up() -> None:
    thread = Image.new("RGB", (1, 60_000))
    with pytest.raises(BadImage, match="too long and thin"):
        to_pixels(thread, Preprocessing(height=224, width=224, shortest_edge=224))
    assert to_pixels(thread, Preprocessing()).shape == (3, 224, 224)


# Pictures of attention.


def test_a_heatmap_marks_the_warm_place() -> None:
    photo = Image.new("RGB", (120, 80), (100, 110, 120))
    heat = np.zeros((4, 6))
    heat[1, 4] = 0.03
    drawn = overlay_heatmap(photo, heat)
    assert drawn.size == photo.size
    grey = np.asarray(drawn.convert("L")).astype(int)
    row, column = np.unravel_index(grey.argmax(), grey.shape)
    assert 20 <= row < 40
    assert 80 <= column < 100
    assert grey.max() - grey[70, 5] > 80
    assert photo.getpixel((0, 0)) == (100, 110, 120)
    # The photo stays visible where the map is cold.
    striped = photo.copy()
    striped.paste("white", (0, 0, 20, 80))
    assert np.asarray(overlay_heatmap(striped, heat).convert("L"))[70, 5] > grey[70, 5] + 50
    # Only differences count, not the scale.
    assert overlay_heatmap(photo, heat * 1000 + 5).tobytes() == drawn.tobytes()


def test_the_colours_rise_in_lightness() -> None:
    photo = Image.new("RGB", (256, 8))
    drawn = overlay_heatmap(photo, np.arange(256)[None])
    light = np.asarray(drawn.convert("L"))[4].astype(int)
    assert (np.diff(light) >= -1).all()
    assert light[-1] > light[0] + 100


@pytest.mark.parametrize("label", ["dog", "a very long label " * 20, "Straße → 犬", "\n\t", "x"])
def test_a_label_stands_below(label: str) -> None:
    photo = noise(size=(90, 60))
    bare = overlay_heatmap(photo, np.eye(3))
    drawn = overlay_heatmap(photo, np.eye(3), label=label)
    assert drawn.width == 90
    assert drawn.height > 60
    assert drawn.crop((0, 0, 90, 60)).tobytes() == bare.tobytes()
    strip = np.asarray(drawn.crop((0, 60, 90, drawn.height)).convert("L"))
    assert (strip.min() < 100) == bool(label.strip())


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_heatmaps_of_odd_sizes(size: tuple[int, int]) -> None:
    flat = overlay_heatmap(noise(size=size), np.full((2, 2), 0.25), label="word")
    assert flat.width == size[0]
    assert overlay_heatmap(noise("RGBA", size), np.ones((1, 1), np.float16)).size == size


@pytest.mark.parametrize(
    "heat", [np.zeros(4), np.zeros((0, 4)), np.full((2, 2), np.nan), np.zeros((1, 2, 2))]
)
def test_bad_heatmaps(heat: np.ndarray) -> None:
    with pytest.raises(BadInput, match="heatmap"):
        overlay_heatmap(noise(), heat)


def test_contact_sheet() -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (9, 9, 9), (90, 90, 90)]
    panels = [Image.new("RGB", (40, 20 + index), colour) for index, colour in enumerate(colours)]
    sheet = contact_sheet(panels, 3)
    assert sheet.size == (3 * 44 + 4, 2 * 28 + 4)
    for index, colour in enumerate(colours):
        assert sheet.getpixel((4 + index % 3 * 44 + 20, 4 + index // 3 * 28 + 10)) == colour
    assert sheet.getpixel((125, 50)) == (255, 255, 255)
    assert contact_sheet(panels[:2], 9).width == 2 * 44 + 4
    assert contact_sheet([noise("L", (900, 500))] * 2, 2, max_side=100).size == (212, 64)
    assert panels[0].size == (40, 20)
    for panels_, columns in (([], 2), (panels, 0)):
        with pytest.raises(BadInput, match="contact sheet"):
            contact_sheet(panels_, columns)


def test_reference_is_what_it_is_taken_for() -> None:
    """transformers' `load_image` is transpose, then convert; the tests above rest on it."""
    picture = noise("RGBA")
    assert same(load_image(picture), ImageOps.exif_transpose(picture).convert("RGB"))
