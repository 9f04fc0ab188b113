"""Keep tensors on the disk that take long to compute; what is damaged is computed again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

__all__ = ["TensorCache", "cache_key", "file_mark"]

logger = logging.getLogger("diptych")

_CHECKSUM = "checksum"
_STRETCHES, _STRETCH = 64, 1 << 16  # bytes


def cache_key(**parts: Any) -> str:
    """Return the name of what depends on `parts`, and on nothing else."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_mark(path: Path) -> str:
    """Return what tells a file of weights from others: its size, and 64 stretches of its bytes.

    All of it would take as long as reading it; weights that were trained differ everywhere.
    """
    size = path.stat().st_size
    summed = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for part in range(_STRETCHES):
            file.seek(part * max(0, size - _STRETCH) // max(1, _STRETCHES - 1))
            summed.update(file.read(_STRETCH))
    return summed.hexdigest()


class TensorCache:
    """Hold a few tensors a key, one file each, below `folder`.

    Files appear whole: a kill while writing leaves a file that nobody reads. Each carries a
    checksum, so that a file damaged later is noticed and made again. A full disk costs the cache,
    not the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._is_full = folder, False

    def get(self, key: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return what is kept under `key`, else what `compute` gives, and keep it."""
        path = self.folder / key[:2] / f"{key}.safetensors"
        found = self._read(path)
        if found is None:
            found = _packed(compute())
            self._write(path, found)
        return found

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        try:
            data = path.read_bytes()
        except OSError:
            return None
        try:
            tensors = load(data)
            stated = bytes(tensors.pop(_CHECKSUM).tolist())
        except (SafetensorError, KeyError, ValueError, TypeError):
            stated, tensors = b"", {}
        if stated and stated == _checksum(tensors):
            return tensors
        logger.warning("%s is damaged: it is computed again", path)
        return None

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        if self._is_full:
            return
        mark = torch.tensor(list(_checksum(tensors)), dtype=torch.uint8)
        partial = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(3)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(save({**tensors, _CHECKSUM: mark}))
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            self._is_full = True
            logger.warning(
                "%s cannot be written (%s): the run goes on and computes anew what it needs again",
                path.parent,
                error.strerror or error,
            )


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _checksum(tensors: Mapping[str, Tensor]) -> bytes:
    summed = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        summed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        summed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return summed.digest()
