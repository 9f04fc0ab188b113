"""Open pictures of every kind, and turn them into the numbers a network reads.

Two steps, each with a reference: `open_image` gives the RGB picture of transformers' `load_image`
(`alpha="drop"`) or a kinder one; `to_pixels` gives the array of its `ViTImageProcessorPil`, bit for
bit. Whatever cannot be read raises `BadImage`, and nothing else.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re
import stat
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from diptych.errors import BadImage, BadInput, UnsupportedModel

__all__ = [
    "FORMATS",
    "Alpha",
    "ImageInput",
    "ImageLimits",
    "Preprocessing",
    "contact_sheet",
    "open_image",
    "overlay_heatmap",
    "preprocess",
    "to_pixels",
]

logger = logging.getLogger("diptych")

ImageInput: TypeAlias = (
    str | os.PathLike[str] | bytes | BinaryIO | Image.Image | NDArray[Any]  # one picture
)
Alpha: TypeAlias = Literal["white", "drop", "keep"]

# Decoders that run in this process, on memory we hold, and that people meet. Never EPS, WMF, PDF or
# the FITS, HDF5, GRIB and BUFR stubs: they start other programs, draw through the system or call
# plugins. TGA has no signature and stands last, so that it sees only what nobody else recognised.
FORMATS = (
    *("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "AVIF"),
    *("ICO", "JPEG2000", "QOI", "TGA"),
)


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Say how much of a picture may be taken in; checked before anything is decoded.

    `max_side` bounds the filter tables of a resize; `max_slow_pixels` holds for decoders written in
    Python (QOI, plain PPM, run-length BMP: about a second per million); `max_scan_pixels` is pixels
    times scans of a progressive JPEG, which may ask for thousands; `timeout_s` is for URLs.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 64_000_000
    max_side: int = 65_535
    max_slow_pixels: int = 2_500_000
    max_scan_pixels: int = 1_000_000_000
    timeout_s: float = 10.0
    formats: tuple[str, ...] = FORMATS

    def __post_init__(self) -> None:
        for field in fields(self)[:6]:
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise BadInput(f"ImageLimits.{field.name} must be above 0, not {value!r}")
        if unknown := set(self.formats) - set(FORMATS):
            raise BadInput(f"ImageLimits.formats: {sorted(unknown)} not among {list(FORMATS)}")


_DEFAULT_LIMITS = ImageLimits()


def open_image(
    source: ImageInput,
    *,
    alpha: Alpha = "white",
    limits: ImageLimits = _DEFAULT_LIMITS,
    allow_urls: bool = False,
) -> Image.Image:
    """Open one picture, upright and in mode RGB (with `alpha="keep"` also RGBA or I;16).

    `source` is a path, encoded bytes, a binary file, a `data:` or http(s) URL, a PIL image, or an
    array: H W, H W C or C H W with 1, 3 or 4 channels; uint8, uint16, bool, or floats in 0..1.
    `alpha="white"` lays transparent pictures on white; `"drop"` forgets the transparency as
    transformers does, and is bit-identical to it in all 8-bit modes. Deeper greys are scaled to
    0..255 either way, where Pillow would clip them. `"keep"` keeps every pixel as it is:
    transparent ones in RGBA, 16-bit greys in I;16. Files show their first frame.
    Raises `BadImage` for whatever cannot be read, `BadInput` for an unknown `alpha`.
    """
    if alpha not in ("white", "drop", "keep"):
        raise BadInput(f"alpha must be 'white', 'drop' or 'keep', not {alpha!r}")
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "") or "<image>")
        with _translated(name):
            _check_size(source.size, name, limits)
            return _to_rgb(source, alpha)
    if isinstance(source, np.ndarray):
        with _translated("<array>"):
            return _to_rgb(_from_array(source, limits), alpha)
    name, data = _read(source, limits, allow_urls)
    if not data:
        raise BadImage(name, "is empty")
    # Pillow decodes an icon while opening it.
    for size in _icon_sizes(data):
        _check_size(size, name, limits)
    stream = _CountedReads(data)
    with _translated(name, data), Image.open(stream, formats=limits.formats) as image:
        stream.reads_left = _check_header(image, data, name, limits)
        return _to_rgb(image, alpha)


# --- reading -------------------------------------------------------------------------------------


def _read(source: object, limits: ImageLimits, allow_urls: bool) -> tuple[str, bytes]:
    """Return a name for messages and the encoded bytes."""
    if isinstance(source, bytes | bytearray | memoryview):
        return "<bytes>", _within(bytes(source), "<bytes>", limits)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return "<data URL>", _within(_from_data_url(source, limits), "<data URL>", limits)
    if isinstance(source, str) and (scheme := _SCHEME.match(source)):
        return _from_url(source, scheme[1].lower(), limits, allow_urls)
    if isinstance(source, str | os.PathLike):
        name = os.fsdecode(source)
        name = name if len(name) <= 200 else name[:199] + "…"
        return name, _from_path(source, name, limits)
    if hasattr(source, "read"):
        return _from_stream(source, limits)
    raise BadImage(
        f"<{type(source).__name__}>",
        "is not a picture: give a path, bytes, a file opened in binary mode, a PIL image, "
        "a numpy array or a data URL",
    )


_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def _within(data: bytes, name: str, limits: ImageLimits) -> bytes:
    if len(data) > limits.max_bytes:
        raise BadImage(name, f"is larger than {limits.max_bytes:,} bytes")
    return data


def _from_path(path: str | os.PathLike[str], name: str, limits: ImageLimits) -> bytes:
    try:
        file_path = Path(os.fsdecode(path))
        found = file_path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise BadImage(name, "is a folder")
        # Opening a pipe or a device may wait for ever.
        if not stat.S_ISREG(found.st_mode):
            raise BadImage(name, "is not a regular file")
        if found.st_size > limits.max_bytes:
            raise BadImage(name, f"is larger than {limits.max_bytes:,} bytes")
        with file_path.open("rb") as file:
            return _within(file.read(limits.max_bytes + 1), name, limits)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadImage(name, "no such file") from error
    except PermissionError as error:
        raise BadImage(name, "may not be read (permission denied)") from error
    except OSError as error:
        raise BadImage(name, f"cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        if isinstance(error, BadImage):
            raise
        raise BadImage(name, f"is not a usable file name ({error})") from error


def _from_stream(stream: Any, limits: ImageLimits) -> tuple[str, bytes]:
    """Read a file object: from its start where it can be rewound, as Pillow does."""
    label = getattr(stream, "name", None)
    name = label if isinstance(label, str) else "<file>"
    data = bytearray()
    try:
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):
            stream.seek(0)
        # Raw streams and sockets hand out less than was asked for.
        while chunk := stream.read(limits.max_bytes + 1 - len(data)):
            if isinstance(chunk, str):
                raise BadImage(name, "is opened as text; open it in binary mode ('rb')")
            data += chunk
            _within(data, name, limits)  # type: ignore[arg-type]
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(name, f"cannot be read ({_one_line(error)})") from error
    return name, bytes(data)


def _from_data_url(url: str, limits: ImageLimits) -> bytes:
    """Decode `data:[type][;base64],payload`; the type is ignored, the bytes tell."""
    import base64
    from urllib.parse import unquote_to_bytes

    header, comma, payload = url.partition(",")
    if not comma:
        raise BadImage("<data URL>", "has no comma between its header and its data")
    # Percent-encoding is the longest form: three characters a byte.
    if len(payload) > 3 * limits.max_bytes + 3:
        raise BadImage("<data URL>", f"is larger than {limits.max_bytes:,} bytes")
    data = unquote_to_bytes(payload)
    if not header.lower().rstrip().endswith(";base64"):
        return data
    data = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError as error:
        raise BadImage("<data URL>", f"is not valid base64 ({error})") from error


def _from_url(url: str, scheme: str, limits: ImageLimits, allow_urls: bool) -> tuple[str, bytes]:
    # Imported late: http and ssl cost 50 ms that local pictures need not pay.
    from diptych import remote_images

    name = remote_images.shown_url(url)
    if scheme not in ("http", "https"):
        raise BadImage(name, f"{scheme}: addresses are not read; give a path, or an http(s) URL")
    if not allow_urls:
        raise BadImage(name, "URLs are not fetched unless allowed: allow_urls=True / --allow-urls")
    fetched = remote_images.fetch(url, max_bytes=limits.max_bytes, timeout_s=limits.timeout_s)
    return name, fetched


# --- checks before decoding, and errors ----------------------------------------------------------


_MOST_READS = 100_000


class _CountedReads(io.BytesIO):
    """Bound the loops of Pillow's parsers: millions of empty chunks would take a minute."""

    reads_left = _MOST_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise OSError("it consists of too many small parts")
        return super().read(size)


