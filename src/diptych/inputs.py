"""Find pictures: files, folders, globs, addresses and standard input in one list."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diptych.errors import BadInput

__all__ = [
    "PICTURE_SUFFIXES",
    "Picture",
    "at_home",
    "find_pictures",
    "is_file",
    "is_folder",
    "is_there",
]

# What a folder is searched for; a file that is named is read whatever it is called.
PICTURE_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("avif", "bmp", "gif", "ico", "jfif", "jp2", "jpe", "jpeg", "jpg", "pgm", "png"),
        *("pnm", "ppm", "qoi", "tga", "tif", "tiff", "webp"),
    )
)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")


@dataclass(frozen=True, slots=True)
class Picture:
    """Hold what to read, and what to call it."""

    name: str
    source: str | Path | bytes


def at_home(path: str | os.PathLike[str]) -> Path:
    """Return `path` with `~` as the home; a name that only begins so is left as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (`Path` fails for an unknown user)


# os.path's, for which a name that is too long, or may not be looked at, is merely not there; `Path`
# raises for it.
is_there, is_file, is_folder = os.path.exists, os.path.isfile, os.path.isdir


def find_pictures(paths: Sequence[str]) -> list[Picture]:
    """Return the pictures that `paths` name, folders with all below them, sorted by name.

    A missing file stays in the list: reading it tells what is wrong with it, and the others go on.
    Raises `BadInput` for a folder or pattern without pictures, if it is all there is.
    """
    if not paths:
        raise BadInput("no pictures given: name files, folders or globs, or - for standard input")
    found: dict[str, Picture] = {}
    for path in dict.fromkeys(paths):
        try:
            for picture in _expand(path):
                # The same file twice (`*.jpg photo.jpg`) is captioned once.
                found.setdefault(picture.name, picture)
        except BadInput:
            if len(paths) == 1:
                raise
            found[path] = Picture(path, Path(path))
    return list(found.values())


def _expand(path: str) -> Iterator[Picture]:
    if not path:
        raise BadInput("an empty name is no picture: is a variable of the shell empty?")
    if path == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise BadInput("- reads a picture from standard input: pipe one in")
        yield Picture("<stdin>", sys.stdin.buffer.read())
    elif _ADDRESS.match(path):
        yield Picture(path if len(path) < 200 else path[:60] + "…", path)
    elif is_folder(path):
        yield from _in_folder(Path(path))
    elif not is_there(path) and glob.has_magic(path):
        matches = sorted(glob.glob(path, recursive=True))  # noqa: PTH207 (also absolute patterns)
        if not matches:
            raise BadInput(f"{path}: no file matches this pattern")
        # Links can lead `**` in circles: every file is taken once.
        once = {Path(match).resolve(): match for match in reversed(matches)}
        for match in sorted(once.values()):
            if Path(match).is_dir() and "**" not in path:
                yield from _in_folder(Path(match))
            elif not Path(match).is_dir():
                yield Picture(match, Path(match))
    else:
        yield Picture(path, Path(path))


def _in_folder(folder: Path) -> Iterator[Picture]:
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in PICTURE_SUFFIXES and file.is_file()
    )
    if not files:
        raise BadInput(f"{folder}: no pictures in this folder or below it")
    yield from (Picture(str(file), file) for file in files)
