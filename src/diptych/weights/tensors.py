"""Know where each tensor of a file lies, without reading it; the safetensors format."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any

from diptych.errors import WeightsMismatch
from diptych.weights.bounded_json import Rejected, parse_object

__all__ = [
    "FETCH_ANEW",
    "ITEM_SIZES",
    "SAFETENSORS_NAMES",
    "StoredTensor",
    "read_into",
    "read_number",
    "read_safetensors",
]

FETCH_ANEW = "fetch or save the model anew"

# Bytes of one number.
ITEM_SIZES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}
SAFETENSORS_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}

# What the hub itself accepts; the format allows 100 MB, which takes gigabytes to parse.
_MAX_HEADER = 25_000_000
_MAX_DIMENSIONS = 16


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Say where in a file a tensor lies. `strides` count numbers; None is row by row."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of its first number, in bytes
    strides: tuple[int, ...] | None = None

    @property
    def span(self) -> int:
        """Count the numbers from its first to its last, those of others between them too."""
        if 0 in self.shape:
            return 0
        if self.strides is None:
            return math.prod(self.shape)
        steps = zip(self.shape, self.strides, strict=True)
        return 1 + sum((length - 1) * stride for length, stride in steps)

    @property
    def span_bytes(self) -> int:
        return self.span * ITEM_SIZES[self.dtype]

    def piece(self, index: int, count: int) -> StoredTensor:
        """Return the `index`th of `count` equal pieces along the rows, which must divide so."""
        rows = self.shape[0] // count
        step = math.prod(self.shape[1:]) if self.strides is None else self.strides[0]
        start = self.offset + index * rows * step * ITEM_SIZES[self.dtype]
        return replace(self, shape=(rows, *self.shape[1:]), offset=start)

    def squeezed(self) -> StoredTensor:
        """Return a matrix for the 1x1 convolution that it is stored as."""
        axes = range(2, len(self.shape))
        if len(self.shape) < 3 or any(self.shape[axis] != 1 for axis in axes):
            return self
        strides = None if self.strides is None else self.strides[:2]
        return replace(self, shape=self.shape[:2], strides=strides)


def read_into(buffer: memoryview, stored: StoredTensor, file: BufferedReader) -> None:
    """Fill `buffer`, of `stored.span_bytes` bytes, from the open `file`."""
    file.seek(stored.offset)
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            raise WeightsMismatch(f"{stored.file} has become shorter while it was read.")
        done += count


def read_number(stored: StoredTensor) -> float | None:
    """Return the one number that a tensor holds; None where it is not one, or of a rare type."""
    layouts = {"int32": "<i", "int64": "<q", "float32": "<f", "float64": "<d"}
    if math.prod(stored.shape) != 1 or stored.dtype not in layouts:
        return None
    data = bytearray(ITEM_SIZES[stored.dtype])
    with stored.file.open("rb") as file:
        read_into(memoryview(data), stored, file)
    number: float = struct.unpack(layouts[stored.dtype], data)[0]
    return number


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name.

    Every number lies in exactly one tensor, as the format demands: no holes, no overlap, no rest.
    Raises `WeightsMismatch` naming the file and what is wrong with it.
    """
    try:
        with path.open("rb") as file:
            file_size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER:
                raise Rejected(f"its header claims {length} bytes, more than {_MAX_HEADER}")
            header = file.read(length)
        if len(header) < length:
            raise Rejected(f"its header claims {length} bytes, but the file has {file_size}")
        start = 8 + length
        found = {
            name: _entry(name, entry, path, start)
            for name, entry in parse_object(header).items()
            if name != "__metadata__"
        }
        _check_cover(found, start, file_size)
    except Rejected as error:
        raise WeightsMismatch(f"{path} is damaged: {error}: {FETCH_ANEW}.") from error
    except OSError as error:
        raise WeightsMismatch(f"{path} cannot be read: {error.strerror or error}.") from error
    return found


def _entry(name: str, entry: Any, path: Path, start: int) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Rejected(f"its entry for {name[:80]!r} is malformed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_NAMES:
        raise Rejected(f"{name[:80]} is of type {str(dtype)[:20]}, which diptych does not read")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise Rejected(f"{name[:80]} has no usable shape")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise Rejected(f"{name[:80]} has no usable offsets")
    begin, end = offsets
    size = math.prod(shape) * ITEM_SIZES[SAFETENSORS_NAMES[dtype]]
    if end - begin != size:
        raise Rejected(f"{name[:80]} needs {size} bytes and has {end - begin}")
    return StoredTensor(path, SAFETENSORS_NAMES[dtype], tuple(shape), start + begin)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(found: dict[str, StoredTensor], start: int, file_size: int) -> None:
    position = start
    for name, stored in _by_position(found.items()):
        if stored.offset != position:
            what = "overlaps the one before it" if stored.offset < position else "leaves a hole"
            raise Rejected(f"{name[:80]} {what}")
        position += stored.span_bytes
    if position != file_size:
        what = "is cut short" if position > file_size else "goes on after its last tensor"
        raise Rejected(f"it {what}: {position} bytes expected, {file_size} found")


def _by_position(items: Iterable[tuple[str, StoredTensor]]) -> list[tuple[str, StoredTensor]]:
    # Empty tensors take no room: at a shared offset they come first.
    return sorted(items, key=lambda item: (item[1].offset, item[1].span_bytes))
