"""Say which of several like cases coverage follows: tracing makes some tests twice as long."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def traced_once(values: Iterable[Any]) -> list[Any]:
    """Return `values` as parameters, all run, the first traced: the others take the same lines."""
    first, *others = values
    return [first, *(pytest.param(value, marks=pytest.mark.no_cover) for value in others)]
