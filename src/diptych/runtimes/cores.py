"""Count the cores this process may use."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["available_cores"]


def available_cores() -> int:
    """Count the physical cores this process may use: affinity, control group and siblings."""
    if hasattr(os, "sched_getaffinity"):
        usable = sorted(os.sched_getaffinity(0))
    else:
        usable = list(range(os.cpu_count() or 1))
    cores = {_core(cpu) for cpu in usable}
    return max(1, min(len(cores), _quota() or len(cores)))


def _core(cpu: int) -> tuple[str, ...]:
    """Name the physical core of a logical one, where Linux tells."""
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return tuple((topology / name).read_text() for name in ("physical_package_id", "core_id"))
    except OSError:
        return (str(cpu),)


def _quota() -> int:
    """Return how many cores the control group allows, 0 for no limit that can be read."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return 0 if quota == "max" else max(1, round(int(quota) / int(period)))
    except (OSError, ValueError):
        return 0
