"""Build a network and fill it from a checkpoint: strictly, and with every number read once."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping
from io import BufferedReader
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diptych.errors import BadInput, WeightsMismatch
from diptych.models.gpt2 import Gpt2Config
from diptych.models.vision_encoder_decoder import VisionEncoderDecoder, VisionEncoderDecoderConfig
from diptych.models.vit import ViTConfig
from diptych.weights.dialects import vision_encoder_decoder as dialect
from diptych.weights.files import ModelFolder, contents, read_checkpoint
from diptych.weights.rename import Renamed, backwards, forwards, reshape
from diptych.weights.tensors import FETCH_ANEW, StoredTensor, read_into

__all__ = ["build_config", "load_captioner"]

logger = logging.getLogger("diptych")

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHOWN = 5


def load_captioner(
    model: ModelFolder,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    check_finite: bool = False,
) -> VisionEncoderDecoder:
    """Build the captioner of `model`, fill it, and return it ready for inference.

    `dtype` None is the file's own, but float32 on a CPU, where halves are slow. With
    `check_finite`, a tensor that holds NaN or infinity is refused. Raises `WeightsMismatch` unless
    every tensor of the file finds its place and every place its tensor.
    """
    if not model.weights:
        raise WeightsMismatch(
            f"{model.name} has no model.safetensors or pytorch_model.bin "
            f"({contents(model.path)}): give a captioner with PyTorch weights."
        )
    device = _device(device)
    stored = read_checkpoint(model.weights)
    config, stored = _settle_head(build_config(model.config), stored, model)
    with torch.device("meta"), _Undrawn():
        module = VisionEncoderDecoder(config)
    renamed = forwards(dialect, stored)
    places = _places(module)
    _check(model, renamed, stored, places)
    reader = _Reader(device, _dtype(dtype, device, stored))
    state = reader.read({name: (stored[renamed.names[name]], places[name]) for name in places})
    if check_finite:
        _check_finite(model, state)
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval()


def build_config(config: Mapping[str, Any]) -> VisionEncoderDecoderConfig:
    """Turn the config of a `ModelFolder` into the one the networks take."""
    encoder = dict(config["encoder"])
    encoder["stem_channels"] = tuple(encoder["stem_channels"])
    return VisionEncoderDecoderConfig(
        ViTConfig(**encoder), Gpt2Config(**config["decoder"]), config["bridge"]
    )


class _Undrawn(TorchFunctionMode):
    """Leave out random start values: all come from the file.

    Drawing them on the meta device would import 800 modules of torch: 70 MB, and seconds.
    """

    _DRAWING = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        return None if func in self._DRAWING else func(*args, **(kwargs or {}))


class _Place:
    """Hold what the module wants under a name, in the words of the file."""

    def __init__(self, name: str, wanted: Tensor) -> None:
        self.name = name  # in the file
        self.is_transposed = reshape(dialect, name) == "transpose"
        shape = tuple(wanted.shape)
        self.shape = shape[::-1] if self.is_transposed else shape
        self.is_floating_point = wanted.is_floating_point()


def _places(module: VisionEncoderDecoder) -> dict[str, _Place]:
    state = module.state_dict()
    files = backwards(dialect, state)
    return {name: _Place(files[name], tensor) for name, tensor in state.items()}


# --- the head, which is often the word embeddings once more ---------------------------------------


def _settle_head(
    config: VisionEncoderDecoderConfig, stored: dict[str, StoredTensor], model: ModelFolder
) -> tuple[VisionEncoderDecoderConfig, dict[str, StoredTensor]]:
    """Decide whether the head is a matrix of its own, and drop it from `stored` where it is not."""
    head, words = (_spelled(stored, name) for name in dialect.TIED)
    if not config.decoder.tie_word_embeddings or head is None:
        return config, stored
    rest = {name: tensor for name, tensor in stored.items() if name != head}
    if words is None:
        # Some writers keep the head's name for the one matrix.
        return config, {**rest, head.replace(*dialect.TIED): stored[head]}
    if _are_equal(stored[head], stored[words]):
        return config, rest
    logger.warning(
        "%s: its config ties the head to the word embeddings, but the two differ: kept apart",
        model.name,
    )
    decoder = dataclasses.replace(config.decoder, tie_word_embeddings=False)
    return dataclasses.replace(config, decoder=decoder), stored


def _spelled(stored: Mapping[str, StoredTensor], name: str) -> str | None:
    """Return `name` as the file spells it: whoever wrapped the module put a prefix before it."""
    found = [spelling for spelling in stored if f".{spelling}".endswith(f".{name}")]
    return found[0] if len(found) == 1 else None


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.file, one.offset, one.shape, one.strides) == (
        other.file,
        other.offset,
        other.shape,
        other.strides,
    ):
        return one.dtype == other.dtype
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    reader = _Reader(torch.device("cpu"), getattr(torch, one.dtype))
    place = _Place(dialect.TIED[0], torch.empty(one.shape, device="meta"))
    found = reader.read({"one": (one, place), "other": (other, place)})
    return torch.equal(found["one"], found["other"])


# --- the check ------------------------------------------------------------------------------------


def _check(
    model: ModelFolder,
    renamed: Renamed,
    stored: Mapping[str, StoredTensor],
    places: Mapping[str, _Place],
) -> None:
    """Raise `WeightsMismatch` unless names, shapes and types all fit."""
    missing = [place.name for name, place in places.items() if name not in renamed.names]
    unexpected = [*renamed.unknown]
    unexpected += [file for name, file in renamed.names.items() if name not in places]
    wrong = []
    for name, file in renamed.names.items():
        if name in places and (reason := _misfit(stored[file], places[name])):
            wrong.append(f"{file} {reason}")
    twice = [" and ".join(files) for files in renamed.twice.values()]
    problems = [
        f"{len(found)} {what}: {', '.join(name[:120] for name in found[:_SHOWN])}"
        + (", …" if len(found) > _SHOWN else "")
        for what, found in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape or type", wrong),
            ("for the same place", twice),
        )
        if found
    ]
    if problems:
        files = ", ".join(path.name for path in model.weights[:2])
        files += ", …" if len(model.weights) > 2 else ""
        known = any(f".{name}".endswith("." + dialect.TELLTALE) for name in stored)
        kind = "" if known else f" It does not look like one: it has no {dialect.TELLTALE}."
        raise WeightsMismatch(
            f"{model.name}: the tensors in {files}, read as {dialect.NAME}, do not fit its config. "
            f"{'. '.join(problems)}.{kind} The files are incomplete, or of another model than the "
            f"config: {FETCH_ANEW}."
        )
    if renamed.dropped:
        logger.debug("%s: dropped: %s", model.name, ", ".join(renamed.dropped))


def _misfit(stored: StoredTensor, place: _Place) -> str | None:
    if stored.shape != place.shape:
        return f"is {list(stored.shape)} instead of {list(place.shape)}"
    is_floating_point = "float" in stored.dtype
    if is_floating_point != place.is_floating_point:
        return f"is {stored.dtype}"
    return None


def _check_finite(model: ModelFolder, state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise WeightsMismatch(f"{model.name}: {name} holds NaN or infinity: {FETCH_ANEW}.")


# --- reading --------------------------------------------------------------------------------------


class _Reader:
    """Read tensors into memory of their own. A map of the file would change with the file."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        # What is not kept as it is in the file passes through here: new memory for each would
        # leave holes of its size between the tensors that stay.
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def read(self, wanted: Mapping[str, tuple[StoredTensor, _Place]]) -> dict[str, Tensor]:
        """Return every tensor as the module wants it; files are read from front to back."""
        order = sorted(wanted, key=lambda name: (wanted[name][0].file, wanted[name][0].offset))
        found: dict[str, Tensor] = {}
        for path, names in groupby(order, key=lambda name: wanted[name][0].file):
            with path.open("rb") as file:
                for name in names:
                    stored, place = wanted[name]
                    found[name] = self._read(stored, place.is_transposed, file)
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


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n", 1)[0]
        raise BadInput(f"device {str(device)!r} cannot be used here: {reason}") from error
    return found


def _dtype(
    dtype: str | torch.dtype | None, device: torch.device, stored: Mapping[str, StoredTensor]
) -> torch.dtype:
    if dtype is None:
        bytes_of = Counter[str]()
        for tensor in stored.values():
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
