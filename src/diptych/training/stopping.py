"""End a run when somebody asks for it, after the step at hand."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Asked", "Stopped", "heeding_signals"]

logger = logging.getLogger("diptych")


class Stopped(KeyboardInterrupt):
    """Report that a run was told to stop, and kept its state at `step`."""

    def __init__(self, step: int, folder: Path) -> None:
        super().__init__(f"stopped at step {step}: nothing is lost in {folder}")
        self.step, self.folder = step, folder


class Asked:
    """Remember that somebody asked the run to stop."""

    to_stop = False


@contextmanager
def heeding_signals() -> Iterator[Asked]:
    """Turn Ctrl-C and SIGTERM into a wish; a second one ends the run at once."""
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: Any) -> None:
        if asked.to_stop:
            raise KeyboardInterrupt
        asked.to_stop = True
        logger.warning("stopping after this step; once more stops at once")

    old = {each: signal.signal(each, ask) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for each, handler in old.items():
            signal.signal(each, handler)