def _check_header(image: Image.Image, data: bytes, name: str, limits: ImageLimits) -> int:
    """Refuse what would cost too much memory or time; return how many reads decoding may take."""
    _check_size(image.size, name, limits)
    width, height = image.size
    for hidden in _hidden_sizes(image, data):
        _check_size(hidden, name, limits)
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
    if image.info.get("progressive") and _more_scans_than(most_scans, data):
        raise BadImage(name, f"is a progressive JPEG of more than {most_scans} scans")
    return 3 * _MOST_READS + (4 * width * height if in_python else 0)


def _check_size(size: tuple[int, int], name: str, limits: ImageLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise BadImage(name, "has no pixels")
    if width * height > limits.max_pixels or max(size) > limits.max_side:
        raise BadImage(
            name,
            f"has {width} x {height} pixels; the limit is {limits.max_pixels:,}, "
            f"{limits.max_side:,} a side",
        )


def _icon_sizes(data: bytes) -> Iterator[tuple[int, int]]:
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
def _translated(name: str, data: bytes = b"") -> Iterator[None]:
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
        raise BadImage(name, f"is damaged or incomplete ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
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


# --- modes ---------------------------------------------------------------------------------------

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _to_rgb(image: Image.Image, alpha: Alpha) -> Image.Image:
    """Decode, turn upright and convert; gives a new image that carries pixels and nothing else."""
    image.load()
    rgb = (_kept if alpha == "keep" else _converted)(_turned(image), alpha)
    # A copy lets go of the file's bytes and of the decoder, and leaves the caller's image alone.
    rgb = rgb.copy() if rgb is image else rgb
    rgb.info = {}
    return rgb


def _kept(image: Image.Image, alpha: Alpha) -> Image.Image:
    values = np.asarray(image) if image.mode == "I" or image.mode.startswith("I;16") else None
    if values is not None and (values.dtype.itemsize == 2 or image.format in ("PNG", "PPM")):
        return Image.fromarray(values.astype(np.uint16))
    if not _has_alpha(image):
        return _converted(image, "drop")
    return image if image.mode == "RGBA" else _straight(image).convert("RGBA")


def _converted(image: Image.Image, alpha: Alpha) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_grey(image, alpha).convert("RGB")
    if alpha == "white" and _has_alpha(image):
        return _on_white(image)
    if image.mode == "RGB":
        return image
    try:
        return image.convert("RGB")
    except ValueError:
        return _straight(image).convert("RGB")


def _turned(image: Image.Image) -> Image.Image:
    # ImageOps.exif_transpose also rewrites the EXIF block; a broken one must not cost a picture.
    try:
        method = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        method = None
    return image if method is None else image.transpose(method)


def _has_alpha(image: Image.Image) -> bool:
    key = image.info.get("transparency")
    if image.mode == "P":
        in_palette = image.palette is not None and image.palette.mode.endswith("A")
        return in_palette or isinstance(key, bytes | int)
    if image.mode in ("1", "L", "RGB"):
        return isinstance(key, tuple if image.mode == "RGB" else int)
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa")


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image if image.mode == "RGBA" else _straight(image).convert("RGBA")
    canvas = Image.new("RGB", rgba.size, "white")
    canvas.paste(rgba, (0, 0), rgba)
    return canvas


def _straight(image: Image.Image) -> Image.Image:
    """Undo premultiplied alpha, from which Pillow has few conversions."""
    return image.convert(image.mode.upper()) if image.mode in ("La", "RGBa") else image


def _deep_grey(image: Image.Image, alpha: Alpha) -> Image.Image:
    """Bring 16-bit, 32-bit and float greys to 8 bits; Pillow would clip them to white."""
    values = np.asarray(image)
    # In these formats mode I always means 16 bits, however dark the picture is.
    sixteen_bits = values.dtype.itemsize == 2 or image.format in ("PNG", "PPM")
    grey = _grey8(values, sixteen_bits and values.dtype.kind in "iu")
    key = image.info.get("transparency")
    if alpha == "white" and isinstance(key, int):
        grey[values == key] = 255
    return Image.fromarray(grey)


def _grey8(values: NDArray[Any], sixteen_bits: bool) -> NDArray[np.uint8]:
    """Scale numbers of any depth to 0..255; clip what lies outside, make NaN black."""
    low, high, _ = _value_range(values)
    offset, factor = 0.0, 1.0
    if values.dtype.kind == "f" and high <= 1:
        factor = 255.0
    elif sixteen_bits or (high > 255 and low >= 0 and high <= 65535):
        factor = 1 / 257
    elif high > 255:
        offset = min(low, 0.0)
        factor = 255 / (high - offset)

    white = offset + 255 / factor

    def scaled(rows: NDArray[Any]) -> NDArray[Any]:
        finite = np.nan_to_num(rows.astype(np.float64), nan=offset, posinf=white, neginf=offset)
        wide = (finite - offset) * factor
        # Pillow truncates floats that need no scaling.
        return np.clip(np.trunc(wide) if factor == 1 else np.rint(wide), 0, 255)

    return _by_rows(values, scaled)


def _row_blocks(values: NDArray[Any]) -> Iterator[slice]:
    """Yield slices of rows of about a million numbers, so that float copies stay small."""
    step = max(1, 2**20 * len(values) // max(1, values.size))
    return (slice(top, top + step) for top in range(0, len(values), step))


def _by_rows(
    values: NDArray[Any], convert: Callable[[NDArray[Any]], NDArray[Any]]
) -> NDArray[np.uint8]:
    result = np.empty(values.shape, np.uint8)
    for rows in _row_blocks(values):
        result[rows] = convert(values[rows])
    return result


def _value_range(values: NDArray[Any]) -> tuple[float, float, bool]:
    """Return the least and the greatest finite value, and whether all are finite."""
    low, high, all_finite = math.inf, -math.inf, True
    for rows in _row_blocks(values):
        block = values[rows]
        if values.dtype.kind == "f":
            finite = np.isfinite(block)
            all_finite = all_finite and bool(finite.all())
            block = block[finite]
        if block.size:
            low, high = min(low, float(block.min())), max(high, float(block.max()))
    return (low, high, all_finite) if low <= high else (0.0, 0.0, all_finite)


def _from_array(array: NDArray[Any], limits: ImageLimits) -> Image.Image:
    """Wrap H W, H W C or C H W in an 8-bit image of mode L, RGB or RGBA."""
    values = np.asarray(array)
    shape = " x ".join(map(str, values.shape))
    if values.ndim == 3 and values.shape[2] not in (1, 3, 4) and values.shape[0] in (1, 3, 4):
        values = np.moveaxis(values, 0, 2)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim != 2 and not (values.ndim == 3 and values.shape[2] in (3, 4)):
        raise BadImage(
            "<array>", f"has shape {shape or '()'}; give one picture as H x W, H x W x 1, 3 or 4"
        )
    _check_size((values.shape[1], values.shape[0]), "<array>", limits)
    return Image.fromarray(np.ascontiguousarray(_array_to_8_bits(values)))


def _array_to_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    kind = (values.dtype.kind, values.dtype.itemsize)
    if kind == ("u", 1):
        return values
    if kind == ("u", 2):
        return _grey8(values, sixteen_bits=True)
    if kind[0] == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if kind[0] != "f":
        raise BadImage(
            "<array>", f"has dtype {values.dtype}; give uint8, uint16, bool, or floats in 0..1"
        )
    low, high, all_finite = _value_range(values)
    # Resampling may leave the range by a rounding error.
    if not all_finite or low < -1e-5 or high > 1 + 1e-5:
        found = f"{low:g}..{high:g}" if all_finite else "NaN or infinity"
        raise BadImage("<array>", f"has floats in {found}; floats must lie in 0..1")
    return _by_rows(values, lambda rows: np.clip(np.rint(rows.astype(np.float64) * 255), 0, 255))


# --- numbers for the network ---------------------------------------------------------------------

_MAX_SIZE = 4096
_MAX_RESIZED_PIXELS = 64_000_000

# What a missing key of the file means, by kind of processor (transformers 5.23).
_VIT = {"size": 224, "resample": int(Image.Resampling.BILINEAR)}
_DEIT = {
    "size": 256,
    "resample": int(Image.Resampling.BICUBIC),
    "do_center_crop": True,
    "crop_size": 224,
}
_COMMON = {
    "do_center_crop": False,
    "crop_size": None,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "image_mean": 0.5,
    "image_std": 0.5,
    "default_to_square": True,
}
_PROCESSORS = {
    "ViTImageProcessor": _VIT,
    "ViTFeatureExtractor": _VIT,
    "DeiTImageProcessor": _DEIT,
    "DeiTFeatureExtractor": _DEIT,
}
# Written by other processors; ignoring one of them would change the pixels in silence.
_CHANGES_PIXELS = frozenset({"crop_pct", "offset", "max_size", "keep_aspect_ratio", "size_divisor"})
_CHANGES_NOTHING = frozenset({"do_convert_rgb", "do_reduce_labels"})


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Say how an RGB picture becomes `pixel_values`; what `preprocessor_config.json` says.

    Resize to `height` x `width`, or to `shortest_edge` keeping the shape; then crop the centre
    (height, width), padding with black; then `(pixel * rescale_factor - mean) / std`.
    """

    height: int = 224
    width: int = 224
    resample: int = int(Image.Resampling.BILINEAR)
    rescale_factor: float = 1 / 255
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    do_resize: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    crop: tuple[int, int] | None = None
    shortest_edge: int | None = None

    def __post_init__(self) -> None:
        for key in ("height", "width"):
            _whole("size", getattr(self, key), 1, _MAX_SIZE)
        for side in self.crop or ():
            _whole("crop_size", side, 1, _MAX_SIZE)
        if self.shortest_edge is not None:
            _whole("size", self.shortest_edge, 1, _MAX_SIZE)
        _whole("resample", self.resample, 0, 5)
        _real("rescale_factor", self.rescale_factor, 1e-9, 1e6)
        if len(self.mean) != 3 or len(self.std) != 3:
            raise UnsupportedModel("image_mean and image_std must have one value a channel: 3")
        for value in self.mean:
            _real("image_mean", value, 0, 1e6)
        for value in self.std:
            _real("image_std", value, 1e-6, 1e6)

    @property
    def output_size(self) -> tuple[int, int] | None:
        """Give height and width of `pixel_values`; None where they depend on the picture."""
        if self.crop is not None:
            return self.crop
        fixed = self.do_resize and self.shortest_edge is None
        return (self.height, self.width) if fixed else None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocessing:
        """Read the content of a ViT or DeiT `preprocessor_config.json` of any transformers version.

        Raises `UnsupportedModel` naming the key that asks for something else.
        """
        if not isinstance(config, Mapping):
            raise UnsupportedModel("preprocessor_config.json does not hold a JSON object")
        known = _defaults(config)
        given = {key: value for key, value in config.items() if value is not None}
        _refuse_other_work(given, known)
        values = {**known, **{key: given[key] for key in known if key in given}}
        for key in [key for key in values if key.startswith("do_") or key == "default_to_square"]:
            if not isinstance(values[key], bool):
                raise UnsupportedModel(f"{key} must be true or false, not {values[key]!r}")
        height, width, shortest_edge = _size(values["size"], values["default_to_square"])
        crop = _size(values["crop_size"], True, "crop_size") if values["do_center_crop"] else None
        return cls(
            height=height,
            width=width,
            resample=values["resample"],
            rescale_factor=values["rescale_factor"],
            mean=_channels("image_mean", values["image_mean"]),
            std=_channels("image_std", values["image_std"]),
            do_resize=values["do_resize"],
            do_rescale=values["do_rescale"],
            do_normalize=values["do_normalize"],
            crop=crop and crop[:2],
            shortest_edge=shortest_edge,
        )

    def to_config(self) -> dict[str, Any]:
        """Write the dict that `from_config` and transformers' `ViTImageProcessor` read."""
        size = {"height": self.height, "width": self.width}
        config: dict[str, Any] = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": self.do_resize,
            "size": size if self.shortest_edge is None else {"shortest_edge": self.shortest_edge},
            "resample": self.resample,
            "do_center_crop": self.crop is not None,
            "do_rescale": self.do_rescale,
            "rescale_factor": self.rescale_factor,
            "do_normalize": self.do_normalize,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.crop is not None:
            config["crop_size"] = {"height": self.crop[0], "width": self.crop[1]}
        return config


def _defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("image_processor_type", "feature_extractor_type"):
        kind = config.get(key)
        if kind is None:
            continue
        plain = kind.removesuffix("Fast").removesuffix("Pil") if isinstance(kind, str) else ""
        if plain not in _PROCESSORS:
            raise UnsupportedModel(f"{key} {kind!r} is not supported; ViT and DeiT are")
        return {**_COMMON, **_PROCESSORS[plain]}
    return {**_COMMON, **_VIT}


def _refuse_other_work(given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for key in given.keys() - known.keys() - _CHANGES_NOTHING:
        if given[key] and (key.startswith("do_") or key in _CHANGES_PIXELS):
            raise UnsupportedModel(f"{key}={given[key]!r} in the preprocessor is not supported")
        logger.debug("preprocessor_config.json: %s has no effect", key)


def _size(value: object, square: object, key: str = "size") -> tuple[int, int, int | None]:
    """Return height, width and shortest edge of an int, a (height, width) pair or a dict."""
    if isinstance(value, int):
        return value, value, None if square else value
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        return value[0], value[1], None
    if isinstance(value, Mapping):
        sides = {side: number for side, number in value.items() if number is not None}
        if sides.keys() == {"height", "width"}:
            return sides["height"], sides["width"], None
        if sides.keys() == {"shortest_edge"} and key == "size":
            edge = sides["shortest_edge"]
            return edge, edge, edge
    raise UnsupportedModel(f"{key}={value!r} in the preprocessor is not supported")


def _channels(key: str, value: object) -> tuple[float, float, float]:
    values = [value] * 3 if isinstance(value, int | float) else value
    if not isinstance(values, Sequence) or len(values) != 3:
        raise UnsupportedModel(f"{key}={value!r} in the preprocessor must be 3 numbers")
    return values[0], values[1], values[2]


def _whole(key: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UnsupportedModel(f"{key} must be a whole number in {least}..{most}, not {value!r}")


def _real(key: str, value: object, least: float, most: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= abs(cast("float", value)) <= most:
        raise UnsupportedModel(f"{key} must be a number of size {least:g}..{most:g}, not {value!r}")


def to_pixels(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Turn a picture into `pixel_values` without the batch axis: float32 [3, H, W].

    Bit-identical to transformers' `ViTImageProcessorPil` on the same RGB picture and config.
    """
    if image.mode != "RGB":
        image = open_image(image)
    if preprocessing.do_resize:
        image = image.resize(
            _resized(image, preprocessing), Image.Resampling(preprocessing.resample)
        )
    if preprocessing.crop is not None:
        image = _centre(image, preprocessing.crop)
    tables = _tables(preprocessing)
    pixels = np.asarray(image)
    result = np.empty((3, image.height, image.width), np.float32)
    for channel in range(3):
        result[channel] = tables[channel][pixels[:, :, channel]]
    return result


def preprocess(
    source: ImageInput,
    preprocessing: Preprocessing,
    *,
    alpha: Alpha = "white",
    limits: ImageLimits = _DEFAULT_LIMITS,
    allow_urls: bool = False,
) -> NDArray[np.float32]:
    """Open a picture and turn it into float32 [3, H, W]: `to_pixels(open_image(…), …)`."""
    image = open_image(source, alpha=alpha, limits=limits, allow_urls=allow_urls)
    return to_pixels(image, preprocessing)


def _resized(image: Image.Image, preprocessing: Preprocessing) -> tuple[int, int]:
    """Return width and height after the resize, rounded as transformers rounds."""
    edge = preprocessing.shortest_edge
    if edge is None:
        return preprocessing.width, preprocessing.height
    width, height = image.size
    long = int(edge * max(image.size) / min(image.size))
    if edge * long > _MAX_RESIZED_PIXELS:
        raise BadImage("<image>", f"is too long and thin: {width} x {height} pixels")
    return (edge, long) if width <= height else (long, edge)


def _centre(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Crop the centre, or pad with black on both sides where the picture is smaller."""
    starts = []
    for have, want in zip((image.width, image.height), (size[1], size[0]), strict=True):
        # transformers pads the odd pixel in front, and crops it there too.
        starts.append((have - want) // 2 if have >= want else -math.ceil((want - have) / 2))
    left, top = starts
    return image.crop((left, top, left + size[1], top + size[0]))


def _tables(preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Give the float of every byte and channel, [3, 256]: 256 steps instead of one a pixel.

    The order and widths of the operations are transformers': the product in float64, rounded to
    float32, then subtraction and division in float32.
    """
    values = np.arange(256, dtype=np.float64)
    if preprocessing.do_rescale:
        values = values * preprocessing.rescale_factor
    tables = np.repeat(values.astype(np.float32)[None], 3, axis=0)
    if preprocessing.do_normalize:
        mean = np.array(preprocessing.mean, np.float32)[:, None]
        std = np.array(preprocessing.std, np.float32)[:, None]
        tables = (tables - mean) / std
    return tables


# --- pictures of attention -----------------------------------------------------------------------

# Dark violet to pale yellow, lightness rising all the way, so that it also reads in grey.
_RAMP = ((12, 8, 60), (92, 18, 110), (168, 44, 96), (226, 92, 54), (250, 166, 40), (252, 252, 170))


def overlay_heatmap(image: Image.Image, heat: NDArray[Any], *, label: str = "") -> Image.Image:
    """Draw a map of non-negative weights [h, w] over a photo, with an optional label below.

    The map is stretched to its own least and greatest value and enlarged smoothly: bright is where
    it is strongest. Gives RGB of the photo's width, higher by the label's strip.
    """
    values = np.asarray(heat, dtype=np.float64)
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise BadInput(f"a heatmap must be finite numbers [h, w], not of shape {values.shape}")
    photo = image if image.mode == "RGB" else open_image(image)
    spread = float(np.ptp(values))
    scaled = (values - values.min()) / spread if spread > 0 else np.zeros_like(values)
    coarse = Image.fromarray((scaled * 255).astype(np.float32))
    level = coarse.resize(photo.size, Image.Resampling.BICUBIC).convert("L")
    stops = np.linspace(0, 255, len(_RAMP))
    ramp = [np.interp(np.arange(256), stops, channel) for channel in zip(*_RAMP, strict=True)]
    colour = level.copy()
    colour.putpalette(np.stack(ramp, axis=1).astype(np.uint8).tobytes())
    # A quarter even where the map is cold: the photo dims and the warm places stand out.
    mask = level.point([round(64 + 128 * (step / 255) ** 0.7) for step in range(256)])
    drawn = Image.composite(colour.convert("RGB"), photo, mask)
    return _labelled(drawn, label) if label else drawn


def _labelled(image: Image.Image, label: str) -> Image.Image:
    from PIL import ImageDraw, ImageFont

    text_height = min(48, max(10, image.width // 14))
    font = ImageFont.load_default(text_height)
    label = " ".join(label.split())[:200]
    dots = "…"
    if not isinstance(font, ImageFont.FreeTypeFont):
        # Pillow without FreeType has one bitmap font, which knows Latin-1 only.
        label, dots = label.encode("latin-1", "replace").decode("latin-1"), "."
    while len(label) > 1 and font.getlength(label) > image.width - 4:
        label = label[:-2].rstrip() + dots
    sheet = Image.new("RGB", (image.width, image.height + text_height * 3 // 2), "white")
    sheet.paste(image, (0, 0))
    left = max(0, (image.width - round(font.getlength(label))) // 2)
    ImageDraw.Draw(sheet).text((left, image.height + text_height // 8), label, "black", font)
    return sheet


def contact_sheet(
    panels: Sequence[Image.Image],
    columns: int,
    *,
    max_side: int = 640,
    labels: Sequence[str] = (),
) -> Image.Image:
    """Join pictures row by row on a white sheet; each is shrunk to at most `max_side` a side.

    `labels` are written below them, one for each.
    """
    if not panels or columns < 1 or max_side < 1:
        raise BadInput(f"a contact sheet needs panels and columns: {len(panels)}, {columns}")
    cells = []
    for index, panel in enumerate(panels):
        cell = _to_rgb(panel, "white")
        cell.thumbnail((max_side, max_side))
        cells.append(_labelled(cell, labels[index]) if index < len(labels) else cell)
    columns = min(columns, len(cells))
    gap = 4
    width = max(cell.width for cell in cells) + gap
    height = max(cell.height for cell in cells) + gap
    rows = math.ceil(len(cells) / columns)
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for index, cell in enumerate(cells):
        left = gap + index % columns * width + (width - gap - cell.width) // 2
        sheet.paste(cell, (left, gap + index // columns * height))
    return sheet
