"""Processes that share a training: none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# As torchrun starts its workers: in a session of their own.
STARTER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], start_new_session=True)
time.sleep(600)
"""
WORKER = """
import os, pathlib, sys, time
from diptych.training.parallel import Workers
workers = Workers()
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's death")
def test_workers_end_when_what_started_them_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    # The one process of a world of one has nobody to wait for, and nobody to end with.
    worker_alone = WORKER.replace("import Workers", "import _end_with_the_parent").replace(
        "workers = Workers()", "_end_with_the_parent()"
    )
    starter = subprocess.Popen([sys.executable, "-c", STARTER, worker_alone, str(told)])
    until = time.monotonic() + 60
    while not (told.exists() and told.read_text()):
        assert starter.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    worker = int(told.read_text())
    assert is_alive(worker)
    starter.send_signal(signal.SIGKILL)
    starter.wait(10)
    until = time.monotonic() + 10
    while is_alive(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_alive(worker)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of a parent's death")
def test_workers_of_torchrun_end_with_it(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.replace("sys.argv[1]", "sys.argv[1] + str(workers.rank)"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    told = [tmp_path / f"pid{rank}" for rank in range(2)]
    runner = subprocess.Popen([*command, str(script), str(tmp_path / "pid")])
    until = time.monotonic() + 120
    while not all(each.exists() and each.read_text() for each in told):
        assert runner.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    workers = [int(each.read_text()) for each in told]
    runner.send_signal(signal.SIGKILL)
    runner.wait(10)
    until = time.monotonic() + 20
    while any(map(is_alive, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_alive, workers))
