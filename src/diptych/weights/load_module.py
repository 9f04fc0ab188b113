"""Build networks without numbers and fill them from files: what all checkpoints share."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diptych.errors import BadInput, WeightsMismatch
from diptych.weights.rename import Dialect, Renamed, backwards, forwards, pieces, reshape
from diptych.weights.tensors import FETCH_ANEW, StoredTensor, read_into

__all__ = ["Place", "Reader", "Source", "as_device", "as_dtype", "fill", "unfilled"]

logger = logging.getLogger("diptych")

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Source:
    """Say where the tensors of one network come from, for reading them and for messages."""

    model: str
    dialect: Dialect
    files: Sequence[Path]
    stored: Mapping[str, StoredTensor]
    prefix: str = ""  # left out of the names in `stored`


@contextmanager
def unfilled() -> Iterator[None]:
    """Let modules be built that hold no numbers yet."""
    with torch.device("meta"), _Undrawn():
        yield


def fill(module: nn.Module, source: Source, reader: Reader, *, check_finite: bool = False) -> None:
    """Read every parameter of `module`, strictly.

    Raises `WeightsMismatch` unless every tensor of the source finds its place and every place its
    tensor, and with `check_finite` for one that holds NaN or infinity.
    """
    renamed = forwards(source.dialect, source.stored)
    places = _places(module, source.dialect)
    _check(source, renamed, places)
    state = reader.read(
        {name: (source.stored[renamed.names[name]], place) for name, place in places.items()}
    )
    if check_finite:
        _check_finite(source.model, state)
    module.load_state_dict(state, strict=True, assign=True)


class _Undrawn(TorchFunctionMode):
    """Leave out random start values: all come from the file.

    Drawing them on the meta device would import 800 modules of torch: 70 MB, and seconds.
    """

    _DRAWING = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        return None if func in self._DRAWING else func(*args, **(kwargs or {}))


class Place:
    """Hold what the module wants under a name, in the words of the file."""

    def __init__(self, dialect: Dialect, file: str, name: str, wanted: Tensor) -> None:
        self.name = file
        self._how = reshape(dialect, file)
        together = pieces(dialect, file)
        self._count = max(len(together), 1)
        self._index = together.index(name) if name in together else 0
        rows, *rest = tuple(wanted.shape) or (1,)
        shape = (rows * self._count, *rest) if wanted.shape else ()
        self.is_transposed = self._how == "transpose"
        self.shape = shape[::-1] if self.is_transposed else shape
        self.is_floating_point = wanted.is_floating_point()

    def flat(self, stored: StoredTensor) -> StoredTensor:
        """Return a tensor of the file without the axes that the module does without."""
        return stored.squeezed() if self._how == "squeeze" else stored

    def cut(self, stored: StoredTensor) -> StoredTensor:
        """Return what of a tensor of the file is for this place."""
        flat = self.flat(stored)
        return flat if self._count == 1 else flat.piece(self._index, self._count)


def _places(module: nn.Module, dialect: Dialect) -> dict[str, Place]:
    state = module.state_dict()
    files = backwards(dialect, state)
    return {name: Place(dialect, files[name], name, tensor) for name, tensor in state.items()}


# --- the check ------------------------------------------------------------------------------------


def _check(source: Source, renamed: Renamed, places: Mapping[str, Place]) -> None:
    """Raise `WeightsMismatch` unless names, shapes and types all fit."""
    missing = [place.name for name, place in places.items() if name not in renamed.names]
    unexpected = [*renamed.unknown]
    unexpected += [file for name, file in renamed.names.items() if name not in places]
    wrong = []
    for name, file in renamed.names.items():
        if name in places and (reason := _misfit(source.stored[file], places[name])):
            wrong.append(f"{file} {reason}")
    twice = [f" and {source.prefix}".join(files) for files in renamed.twice.values()]
    problems = [
        _told(what, source.prefix, found)
        for what, found in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape or type", wrong),
            ("for the same place", twice),
        )
        if found
    ]
    if problems:
        files = ", ".join(path.name for path in source.files[:2])
        files += ", …" if len(source.files) > 2 else ""
        telltale = source.dialect.TELLTALE
        known = any(f".{name}".endswith("." + telltale) for name in source.stored)
        kind = "" if known else f" It does not look like one: it has no {telltale}."
        raise WeightsMismatch(
            f"{source.model}: the tensors in {files}, read as {source.dialect.NAME}, do not fit "
            f"its config. {'. '.join(problems)}.{kind} The files are incomplete, or of another "
            f"model than the config: {FETCH_ANEW}."
        )
    if renamed.dropped:
        logger.debug("%s: dropped: %s", source.model, ", ".join(renamed.dropped))


def _told(what: str, prefix: str, found: Iterable[str]) -> str:
    names = list(dict.fromkeys(found))
    shown = ", ".join(f"{prefix}{name}"[:120] for name in names[:_SHOWN])
    return f"{len(names)} {what}: {shown}" + (", …" if len(names) > _SHOWN else "")


def _misfit(stored: StoredTensor, place: Place) -> str | None:
    if place.flat(stored).shape != place.shape:
        return f"is {list(stored.shape)} instead of {list(place.shape)}"
    is_floating_point = "float" in stored.dtype
    if is_floating_point != place.is_floating_point:
        return f"is {stored.dtype}"
    return None


def _check_finite(model: str, state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise WeightsMismatch(f"{model}: {name} holds NaN or infinity: {FETCH_ANEW}.")


# --- reading --------------------------------------------------------------------------------------


class Reader:
    """Read tensors into memory of their own. A map of the file would change with the file."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        # What is not kept as it is in the file passes through here: new memory for each would
        # leave holes of its size between the tensors that stay.
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def read(self, wanted: Mapping[str, tuple[StoredTensor, Place]]) -> dict[str, Tensor]:
        """Return every tensor as the module wants it; files are read from front to back."""
        order = sorted(wanted, key=lambda name: (wanted[name][0].file, wanted[name][0].offset))
        found: dict[str, Tensor] = {}
        for path, names in groupby(order, key=lambda name: wanted[name][0].file):
            with path.open("rb") as file:
                for name in names:
                    stored, place = wanted[name]
                    found[name] = self._read(place.cut(stored), place.is_transposed, file)
        return found

    def _read(self, stored: StoredTensor, is_transposed: bool, file: BufferedReader) -> Tensor:
        own = getattr(torch, stored.dtype)
        target = self._dtype if own.is_floating_point else own
        is_as_stored = not is_transposed and stored.strides is None and target == own
        if is_as_stored and self._device.type == "cpu":
            return _filled(torch.empty(stored.shape, dtype=own), stored, file)
        if len(self._scratch) < stored.span_bytes:
            self._scratch = torch.empty(stored.span_bytes, dtype=torch.uint8)
        source = _filled(self._scratch[: stored.span_bytes].view(own), stored, file)
        if stored.strides is None:
            source = source.view(stored.shape)
        else:
            source = source.as_strided(stored.shape, stored.strides)
        source = source.t() if is_transposed else source
        # Contiguous, because a transposed view would keep its slow layout for good.
        return torch.empty(source.shape, dtype=target, device=self._device).copy_(source)


