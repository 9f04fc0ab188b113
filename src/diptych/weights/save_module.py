"""Write networks as safetensors and whole folders at once: what all checkpoints share."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.errors import BadInput
from diptych.weights.rename import Dialect, backwards, pieces, reshape
from diptych.weights.tensors import ITEM_SIZES, SAFETENSORS_NAMES

__all__ = [
    "Written",
    "as_target",
    "dtype_name",
    "forget_artifact",
    "staged",
    "sync",
    "write_file",
    "write_tensors",
]

logger = logging.getLogger("diptych")

_CODES = {name: code for code, name in SAFETENSORS_NAMES.items()}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Written:
    """Pair a network's tensors with the dialect, and the prefix, under which they are written."""

    dialect: Dialect
    state: Mapping[str, Tensor]
    prefix: str = ""


@dataclass(frozen=True, slots=True)
class _Entry:
    """Describe one tensor of the file: what it is made of, and how."""

    name: str
    parts: tuple[tuple[str, Tensor], ...]
    dtype: torch.dtype
    how: str | None

    @property
    def shape(self) -> list[int]:
        rows = sum(tensor.shape[0] for _, tensor in self.parts if tensor.shape)
        shape = [rows, *self.parts[0][1].shape[1:]] if self.parts[0][1].shape else []
        if self.how == "transpose":
            shape.reverse()
        return shape + [1, 1] * (self.how == "squeeze")

    @property
    def item_size(self) -> int:
        return ITEM_SIZES[dtype_name(self.dtype)]

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() for _, tensor in self.parts) * self.item_size


def as_target(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the type to write as; None is the module's own. Raises `BadInput`."""
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in _DTYPES.values():
        raise BadInput(f"dtype is {str(dtype)!r}: give {', '.join(_DTYPES)}.")
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type, as in `float16`."""
    return str(dtype).removeprefix("torch.")


def write_tensors(
    path: Path,
    networks: Iterable[Written],
    target: torch.dtype | None,
    marks: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a safetensors file tensor by tensor, so that no second copy of all is ever made.

    `target` None keeps the type of each. `marks` are written as they are.
    """
    entries = [entry for network in networks for entry in _entries(network, target)]
    entries += [
        _Entry(name, ((name, tensor),), tensor.dtype, None)
        for name, tensor in (marks or {}).items()
    ]
    # The widest numbers first keep all of them aligned.
    entries.sort(key=lambda entry: (-entry.item_size, entry.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        end = position + entry.nbytes
        header[entry.name] = {
            "dtype": _CODES[dtype_name(entry.dtype)],
            "shape": entry.shape,
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _open(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            for name, tensor in entry.parts:
                file.write(_bytes(name, tensor, entry.dtype, entry.how))


def _entries(network: Written, target: torch.dtype | None) -> Iterator[_Entry]:
    files = backwards(network.dialect, network.state)
    for file in dict.fromkeys(files.values()):
        names = [name for name in pieces(network.dialect, file) if name in network.state]
        parts = tuple((name, network.state[name].detach()) for name in names)
        own = parts[0][1]
        dtype = target if target and own.is_floating_point() else own.dtype
        yield _Entry(network.prefix + file, parts, dtype, reshape(network.dialect, file))


def _bytes(name: str, tensor: Tensor, dtype: torch.dtype, how: str | None) -> memoryview:
    tensor = tensor.cpu()
    cast = tensor.to(dtype)
    if cast.dtype != tensor.dtype and bool((tensor.isfinite() & ~cast.isfinite()).any()):
        raise BadInput(f"{name} holds numbers beyond {dtype_name(dtype)}: save it as float32.")
    if how == "transpose":
        cast = cast.t()
    return cast.contiguous().flatten().view(torch.uint8).numpy().data


# --- files ----------------------------------------------------------------------------------------


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, whose files then take their places in `folder` at once."""
    is_new = not folder.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.parent if is_new else folder
    staging = beside / f".{folder.name}.{secrets.token_hex(4)}.partial"
    staging.mkdir()
    try:
        yield staging
        if is_new:
            sync(staging)
            staging.rename(folder)
        else:
            for path in sorted(path for path in staging.rglob("*") if path.is_file()):
                target = folder / path.relative_to(staging)
                target.parent.mkdir(exist_ok=True)
                path.replace(target)
            sync(folder)
        sync(folder.parent)
    finally:
        if staging.exists():
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def forget_artifact(folder: Path) -> None:
    """Let ONNX networks in `folder`, which are of the weights before, not be taken for the new."""
    stated = folder / "artifact.json"
    if stated.exists():
        stated.unlink()
        logger.warning("%s: its ONNX networks were of other weights: export the model anew", folder)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a new file, down to the disk."""
    with _open(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync(path: Path) -> None:
    """Bring a file, or the new names in a folder, down to the disk."""
    # Not every system lets a folder be opened.
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
