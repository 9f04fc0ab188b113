"""Damaged, hostile and odd files: a picture or `BadImage`, soon, within bounded memory.

The files are opened in a process of their own, so that a crash, a hang or a bloated heap is seen
and blamed on the file that caused it, instead of taking the test run down.
"""

from __future__ import annotations

import io
import json
import os
import select
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

# Processor time; the wall clock of a busy machine says little.
SECONDS_A_FILE = 2.0
WALL_SECONDS_A_FILE = 60.0

OPENER = """
import json, re, sys, time
from diptych.errors import BadImage
from diptych.images import open_image

def outcome(path, alpha):
    try:
        picture = open_image(path, alpha=alpha)
        return "ok" if picture.mode == "RGB" and min(picture.size) > 0 else "no picture"
    except BadImage as error:
        fine = error.name == path and error.reason and "\\n" not in error.reason
        return "bad" if fine and len(str(error)) < 1000 else "poor message: " + str(error)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"

def peak_mb():
    # Not ru_maxrss, which a child inherits from the process that forked it.
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1]) / 1024

print("ready", flush=True)
for line in sys.stdin:
    path, alpha = json.loads(line)
    started = time.process_time()
    said = outcome(path, alpha)
    seconds = time.process_time() - started
    print(json.dumps([said, seconds, peak_mb()]), flush=True)
"""


@dataclass
class Report:
    """What became of a file: "ok", "bad" or something that must not be; the whole peak so far."""

    outcome: str
    seconds: float
    peak_mb: float


