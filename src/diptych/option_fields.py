"""Declare, check and merge the fields of an options dataclass, the same way in both panels."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from diptych.errors import BadInput

__all__ = [
    "check_value",
    "check_values",
    "library",
    "option",
    "plain",
    "replace",
    "setting",
    "values",
]

Options = TypeVar("Options")


def option(
    kind: type,
    help: str,
    *,
    library: object = None,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[object, ...] = (),
    hint: str = "",
) -> Any:
    """Declare an option that stays None until `resolve`: model's default first, then `library`."""
    metadata = _metadata(kind, help, library, low, high, choices, hint, from_model=True)
    return dataclasses.field(default=None, metadata=metadata)


def setting(
    kind: type,
    help: str,
    *,
    default: object,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[object, ...] = (),
    hint: str = "",
) -> Any:
    """Declare an option that models have no say in."""
    metadata = _metadata(kind, help, default, low, high, choices, hint, from_model=False)
    return dataclasses.field(default=default, metadata=metadata)


def _metadata(
    kind: type,
    help: str,
    default: object,
    low: float | None,
    high: float | None,
    choices: tuple[object, ...],
    hint: str,
    *,
    from_model: bool,
) -> dict[str, Any]:
    return {
        "kind": kind,
        "help": help,
        "default": default,
        "low": low,
        "high": high,
        "choices": choices,
        "hint": hint,
        "from_model": from_model,
    }


def values(options: Any) -> dict[str, Any]:
    """Return what each field of an options dataclass holds."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}


def library(options: Any) -> dict[str, Any]:
    """Return what holds where neither the caller nor the model says anything."""
    return {field.name: field.metadata["default"] for field in dataclasses.fields(options)}


def replace(
    options: Options,
    overrides: Mapping[str, object],
    noun: str,
    foreign: Mapping[str, str] | None = None,
) -> Options:
    """Return a copy with these options changed; BadInput for a word that is no option.

    `foreign` gives our word for words of other programs, to name it where one is used.
    """
    names = [field.name for field in dataclasses.fields(options)]  # type: ignore[arg-type]
    for word in overrides:
        if word not in names:
            close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
            meant = (foreign or {}).get(word) or (close[0] if close else "")
            hint = f"did you mean {meant}?" if meant else f"choose from {', '.join(names)}."
            raise BadInput(f"{word} is not {noun}: {hint}")
    return dataclasses.replace(options, **overrides)  # type: ignore[type-var]


def check_values(options: Any) -> None:
    """Raise BadInput for the first value out of range; None waits where it is the default."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value is not None or field.default is not None:
            check_value(field, value)


def check_value(field: dataclasses.Field[Any], value: object, where: str = "") -> None:
    """Raise BadInput for a value that this option cannot have; `where` says where it stands."""
    kind, choices = field.metadata["kind"], field.metadata["choices"]
    if choices:
        # By identity for True and False, because 1 equals True.
        fits = any(
            value is choice or (isinstance(value, str) and choice == value) for choice in choices
        )
    elif kind is int:
        fits = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    elif kind is float:
        fits = isinstance(value, numbers.Real) and not isinstance(value, bool)
        fits = fits and math.isfinite(value)  # type: ignore[arg-type]
    else:
        fits = isinstance(value, kind)
    low, high = field.metadata["low"], field.metadata["high"]
    if fits and low is not None:
        fits = value >= low
    if fits and high is not None:
        fits = value <= high
    if not fits:
        raise BadInput(
            f"{where}{field.name} is {value!r}: give {_wanted(field.metadata)}."
            f"{_meant(value, choices)}"
        )


def _meant(value: object, choices: Sequence[object]) -> str:
    """Ask for the choice that `value` may stand for, as `DPM++ 2M` does for `dpmpp_2m`."""
    if not isinstance(value, str):
        return ""
    spelled = re.sub(r"[^a-z0-9]+", "_", value.lower().replace("++", "pp")).strip("_")
    words = [choice for choice in choices if isinstance(choice, str)]
    begins = sorted((word for word in words if spelled.startswith(word)), key=len, reverse=True)
    close = begins or difflib.get_close_matches(spelled, words, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def plain(value: object) -> Any:
    """Turn NumPy numbers into Python's, so that options can be written as JSON."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _wanted(metadata: Mapping[str, Any]) -> str:
    """Say in words what an option accepts."""
    if metadata["choices"]:
        return "one of " + ", ".join(repr(choice) for choice in metadata["choices"])
    nouns = {
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        str: "a text",
        tuple: "a list of texts",
    }
    text, low, high = nouns[metadata["kind"]], metadata["low"], metadata["high"]
    spell = str if metadata["kind"] is int else "{:g}".format
    if high is not None:
        text += f" from {spell(low)} to {spell(high)}"
    elif low is not None:
        text += f" of {low} or more"
    return text + str(metadata["hint"])
