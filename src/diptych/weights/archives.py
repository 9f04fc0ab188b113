"""Find the entries of a zip archive as torch writes it: stored, never compressed."""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

__all__ = ["Damaged", "Entry", "read_entries"]

_MAX_DIRECTORY = 32 << 20
_MAX_ENTRIES = 100_000
_LOCAL_HEADER = struct.Struct("<4s2xHH16xHH")  # magic, flags, method, length of name and extra
_ENCRYPTED = 1


class Damaged(Exception):
    """Say what is wrong with a file; whoever opened it knows its name and what to do."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Say where in a file a run of bytes lies."""

    offset: int
    size: int


def read_entries(file: BufferedReader) -> dict[str, Entry]:
    """Return where the bytes of every entry lie; `Damaged` where they overlap or leave the file."""
    try:
        with zipfile.ZipFile(_Sparing(file)) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise Damaged(f"its archive cannot be read ({error})") from error
    if len(infos) > _MAX_ENTRIES:
        raise Damaged(f"its archive has {len(infos)} entries, more than {_MAX_ENTRIES}")
    size = file.seek(0, 2)
    found: dict[str, Entry] = {}
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.filename in found or info.orig_filename != info.filename:
            raise Damaged(f"its archive has no clear entry {info.filename[:80]!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise Damaged(f"{info.filename[:80]!r} in its archive is compressed")
        entry = _entry(file, info)
        if info.header_offset < end or entry.offset + entry.size > size:
            raise Damaged(f"{info.filename[:80]!r} in its archive overlaps another")
        end = entry.offset + entry.size
        found[info.filename] = entry
    return found


def _entry(file: BufferedReader, info: zipfile.ZipInfo) -> Entry:
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size:
        raise Damaged("its archive is cut short")
    magic, flags, method, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    name = file.read(name_length)
    # The directory at the end and the header before the bytes must tell the same story.
    if magic != b"PK\x03\x04" or method != zipfile.ZIP_STORED or flags & _ENCRYPTED:
        raise Damaged(f"{info.filename[:80]!r} in its archive has no usable header")
    if name not in (info.filename.encode("utf-8"), info.filename.encode("cp437", "replace")):
        raise Damaged(f"{info.filename[:80]!r} in its archive has another name inside")
    return Entry(
        info.header_offset + _LOCAL_HEADER.size + name_length + extra_length, info.file_size
    )


class _Sparing(io.RawIOBase):
    """Give zipfile the file, but not more of it at once than a directory needs."""

    def __init__(self, file: BufferedReader) -> None:
        super().__init__()
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > _MAX_DIRECTORY:
            raise ValueError("its directory is too large")
        return self._file.read(_MAX_DIRECTORY if size is None or size < 0 else size)
