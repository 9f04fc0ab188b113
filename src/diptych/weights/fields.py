"""Check config values: of the right kind, within bounds, and every one there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diptych.errors import UnsupportedModel

__all__ = ["Field", "check_fields", "translate"]


@dataclass(frozen=True, slots=True)
class Field:
    """Bound a config value. The bounds are far beyond any model, and near enough to build.

    `kind` is `int`, `float`, `bool`, `str` or a tuple of the first three; `foreign` is what the
    file calls it, where not the same.
    """

    kind: Literal["int", "float", "bool", "str", "ints", "bools", "floats"]
    default: Any
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    foreign: str | None = None
    is_optional: bool = False  # may be None
    most: int = 16  # items of a tuple


def translate(fields: Mapping[str, Field], document: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the values of `fields` out of a foreign document; what it leaves out gets its default.

    A null counts as left out.
    """
    found = {}
    for name, each in fields.items():
        value = document.get(each.foreign or name)
        found[name] = each.default if value is None else value
    return found


def check_fields(
    part: str, fields: Mapping[str, Field], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `values` with every field there and lists as tuples, else `UnsupportedModel`."""
    if unknown := sorted(set(values) - set(fields)):
        raise UnsupportedModel(f"{part}: diptych knows no {str(unknown[0])[:60]}")
    return {
        name: _checked(f"{part}: {name}", each, values.get(name, each.default))
        for name, each in fields.items()
    }


def _checked(name: str, field: Field, value: Any) -> Any:
    if value is None and field.is_optional:
        return None
    if field.kind in ("ints", "bools", "floats"):
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= field.most:
            raise UnsupportedModel(f"{name} is {_shown(value)}, not a list of values")
        return tuple(_single(name, field.kind[:-1], field, item) for item in value)
    return _single(name, field.kind, field, value)


def _single(name: str, kind: str, field: Field, value: Any) -> Any:
    if kind == "bool":
        if not isinstance(value, bool):
            raise UnsupportedModel(f"{name} is {_shown(value)}, not true or false")
        return value
    if kind == "str":
        if not isinstance(value, str) or value not in field.choices:
            known = ", ".join(field.choices)
            raise UnsupportedModel(f"{name} is {_shown(value)}; diptych knows {known}")
        return value
    kinds = (int,) if kind == "int" else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        noun = "a whole number" if kind == "int" else "a number"
        raise UnsupportedModel(f"{name} is {_shown(value)}, not {noun}")
    if not field.low <= value <= field.high:
        raise UnsupportedModel(f"{name} is {value}; diptych takes {field.low:g} to {field.high:g}")
    return int(value) if kind == "int" else float(value)


def _shown(value: Any) -> str:
    return repr(value)[:40]
