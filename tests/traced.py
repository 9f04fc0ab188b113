"""Say what coverage follows: tracing makes Python run up to twice as long, the references' too."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


def traced_once(values: Iterable[Any]) -> list[Any]:
    """Return `values` as parameters, all run, the first traced: the others take the same lines."""
    first, *others = values
    return [first, *(pytest.param(value, marks=pytest.mark.no_cover) for value in others)]


@contextmanager
def untraced() -> Iterator[None]:
    """Run what is none of our code at its own speed; as a decorator, too."""
    if sys.gettrace() is None or "coverage" not in sys.modules:
        yield
        return
    from coverage import Coverage

    measured = Coverage.current()
    if measured is None:
        yield
        return
    measured.stop()
    try:
        yield
    finally:
        measured.start()
