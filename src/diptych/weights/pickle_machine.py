"""Interpret a pickle that can only build tensors.

A pickle is a program. This machine knows the thirty-odd instructions that `torch.save` writes, and
calls nothing that a file names: a name is looked up in `_CALLS` and `_STORAGES` below, and any
other is refused before the next instruction. Tensors are not read but described.
"""

from __future__ import annotations

import io
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diptych.weights.archives import Damaged
from diptych.weights.tensors import ITEM_SIZES

__all__ = ["INERT", "MAX_BYTES", "Machine", "PickledStorage", "PickledTensor", "Refused"]

MAX_BYTES = 64 << 20  # of pickle; the one of a 239 M parameter captioner has 0.1 MB
_MAX_STEPS = 4_000_000
_MAX_TEXT = 1 << 16
_MAX_WHOLE = 2**48
_MAX_DIMENSIONS = 16


class Refused(Exception):
    """Name what a pickle asks for and does not get."""


@dataclass(frozen=True, slots=True)
class PickledStorage:
    """Stand for the numbers that one or more tensors share."""

    key: str
    dtype: str
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """Say which numbers of a storage a tensor has; `strides` and `offset` count numbers."""

    storage: PickledStorage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# --- what a pickle may name -----------------------------------------------------------------------


def _ordered_dict(*pairs: Any) -> dict[Any, Any]:
    if pairs:
        raise Damaged("an OrderedDict is malformed")
    return {}


def _size(lengths: Any) -> tuple[int, ...]:
    return _counts(lengths)


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *_unused: Any
) -> PickledTensor:
    # What follows: requires_grad, backward hooks, metadata. None of them matters here.
    if not isinstance(storage, PickledStorage):
        raise Damaged("a tensor has no storage")
    (offset,) = _counts((offset,))
    shape, strides = _counts(shape), _counts(strides)
    if len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise Damaged("a tensor has no usable shape")
    return PickledTensor(storage, offset, shape, strides)


def _rebuild_parameter(data: Any, *_unused: Any) -> PickledTensor:
    if not isinstance(data, PickledTensor):
        raise Damaged("a parameter is not a tensor")
    return data


def _counts(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > _MAX_DIMENSIONS:
        raise Damaged("a tensor has no usable shape")
    if not all(type(item) is int and 0 <= item <= _MAX_WHOLE for item in value):
        raise Damaged("a tensor has no usable shape")
    return tuple(value)


@dataclass(frozen=True, slots=True)
class _Call:
    """Stand for a name that a pickle may apply: ours runs, never the one that is named."""

    run: Callable[..., Any]
    least: int
    most: int


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: str


_CALLS = {
    ("collections", "OrderedDict"): _Call(_ordered_dict, 0, 1),
    ("torch", "Size"): _Call(_size, 1, 1),
    ("torch._utils", "_rebuild_tensor"): _Call(_rebuild_tensor, 4, 4),
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_rebuild_tensor, 6, 7),
    ("torch._utils", "_rebuild_parameter"): _Call(_rebuild_parameter, 3, 3),
}
_STORAGES = {
    ("torch", f"{word}Storage"): _StorageType(dtype)
    for word, dtype in {
        "Bool": "bool",
        "Byte": "uint8",
        "Char": "int8",
        "Short": "int16",
        "Int": "int32",
        "Long": "int64",
        "Half": "float16",
        "BFloat16": "bfloat16",
        "Float": "float32",
        "Double": "float64",
    }.items()
}


class _Nothing:
    """Stand for what a training run left behind and nobody needs; applied, it is itself."""


_NOTHING = _Nothing()

# What the published checkpoints of training runs name beside their tensors. None of it is built.
INERT = frozenset(
    {
        ("_codecs", "encode"),
        ("__builtin__", "set"),
        ("builtins", "set"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "scalar"),
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
        ("pytorch_lightning.callbacks", "ModelCheckpoint"),
    }
)