def _filled(tensor: Tensor, stored: StoredTensor, file: BufferedReader) -> Tensor:
    if tensor.numel():
        read_into(tensor.view(-1).view(torch.uint8).numpy().data, stored, file)
    return tensor


# --- device and dtype -----------------------------------------------------------------------------


def as_device(device: str | torch.device) -> torch.device:
    """Return a device that can be used here, else `BadInput`."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = re.split(r"(?<=\.)\s", str(error), maxsplit=1)[0]  # some go on for a page
        raise BadInput(f"device {str(device)!r} cannot be used here: {reason}") from error
    return found


def as_dtype(
    dtype: str | torch.dtype | None, device: torch.device, stored: Iterable[StoredTensor]
) -> torch.dtype:
    """Return the type to load as: None is that of most numbers, but float32 on a CPU."""
    if dtype is None:
        bytes_of = Counter[str]()
        for tensor in stored:
            if tensor.dtype in _DTYPES:
                bytes_of[tensor.dtype] += tensor.span_bytes
        if device.type == "cpu" or not bytes_of:
            return torch.float32
        return _DTYPES[bytes_of.most_common(1)[0][0]]
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in _DTYPES.values():
        raise BadInput(f"dtype is {str(dtype)!r}: give {', '.join(_DTYPES)}.")
    assert found is not None
    return found
