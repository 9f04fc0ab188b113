"""Put networks out of the way while they wait: what is encoded already needs them no more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from diptych.weights.generator_files import GeneratorFolder
from diptych.weights.load_generator import load_generator

__all__ = ["Resting"]


class Resting:
    """Hold networks of a generator that work now and then, and that no training changes.

    On a GPU they wait in main memory. On a processor their memory is given back, and they are read
    from the checkpoint again.
    """

    def __init__(
        self, model: GeneratorFolder, modules: Mapping[str, nn.Module], device: torch.device
    ) -> None:
        self._model, self._modules, self._device = model, modules, device
        self._asleep: dict[str, torch.dtype] = {}

    def rest(self) -> None:
        """Let go of the networks until `wake`."""
        place = {"cuda": "cpu", "cpu": "meta"}.get(self._device.type)
        for name, module in self._modules.items():
            if place is not None and name not in self._asleep:
                self._asleep[name] = next(module.parameters()).dtype
                module.to(place)

    def wake(self, *names: str) -> None:
        """Bring some back, or all without names, as they were."""
        chosen = self._asleep.keys() & names if names else {*self._asleep}
        wanted = {name: self._asleep.pop(name) for name in chosen}
        if wanted and self._device.type == "cpu":
            anew = load_generator(self._model, dtype="float32", only=wanted.keys())
            for name, dtype in wanted.items():
                state = anew.pop(name).to(dtype).state_dict()
                self._modules[name].load_state_dict(state, assign=True)
                self._modules[name].requires_grad_(False)
        for name in wanted:
            self._modules[name].to(self._device)