class Opener:
    """Opens files one by one in a child process; a dead or silent child is an outcome too."""

    def __init__(self) -> None:
        self.child: subprocess.Popen[str] | None = None

    def __call__(self, path: Path, alpha: str = "white") -> Report:
        child = self.child = self.child or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps([str(path), alpha]) + "\n")
        child.stdin.flush()
        if not select.select([child.stdout], [], [], WALL_SECONDS_A_FILE)[0]:
            self.close()
            return Report("hangs", 0, 0)
        if not (line := child.stdout.readline()):
            code = child.wait()
            self.close()
            return Report(f"the process died with {code}", 0, 0)
        return Report(*json.loads(line))

    def _start(self) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", OPENER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # libtiff writes there.
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        return child

    def close(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.communicate()
            self.child = None


@pytest.fixture
def opener() -> Iterator[Opener]:
    opener = Opener()
    yield opener
    opener.close()


def open_all(opener: Opener, paths: list[Path], peak_mb: float) -> dict[Path, str]:
    """Open every file, in turns with either `alpha`; fail with those that misbehave."""
    outcomes: dict[Path, str] = {}
    wrong: list[str] = []
    for path in paths:
        assert len(wrong) < 20, wrong
        report = opener(path, ("white", "drop")[len(outcomes) % 2])
        outcomes[path] = report.outcome
        if report.outcome not in ("ok", "bad"):
            wrong.append(f"{path}: {report.outcome}")
        if report.seconds > SECONDS_A_FILE:
            wrong.append(f"{path}: took {report.seconds:.1f} s")
        if report.peak_mb > peak_mb:
            wrong.append(f"{path}: {report.peak_mb:.0f} MB by now")
            opener.close()
    assert wrong == []
    return outcomes


# The harness itself: what it must notice.


@pytest.mark.parametrize(
    ("fault", "noticed"),
    [
        ("raise KeyError('x')", "KeyError"),
        ("import os; os.kill(os.getpid(), 11)", "died with -11"),
        ("import time; time.sleep(60)", "hangs"),
        ("end = time.process_time() + 0.3\n        while time.process_time() < end: pass", "took"),
        ("x = bytearray(300_000_000)", "MB by now"),
        ("import warnings; warnings.warn('loud')", "UserWarning"),
    ],
)
def test_the_harness_notices(
    fault: str, noticed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy machine may be slow at all of them; only the sleeper has to be caught by the clock.
    wall = 1.0 if noticed == "hangs" else WALL_SECONDS_A_FILE
    monkeypatch.setattr(sys.modules[__name__], "WALL_SECONDS_A_FILE", wall)
    monkeypatch.setattr(sys.modules[__name__], "SECONDS_A_FILE", 0.2)
    faulty = OPENER.replace("    try:\n", f"    try:\n        {fault}\n", 1)
    assert faulty != OPENER
    monkeypatch.setattr(sys.modules[__name__], "OPENER", faulty)
    path = tmp_path / "a.png"
    Image.new("RGB", (2, 2)).save(path)
    opener = Opener()
    with pytest.raises(AssertionError, match=noticed):
        open_all(opener, [path], peak_mb=200)
    opener.close()


# Damage, made here.


def sample(mode: str = "RGB", seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 256, (4, 4, 4), dtype=np.uint8)).resize((32, 24))
    if mode in ("I;16", "F"):
        grey = np.asarray(smooth.convert("L"))
        return Image.fromarray(
            grey.astype(np.uint16) * 257 if mode == "I;16" else grey / np.float32(255)
        )
    return (
        smooth.convert("RGB").convert(mode) if mode in ("CMYK", "P", "1") else smooth.convert(mode)
    )


EXIF = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\6\0\0\0"

SAMPLES: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "jpg": ("JPEG", "RGB", {"exif": EXIF}),
    "progressive.jpg": ("JPEG", "RGB", {"progressive": True}),
    "cmyk.jpg": ("JPEG", "CMYK", {}),
    "png": ("PNG", "RGB", {}),
    "1.png": ("PNG", "1", {}),
    "palette.png": ("PNG", "P", {"transparency": bytes(range(0, 250, 10))}),
    "16.png": ("PNG", "I;16", {}),
    "alpha.png": ("PNG", "RGBA", {}),
    "animated.png": ("PNG", "RGBA", {"save_all": True, "append_images": [sample("RGBA", 1)]}),
    "gif": ("GIF", "P", {"save_all": True, "append_images": [sample("P", 1)]}),
    "bmp": ("BMP", "RGB", {}),
    "palette.bmp": ("BMP", "P", {}),
    "tif": ("TIFF", "RGB", {}),
    "16.tif": ("TIFF", "I;16", {}),
    "float.tif": ("TIFF", "F", {}),
    "lzw.tif": ("TIFF", "RGBA", {"compression": "tiff_lzw"}),
    "deflate.tif": ("TIFF", "RGB", {"compression": "tiff_adobe_deflate"}),
    "jpeg.tif": ("TIFF", "RGB", {"compression": "jpeg"}),
    "fax.tif": ("TIFF", "1", {"compression": "group4"}),
    "webp": ("WEBP", "RGB", {}),
    "lossless.webp": ("WEBP", "RGBA", {"lossless": True}),
    "animated.webp": ("WEBP", "RGB", {"save_all": True, "append_images": [sample(seed=1)]}),
    "avif": ("AVIF", "RGBA", {"speed": 10}),
    "jp2": ("JPEG2000", "RGB", {}),
    "j2k": ("JPEG2000", "L", {"no_jp2": True}),
    "ico": ("ICO", "RGBA", {"sizes": [(24, 24), (16, 16)]}),
    "bitmap.ico": ("ICO", "RGBA", {"sizes": [(24, 24)], "bitmap_format": "bmp"}),
    "ppm": ("PPM", "RGB", {}),
    "pfm": ("PPM", "F", {}),
    "tga": ("TGA", "RGB", {}),
    "rle.tga": ("TGA", "RGBA", {"compression": "tga_rle"}),
    "qoi": ("QOI", "RGB", {}),
    "mpo": ("MPO", "RGB", {"save_all": True, "append_images": [sample(seed=1)]}),
}  # fmt: skip

