"""Build a network and fill it from a checkpoint: strictly, and with every number read once."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
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
    target = _dtype(dtype, device, stored)
    state: dict[str, Tensor] = {}
    for name, tensor in _read(renamed.names, stored, places):
        if check_finite and tensor.is_floating_point() and not tensor.isfinite().all():
            raise WeightsMismatch(f"{model.name}: {name} holds NaN or infinity: {FETCH_ANEW}.")
        state[name] = tensor.to(device, target if tensor.is_floating_point() else tensor.dtype)
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
    with one.file.open("rb") as first, other.file.open("rb") as second:
        return torch.equal(_tensor(one, first), _tensor(other, second))


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


# --- reading --------------------------------------------------------------------------------------


def _read(
    names: Mapping[str, str], stored: Mapping[str, StoredTensor], places: Mapping[str, _Place]
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor as the module wants it, in the order of the files."""
    order = sorted(names, key=lambda name: (stored[names[name]].file, stored[names[name]].offset))
    path: Path | None = None
    file: BufferedReader | None = None
    try:
        for name in order:
            found = stored[names[name]]
            if file is None or found.file != path:
                if file is not None:
                    file.close()
                path, file = found.file, found.file.open("rb")
            tensor = _tensor(found, file)
            # Contiguous, because a transposed view would keep its slow layout for good.
            yield name, tensor.t().contiguous() if places[name].is_transposed else tensor
    finally:
        if file is not None:
            file.close()


def _tensor(stored: StoredTensor, file: BufferedReader) -> Tensor:
    """Read one tensor into memory of its own. A map of the file would change with the file."""
    flat = torch.empty(stored.span, dtype=getattr(torch, stored.dtype))
    if stored.span:
        read_into(flat.view(torch.uint8).numpy().data, stored, file)
    if stored.strides is None or math.prod(stored.shape) == 0:
        return flat.reshape(stored.shape)
    return flat.as_strided(stored.shape, stored.strides).contiguous()


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
