"""What a pickle asks for is refused by name, what is damaged is told, and nothing ever runs."""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import os
import pickle
import random
import struct
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diptych.errors import DiptychError, UnsupportedModel, WeightsMismatch
from diptych.weights import pickle_machine
from diptych.weights.files import read_checkpoint
from diptych.weights.pickles import LEGACY_START, read_pickle
from diptych.weights.tensors import StoredTensor, read_into


def value_of(stored: StoredTensor) -> Any:
    flat = torch.empty(stored.span, dtype=getattr(torch, stored.dtype))
    with stored.file.open("rb") as file:
        if stored.span:
            read_into(flat.view(torch.uint8).numpy().data, stored, file)
    strides = stored.strides
    return flat.reshape(stored.shape) if strides is None else flat.as_strided(stored.shape, strides)


def tensors() -> dict[str, Any]:
    base = torch.randn(6, 4)
    return {
        "plain": torch.randn(3, 5),
        "tied": base,
        "tied again": base,
        "view": base[2:5, 1:3],
        "transposed": torch.randn(4, 3).t(),
        "half": torch.randn(2, 2).half(),
        "bfloat": torch.randn(3).bfloat16(),
        "double": torch.randn(2).double(),
        "long": torch.tensor(7),
        "int": torch.arange(3, dtype=torch.int32),
        "short": torch.arange(3, dtype=torch.int16),
        "char": torch.arange(3, dtype=torch.int8),
        "byte": torch.arange(3, dtype=torch.uint8),
        "bool": torch.tensor([[True, False]]),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }


CONTAINERS = {"zip": {}, "stream": {"_use_new_zipfile_serialization": False}}


