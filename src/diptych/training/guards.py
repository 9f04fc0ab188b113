"""Notice a run that goes wrong: no finite numbers, a loss that runs away, over-fitting."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diptych.errors import BadInput
from diptych.training.task import Validation

__all__ = ["Guard"]

logger = logging.getLogger("diptych")

_MOST_NOT_FINITE = 10  # steps in a row
_MOST_SCALINGS = 40  # the same while a scaler of fp16 looks for its scale
_RECENT = 20  # batches whose mean loss tells whether the run diverges
_FEW = 5  # the same before there are as many, for a loss that is far from the first
_RISES = 3  # steps of validation in a row that look like over-fitting


Advice = Callable[[], str]


@dataclass
class Guard:
    """Remember of a run what tells how it goes; `advice` gives what to do where it goes wrong."""

    not_finite: int = 0
    first_loss: float | None = None
    start: float | None = None  # the loss of the first batch
    recent: list[float] = field(default_factory=list)
    rises: int = 0

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Guard:
        return cls(**said)

    def leave_out(
        self, step: int, loss: float, norm: float, advice: Advice, *, scales: bool
    ) -> None:
        """Note a step whose numbers are not finite; too many in a row raise `BadInput`.

        With `scales` its gradient overflowed while the scale of the loss is looked for.
        """
        self.not_finite += 1
        if not scales:
            logger.warning("step %d is left out: its loss is %s, its gradient %s", step, loss, norm)
        if self.not_finite >= (_MOST_SCALINGS if scales else _MOST_NOT_FINITE):
            raise BadInput(
                f"loss or gradient were not finite for {self.not_finite} steps up to {step}: "
                f"{advice()}"
            )

    def watch(self, step: int, loss: float, advice: Advice) -> None:
        """Note the loss of a step; raises `BadInput` where it runs away."""
        self.not_finite = 0
        # A reward gives a loss below nothing, of which no multiple is a bound.
        self.start = max(loss, 0.0) if self.start is None else self.start
        self.recent = [*self.recent, loss][-_RECENT:]
        few = self.recent[-_FEW:]
        lately = sum(few) / len(few)
        # One batch says little of the loss, but not that little.
        if len(few) == _FEW and lately > 30 * self.start + 30:
            raise _runs_away(self.start, lately, step, advice)
        if len(self.recent) < _RECENT:
            return
        mean = sum(self.recent) / _RECENT
        if self.first_loss is None:
            self.first_loss = min(mean, 3 * self.start + 1)
        if mean > 3 * self.first_loss and mean > self.first_loss + 1:
            raise _runs_away(self.first_loss, mean, step, advice)

    def sees_overfitting(self, before: Validation, found: Validation, best: Validation) -> bool:
        """Tell whether validation has risen for a while and training has not."""
        self.rises = self.rises + 1 if found.merit < before.merit else 0
        first = self.first_loss  # unknown for the first batches
        falls = first is not None and sum(self.recent) / _RECENT < first
        is_worse = best.merit - found.merit > 0.02 * abs(best.merit)
        return falls and self.rises >= _RISES and is_worse


def _runs_away(first: float, now: float, step: int, advice: Advice) -> BadInput:
    return BadInput(f"the loss rose from {first:.4g} to {now:.4g} by step {step}: {advice()}")
