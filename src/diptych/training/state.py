"""Keep what training needs to go on where it stopped: weights, averages, optimizer, progress."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class Tensors(Protocol):
    """Hold tensors by name, as a module does."""

    def state_dict(self) -> Mapping[str, Tensor]: ...


class Average:
    """Follow a module's weights and buffers by an exponential moving average."""

    def __init__(self, module: Tensors, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.tensors = {name: value.clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: Tensors) -> None:
        # The young average forgets faster, else the random start would linger in it.
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        values = module.state_dict()
        moving = [name for name, value in values.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.tensors[name] for name in moving], [values[name] for name in moving], 1 - decay
        )
        for name in values.keys() - set(moving):
            self.tensors[name].copy_(values[name])

    @contextmanager
    def swapped(self, module: Tensors) -> Iterator[None]:
        """Put the average into `module` for a while, and what was there back afterwards."""
        kept = {name: value.detach().clone() for name, value in module.state_dict().items()}
        _copy(self.tensors, module)
        try:
            yield
        finally:
            _copy(kept, module)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], module: Tensors) -> None:
    for name, value in module.state_dict().items():
        value.copy_(source[name])


def save_state(
    path: Path,
    module: nn.Module,
    average: Average,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
) -> None:
    """Write everything into one safetensors file, replacing the former one in one step."""
    tensors: dict[str, Tensor] = {}
    for prefix, named in (("module", module.state_dict()), ("average", average.tensors)):
        tensors |= {f"{prefix}.{name}": value for name, value in named.items()}
    packed_optimizer = pack_optimizer(optimizer)
    tensors |= {f"optimizer.{name}": value for name, value in packed_optimizer.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    note = json.dumps({**progress, "average_steps": average.steps})
    packed = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    save_file(packed, partial, {"progress": note})
    partial.replace(path)


def load_state(
    path: Path, module: nn.Module, average: Average, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Read the file back into the three objects and return the progress."""
    groups: dict[str, dict[str, Tensor]] = {"module": {}, "average": {}, "optimizer": {}}
    with safe_open(path, "pt") as file:
        progress: dict[str, Any] = json.loads(file.metadata()["progress"])
        for key in file.keys():
            prefix, name = key.split(".", 1)
            groups[prefix][name] = file.get_tensor(key)
    module.load_state_dict(groups["module"])
    average.tensors = {k: v.to(average.tensors[k].device) for k, v in groups["average"].items()}
    average.steps = progress["average_steps"]
    unpack_optimizer(optimizer, groups["optimizer"])
    return progress


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what an optimizer remembers, by the number of the parameter and a word."""
    # Not from its `state_dict`, in which 8-bit optimizers hide their numbers from FSDP.
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def unpack_optimizer(optimizer: torch.optim.Optimizer, packed: Mapping[str, Tensor]) -> None:
    """Give an optimizer back what `pack_optimizer` took from one of the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    parameters = _parameters(optimizer)
    for key, value in packed.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = _fitted(value, parameters[int(index)])
    whole = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _fitted(value: Tensor, like: nn.Parameter) -> Tensor | int:
    if value.dtype == torch.int64 and value.ndim == 0:
        return int(value)  # a count of steps
    if value.shape != like.shape:
        return value
    # The fused optimizer wants its averages laid out in memory as the parameter is.
    return torch.empty_like(like, dtype=value.dtype).copy_(value).detach()


def read_average(path: Path) -> dict[str, Tensor]:
    """Return the averaged weights of a state file."""
    with safe_open(path, "pt") as file:
        return {
            key.removeprefix("average."): file.get_tensor(key)
            for key in file.keys()
            if key.startswith("average.")
        }


def learning_rate(step: int, total: int, warmup: int) -> float:
    """Return the share of the peak rate: linear warm-up, then a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


class Pace:
    """Say how many steps a stage has: a set number, or what the clock allows.

    With `seconds` the number is what the steps so far foretell, so that a learning rate that ends
    with the stage ends with the time it was given. Such a run cannot be repeated to the digit.
    """

    def __init__(self, steps: int, seconds: float | None = None, spent: float = 0.0) -> None:
        self._steps, self._seconds, self._start = steps, seconds, time.time() - spent

    @property
    def spent(self) -> float:
        """Return the seconds of this stage, those before a restart among them."""
        return time.time() - self._start

    def total(self, step: int) -> int:
        """Return how many steps the stage has in all, as seen after `step` of them."""
        if self._seconds is None:
            return self._steps
        if self.spent >= self._seconds:
            return step
        return max(step + 1, round(step * self._seconds / max(self.spent, 1e-3)))

    def over(self, step: int) -> bool:
        """Tell whether the stage has no more than `step` steps."""
        return step >= self.total(step)


def decayed(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, **group: Any
) -> list[Any]:
    """Split parameters into those that decay (matrices) and those that do not."""
    named = list(named)
    matrix = [p for _, p in named if p.ndim > 1]
    rest = [p for _, p in named if p.ndim <= 1]
    return [
        {"params": matrix, "weight_decay": weight_decay, **group},
        {"params": rest, "weight_decay": 0.0, **group},
    ]


class Log:
    """Write one JSON line a row, to a file and to stderr."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.start = path, time.time()

    def write(self, **row: Any) -> None:
        line = json.dumps({"seconds": round(time.time() - self.start, 1), **row})
        with self.path.open("a") as file:
            file.write(line + "\n")
        sys.stderr.write(line + "\n")
