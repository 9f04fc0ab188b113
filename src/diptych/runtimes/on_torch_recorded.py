"""Launch a network as one CUDA graph: a GPU waits for a thousand launches otherwise.

A UNet of Stable Diffusion is some 700 kernels a step, and Python needs longer to launch them than
an NVIDIA H100 to run them. Once recorded they are launched together, and the numbers stay the same.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diptych.models.lora import LowRank

__all__ = ["RecordedNetwork", "Recording", "has_room", "laid_out", "warn"]

logger = logging.getLogger("diptych")

Call = Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, ...]]
_EAGER = 2  # calls of a shape as they are: they choose kernels, and some pictures are one of a kind
_MOST = 4  # shapes that are kept
_recording = threading.Lock()
_ROOM = 4 << 30  # free bytes of a card below which nothing is recorded: a graph keeps its room


class Recording:
    """Hold one CUDA graph of `call`, the tensors it reads and the tensors it writes.

    `call` has to be a function of `inputs` and of what lies in place, and has to ask nothing of
    the GPU on its way.
    """

    def __init__(
        self,
        call: Callable[..., tuple[Tensor, ...]],
        inputs: tuple[Tensor, ...],
        pool: Any = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self._inputs = tuple(each.clone() for each in inputs)
        self._graph = torch.cuda.CUDAGraph()
        device = self._inputs[0].device
        # On a stream of this card: what ran on another would not be recorded, and never run again.
        stream = stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Other threads may go on with their own work, but for recording.
        recording = torch.cuda.graph(
            self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        )
        current = torch.cuda.current_stream(device)
        try:
            with _recording, torch.cuda.device(device), recording:
                self._outputs = call(*self._inputs)
        except BaseException:
            torch.cuda.set_stream(current)  # which a recording that fails leaves to its own
            raise

    def first(self) -> tuple[Tensor, ...]:
        """Run it with the inputs it was recorded from, which are in place already."""
        self._graph.replay()
        return self._outputs

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run it with other inputs of the same shapes; the next call overwrites what it returns."""
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._outputs


class RecordedNetwork:
    """Stand before the `call` of one network and record it, shape by shape, at the third call.

    What was recorded reads weights where they lay. It is forgotten as soon as they lie elsewhere,
    a LoRA was put in or taken out, or blocks were compiled. Calls with numbers among their
    arguments, or in autocast, run as they are, as all do where recording fails.
    """

    def __init__(self, call: Call, record: Callable[..., Any] = Recording) -> None:
        self._call, self._record = call, record
        self._recorded: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._calls: Counter[tuple[Any, ...]] = Counter()
        self._state: list[Any] = []
        self._place: tuple[Any, ...] = ()  # pool and stream of all recordings, which share them
        self._fails = False

    def __call__(self, module: nn.Module, arrays: Mapping[str, Any]) -> tuple[Tensor, ...]:
        given = {name: each for name, each in arrays.items() if each is not None}
        if (
            self._fails
            or not all(isinstance(each, Tensor) for each in given.values())
            or _is_cast(module)
        ):
            return self._call(module, arrays)
        if (state := laid_out(module)) != self._state:
            self.forget()
            self._state = state
        tensors = tuple(given.values())
        key = tuple((name, each.shape, each.dtype, each.stride()) for name, each in given.items())
        if key in self._recorded:
            self._recorded.move_to_end(key)
            return _own(self._recorded[key].replay(tensors))
        self._calls[key] += 1
        if self._calls[key] <= _EAGER or not has_room(tensors[0].device):
            return self._call(module, arrays)
        return self._first(module, tuple(given), tensors, key)

    def forget(self) -> None:
        """Give back all that is recorded."""
        self._recorded.clear()
        self._calls.clear()
        self._place = ()

    def _first(
        self,
        module: nn.Module,
        names: tuple[str, ...],
        tensors: tuple[Tensor, ...],
        key: tuple[Any, ...],
    ) -> tuple[Tensor, ...]:
        def call(*inputs: Tensor) -> tuple[Tensor, ...]:
            return self._call(module, dict(zip(names, inputs, strict=True)))

        while len(self._recorded) >= _MOST:
            self._recorded.popitem(last=False)
        if not self._place and tensors[0].is_cuda:
            stream = torch.cuda.Stream(tensors[0].device)  # type: ignore[no-untyped-call]
            self._place = (torch.cuda.graph_pool_handle(), stream)
        try:
            recording = self._record(call, tensors, *self._place)
        except RuntimeError as error:
            warn(error)
            self._fails = True
            self.forget()
            return call(*tensors)
        self._recorded[key] = recording
        return _own(recording.first())


def _own(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copy what the next call would write over."""
    return tuple(each.clone() for each in outputs)


def warn(error: RuntimeError) -> None:
    """Say that calls run as they are, and why."""
    reason = str(error).partition("\n")[0][:200]
    logger.warning("no CUDA graph could be recorded, all runs without: %s", reason)


def _is_cast(module: nn.Module) -> bool:
    # Compiled for graphs of its own, a module has another `predict` in its place.
    return torch.is_autocast_enabled("cuda") or "predict" in vars(module)


def has_room(device: torch.device) -> bool:
    """Tell whether a card has memory to spare: a graph keeps its own."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return (
        int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) > _ROOM
    )


def laid_out(module: nn.Module) -> list[Any]:
    """Say where all weights lie, what else a graph holds as it was, and what is compiled.

    A third of a millisecond for a UNet of Stable Diffusion, while the card computes.
    """
    found: list[Any] = []
    _look(module, found)
    return found


def _look(module: nn.Module, found: list[Any]) -> None:
    found += (type(module), module._compiled_call_impl)
    found += [each if each is None else each.data_ptr() for each in module._parameters.values()]
    if isinstance(module, LowRank):
        found.append(module.scale)
    for child in module._modules.values():
        if child is not None:
            _look(child, found)
