"""Write down what a run measures: JSON lines, and TensorBoard where it is asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diptych.errors import MissingExtra
from diptych.training.checkpoints import write_whole

__all__ = ["Journal", "read_rows"]

Row = dict[str, Any]


class Journal:
    """Keep the rows of a run in `metrics.jsonl`; `tell` hears each as well.

    A run that goes on from step `first` forgets what was written later than that, so that the file
    is the same as if nothing had happened.
    """

    def __init__(
        self,
        folder: Path,
        first: int = 0,
        *,
        tensorboard: bool = False,
        tell: Callable[[Row], None] | None = None,
        leads: bool = True,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self._tell = tell
        # What belongs to the first step itself is written again.
        self.rows = [row for row in read_rows(self.path) if row["step"] <= first and first]
        if leads:  # of several processes one writes
            write_whole(self.path, "".join(_line(row) for row in self.rows))
        self._board = _board(folder / "tensorboard", first) if tensorboard else None

    def write(self, row: Mapping[str, Any]) -> None:
        """Add one row; it holds `step`."""
        self.rows.append(dict(row))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))
        if self._board is not None:
            for name, value in _flat(row):
                self._board.add_scalar(name, value, row["step"])
            self._board.flush()
        if self._tell is not None:
            self._tell(dict(row))

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read_rows(path: Path) -> list[Row]:
    """Return the whole rows of a file; a kill may have cut the last one."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(_mapped(row, lambda each: math.nan if each is None else each))
    return rows


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_mapped(row, _or_null), ensure_ascii=False, allow_nan=False) + "\n"


def _or_null(value: Any) -> Any:
    """Return None for what is no number, which JSON does not know; `read_rows` gives NaN back."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return `value` with every leaf changed."""
    if isinstance(value, Mapping):
        return {name: _mapped(each, change) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(each, change) for each in value]
    return change(value)


def _flat(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in row.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            found.append((prefix + name, float(value)))
    return found


def _board(folder: Path, first: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtra("train", "report_to='tensorboard'") from error
    return SummaryWriter(str(folder), purge_step=first or None)
