"""Kill real training runs at random moments, and let them go on, until they end."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

WAIT_S = 120


def train(kind: str, data: Path, folder: Path, model: Path, words: dict[str, Any]) -> None:
    """Run or resume one training, as a process of its own."""
    import torch

    from diptych.training.finetune import finetune_captioner, finetune_generator

    torch.set_num_threads(1)
    run = finetune_generator if kind == "generator" else finetune_captioner
    run(data, folder, model, resume=True, **words)
    (folder / "finished").write_text("")


class Runs:
    """Start trainings in fresh processes, forked from one that has imported torch already."""

    def __init__(self, kind: str, data: Path, model: Path, words: dict[str, Any]) -> None:
        self.kind, self.data, self.model, self.words = kind, data, model, words
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["diptych.training.generator", "training_kills"])

    def start(self, folder: Path) -> Any:
        arguments = (self.kind, self.data, folder, self.model, self.words)
        process = self.context.Process(target=train, args=arguments)
        process.start()
        return process

    def whole(self, folder: Path) -> float:
        """Run once without being disturbed; return the seconds it took."""
        first = self.context.Process(target=bool)  # its start is that of the fork server
        first.start()
        first.join(WAIT_S)
        began = time.monotonic()
        process = self.start(folder)
        process.join(WAIT_S)
        assert process.exitcode == 0
        return time.monotonic() - began

    def killed(self, place: Path, kills: int, within_s: float, seed: int) -> list[Path]:
        """Kill `kills` runs at random moments, and let each go on; return their folders.

        Where one has ended before it could be killed, the next begins anew in a folder of its own.
        """
        chance, hit, folders = random.Random(seed), 0, [place / "0"]
        while hit < kills:
            if (folders[-1] / "finished").exists():
                folders.append(place / str(len(folders)))
            process = self.start(folders[-1])
            time.sleep(chance.uniform(0.0, within_s))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                hit += 1
            process.join(WAIT_S)
        process = self.start(folders[-1])
        process.join(WAIT_S)
        assert process.exitcode == 0
        return folders
