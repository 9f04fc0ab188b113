"""Apply a dialect's tables to the names of tensors, forwards and backwards.

A rule pairs two module paths, `{}` standing for a number: what follows the path (`.weight`,
`.bias`, …) passes through. Rules for whole names are in a table of their own. Both are looked up,
not searched, so a name matches one rule or none: a rule that says its numbers goes before one that
leaves them open. Where the file has several tensors in one, the rule names all of them, in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

__all__ = [
    "LEAVES",
    "Dialect",
    "Renamed",
    "Reshape",
    "Rules",
    "Scheme",
    "backwards",
    "forwards",
    "pieces",
    "reshape",
]

LEAVES = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})

# Left by whoever wrapped the module before saving it: data parallelism, torch.compile, a trainer.
_WRAPPERS = ("module.", "_orig_mod.", "model.")

Pairs = tuple[tuple[str, str], ...]
Target = str | tuple[str, ...] | None  # several names: the file has them in one, along the rows
Rules = tuple[tuple[str, Target], ...]

# How a tensor is stored: the other way round, or as the 1x1 convolution that its matrix stands for.
Reshape = Literal["transpose", "squeeze"]


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
    def RESHAPE(self) -> Mapping[str, Reshape]: ...


@dataclass(frozen=True, slots=True)
class Scheme:
    """Hold a dialect whose rules follow from a config."""

    NAME: str
    TELLTALE: str
    RULES: Rules
    TENSORS: Rules = ()
    ALIASES: Pairs = ()
    RESHAPE: Mapping[str, Reshape] = field(default_factory=dict)


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
        (alias, *_) = aliases.apply(spelling) or (spelling,)
        targets = rules.apply(alias)
        if targets is None:
            unknown.append(name)
        elif not targets:
            dropped.append(name)
        for target in targets or ():
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
        targets = rules.apply(name)
        if targets is None:
            raise KeyError(f"no rule of {dialect.NAME} leads to {name}")
        (found[name],) = targets
    return found


def pieces(dialect: Dialect, name: str) -> tuple[str, ...]:
    """Return the names in the module of what the tensor `name` in the file holds, in order."""
    return _Table(dialect.RULES, dialect.TENSORS).apply(name) or ()


def reshape(dialect: Dialect, name: str) -> Reshape | None:
    """Return how a tensor is stored, by its name as `backwards` gives it; None as it is."""
    return dialect.RESHAPE.get(name) or dialect.RESHAPE.get(_pattern(name)[0])


def _wrapper(names: list[str]) -> str:
    prefix = ""
    while names:
        found = [w for w in _WRAPPERS if all(name.startswith(prefix + w) for name in names)]
        if not found:
            break
        prefix += found[0]
    return prefix


def _inverse(rules: Rules) -> Pairs:
    pairs = []
    for file, target in rules:
        modules = (target,) if isinstance(target, str) else target or ()
        pairs += [(module, file) for module in modules]
    return tuple(pairs)


class _Table:
    """Look names up in rules for module paths and for whole names."""

    def __init__(self, paths: Rules, tensors: Rules) -> None:
        self._paths, self._tensors = dict(paths), dict(tensors)

    def apply(self, name: str) -> tuple[str, ...] | None:
        """Return the new names, none where a rule drops it; None where no rule knows it."""
        if (found := _look_up(self._tensors, name)) is not None:
            return found
        path, _, leaf = name.rpartition(".")
        found = _look_up(self._paths, path) if leaf in LEAVES else None
        return None if found is None else tuple(f"{target}.{leaf}" for target in found)


def _look_up(rules: Mapping[str, Target], name: str) -> tuple[str, ...] | None:
    pattern, numbers = _pattern(name)
    # As it stands first: where a rule says its numbers, it means these and no others.
    key = name if pattern and name in rules else pattern
    if key not in rules:
        return None
    target = rules[key]
    targets = (target,) if isinstance(target, str) else target or ()
    return tuple(each.format(*numbers) if key == pattern else each for each in targets)


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