RLE_BMP = (
    b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024)
    + struct.pack("<IiiHHIIiiII", 40, 8, 4, 1, 8, 1, 0, 0, 0, 256, 0)
    + bytes(range(256)) * 4 + b"\x08\x07\0\0\x03\x01\0\x03\x05\6\7\0\2\x09\0\0\0\2\1\1\4\5\0\0\0\1"
)  # fmt: skip
PLAIN = {"rle.bmp": RLE_BMP, "plain.ppm": b"P3 # x\n3 2 255\n" + b"9 80 255 " * 6}


def encode(format: str, mode: str, options: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    sample(mode).save(stream, format, **options)
    return stream.getvalue()


def whole_samples() -> dict[str, bytes]:
    return {name: encode(*recipe) for name, recipe in SAMPLES.items()} | PLAIN


def test_the_undamaged_samples_open(opener: Opener, tmp_path: Path) -> None:
    paths = []
    for name, data in whole_samples().items():
        paths.append(tmp_path / f"whole.{name}")
        paths[-1].write_bytes(data)
    outcomes = open_all(opener, paths, peak_mb=200)
    assert {path.name: said for path, said in outcomes.items() if said != "ok"} == {}


def damaged(data: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """Cut, flip bits, overwrite, drop, repeat; half of it near the start, where headers are."""
    for cut in {0, 1, 2, *rng.integers(3, len(data), 14).tolist(), len(data) - 1}:
        yield data[:cut]
    for _ in range(20):
        broken = bytearray(data)
        span = len(data) if rng.random() < 0.5 else min(len(data), 120)
        for _ in range(int(rng.integers(1, 4))):
            broken[rng.integers(0, span)] ^= 1 << int(rng.integers(0, 8))
        yield bytes(broken)
    for _ in range(8):
        broken = bytearray(data)
        start, length = int(rng.integers(0, len(data))), int(rng.integers(1, 9))
        piece = [rng.bytes(length), b"\xff" * length, bytes(length), b"", broken[start:] * 3]
        broken[start : start + length] = piece[rng.integers(0, 5)]
        yield bytes(broken)


def test_damaged_files(opener: Opener, tmp_path: Path) -> None:
    rng = np.random.default_rng(20)
    paths = []
    for name, data in whole_samples().items():
        for index, broken in enumerate(damaged(data, rng)):
            paths.append(tmp_path / f"{index}.{name}")
            paths[-1].write_bytes(broken)
    assert len(paths) > 1400
    outcomes = list(open_all(opener, paths, peak_mb=400).values())
    # Both ends occur: neither is everything refused, nor does damage go unnoticed.
    assert outcomes.count("bad") > 450
    assert outcomes.count("ok") > 250


# Bombs and traps.


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(
    width: int, height: int, *, extra: bytes = b"", pixels: bytes = b"", after: bytes = b""
) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + extra + chunk(b"IDAT", pixels) + after + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def zipped_zeros(megabytes: int) -> bytes:
    """A zlib stream of that many zeros, put together from one compressed megabyte."""
    squeezer = zlib.compressobj(9, wbits=-15)
    block = squeezer.compress(bytes(1 << 20)) + squeezer.flush(zlib.Z_FULL_FLUSH)
    checksum = struct.pack(">HH", (megabytes << 20) % 65_521, 1)
    return b"\x78\xda" + block * megabytes + b"\3\0" + checksum


def tiff(width: int, height: int, *tags: tuple[int, int, int], data: bytes = b"") -> bytes:
    """A little-endian grey TIFF with (tag, type, value) entries beside the usual ones."""
    entries = {
        256: (4, width),
        257: (4, height),
        258: (3, 8),
        259: (3, 1),
        262: (3, 1),
        277: (3, 1),
    }
    entries |= {tag: (kind, value) for tag, kind, value in tags}
    body = b"".join(
        struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in sorted(entries.items())
    )
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries))
    return head + body + bytes(4) + data


