"""Launch a training step as one CUDA graph: a small network waits for Python, not for the GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from diptych.runtimes.on_torch_recorded import Recording

__all__ = ["Replay", "set_rate"]

Step = Callable[..., tuple[Tensor, ...]]
_EAGER = 3  # steps as they are, before one is recorded: they choose kernels and make states


class Replay:
    """Record steps that share memory; on a processor, and where not `enabled`, leave them be.

    A recorded step has to be a function of the tensors it is given, of what lies in place
    (weights, states, a learning rate in a tensor) and of the default generator, and has to ask
    nothing of the GPU on its way. It is recorded once for every set of shapes. Steps that hand
    tensors on to the next one are to be called in turn.
    """

    def __init__(self, device: torch.device | str, *, enabled: bool = True) -> None:
        self.enabled = enabled and torch.device(device).type == "cuda"
        if self.enabled:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, step: Step) -> Step:
        """Return `step`, recorded at its fourth call; the next call overwrites what it returned."""
        if not self.enabled:
            return step
        calls: dict[tuple[torch.Size, ...], int] = {}
        recorded: dict[tuple[torch.Size, ...], Recording] = {}

        def replayed(*inputs: Tensor) -> tuple[Tensor, ...]:
            shapes = tuple(each.shape for each in inputs)
            calls[shapes] = calls.get(shapes, 0) + 1
            if calls[shapes] <= _EAGER:
                return self._eager(step, inputs)
            if shapes in recorded:
                return recorded[shapes].replay(inputs)
            recorded[shapes] = Recording(step, inputs, self._pool, self._stream)
            return recorded[shapes].first()

        return replayed

    def _eager(self, step: Step, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = step(*inputs)
        current.wait_stream(self._stream)
        return outputs


def set_rate(
    optimizer: torch.optim.Optimizer, rate: float, peaks: Mapping[str, float] | None = None
) -> None:
    """Set every group's learning rate, in place where it is a tensor.

    With `peaks` a group's `share` names its own peak there, which `rate` is a share of.
    """
    for group in optimizer.param_groups:
        value = rate * peaks[group["share"]] if peaks else rate
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value
