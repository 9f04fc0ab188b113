"""Save memory: numbers of half the size, and activations that are computed twice."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["HALVES", "checkpoint_blocks"]

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by the words of `mixed_precision`


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
