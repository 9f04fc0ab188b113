"""Apply a dialect's tables to the names of tensors, forwards and backwards.

A rule pairs two module paths, `{}` standing for a number: what follows the path (`.weight`,
`.bias`, …) passes through. Rules for whole names are in a table of their own. Both are looked up,
not searched, so a name matches one rule or none.
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
Rules = tuple[tuple[str, str | None], ...]


class Dialect(Protocol):
    """Name what a dialect module holds; every pattern is one of the file, then one of the module.

    `RULES` are for module paths, `TENSORS` for whole names; a rule to None is for what is known and
    dropped. `ALIASES` turns other spellings of paths into those of `RULES`, for reading only.
    `RESHAPE` says how a tensor, by its name in the file, is stored.
    """

    @property
    def NAME(self) -> str: ...
    @property
    def TELLTALE(self) -> str: ...
    @property
    def ALIASES(self) -> Pairs: ...
    @property
    def RULES(self) -> Rules: ...
    @property
    def TENSORS(self) -> Rules: ...
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
    aliases = _Table(dialect.ALIASES, ())
    rules = _Table(dialect.RULES, dialect.TENSORS)
    prefix = _wrapper(names)
    claims: dict[str, list[str]] = {}
    dropped, unknown = [], []
    for name in names:
        spelling = name[len(prefix) :]
        known, target = rules.apply(aliases.apply(spelling)[1] or spelling)
        if not known:
            unknown.append(name)
        elif target is None:
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
    rules = _Table(_inverse(dialect.RULES), _inverse(dialect.TENSORS))
    found = {}
    for name in names:
        _, target = rules.apply(name)
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


def _inverse(rules: Rules) -> Pairs:
    return tuple((module, file) for file, module in rules if module is not None)


class _Table:
    """Look names up in rules for module paths and for whole names."""

    def __init__(self, paths: Rules, tensors: Rules) -> None:
        self._paths, self._tensors = dict(paths), dict(tensors)

    def apply(self, name: str) -> tuple[bool, str | None]:
        """Say whether a rule knows `name`, and return the new one, None where it is dropped."""
        pattern, numbers = _pattern(name)
        if pattern in self._tensors:
            return True, _filled(self._tensors[pattern], numbers)
        path, _, leaf = name.rpartition(".")
        pattern, numbers = _pattern(path)
        if leaf not in LEAVES or pattern not in self._paths:
            return False, None
        target = _filled(self._paths[pattern], numbers)
        return True, None if target is None else f"{target}.{leaf}"


def _filled(pattern: str | None, numbers: list[str]) -> str | None:
    return None if pattern is None else pattern.format(*numbers)


def _pattern(name: str) -> tuple[str, list[str]]:
    """Split `h.11.attn` into `h.{}.attn` and its numbers."""
    if "{" in name or "}" in name:
        return "", []  # would be taken for a pattern; no rule is called so
    parts = name.split(".")
    # `07` is not the number 7: two names must never meet in one.
    is_number = [
        part.isascii() and part.isdigit() and (part == "0" or part[0] != "0") for part in parts
    ]
    pattern = ".".join(
        "{}" if number else part for part, number in zip(parts, is_number, strict=True)
    )
    return pattern, [part for part, number in zip(parts, is_number, strict=True) if number]
