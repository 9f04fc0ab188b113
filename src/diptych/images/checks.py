"""Refuse what would cost too much before it is decoded, and say in a sentence what went wrong."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from typing import cast

from PIL import Image, UnidentifiedImageError

from diptych.errors import BadImage
from diptych.images.limits import ImageLimits

__all__ = ["CountedReads", "check_header", "check_size", "icon_sizes", "one_line", "translated"]

_MOST_READS = 100_000


class CountedReads(io.BytesIO):
    """Bound the loops of Pillow's parsers: millions of empty chunks would take a minute."""

    reads_left = _MOST_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise OSError("it consists of too many small parts")
        return super().read(size)


def check_header(image: Image.Image, data: bytes, name: str, limits: ImageLimits) -> int:
    """Refuse what would cost too much memory or time; return how many reads decoding may take."""
    check_size(image.size, name, limits)
    width, height = image.size
    for hidden in _hidden_sizes(image, data):
        check_size(hidden, name, limits)
    codecs = {str(tile[0]) for tile in getattr(image, "tile", ())}
    in_python = not codecs.isdisjoint(Image.DECODERS)
    # OpenJPEG holds some 30 bytes a pixel, so that a file of 1 kB could ask for 2 GB.
    ceiling = limits.max_pixels // 4 if image.format == "JPEG2000" else limits.max_pixels
    ceiling = limits.max_slow_pixels if in_python else ceiling
    if width * height > ceiling:
        raise BadImage(
            name,
            f"has {width} x {height} pixels; {image.format} in this encoding is read "
            f"up to {ceiling:,}",
        )
    # That decoder copies a megabyte for every comment.
    if "ppm_plain" in codecs and data.count(b"#") > 100:
        raise BadImage(name, "has too many comments")
    most_scans = limits.max_scan_pixels // (width * height)
    if not image.info.get("progressive"):
        most_scans = max(most_scans, _SCANS_OF_ONE_PASS)
    if image.format in ("JPEG", "MPO") and _more_scans_than(most_scans, data):
        raise BadImage(name, f"is a JPEG of more than {most_scans} scans")
    return 3 * _MOST_READS + (4 * width * height if in_python else 0)


def check_size(size: tuple[int, int], name: str, limits: ImageLimits) -> None:
    """Raise `BadImage` for a picture of no pixels, or of more than the limits allow."""
    width, height = size
    if width < 1 or height < 1:
        raise BadImage(name, "has no pixels")
    if width * height > limits.max_pixels or max(size) > limits.max_side:
        raise BadImage(
            name,
            f"has {width} x {height} pixels; the limit is {limits.max_pixels:,}, "
            f"{limits.max_side:,} a side",
        )


def icon_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the sizes of the pictures inside an ICO, whose directory cannot say more than 256."""
    count = int.from_bytes(data[4:6], "little") if data[:4] == b"\0\0\1\0" else 0
    for entry in range(6, min(6 + 16 * count, len(data) - 15), 16):
        start = int.from_bytes(data[entry + 12 : entry + 16], "little")
        head = data[start : start + 24].ljust(24, b"\0")
        if head.startswith(b"\x89PNG"):
            yield cast("tuple[int, int]", struct.unpack_from(">II", head, 16))
        else:
            width, height = struct.unpack_from("<ii", head, 4)
            # Twice the height: colours, then a mask.
            yield max(1, abs(width)), max(1, abs(height) // 2)


def _hidden_sizes(image: Image.Image, data: bytes) -> Iterator[tuple[int, int]]:
    """Yield what a decoder will really allocate where that is not the picture's size."""
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        if isinstance(width := tags.get(322), int) and isinstance(height := tags.get(323), int):
            yield max(1, width), max(1, height)
    elif image.format == "JPEG2000" and (start := data.find(b"\xff\x4f\xff\x51")) >= 0:
        width, height, left, top = struct.unpack_from(">IIII", data, start + 8)
        yield max(1, width - left), max(1, height - top)


_SCANS_OF_ONE_PASS = 4  # one for each channel, at most
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")


