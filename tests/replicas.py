"""What stands for a CUDA graph where there is no GPU."""

from __future__ import annotations

from typing import Any


class Replica:
    """Read inputs of its own and give the same tensors at each run; run nothing until then."""

    made = 0

    def __init__(self, call: Any, inputs: Any) -> None:
        type(self).made += 1
        self.call = call
        self.inputs = tuple(each.clone() for each in inputs)
        self.outputs: Any = None

    def first(self) -> Any:
        found = self.call(*self.inputs)
        if self.outputs is None:
            self.outputs = tuple(each.clone() for each in found)
        for mine, made in zip(self.outputs, found, strict=True):
            mine.copy_(made)
        return self.outputs

    def replay(self, inputs: Any) -> Any:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        return self.first()
