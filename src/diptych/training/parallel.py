"""Share one training step between processes: each computes its rows, gradients are averaged.

Processes of one thread each, rather than one of many threads: on a machine that others use too,
threads wait for one another at every operation, processes once a step.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["Workers"]


class Workers:
    """Join the other processes that `torchrun` started; alone without it."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.count > 1:
            _end_with_the_parent()
            dist.init_process_group("gloo" if not torch.cuda.is_available() else "nccl")

    @classmethod
    def alone(cls) -> Workers:
        """Return one process that has no others, whatever the environment says."""
        workers = cls.__new__(cls)
        workers.count, workers.rank = 1, 0
        return workers

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

    def lightest_share(self, weights: Sequence[float]) -> set[int]:
        """Return the indices of this process's part of work whose pieces take `weights`."""
        loads, mine = [0.0] * self.count, set()
        for index in sorted(range(len(weights)), key=lambda i: -weights[i]):
            lightest = loads.index(min(loads))
            loads[lightest] += weights[index]
            if lightest == self.rank:
                mine.add(index)
        return mine

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in one message."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        if dist.get_backend() == "nccl":  # it sends what is on a GPU only
            flat = flat.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients over all processes, in one message."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.add_up(gradients)
        torch._foreach_div_(gradients, self.count)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def close(self) -> None:
        if self.count > 1:
            dist.destroy_process_group()


_SIGNAL_OF_PARENT = 1  # PR_SET_PDEATHSIG in Linux' prctl.h


def _end_with_the_parent() -> None:
    """Ask Linux to end this process when `torchrun` is killed, which has no time to do so.

    It starts each process in a session of its own, so that killing the group leaves them at work.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SIGNAL_OF_PARENT, signal.SIGTERM, 0, 0, 0)