def _more_scans_than(most: int, data: bytes) -> bool:
    """Tell whether a JPEG has more scans than that; each decodes every pixel once more."""
    if data.count(b"\xff\xda") <= most:
        return False
    position = scans = 0
    for _ in range(_MOST_READS):
        marker = _JPEG_MARKER.search(data, position)
        # What follows the end (a film, a second picture) does not count.
        if marker is None or marker[1] == b"\xd9":
            return False
        scans += marker[1] == b"\xda"
        if scans > most:
            return True
        position = marker.end() + max(
            2, int.from_bytes(data[marker.end() : marker.end() + 2], "big")
        )
    return True


@contextlib.contextmanager
def translated(name: str, data: bytes = b"") -> Iterator[None]:
    """Turn whatever Pillow throws into `BadImage`, and keep its warnings quiet.

    Its decoders throw OSError, ValueError, SyntaxError, KeyError, struct.error and a dozen others.
    """
    try:
        with _quiet_pillow():
            yield
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(name, _unknown_kind(data)) from error
    except Image.DecompressionBombError as error:
        raise BadImage(name, "has far more pixels than the limit") from error
    except MemoryError as error:
        raise BadImage(name, "needs more memory than there is") from error
    except Exception as error:
        raise BadImage(name, f"is damaged or incomplete ({one_line(error)})") from error


def one_line(error: Exception) -> str:
    """Return what an error says, for the inside of a sentence."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def _unknown_kind(data: bytes) -> str:
    for start, signature, reason in _SIGNATURES:
        if data[start : start + 256].lstrip().lower().startswith(signature):
            return reason
    return "is not a picture that can be read (JPEG, PNG, WebP, AVIF, GIF, TIFF, BMP, …)"


_OTHER = "which is not read; convert it to JPEG or PNG"
_SIGNATURES = (
    (0, b"\x89png", "is a damaged PNG"),
    (0, b"\xff\xd8\xff", "is a damaged JPEG"),
    (0, b"gif8", "is a damaged GIF"),
    (8, b"webp", "is a damaged WebP"),
    (0, b"ii*\0", "is a damaged TIFF"),
    (0, b"mm\0*", "is a damaged TIFF"),
    (4, b"ftypavi", "is a damaged AVIF"),
    (4, b"ftyphei", f"is a HEIC photo, {_OTHER}"),
    (4, b"ftyphev", f"is a HEIC photo, {_OTHER}"),
    (4, b"ftypmif1", f"is a HEIC photo, {_OTHER}"),
    (4, b"ftyp", f"is a film, {_OTHER}"),
    (0, b"%pdf", f"is a PDF, {_OTHER}"),
    (0, b"%!ps", f"is a PostScript drawing, {_OTHER}"),
    (0, b"\xc5\xd0\xd3\xc6", f"is a PostScript drawing, {_OTHER}"),
    (0, b"8bps", f"is a Photoshop file, {_OTHER}"),
    (0, b"<svg", f"is an SVG drawing, {_OTHER}"),
    (0, b"<?xml", "is an XML file, not a picture that can be read"),
    (0, b"<!doctype html", "is a web page, not a picture"),
    (0, b"<html", "is a web page, not a picture"),
)

_quiet_lock = threading.Lock()
_quiet_users = 0
_QUIET_MODULES = r"PIL\.(?#diptych)"


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Ignore Pillow's warnings meanwhile, also where the program made warnings errors.

    `warnings.catch_warnings` swaps the whole filter list and is not safe between threads. One entry
    of our own, put in by the first thread and taken out by the last, disturbs no other.
    """
    global _quiet_users
    with _quiet_lock:
        _quiet_users += 1
        if _quiet_users == 1:
            warnings.filterwarnings("ignore", module=_QUIET_MODULES)
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_users -= 1
            if _quiet_users == 0:
                entry = ("ignore", None, Warning, re.compile(_QUIET_MODULES), 0)
                with contextlib.suppress(ValueError):
                    cast("list[object]", warnings.filters).remove(entry)
