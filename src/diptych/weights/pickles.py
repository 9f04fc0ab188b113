"""Read `pytorch_model.bin` and `.ckpt` without running them: where tensors lie, and nothing else.

Both containers of `torch.save` are read: the zip archive that torch writes since 1.6, and the
stream of pickles and numbers before it. `torch.load` is never involved; see `pickle_machine`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

from diptych.errors import UnsupportedModel, WeightsMismatch
from diptych.weights.archives import Damaged, Entry, read_entries
from diptych.weights.pickle_machine import INERT, MAX_BYTES, Machine, PickledTensor, Refused
from diptych.weights.tensors import FETCH_ANEW, ITEM_SIZES, StoredTensor

__all__ = ["LEGACY_START", "read_embedding_pickle", "read_pickle", "read_training_pickle"]

LEGACY_START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # protocol 2, torch's magic number
_LEGACY_PROTOCOL = 1001


def read_pickle(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a `torch.save` file by name, where it holds a state dict.

    Raises `UnsupportedModel` for a pickle that asks for more than tensors, naming what it asks
    for, and `WeightsMismatch` for one that is damaged.
    """
    return _read(path, frozenset(), _state_dict)[0]


def read_training_pickle(path: Path) -> tuple[dict[str, StoredTensor], dict[str, float]]:
    """Return the tensors and the numbers of a checkpoint that a training run left behind.

    Beside the state dict it may hold optimizer, callbacks and counters. Raises as `read_pickle`.
    """
    return _read(path, INERT, _training_state)


def read_embedding_pickle(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a learned word: from where A1111 keeps them, or of a state dict.

    Raises as `read_pickle`.
    """

    def pick(found: Any) -> tuple[dict[str, PickledTensor], dict[str, float]]:
        words = found.get("string_to_param") if isinstance(found, dict) else None
        return _state_dict(words if isinstance(words, dict) else found)

    return _read(path, frozenset(), pick)[0]


def _read(
    path: Path,
    inert: frozenset[tuple[str, str]],
    pick: Callable[[Any], tuple[dict[str, PickledTensor], dict[str, float]]],
) -> tuple[dict[str, StoredTensor], dict[str, float]]:
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                found, storages = _read_archive(file, inert)
            else:
                found, storages = _read_stream(file, inert)
            size = file.seek(0, 2)
        tensors, numbers = pick(found)
        located = {
            name: _locate(name, tensor, storages, path, size) for name, tensor in tensors.items()
        }
    except Refused as refused:
        raise UnsupportedModel(
            f"{path}: refuses to run {refused}. A state dict holds tensors and nothing else: "
            "convert the file to safetensors where you trust it, or fetch it from elsewhere."
        ) from refused
    except Damaged as error:
        raise WeightsMismatch(f"{path} is damaged: {error}: {FETCH_ANEW}.") from error
    except OSError as error:
        raise WeightsMismatch(f"{path} cannot be read: {error.strerror or error}.") from error
    return located, numbers


def _read_archive(
    file: BufferedReader, inert: frozenset[tuple[str, str]]
) -> tuple[Any, dict[str, Entry]]:
    entries = read_entries(file)
    programs = [name for name in entries if name.endswith("/data.pkl")]
    if len(programs) != 1:
        raise Damaged("it is an archive, but not one of torch.save")
    root = programs[0].removesuffix("data.pkl")
    if root + "constants.pkl" in entries:
        raise Refused("a TorchScript archive, which carries code")
    if order := entries.get(root + "byteorder"):
        file.seek(order.offset)
        if file.read(min(order.size, 16)) != b"little":
            raise Damaged("its numbers are not little-endian")
    program = entries[programs[0]]
    if program.size > MAX_BYTES:
        raise Damaged(f"its pickle has {program.size} bytes, more than {MAX_BYTES}")
    file.seek(program.offset)
    machine = Machine(BytesIO(file.read(program.size)), inert)
    found = machine.run()
    prefix = root + "data/"
    return found, {
        name.removeprefix(prefix): entry
        for name, entry in entries.items()
        if name.startswith(prefix)
    }


def _read_stream(
    file: BufferedReader, inert: frozenset[tuple[str, str]]
) -> tuple[Any, dict[str, Entry]]:
    file.seek(len(LEGACY_START))
    machine = Machine(file, inert)
    if machine.run() != _LEGACY_PROTOCOL:
        raise Damaged("it is of an unknown protocol")
    system = machine.run()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Damaged("its numbers are not little-endian")
    found = machine.run()
    keys = machine.run()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise Damaged("its list of storages is malformed")
    entries: dict[str, Entry] = {}
    position, size = file.tell(), file.seek(0, 2)
    for key in keys:
        storage = machine.storages.get(key)
        if storage is None or key in entries:
            raise Damaged("its list of storages does not fit its tensors")
        file.seek(position)
        count = int.from_bytes(file.read(8), "little")
        if count != storage.numel or position + 8 + storage.nbytes > size:
            raise Damaged(f"storage {key[:40]} is cut short")
        entries[key] = Entry(position + 8, storage.nbytes)
        position += 8 + storage.nbytes
    return found, entries


def _state_dict(found: Any) -> tuple[dict[str, PickledTensor], dict[str, float]]:
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise Damaged("it holds no state dict")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, PickledTensor):
            raise Damaged(f"{str(name)[:80]!r} in its state dict is not a tensor")
    return found, {}


def _training_state(found: Any) -> tuple[dict[str, PickledTensor], dict[str, float]]:
    if not isinstance(found, dict):
        raise Damaged("it holds no state dict")
    nested = found.get("state_dict")
    state = nested if isinstance(nested, dict) else found
    tensors = {n: v for n, v in state.items() if isinstance(n, str) and type(v) is PickledTensor}
    numbers = {n: v for n, v in found.items() if isinstance(n, str) and type(v) in (int, float)}
    return tensors, numbers


def _locate(
    name: str, tensor: PickledTensor, entries: dict[str, Entry], path: Path, file_size: int
) -> StoredTensor:
    """Turn a tensor of a storage into one of the file; everything is checked against its size."""
    storage = tensor.storage
    entry = entries.get(storage.key)
    if entry is None:
        raise Damaged(f"{name[:80]}: storage {storage.key[:40]!r} is missing")
    if entry.size != storage.nbytes or entry.offset + entry.size > file_size:
        raise Damaged(
            f"{name[:80]}: its storage has {entry.size} bytes instead of {storage.nbytes}"
        )
    item = ITEM_SIZES[storage.dtype]
    start = entry.offset + tensor.offset * item
    rows = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
    # The stride of an axis of length 1 (or of an empty tensor) means nothing.
    is_plain = 0 in tensor.shape or all(
        length == 1 or stride == row
        for length, stride, row in zip(tensor.shape, tensor.strides, rows, strict=True)
    )
    located = StoredTensor(
        path, storage.dtype, tensor.shape, start, None if is_plain else tensor.strides
    )
    # More numbers than the storage holds would be a small file that fills the memory.
    if math.prod(tensor.shape) > storage.numel or tensor.offset + located.span > storage.numel:
        raise Damaged(f"{name[:80]} reaches beyond its storage")
    return located