@pytest.mark.parametrize("options", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize("wrap", [dict, collections.OrderedDict, lambda s: {"state_dict": s}])
def test_what_torch_saves_is_read(tmp_path: Path, options: Any, wrap: Callable[..., Any]) -> None:
    state = tensors()
    path = tmp_path / "a.bin"
    torch.save(wrap(state), path, **options)
    found = read_pickle(path)
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert str(tensor.dtype) == f"torch.{found[name].dtype}"
        assert torch.equal(value_of(found[name]), tensor.detach()), name
    assert found["tied"] == found["tied again"]


@pytest.mark.parametrize("options", CONTAINERS.values(), ids=CONTAINERS)
def test_state_dict_of_a_module_is_read(tmp_path: Path, options: Any) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    torch.save(module.state_dict(), tmp_path / "a.bin", **options)
    assert list(read_pickle(tmp_path / "a.bin")) == list(module.state_dict())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_the_archive(tmp_path: Path, protocol: int) -> None:
    state = tensors()
    torch.save(state, tmp_path / "a.bin", pickle_protocol=protocol)
    assert list(read_pickle(tmp_path / "a.bin")) == list(state)


# --- hostile programs -----------------------------------------------------------------------------


def archive(program: bytes, storages: dict[str, bytes] | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", options.get("compression", zipfile.ZIP_STORED)) as target:
        target.writestr("x/data.pkl", program)
        for key, data in (storages or {}).items():
            target.writestr(f"x/data/{key}", data)
    return file.getvalue()


def stream(program: bytes) -> bytes:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = [1001, system]
    head = b"".join(pickle.dumps(part, protocol=2) for part in parts)
    return LEGACY_START + head + program + pickle.dumps([], protocol=2)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


class Payload:
    """Pickle as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def hostile(canary: str) -> dict[str, tuple[bytes, str]]:
    """Return programs and what each is refused for. Every one of them would touch `canary`."""
    command = f"touch {canary}"
    touch = text(command)
    by_name = b"cposix\nsystem\n" + touch + b"\x85R"
    found = {
        f"protocol {protocol}": (pickle.dumps(Payload(os.system, command), protocol), "system")
        for protocol in range(6)
    }
    found |= {
        "eval": (pickle.dumps(Payload(eval, f"open({canary!r}, 'w')"), 2), "eval"),
        "exec": (pickle.dumps(Payload(exec, f"open({canary!r}, 'w')"), 4), "builtins.exec"),
        "open": (pickle.dumps(Payload(open, canary, "w"), 2), "io.open"),
        "getattr": (
            b"\x80\x02cbuiltins\ngetattr\ncos\n__dict__\n" + by_name + b".",
            "builtins.getattr",
        ),
        "partial": (
            pickle.dumps(Payload(functools.partial, os.system, command), 2),
            "functools.partial",
        ),
        "import": (
            b"\x80\x02cimportlib\nimport_module\n" + text("os") + b"\x85R.",
            "importlib.import_module",
        ),
        "torch.load": (b"\x80\x02ctorch\nload\n" + text(canary) + b"\x85R.", "torch.load"),
        "load from bytes": (
            b"\x80\x02ctorch.storage\n_load_from_bytes\nU\x00\x85R.",
            "torch.storage._load_from_bytes",
        ),
        "hub": (b"\x80\x02ctorch.hub\nload\n" + text(canary) + b"\x85R.", "torch.hub.load"),
        "dotted name": (
            b"\x80\x04" + text("torch") + text("_utils._rebuild_tensor_v2") + b"\x93.",
            "torch._utils._rebuild_tensor_v2",
        ),
        "name of the module beside": (
            b"\x80\x02ctorch._utils\n_import_dotted_name\n" + text("os") + b"\x85R.",
            "torch._utils._import_dotted_name",
        ),
        "a class of collections": (
            b"\x80\x02ccollections\nnamedtuple\n" + text("os") + b"\x85R.",
            "collections.namedtuple",
        ),
        "numpy": (pickle.dumps(np.float64(1.5), 2), "scalar"),
        "a module": (pickle.dumps(torch.nn.Identity(), 2), "torch.nn.modules.linear.Identity"),
        "stack global": (
            b"\x80\x04" + text("posix") + text("system") + b"\x93" + touch + b"\x85R.",
            "posix.system",
        ),
        "inst": (b"(" + touch + b"iposix\nsystem\n.", "posix.system"),
        "inst of an allowed name": (b"(icollections\nOrderedDict\n.", "instruction INST"),
        "obj": (b"(cposix\nsystem\n" + touch + b"o.", "posix.system"),
        "obj of an allowed name": (b"(ccollections\nOrderedDict\no.", "instruction OBJ"),
        "newobj": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "instruction NEWOBJ"),
        "newobj ex": (b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "instruction NEWOBJ_EX"),
        "extension": (b"\x80\x02\x82\x01.", "instruction EXT1"),
        "persid": (b"Pposix\n.", "instruction PERSID"),
        "out of band": (b"\x80\x05\x97.", "instruction NEXT_BUFFER"),
        "no instruction": (b"\x80\x02\xff.", "instruction 0xff"),
        "in a value": (b"\x80\x02}" + text("weight") + by_name + b"s.", "posix.system"),
        "in a key": (b"\x80\x02}" + by_name + b"Ns.", "posix.system"),
        "in a list": (b"\x80\x02]" + by_name + b"a.", "posix.system"),
        "in the memo": (b"\x80\x02cposix\nsystem\nq\x00h\x00" + touch + b"\x85R.", "posix.system"),
        "in a reference": (
            b"\x80\x02(" + text("storage") + by_name + text("0") + text("cpu") + b"K\x01tQ.",
            "posix.system",
        ),
        "in arguments": (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + by_name + b"tR.",
            "posix.system",
        ),
        "in attributes": (
            b"\x80\x02ccollections\nOrderedDict\n)R}" + text("__dict__") + by_name + b"sb.",
            "posix.system",
        ),
        "thrown away": (b"\x80\x02" + by_name + b"0}.", "posix.system"),
        "a name that is not text": (b"\x80\x04K\x01K\x02\x93.", "a name is no text"),
    }
    return found


def contained(program: bytes) -> Iterator[tuple[str, bytes]]:
    yield "archive", archive(program)
    yield "stream", stream(program)


@pytest.mark.parametrize("kind", hostile(""))
def test_nothing_runs_and_everything_is_named(tmp_path: Path, kind: str) -> None:
    canary = tmp_path / "canary"
    program, name = hostile(str(canary))[kind]
    for container, data in contained(program):
        path = tmp_path / f"{container}.bin"
        path.write_bytes(data)
        with pytest.raises((UnsupportedModel, WeightsMismatch)) as caught:
            read_pickle(path)
        assert name in str(caught.value)
        assert str(path) in str(caught.value)
        if isinstance(caught.value, UnsupportedModel):
            assert "refuses to run" in str(caught.value)
            assert "convert the file to safetensors" in str(caught.value)
    bare = tmp_path / "bare.bin"
    bare.write_bytes(program)
    with pytest.raises(WeightsMismatch, match=r"bare\.bin is "):
        read_checkpoint([bare])
    assert not canary.exists()


def test_the_canary_would_have_sung(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for kind in ("protocol 0", "protocol 5", "stack global", "inst", "obj", "thrown away"):
        pickle.loads(hostile(str(canary))[kind][0])
        assert canary.exists()
        canary.unlink()


def test_name_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(archive(b"\x80\x02c\x1b[2Jevil\r\n" + b"n" * 190 + b"\n."))
    with pytest.raises(UnsupportedModel) as caught:
        read_pickle(path)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 500


# --- malformed programs ---------------------------------------------------------------------------

STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"%stQ"
SIX = b"K\x06"


def tensor(offset: bytes, shape: bytes, strides: bytes, numel: bytes = SIX) -> bytes:
    """Return the program of {"w": a tensor}; the storage `0` has `numel` numbers."""
    parts = STORAGE % numel + offset + shape + strides + b"\x89}"
    return b"\x80\x02}" + text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + parts + b"tRs."


def pair(one: bytes, other: bytes) -> bytes:
    return one + other + b"\x86"


ZERO = b"K\x00"
TWO_THREE = pair(b"K\x02", b"K\x03")
THREE_ONE = pair(b"K\x03", b"K\x01")
MINUS = b"J\xff\xff\xff\xff"
HUGE = b"\x8a\x08" + struct.pack("<q", 2**62)
LARGE = b"J\xff\xff\xff\x7f"

MALFORMED = {
    "reaches beyond": (tensor(b"K\x01", TWO_THREE, THREE_ONE), "w reaches beyond its storage"),
    "wide strides": (tensor(ZERO, TWO_THREE, pair(b"K\x04", b"K\x01")), "reaches beyond"),
    "expanded": (tensor(ZERO, pair(LARGE, LARGE), pair(ZERO, ZERO)), "reaches beyond"),
    "overlapping": (tensor(ZERO, pair(b"K\x03", b"K\x03"), pair(b"K\x01", b"K\x01")), "beyond"),
    "huge shape": (tensor(ZERO, pair(HUGE, b"K\x01"), THREE_ONE), "no usable shape"),
    "huge product": (tensor(ZERO, pair(LARGE, LARGE), THREE_ONE), "reaches beyond"),
    "huge strides": (tensor(ZERO, TWO_THREE, pair(LARGE, LARGE)), "reaches beyond"),
    "negative offset": (tensor(MINUS, TWO_THREE, THREE_ONE), "no usable shape"),
    "negative length": (tensor(ZERO, pair(MINUS, MINUS), THREE_ONE), "no usable shape"),
    "negative stride": (tensor(ZERO, TWO_THREE, pair(MINUS, MINUS)), "no usable shape"),
    "a boolean for a length": (tensor(ZERO, pair(b"\x88", b"\x88"), THREE_ONE), "no usable"),
    "a fraction for a length": (
        tensor(ZERO, pair(b"G" + struct.pack(">d", 2.0), b"K\x03"), THREE_ONE),
        "no usable shape",
    ),
    "no shape": (tensor(ZERO, b"N", THREE_ONE), "no usable shape"),
    "fewer strides": (tensor(ZERO, TWO_THREE, b"K\x01\x85"), "no usable shape"),
    "a list of itself": (tensor(ZERO, b"]q\x00h\x00a", THREE_ONE), "no usable shape"),
    "many dimensions": (tensor(ZERO, b"(" + b"K\x01" * 99 + b"t", b")"), "no usable shape"),
    "another size": (tensor(ZERO, TWO_THREE, THREE_ONE, b"K\x07"), "24 bytes instead of 28"),
    "negative size": (tensor(ZERO, TWO_THREE, THREE_ONE, MINUS), "no usable size"),
    "huge size": (tensor(ZERO, TWO_THREE, THREE_ONE, HUGE), "no usable size"),
    "missing storage": (
        tensor(ZERO, TWO_THREE, THREE_ONE).replace(text("0"), text("../../etc/passwd")),
        "storage '../../etc/passwd' is missing",
    ),
    "no storage": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))\x89}tR.",
        "a tensor has no storage",
    ),
    "a reference to no storage": (b"\x80\x02" + text("storage") + b"\x85Q.", "is malformed"),
    "a view of a storage": (
        b"\x80\x02" + STORAGE.replace(b"%stQ", b"K\x06K\x01tQ") + b".",
        "views of storages",
    ),
    "one storage of two sizes": (
        b"\x80\x02" + STORAGE % SIX + STORAGE % b"K\x05" + b".",
        "two sizes or types",
    ),
    "a parameter of nothing": (
        b"\x80\x02ctorch._utils\n_rebuild_parameter\nN\x89}\x87R.",
        "a parameter is not a tensor",
    ),
    "few arguments": (b"\x80\x02ctorch._utils\n_rebuild_parameter\n)R.", "call in its pickle"),
    "pairs for an OrderedDict": (
        b"\x80\x02ccollections\nOrderedDict\n]\x85R.",
        "OrderedDict is malformed",
    ),
    "apply a number": (b"\x80\x02K\x01)R.", "applies what cannot be applied"),
    "apply a type": (b"\x80\x02ctorch\nFloatStorage\n)R.", "applies what cannot be applied"),
    "apply to no tuple": (b"\x80\x02ccollections\nOrderedDict\n]R.", "cannot be applied"),
    "attributes of a list": (b"\x80\x02]}b.", "sets attributes"),
    "attributes that are none": (b"\x80\x02}]b.", "sets attributes"),
    "append to a dict": (b"\x80\x02}K\x01a.", "appends to what is no list"),
    "write into a list": (b"\x80\x02]K\x01K\x02s.", "writes into what is no dict"),
    "an odd number of items": (b"\x80\x02}(K\x01u.", "writes into what is no dict"),
    "a tuple for a key": (b"\x80\x02})Ns.", "the key of a dict is no text"),
    "a key twice": (b"\x80\x02}K\x01NsK\x01Ns.", "a dict holds '1' twice"),
    "nothing there": (b"\x80\x02.", "takes what it never built"),
    "nothing to put": (b"\x80\x02q\x00.", "takes what it never built"),
    "no mark": (b"\x80\x02K\x01t.", "takes what it never built"),
    "only a mark": (b"\x80\x02(.", "takes what it never built"),
    "unknown memo": (b"\x80\x02j\xff\xff\xff\xff.", "recalls what it never built"),
    "a far memo": (b"\x80\x02Nr\xff\xff\xff\xffj\xff\xff\xff\xff.", "holds no state dict"),
    "no end": (b"\x80\x02}", "cut short"),
    "a long text": (b"\x80\x02\x8d" + b"\xff" * 8 + b".", "a text has"),
    "a long number": (b"\x80\x02\x8a\xff" + b"1" * 255 + b".", "out of range"),
    "a longer number": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "instruction LONG4"),
    "a decimal number": (b"L" + b"9" * 5000 + b"L\n.", "instruction LONG"),
    "a frame": (b"\x80\x04\x95" + b"\xff" * 8 + b"}N.", "holds no state dict"),
    "text that is none": (b"\x80\x02X\x02\x00\x00\x00\xff\xfe.", "not UTF-8"),
    "a name without end": (b"\x80\x02c" + b"a" * 300, "name is too long"),
    "a number": (b"\x80\x02K\x05.", "holds no state dict"),
    "a list": (b"\x80\x02].", "holds no state dict"),
    "no tensors": (b"\x80\x02}" + text("epoch") + b"K\x05s.", "'epoch' in its state dict is not"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_programs_are_told(tmp_path: Path, kind: str) -> None:
    program, reason = MALFORMED[kind]
    path = tmp_path / "a.bin"
    path.write_bytes(archive(program, {"0": bytes(24)}))
    started = time.perf_counter()
    with pytest.raises((WeightsMismatch, UnsupportedModel)) as caught:
        read_pickle(path)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 400
    assert time.perf_counter() - started < 2


def test_a_good_program_of_the_same_kind_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(archive(tensor(ZERO, TWO_THREE, THREE_ONE), {"0": bytes(range(24))}))
    (found,) = read_pickle(path).values()
    assert (found.shape, found.dtype, found.strides) == ((2, 3), "float32", None)
    assert value_of(found).view(torch.uint8).tolist() == torch.arange(24).view(2, 12).tolist()


@pytest.mark.no_cover  # a few lines, a hundred thousand times
@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02" + b")" * 100_000 + b".",
        b"\x80\x02)" + b"\x85" * 100_000 + b".",
        b"\x80\x02]" + b"q\x00h\x00a" * 100_000 + b".",
        b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x02}" + b"".join(b"K\x00}" for _ in range(100_000)) + b"s" * 100_000 + b".",
    ],
    ids=["wide", "deep", "into itself", "marks", "deep lists", "deep dicts"],
)
def test_deep_and_wide_programs_end(tmp_path: Path, program: bytes) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(archive(program))
    with pytest.raises(WeightsMismatch):
        read_pickle(path)


def test_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(archive(b"\x80\x02" + b"N0" * 500 + b"}."))
    monkeypatch.setattr(pickle_machine, "_MAX_STEPS", 900)
    with pytest.raises(WeightsMismatch, match="takes more than 900 steps"):
        read_pickle(path)
    monkeypatch.setattr(pickle_machine, "MAX_BYTES", 900)
    with pytest.raises(WeightsMismatch, match="more than 900 bytes"):
        read_pickle(path)


# --- damaged containers ---------------------------------------------------------------------------


def test_compressed_entries_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    program = tensor(ZERO, TWO_THREE, THREE_ONE)
    data = archive(program, {"0": bytes(10**6)}, compression=zipfile.ZIP_DEFLATED)
    assert len(data) < 10_000
    path.write_bytes(data)
    with pytest.raises(WeightsMismatch, match="in its archive is compressed"):
        read_pickle(path)


def test_entries_that_overlap_are_refused(tmp_path: Path) -> None:
    data = bytearray(archive(b"\x80\x02}.", {"0": bytes(100), "1": bytes(100)}))
    first = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)
    second = data.index(b"PK\x01\x02", first + 4)
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    with pytest.raises(WeightsMismatch, match=r"has another name inside|overlaps another"):
        read_pickle(path)


def test_entries_beyond_the_file_are_refused(tmp_path: Path) -> None:
    data = bytearray(archive(b"\x80\x02}.", {"0": bytes(100)}))
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = struct.pack("<II", 10**9, 10**9)
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    with pytest.raises(WeightsMismatch, match="overlaps another"):
        read_pickle(path)


@pytest.mark.parametrize("names", [["x/data.pkl", "x/data.pkl"], ["x/a.pkl"], []], ids=str)
def test_archives_without_one_program_are_refused(tmp_path: Path, names: list[str]) -> None:
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("padding", b"")
        for name in names:
            with warnings.catch_warnings(action="ignore"):  # about the name that is there twice
                target.writestr(name, b"\x80\x02}.")
    with pytest.raises(WeightsMismatch, match=r"no clear entry|not one of torch"):
        read_pickle(path)


def test_torchscript_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("x/data.pkl", b"\x80\x02}.")
        target.writestr("x/constants.pkl", b"\x80\x02}.")
    with pytest.raises(UnsupportedModel, match="TorchScript"):
        read_pickle(path)


def test_other_byte_orders_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("x/data.pkl", b"\x80\x02}.")
        target.writestr("x/byteorder", b"big")
    with pytest.raises(WeightsMismatch, match="not little-endian"):
        read_pickle(path)
    path.write_bytes(stream(b"\x80\x02}.").replace(b"little_endian", b"little_indian"))
    with pytest.raises(WeightsMismatch, match="not little-endian"):
        read_pickle(path)


def test_archive_with_a_large_directory_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    claim = 1 << 30
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(claim)
        file.seek(claim)
        file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, claim, 0, 0))
    with pytest.raises(WeightsMismatch, match="directory is too large"):
        read_pickle(path)


def test_every_cut_and_every_flip_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    draw = random.Random(5)
    for options in CONTAINERS.values():
        torch.save({"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2)}, path, **options)
        whole = path.read_bytes()
        for cut in sorted(draw.sample(range(len(whole)), 60)):
            path.write_bytes(whole[:cut])
            with pytest.raises(DiptychError):
                read_checkpoint([path])
        for _ in range(250):
            data = bytearray(whole)
            for _ in range(draw.choice([1, 1, 4])):
                data[draw.randrange(len(data))] = draw.randrange(256)
            path.write_bytes(data)
            with contextlib.suppress(DiptychError):
                for stored in read_checkpoint([path]).values():
                    assert 0 <= stored.offset <= len(data) - stored.span_bytes
