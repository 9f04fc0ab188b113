"""Make optimizers and learning rates from options."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diptych.errors import BadInput
from diptych.training.muon import Muon
from diptych.training.options import TrainOptions
from diptych.training.parallel import Workers

__all__ = ["Group", "learning_rate_factor", "make_optimizer", "set_learning_rate"]

_BETAS, _EPS = (0.9, 0.999), 1e-8
# What is no matrix between layers, of all networks that learn: Muon leaves it to Adam.
_PLAIN = ("conv_in", "conv_out", "embedding", "wte", "wpe", "lm_head", ".vectors")
_LAST_POLYNOMIAL = 1e-7  # the rate at which diffusers' polynomial ends


@dataclass(frozen=True, slots=True)
class Group:
    """Hold parameters that learn at one peak rate."""

    parameters: Mapping[str, nn.Parameter]
    learning_rate: float


def make_optimizer(
    groups: Sequence[Group], options: TrainOptions, workers: Workers
) -> torch.optim.Optimizer:
    """Make the optimizer of a run; each of its groups remembers its peak rate.

    Raises `BadInput` for 8-bit states without bitsandbytes, and for two rates with Muon.
    """
    if options.optimizer == "muon":
        if len({group.learning_rate for group in groups}) > 1:
            raise BadInput("muon takes one learning rate: leave text_encoder_learning_rate out")
        named = [pair for group in groups for pair in group.parameters.items()]
        optimizer: torch.optim.Optimizer = Muon(
            named,
            groups[0].learning_rate,
            weight_decay=options.weight_decay,
            plain=_PLAIN,
            workers=workers,
        )
    else:
        made = [
            {"params": [*group.parameters.values()], "lr": group.learning_rate} for group in groups
        ]
        kind: Any = torch.optim.AdamW if options.optimizer == "adamw" else _adamw_8bit()
        optimizer = kind(made, betas=_BETAS, eps=_EPS, weight_decay=options.weight_decay)
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return optimizer


def _adamw_8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise BadInput(
            "optimizer='adamw_8bit' needs the package bitsandbytes: pip install bitsandbytes"
        ) from error
    return AdamW8bit


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Make every group learn at `factor` times its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def learning_rate_factor(name: str, step: int, total: int, warmup: int, peak: float) -> float:
    """Return the share of the peak rate at `step`, as diffusers' `get_scheduler` gives it.

    Source: diffusers 0.42 `optimization.py`; a constant rate warms up too.
    """
    if step < warmup:
        return step / warmup
    if name.startswith("constant"):
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    if name == "linear":
        return max(0.0, 1 - progress)
    if name == "cosine":
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    last = min(_LAST_POLYNOMIAL, peak)
    return ((peak - last) * (1 - min(progress, 1.0)) + last) / peak