def scans(count: int) -> bytes:
    """A progressive JPEG of 1024 x 1024 whose last scan comes again and again."""
    stream = io.BytesIO()
    Image.new("RGB", (1024, 1024)).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    last = data.rfind(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def icon_of(inner: bytes) -> bytes:
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(inner), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + inner


def codestream_in_a_small_box() -> bytes:
    """A JP2 whose container says 16 x 16 and whose codestream says 60,000 x 60,000."""
    stream = io.BytesIO()
    Image.new("L", (16, 16)).save(stream, "JPEG2000")
    data = bytearray(stream.getvalue())
    start = data.index(b"\xff\x4f\xff\x51")
    struct.pack_into(">II", data, start + 8, 60_000, 60_000)
    return bytes(data)


def heavy_jp2() -> bytes:
    """25 million black pixels in a kilobyte, for which OpenJPEG would want 0.7 GB."""
    stream = io.BytesIO()
    Image.new("L", (5000, 5000)).save(stream, "JPEG2000")
    return stream.getvalue()


MILLION = 1_000_000

BOMBS: Mapping[str, Any] = {
    "huge header.png": lambda: png(60_000, 60_000, pixels=zipped_zeros(8)),
    "zip bomb.png": lambda: png(30, 30, pixels=zipped_zeros(200)),
    "text bomb.png": lambda: png(1, 1, extra=chunk(b"zTXt", b"a\0\0" + zipped_zeros(400))),
    "profile bomb.png": lambda: png(1, 1, extra=chunk(b"iCCP", b"a\0\0" + zipped_zeros(400))),
    "chunks.png": lambda: png(1, 1, extra=chunk(b"tEXt", b"a\0b") * MILLION),
    "chunks after.png": lambda: png(
        1, 1, pixels=zlib.compress(bytes(4)), after=chunk(b"teXt", b"") * MILLION
    ),
    "empty pieces.png": lambda: png(2000, 2000, after=chunk(b"IDAT", b"") * MILLION),
    "one row.png": lambda: png(60_000_000, 1, pixels=zipped_zeros(180)),
    "screen.gif": lambda: b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\1\0\1\0\0\2\1\0\0;",
    "frame.gif": lambda: b"GIF89a\1\0\1\0\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\2\1\0\0;",
    "comments.gif": lambda: b"GIF89a\1\0\1\0\0\0\0!\xfe" + b"\1a" * MILLION,
    "extensions.gif": lambda: b"GIF89a\1\0\1\0\0\0\0" + b"!\xf9\0" * MILLION,
    "huge.tif": lambda: tiff(60_000, 60_000, (273, 4, 8), (279, 4, 9), (278, 4, 60_000)),
    "huge tile.tif": lambda: tiff(
        16, 16, (259, 3, 8), (322, 4, 60_000), (323, 4, 60_000), (324, 4, 8), (325, 4, 9)
    ),
    "deflated tile.tif": lambda: tiff(
        16, 16, (259, 3, 8), (322, 4, 16_000), (323, 4, 16_000), (324, 4, 158), (325, 4, 260_000),
        data=bytes(4) + zipped_zeros(256),
    ),
    "tags.tif": lambda: b"II*\0\x08\0\0\0\xff\xff" + b"\0\1\3\0\1\0\0\0\1\0\0\0" * 65_535,
    "loop.tif": lambda: b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "many scans.jpg": lambda: scans(3000),
    "padding.jpg": lambda: b"\xff\xd8" + b"\xff" * 20 * MILLION,
    "junk.jpg": lambda: b"\xff\xd8\xff" + bytes(20 * MILLION),
    "segments.jpg": lambda: b"\xff\xd8" + b"\xff\xe0\0\2" * 5 * MILLION,
    "hidden.ico": lambda: icon_of(png(30_000, 30_000, pixels=zipped_zeros(64))),
    "hidden 2.ico": lambda: icon_of(png(10_000, 8_000, pixels=zipped_zeros(229))),
    "hidden bitmap.ico": lambda: icon_of(
        struct.pack("<IiiHHIIiiII", 40, 10_000, 16_000, 1, 32, 0, 0, 0, 0, 0, 0) + bytes(100)
    ),
    "codestream.jp2": codestream_in_a_small_box,
    "huge.webp": lambda: b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\2\0\0\0"
    b"\xff\x3f\0\xff\x3f\0ANIM\6\0\0\0",
    "heavy.jp2": heavy_jp2,
    "huge.bmp": lambda: b"BM" + struct.pack("<IHHI", 0, 0, 0, 54)
    + struct.pack("<IiiHHIIiiII", 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0),
    "deltas.bmp": lambda: RLE_BMP[:1078] + b"\0\2\0\0" * 5 * MILLION,
    "slow.bmp": lambda: RLE_BMP[:18] + struct.pack("<ii", 8000, 7000) + RLE_BMP[26:],
    "comments.ppm": lambda: b"P3 4 4 255\n" + b"#\n" * MILLION,
    "comment.ppm": lambda: b"P6\n#" + b"a" * 20 * MILLION,
    "blanks.ppm": lambda: b"P6" + b" " * 20 * MILLION,
    "slow.ppm": lambda: b"P3 8000 8000 255 " + b"1 " * MILLION,
    "slow.qoi": lambda: b"qoif" + struct.pack(">IIBB", 8000, 8000, 3, 0) + b"\xfd" * 1_040_000,
    "huge.tga": lambda: struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 65_535, 65_535, 32, 0),
}  # fmt: skip


