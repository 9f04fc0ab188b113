"""Safetensors files, good and hostile, beside the library that defines them."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diptych.errors import WeightsMismatch
from diptych.weights.files import read_checkpoint
from diptych.weights.tensors import StoredTensor, read_into, read_safetensors


def container(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_every_type_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    state = {
        str(dtype): torch.ones(2, 3).to(dtype)
        for dtype in (
            *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
            *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        )
    }
    state |= {"nothing": torch.zeros(0, 4), "one": torch.tensor(3.0)}
    save_file(state, path, {"format": "pt", "note": "x"})
    found = read_safetensors(path)
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        stored = found[name]
        assert (f"torch.{stored.dtype}", stored.shape) == (str(tensor.dtype), tuple(tensor.shape))
        raw = bytearray(stored.span_bytes)
        with path.open("rb") as file:
            read_into(memoryview(raw), stored, file)
        assert bytes(raw) == tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


DATA = bytes(24)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "cut in the length": (b"\x10\0\0\0", "neither safetensors nor"),
    "cut in the header": (container({"a": entry([6], 0, 24)}, DATA)[:30], "but the file has 30"),
    "cut in the data": (container({"a": entry([6], 0, 24)}, DATA[:20]), "it is cut short"),
    "more data": (container({"a": entry([6], 0, 24)}, DATA + b"!"), "goes on after its last"),
    "huge header": (container(b"{}", length=2**63), "claims 9223372036854775808 bytes"),
    "header beyond the hub's": (container(b"{}", length=25_000_001), "more than 25000000"),
    "overlap": (container({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, DATA), "overlaps"),
    "the same twice": (container({"a": entry([6], 0, 24), "b": entry([6], 0, 24)}, DATA), "overl"),
    "hole": (container({"a": entry([2], 0, 8), "b": entry([2], 16, 24)}, DATA), "leaves a hole"),
    "hole at the start": (container({"a": entry([4], 8, 24)}, DATA), "leaves a hole"),
    "backwards": (container({"a": entry([6], 24, 0)}, DATA), "needs 24 bytes and has -24"),
    "negative": (container({"a": entry([6], -24, 0)}, DATA), "no usable offsets"),
    "negative shape": (container({"a": entry([-6], 0, 24)}, DATA), "no usable shape"),
    "product that wraps": (container({"a": entry([2**32, 2**32], 0, 0)}), "needs"),
    "another size": (container({"a": entry([5], 0, 24)}, DATA), "needs 20 bytes and has 24"),
    "many dimensions": (container({"a": entry([1] * 17, 0, 4)}, DATA[:4]), "no usable shape"),
    "fractions": (container({"a": entry([6.0], 0, 24)}, DATA), "no usable shape"),
    "booleans": (container({"a": entry([6], False, 24)}, DATA), "no usable offsets"),
    "texts": (container({"a": entry("6", 0, 24)}, DATA), "no usable shape"),
    "three offsets": (
        container({"a": {**entry([6], 0, 24), "data_offsets": [0, 24, 24]}}, DATA),
        "no usable offsets",
    ),
    "unknown type": (container({"a": entry([24], 0, 24, "F8_E4M3")}, DATA), "of type F8_E4M3"),
    "no type": (container({"a": entry([24], 0, 24, None)}, DATA), "of type None"),
    "no shape": (container({"a": {"dtype": "F32", "data_offsets": [0, 24]}}, DATA), "malformed"),
    "more words": (container({"a": {**entry([6], 0, 24), "x": 1}}, DATA), "is malformed"),
    "no entry": (container({"a": 24}, DATA), "is malformed"),
    "no json": (container(b"{'a': 1}"), "not JSON: line 1"),
    "no utf-8": (container(b'{"\xff": 1}'), "not UTF-8 text: byte 2"),
    "a name twice": (
        container(b'{"a":%b,"a":%b}' % ((json.dumps(entry([6], 0, 24)).encode(),) * 2), DATA),
        "says 'a' twice",
    ),
    "not a number": (container(b'{"a": NaN}'), "NaN is out of range"),
    "long number": (container(b'{"a": %b}' % (b"9" * 100_000)), "is out of range"),
    "deep": (container(b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}"), "20 deep"),
    "very deep": (container(b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}"), "20 deep"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "a page": (b"<!DOCTYPE html><html>Sign in</html>", "is a web page"),
    "something else": (b"GGUF\3\0\0\0" + bytes(99), "neither safetensors nor a file of torch"),
    "a tar": (bytes(257) + b"ustar" + bytes(99), "is a pickle, but not one of torch.save"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_told(tmp_path: Path, kind: str) -> None:
    data, reason = HOSTILE[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(WeightsMismatch) as caught:
        read_checkpoint([path])
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith("fetch or save the model anew.")
    assert len(str(caught.value)) < 300 + len(str(path))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(WeightsMismatch, match="cannot be read: No such file"):
        read_checkpoint([tmp_path / "model.safetensors"])


def test_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(10))
    stored = StoredTensor(path, "float32", (4,), 0)
    with path.open("rb") as file, pytest.raises(WeightsMismatch, match="has become shorter"):
        read_into(memoryview(bytearray(16)), stored, file)


def test_what_the_library_refuses_is_refused(tmp_path: Path) -> None:
    """We may be stricter, never laxer; what both read, both read alike."""
    path = tmp_path / "model.safetensors"
    draw = random.Random(11)
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int64)}, path)
    whole = path.read_bytes()
    both = 0
    for number in range(700):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 1, 2])):
            place = draw.randrange(len(data) if number % 3 else 160)
            data[place] = draw.choice([draw.randrange(256), *b'0123456789[]{},:" '])
        path.write_bytes(data)
        try:
            found = read_checkpoint([path])
        except WeightsMismatch:
            continue
        try:
            with safe_open(path, "np") as file:
                theirs = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, UnicodeError) as error:
            pytest.fail(f"we read what the library refuses: {error}: {bytes(data)!r}")
        both += 1
        assert found.keys() == theirs.keys()
        for name, array in theirs.items():
            assert (found[name].dtype, found[name].shape) == (str(array.dtype), array.shape)
            raw = data[found[name].offset :][: found[name].span_bytes]
            assert np.array_equal(np.frombuffer(raw, array.dtype), array.ravel(), equal_nan=True)
    assert both > 50
