"""Talk to the terminal: progress and complaints on stderr, exit codes, names of files."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

from diptych.errors import BadInput

__all__ = [
    "FAILED",
    "INTERRUPTED",
    "SOME_FAILED",
    "USAGE",
    "Format",
    "Notes",
    "begin_notes",
    "check_writable",
    "complain",
    "note",
    "progress",
    "real_path",
]

_LONGEST_NAME = 255  # bytes, of most file systems
FAILED, USAGE, SOME_FAILED, INTERRUPTED = 1, 2, 3, 130


class Format(StrEnum):
    """Name the ways to print results."""

    text = "text"
    json = "json"
    jsonl = "jsonl"


class progress:
    """Show a bar on stderr for more than a few things, if somebody is there to see it."""

    def __init__(self, title: str, total: int, hide: bool = False) -> None:
        self.title, self.total = title, total
        # Without a terminal, or with a closed one, there is no stderr to look at.
        self.shown = total > 3 and not hide and sys.stderr is not None and sys.stderr.isatty()

    def __enter__(self) -> Callable[[], None]:
        if not self.shown:
            return lambda: None
        from rich.console import Console
        from rich.progress import Progress

        self.bar = Progress(console=Console(stderr=True), transient=True)
        self.bar.start()
        task = self.bar.add_task(self.title, total=self.total)
        return lambda: self.bar.advance(task)

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self.bar.stop()


def complain(message: str) -> None:
    """Write one line to stderr."""
    print(f"diptych: {message}", file=sys.stderr, flush=True)


_noted: set[str] = set()


def note(message: str) -> None:
    """Write one line to stderr, the same one only once for a command."""
    if message not in _noted:
        _noted.add(message)
        complain(message)


def begin_notes() -> None:
    """Begin a command, of which nothing was noted yet."""
    _noted.clear()


class Notes(logging.Handler):
    """Write what the package logs as notes of a command."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            note(record.getMessage())


def real_path(path: object) -> str:
    """Return where a name leads to in the end: two names of one file are the same then."""
    return os.path.realpath(str(path))


def check_writable(path: Path, suffixes: tuple[str, ...] = ()) -> None:
    """Raise `BadInput` before the work is done, not after it, for a file that cannot be written."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise BadInput(f"{path}: give a name that ends in {' or '.join(suffixes)}")
    from diptych.inputs import is_folder

    is_taken = is_folder(path) or not is_folder(path.absolute().parent)
    if is_taken or len(os.fsencode(path.name)) > _LONGEST_NAME:
        raise BadInput(f"{path}: cannot be written; is it in a folder that exists?")
