"""Say where a task works: its folder and device, and who works with it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from diptych.training.parallel import Workers

__all__ = ["Workplace"]


@dataclass(frozen=True, slots=True)
class Workplace:
    """Hold the folder of a run, its device and processes, and who is told what goes on.

    `fingerprint` tells its data and first weights from others.
    """

    folder: Path
    device: torch.device
    workers: Workers
    fingerprint: str = ""
    note: Callable[[str], None] = logging.getLogger("diptych").info
