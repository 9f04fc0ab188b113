"""Open pictures of every kind: as transformers' `load_image` does (`alpha="drop"`), or kinder."""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diptych.errors import BadImage, BadInput
from diptych.images.checks import (
    CountedReads,
    check_header,
    check_size,
    icon_sizes,
    one_line,
    translated,
)
from diptych.images.limits import DEFAULT_LIMITS, Alpha, ImageInput, ImageLimits
from diptych.images.modes import from_array, to_rgb

__all__ = ["open_image"]


def open_image(
    source: ImageInput,
    *,
    alpha: Alpha = "white",
    limits: ImageLimits = DEFAULT_LIMITS,
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
        with translated(name):
            check_size(source.size, name, limits)
            return to_rgb(source, alpha)
    if isinstance(source, np.ndarray):
        with translated("<array>"):
            return to_rgb(from_array(source, limits), alpha)
    name, data = _read(source, limits, allow_urls)
    if not data:
        raise BadImage(name, "is empty")
    # Pillow decodes an icon while opening it.
    for size in icon_sizes(data):
        check_size(size, name, limits)
    stream = CountedReads(data)
    with translated(name, data), Image.open(stream, formats=limits.formats) as image:
        stream.reads_left = check_header(image, data, name, limits)
        return to_rgb(image, alpha)


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
        raise BadImage(name, f"cannot be read ({one_line(error)})") from error
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
