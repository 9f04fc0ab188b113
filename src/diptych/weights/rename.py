"""Apply a dialect's table to the names of tensors, forwards and backwards.

A rule pairs two module paths, `{}` standing for a number: what follows the path (`.weight`,
`.bias`, …) passes through. A rule may also name a whole tensor. Rules are looked up, not searched,
so no name can match two of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = ["LEAVES", "Dialect", "Renamed", "backwards", "forwards", "reshape"]

LEAVES = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})

# Left by whoever wrapped the module before saving it: data parallelism, torch.compile, a trainer.
_WRAPPERS = ("module.", "_orig_mod.", "model.")

Pairs = tuple[tuple[str, str], ...]


class Dialect(Protocol):
    """Name what a dialect module holds; every pattern is one of the file, then one of the module.

    `ALIASES` turns other spellings into those of `RULES`, for reading only; a rule to None is for
    what is known and dropped. `RESHAPE` says how a tensor, by its name in the file, is stored.
    """

    @property
    def NAME(self) -> str: ...
    @property
    def TELLTALE(self) -> str: ...
    @property
    def ALIASES(self) -> Pairs: ...
    @property
    def RULES(self) -> tuple[tuple[str, str | None], ...]: ...
    @property
    def RESHAPE(self) -> Mapping[str, Literal["transpose"]]: ...


@dataclass(frozen=True, slots=True)
class Renamed:
    """Hold what became of the names in a file."""

    names: dict[str, str]  # name in the module → name in the file
    dropped: tuple[str, ...]  # known and not needed
    unknown: tuple[str, ...]
    twice: dict[str, tuple[str, ...]]  # name in the module → the names in the file that claim it


def forwards(dialect: Dialect, names: Iterable[str]) -> Renamed:
    """Map the names in a file to those in the module; each lands in exactly one place."""
    names = list(names)
    aliases, rules = dict(dialect.ALIASES), dict(dialect.RULES)
    prefix = _wrapper(names)
    claims: dict[str, list[str]] = {}
    dropped, unknown = [], []
    for name in names:
        spelling = name[len(prefix) :]
        spelling = _apply(aliases, spelling) or spelling
        if not _knows(rules, spelling):
            unknown.append(name)
        elif (target := _apply(rules, spelling)) is None:
            dropped.append(name)
        else:
            claims.setdefault(target, []).append(name)
    return Renamed(
        names={target: claimed[0] for target, claimed in claims.items()},
        dropped=tuple(dropped),
        unknown=tuple(unknown),
        twice={target: tuple(claimed) for target, claimed in claims.items() if len(claimed) > 1},
    )


def backwards(dialect: Dialect, names: Iterable[str]) -> dict[str, str]:
    """Map the names in the module to those in the file; KeyError for one that no rule gives."""
    rules: dict[str, str | None] = {
        module: file for file, module in dialect.RULES if module is not None
    }
    found = {}
    for name in names:
        target = _apply(rules, name)
        if target is None:
            raise KeyError(f"no rule of {dialect.NAME} leads to {name}")
        found[name] = target
    return found


def reshape(dialect: Dialect, name: str) -> Literal["transpose"] | None:
    """Return how a tensor is stored, by its name as `backwards` gives it; None as it is."""
    return dialect.RESHAPE.get(_pattern(name)[0])


def _wrapper(names: list[str]) -> str:
    prefix = ""
    while names:
        found = [w for w in _WRAPPERS if all(name.startswith(prefix + w) for name in names)]
        if not found:
            break
        prefix += found[0]
    return prefix


def _knows(rules: Mapping[str, str | None], name: str) -> bool:
    return _split(rules, name) is not None


def _apply(rules: Mapping[str, str | None], name: str) -> str | None:
    """Return the new name; None where no rule is for it, or the rule drops it."""
    if (found := _split(rules, name)) is None:
        return None
    pattern, numbers, rest = found
    target = rules[pattern]
    return None if target is None else target.format(*numbers) + rest


def _split(rules: Mapping[str, str | None], name: str) -> tuple[str, list[str], str] | None:
    """Return the pattern that `name` matches, its numbers, and what passes through."""
    pattern, numbers = _pattern(name)
    if pattern in rules:
        return pattern, numbers, ""
    path, _, leaf = name.rpartition(".")
    if leaf not in LEAVES:
        return None
    pattern, numbers = _pattern(path)
    return (pattern, numbers, "." + leaf) if pattern in rules else None


def _pattern(name: str) -> tuple[str, list[str]]:
    """Split `h.11.attn` into `h.{}.attn` and its numbers."""
    parts = name.split(".")
    # `07` is not the number 7: two names must never meet in one.
    is_number = [
        part.isascii() and part.isdigit() and (part == "0" or part[0] != "0") for part in parts
    ]
    pattern = ".".join(
        "{}" if number else part for part, number in zip(parts, is_number, strict=True)
    )
    return pattern, [part for part, number in zip(parts, is_number, strict=True) if number]