# --- the machine ----------------------------------------------------------------------------------

_MARK = object()
_CONSTANTS: dict[int, Any] = {ord("N"): None, 0x88: True, 0x89: False, ord(")"): ()}
# Instruction → format of the number that follows it.
_NUMBERS = {ord("J"): "<i", ord("K"): "<B", ord("M"): "<H", ord("G"): ">d"}
_TEXTS = {ord("X"): "<I", 0x8C: "<B", 0x8D: "<Q"}
_PUTS = {ord("q"): "<B", ord("r"): "<I"}
_GETS = {ord("h"): "<B", ord("j"): "<I"}
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}


class Machine:
    """Run pickles that follow each other in `file`; the budgets are for all of them together.

    What `inert` names comes to nothing, instead of being refused.
    """

    def __init__(
        self, file: io.BufferedIOBase, inert: frozenset[tuple[str, str]] = frozenset()
    ) -> None:
        self._file = file
        self._inert = inert
        self._bytes_left = MAX_BYTES
        self._steps_left = _MAX_STEPS
        self.storages: dict[str, PickledStorage] = {}
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._others: dict[int, Callable[[], object]] = {
            0x80: lambda: self._read(1),  # protocol
            0x95: lambda: self._read(8),  # frame: only a hint about the bytes to come
            0x8A: lambda: self._push(self._long()),
            0x94: lambda: self._memo.update({len(self._memo): self._top()}),
            0x93: self._stack_global,
            ord("("): lambda: self._push(_MARK),
            ord("0"): self._pop,
            ord("]"): lambda: self._push([]),
            ord("}"): lambda: self._push({}),
            ord("t"): lambda: self._push(tuple(self._pop_to_mark())),
            ord("a"): lambda: self._extend([self._pop()]),
            ord("e"): lambda: self._extend(self._pop_to_mark()),
            ord("s"): lambda: self._update([self._pop(), self._pop()][::-1]),
            ord("u"): lambda: self._update(self._pop_to_mark()),
            ord("c"): lambda: self._push(self._named(self._line(), self._line())),
            ord("i"): self._instance,
            ord("R"): self._reduce,
            ord("b"): self._build,
            ord("Q"): lambda: self._push(self._storage(self._pop())),
        }

    def run(self) -> Any:
        """Run one pickle to its end and return what it builds."""
        self._stack, self._memo = [], {}
        while (code := self._read(1)[0]) != ord("."):
            self._steps_left -= 1
            if self._steps_left < 0:
                raise Damaged(f"its pickle takes more than {_MAX_STEPS} steps")
            self._step(code)
        return self._pop()

    def _step(self, code: int) -> None:
        if code in _CONSTANTS:
            self._push(_CONSTANTS[code])
        elif code in _NUMBERS:
            self._push(self._number(_NUMBERS[code]))
        elif code in _TEXTS:
            self._push(self._text(self._number(_TEXTS[code])))
        elif code in _PUTS:
            self._memo[self._number(_PUTS[code])] = self._top()
        elif code in _GETS:
            self._push(self._recall(self._number(_GETS[code])))
        elif code in _TUPLES:
            items = [self._pop() for _ in range(_TUPLES[code])]
            self._push(tuple(reversed(items)))
        elif code in self._others:
            self._others[code]()
        else:
            words = {op.code: op.name for op in pickletools.opcodes}
            raise Refused(f"the pickle instruction {words.get(chr(code), hex(code))}")

    # Reading.

    def _read(self, count: int) -> bytes:
        self._bytes_left -= count
        if self._bytes_left < 0:
            raise Damaged(f"its pickle has more than {MAX_BYTES} bytes")
        data = self._file.read(count)
        if len(data) < count:
            raise Damaged("its pickle is cut short")
        return data

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._read(struct.calcsize(layout)))[0]

    def _long(self) -> int:
        count = self._read(1)[0]
        if count > 8:
            raise Damaged("a number is out of range")
        return int.from_bytes(self._read(count), "little", signed=True)

    def _text(self, length: int) -> str:
        if length > _MAX_TEXT:
            raise Damaged(f"a text has {length} bytes, more than {_MAX_TEXT}")
        try:
            return self._read(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise Damaged("a text is not UTF-8") from error

    def _line(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            if len(line) > 200:
                raise Damaged("a name is too long")
            line += self._read(1)
        return line[:-1].decode("utf-8", "replace")

    # The stack and the memo.

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _top(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise Damaged("its pickle takes what it never built")
        return self._stack[-1]

    def _pop(self) -> Any:
        self._top()
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        items = []
        while self._stack and self._stack[-1] is not _MARK:
            items.append(self._stack.pop())
        if not self._stack:
            raise Damaged("its pickle takes what it never built")
        self._stack.pop()
        return items[::-1]

    def _recall(self, number: int) -> Any:
        if number not in self._memo:
            raise Damaged("its pickle recalls what it never built")
        return self._memo[number]

    # Building.

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(target := self._top(), list):
            raise Damaged("its pickle appends to what is no list")
        target.extend(items)

    def _update(self, items: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(items) % 2:
            raise Damaged("its pickle writes into what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a deep tuple would recurse as deep.
            if key is _NOTHING:
                continue
            if not isinstance(key, str | int):
                raise Damaged("the key of a dict is no text")
            if key in target:
                raise Damaged(f"a dict holds {str(key)[:80]!r} twice")
            target[key] = value

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise Damaged("a name is no text")
        self._push(self._named(module, name))

    def _named(self, module: str, name: str) -> Any:
        return _NOTHING if (module, name) in self._inert else _allowed(module, name)

    def _instance(self) -> None:
        _allowed(self._line(), self._line())
        raise Refused("the pickle instruction INST")

    def _reduce(self) -> None:
        arguments, call = self._pop(), self._pop()
        if call is _NOTHING:
            self._push(_NOTHING)
            return
        if not isinstance(call, _Call) or not isinstance(arguments, tuple):
            raise Damaged("its pickle applies what cannot be applied")
        if not call.least <= len(arguments) <= call.most:
            raise Damaged("a call in its pickle is malformed")
        self._push(call.run(*arguments))

    def _build(self) -> None:
        # The attributes of an OrderedDict: state_dict() hangs `_metadata` on it. Not needed.
        attributes = self._pop()
        if self._top() is _NOTHING:
            return
        if not isinstance(attributes, dict) or not isinstance(self._top(), dict):
            raise Damaged("its pickle sets attributes on what has none")

    def _storage(self, reference: Any) -> PickledStorage:
        if not isinstance(reference, tuple) or len(reference) not in (5, 6):
            raise Damaged("a reference to a storage is malformed")
        word, kind, key, _place, numel = reference[:5]
        if word != "storage" or not isinstance(kind, _StorageType) or not isinstance(key, str):
            raise Damaged("a reference to a storage is malformed")
        if type(numel) is not int or not 0 <= numel <= _MAX_WHOLE:
            raise Damaged("a storage has no usable size")
        if len(reference) == 6 and reference[5] is not None:
            raise Damaged("it uses views of storages, which torch wrote before 0.4")
        storage = PickledStorage(key, kind.dtype, numel)
        if self.storages.setdefault(key, storage) != storage:
            raise Damaged(f"storage {key[:40]!r} has two sizes or types")
        return storage


def _allowed(module: str, name: str) -> _Call | _StorageType:
    """Return what stands for a name in a pickle; `Refused` for any that builds no tensor."""
    found = _CALLS.get((module, name)) or _STORAGES.get((module, name))
    if found is None:
        raise Refused("".join(c if c.isprintable() else "?" for c in f"{module}.{name}"[:120]))
    return found
