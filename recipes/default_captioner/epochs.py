"""Go through the epochs of a stage: their chance, their learning rate, and what is kept of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diptych.training.replay import set_rate
from diptych.training.state import Average, Log, Pace, learning_rate, load_state, save_state


@dataclass(frozen=True, slots=True)
class Epoch:
    """Hold what an epoch draws from; `torch.manual_seed` is set by it too."""

    chance: torch.Generator  # on the CPU
    draws: torch.Generator  # on the device


class Epochs:
    """Go through the epochs of a stage, on from its last state.

    All chance of an epoch follows from its number: a resumed run equals an unbroken one. `examples`
    is how many there are in an epoch, `salt` tells the seeds of stages apart. With `best` the best
    weights so far go to a file of that name.
    """

    def __init__(
        self,
        stage: str,
        config: Mapping[str, Any],
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        examples: int,
        salt: int = 1000,
        best: str | None = None,
    ) -> None:
        options, output = config[stage], Path(config["output"])
        self.average = Average(module, options["ema_decay"])
        self.log = Log(output / f"{stage}.jsonl")
        self.per_epoch = examples // options["batch_size"]
        self._stage, self._options, self._module, self._optimizer = (
            *(stage, options, module, optimizer),
        )
        self._state = output / f"{stage}.safetensors"
        self._best_file = None if best is None else output / f"{best}.safetensors"
        self._seed, self._device = config["seed"] * salt, next(module.parameters()).device
        self._number, self._best, spent = -1, -1.0, 0.0
        self.is_new = not self._state.exists()
        if not self.is_new:
            progress = load_state(self._state, module, self.average, optimizer)
            self._number, spent = progress["epoch"], progress.get("spent", 0.0)
            self._best = progress.get("best", self._best)
        self._pace = Pace(options["epochs"] * self.per_epoch, options.get("seconds"), spent)
        self._is_over = self._pace.over(self._done)

    @property
    def _done(self) -> int:
        """Return the steps of all epochs up to this one."""
        return (self._number + 1) * self.per_epoch

    def __iter__(self) -> Iterator[Epoch]:
        while not self._is_over:
            self._number += 1
            seed = self._seed + self._number
            torch.manual_seed(seed)  # of dropout, and of words that are drawn
            yield Epoch(
                torch.Generator().manual_seed(seed),
                torch.Generator(self._device).manual_seed(seed),
            )

    def steps(self, peaks: Mapping[str, float] | None = None) -> Iterator[int]:
        """Yield the numbers of the steps of an epoch; sets the rate before, averages after each.

        `peaks` are those of the optimizer's groups, where they have a `share`.
        """
        first, peak = self._number * self.per_epoch, self._options["learning_rate"]
        for index in range(self.per_epoch):
            total = self._pace.total(first + index)
            rate = learning_rate(first + index, total, self._options["warmup_steps"])
            set_rate(self._optimizer, rate if peaks else peak * rate, peaks)
            yield index
            self.average.update(self._module)
        self._is_over = self._pace.over(self._done)

    def is_due(self) -> bool:
        """Tell whether to validate after this epoch: every few, and the last."""
        return self._is_over or (self._number + 1) % self._options["validate_every"] == 0

    def keep(self, merit: float | None = None, **row: Any) -> None:
        """Log `row` and keep the state; where `merit` is the highest so far, as the best too."""
        self.log.write(stage=self._stage, epoch=self._number, **row)
        is_best = merit is not None and merit > self._best
        if merit is not None:
            self._best = max(self._best, merit)
        progress = {"epoch": self._number, "best": self._best, "spent": self._pace.spent}
        # The best goes first: killed between the two, the epoch is repeated, and no best is lost.
        if is_best and self._best_file is not None:
            save_state(self._best_file, *self._kept, progress)
        save_state(self._state, *self._kept, progress)

    def begin(self, merit: float, **row: Any) -> None:
        """Let what there is before the first epoch be the best so far."""
        self._best = max(self._best, merit)
        if self.is_new and self._best_file is not None:
            self.log.write(stage=self._stage, epoch=self._number, **row)
            save_state(self._best_file, *self._kept, {"epoch": self._number})

    @property
    def _kept(self) -> tuple[nn.Module, Average, torch.optim.Optimizer]:
        return self._module, self.average, self._optimizer
