"""Share one training step between processes: each computes its rows, gradients are averaged.

Processes of one thread each, rather than one of many threads: on a machine that others use too,
threads wait for one another at every operation, processes once a step.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["Workers"]


class Workers:
    """Join the other processes that `torchrun` started; alone without it."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.count > 1:
            dist.init_process_group("gloo" if not torch.cuda.is_available() else "nccl")

    @property
    def leads(self) -> bool:
        """Tell whether this process writes files and logs."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """Return the rows of a batch that are this process's; all get equally many."""
        if rows % self.count:
            raise ValueError(f"a batch of {rows} cannot be shared evenly by {self.count} processes")
        each = rows // self.count
        return slice(self.rank * each, (self.rank + 1) * each)

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients over all processes, in one message."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.count
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def close(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()
