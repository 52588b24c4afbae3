"""How many cores this process may use."""

from __future__ import annotations

import os
from pathlib import Path

from m2dexport.errors import UsageError


def threads_for(threads: int | None) -> int:
    """Return how many threads a session gets: as asked for, within what this process may use.

    Raises:
        UsageError: when fewer than one is asked for.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads cannot run anything; ask for 1 or more.")
    return min(threads or usable_cores(), usable_cores())


def usable_cores() -> int:
    """Return how many cores this process may use: its affinity mask within its cgroup's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return cores
