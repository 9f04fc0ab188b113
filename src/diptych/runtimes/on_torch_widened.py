"""Compute in float32 with weights that stay in 16 bits, on processors that multiply no others.

Where a processor has no instructions for bfloat16 or float16, torch goes through such numbers one
by one, tens of times slower than through float32. Weights are widened there, each just before its
layer: memory stays that of 16 bits, and results are closer to float32 than 16-bit arithmetic is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["computed_in", "multiplies", "widening"]

_NARROW = (torch.bfloat16, torch.float16)
# The functions that take a network's parameters; all other numbers are float32 by then.
_LAYERS = frozenset({F.linear, F.conv2d, F.group_norm, F.layer_norm})


def computed_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return what to compute in where weights are `dtype`: float32, if the CPU lacks the other."""
    if device.type != "cpu" or dtype not in _NARROW or multiplies(dtype):
        return dtype
    return torch.float32


def multiplies(dtype: torch.dtype) -> bool:
    """Tell whether torch has instructions of this processor for a 16-bit `dtype`."""
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    try:
        return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())
    except (AttributeError, RuntimeError):
        return True  # torch keeps the question to itself, and may stop answering: leave it to torch


def widening(dtype: torch.dtype, computed: torch.dtype) -> AbstractContextManager[Any]:
    """Return a context for running a module of `dtype` on tensors of `computed`."""
    return nullcontext() if dtype == computed else _Widening()


class _Widening(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding:
            return func(*args, **kwargs).float()  # of the rows, not of the whole table
        if func in _LAYERS:
            args = [_wide(each) for each in args]
            kwargs = {name: _wide(each) for name, each in kwargs.items()}
        return func(*args, **kwargs)


def _wide(value: Any) -> Any:
    is_narrow = isinstance(value, Tensor) and value.dtype in _NARROW
    return value.float() if is_narrow else value
