"""Say what the loop needs to know of what is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from diptych.training.optimizers import Group
from diptych.training.workplace import Workplace

__all__ = ["Task", "Validation"]


@dataclass(frozen=True, slots=True)
class Validation:
    """Hold what held-out data says: `loss`, further numbers, and what is shown beside them.

    The best of several has the highest `merit`.
    """

    loss: float
    parts: Mapping[str, float]
    merit: float
    shown: Mapping[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """Say what is learned."""

    groups: Sequence[Group]
    place: Workplace
    batches_per_epoch: int

    def rate(self, step: int) -> float:
        """Return what the learning rate is multiplied by at `step`, for phases of a run."""
        ...

    def losses(self, number: int, rows: slice) -> Tensor:
        """Return what each of these rows of batch `number` adds to its loss.

        The loss of the batch is the sum over all its rows, by `train_batch_size`.
        """
        ...

    def validate(self) -> Validation | None:
        """Measure the weights as they are; None where nothing is held out."""
        ...

    def sample(self, step: int) -> None:
        """Show what the weights can do."""
        ...

    def finish(self) -> list[Path]:
        """Write what was learned, and return the files."""
        ...
