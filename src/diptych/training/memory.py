"""Save memory: numbers of half the size, and activations that are computed twice."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["HALVES", "bound_kernel_cache", "checkpoint_blocks"]

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by the words of `mixed_precision`

_KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


def bound_kernel_cache() -> None:
    """Let oneDNN keep 64 kernels at a time, unless the environment says otherwise; 1,024 by itself.

    In bfloat16 on a processor each shape of a product is a kernel with room of its own, and
    captions have many lengths: a training grew by 200 MB a step until it was killed. Counts only
    before the first product of a process.
    """
    os.environ.setdefault(_KERNELS, "64")


def checkpoint_blocks(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> int:
    """Make every block of these `kinds` forget its activations (Chen et al. 2016); count them.

    Results stay the same to the bit. Without gradients nothing changes at all.
    """
    count = 0
    for child in module.modules():
        if isinstance(child, kinds):
            # In the instance, so that the network's own file stays free of it.
            object.__setattr__(child, "forward", partial(_forgetting, child.forward))
            count += 1
    return count


def _forgetting(forward: Any, *args: Any, **words: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **words)
    return checkpoint(forward, *args, use_reentrant=False, **words)