def test_the_bombs_are_live() -> None:
    assert zlib.decompress(zipped_zeros(3)) == bytes(3 << 20)


HARMLESS = {"zip bomb.png"}


def test_bombs(opener: Opener, tmp_path: Path) -> None:
    paths = []
    for name, make in BOMBS.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(make())
    assert max(path.stat().st_size for path in paths) < 64 << 20
    outcomes = open_all(opener, paths, peak_mb=200)
    passed = {path.name for path, said in outcomes.items() if said == "ok"}
    assert passed <= HARMLESS


def test_a_normal_number_of_scans_is_fine(opener: Opener, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    # A film behind the picture, as phones make them, holds the marker by chance.
    path.write_bytes(scans(40) + b"\xff\xda\0\0" * 5000)
    assert open_all(opener, [path], peak_mb=200) == {path: "ok"}


# Files that broke others, collected from three projects.

ARCHIVE = (
    Path(
        os.environ.get("DIPTYCH_SHARED_DATA")
        or Path(__file__).resolve().parents[2] / "shared" / "data"
    )
    / "robust.tar"
)


@pytest.mark.skipif(not ARCHIVE.is_file(), reason=f"no {ARCHIVE}: set DIPTYCH_SHARED_DATA")
def test_the_shared_collection(opener: Opener, tmp_path: Path) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "robust"
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 765
    outcomes = open_all(opener, [folder / row["file"] for row in rows], peak_mb=250)
    ok = {str(path.relative_to(folder)) for path, said in outcomes.items() if said == "ok"}
    assert len(ok) > 450
    # What Pillow 13 could read in a format of ours is read here too.
    from diptych.images import FORMATS

    readable = {row["file"] for row in rows if row["pillow"] == "ok" and row["format"] in FORMATS}
    assert readable - ok == set()


def test_scans_of_a_jpeg_that_is_not_progressive() -> None:
    """Each decodes every block once more: 20 kB would be seconds, a megabyte minutes."""
    from diptych.errors import BadImage
    from diptych.images import open_image

    data = io.BytesIO()
    Image.new("RGB", (512, 512)).save(data, "JPEG")
    jpeg = data.getvalue()
    assert open_image(jpeg).size == (512, 512)
    start = jpeg.index(b"\xff\xda")
    again = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
    scans = limits_of(jpeg) + 1
    bomb = jpeg[:start] + again * scans + jpeg[start:]
    with pytest.raises(BadImage, match=r"JPEG of more than \d+ scans"):
        open_image(bomb)


def limits_of(jpeg: bytes) -> int:
    from diptych.images import ImageLimits

    with Image.open(io.BytesIO(jpeg)) as image:
        return max(4, ImageLimits().max_scan_pixels // (image.width * image.height))
