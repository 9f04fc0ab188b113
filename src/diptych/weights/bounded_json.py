"""Read JSON that a stranger wrote: bounded in size, depth and numbers, and no word twice."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

__all__ = ["Rejected", "parse_object", "read_object"]

_MAX_DEPTH = 20
_MAX_WHOLE = 2**53  # beyond it, readers that keep numbers as doubles see another value
_MAX_CONFIG = 4 << 20


class Rejected(ValueError):
    """Say why a document is not read; whoever asked for it knows the file and what to do."""


def read_object(path: Path, limit: int = _MAX_CONFIG, *, infinite: bool = False) -> dict[str, Any]:
    """Return the JSON object in the file at `path`; `Rejected` where there is none to trust.

    With `infinite` it may say Infinity and -Infinity, which JSON does not know.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Rejected("it is not a regular file")
        if status.st_size > limit:
            raise Rejected(f"it has {status.st_size} bytes, more than {limit}")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise Rejected(f"it cannot be opened: {error.strerror or error}") from error
    return parse_object(data, infinite=infinite)


def parse_object(data: bytes, *, infinite: bool = False) -> dict[str, Any]:
    """Return the JSON object that `data` spells; `Rejected` for anything else."""
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_word_twice,
            parse_int=_bounded,
            parse_float=_finite,
            parse_constant=_no_nan if infinite else _finite,
        )
    except UnicodeDecodeError as error:
        raise Rejected(f"it is not UTF-8 text: byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise Rejected(f"it is not JSON: line {error.lineno}: {error.msg}") from error
    except RecursionError as error:
        raise Rejected(f"it is nested more than {_MAX_DEPTH} deep") from error
    if not isinstance(value, dict):
        raise Rejected("it holds no JSON object")
    _check_depth(value)
    return value


def _no_word_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of two equal words, readers differ in which one counts: a checker and a user may disagree.
    found = dict(pairs)
    if len(found) != len(pairs):
        words = [word for word, _ in pairs]
        twice = next(word for word in found if words.count(word) > 1)
        raise Rejected(f"it says {twice[:80]!r} twice")
    return found


def _bounded(text: str) -> int:
    # By length first: turning a long row of digits into a number takes quadratic time.
    if len(text) > 17 or abs(value := int(text)) > _MAX_WHOLE:
        raise Rejected(f"the number {text[:20]} is out of range")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise Rejected(f"the number {text[:20]} is out of range")
    return value


def _no_nan(text: str) -> float:
    return _finite(text) if text == "NaN" else float(text)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise Rejected(f"it is nested more than {_MAX_DEPTH} deep")
