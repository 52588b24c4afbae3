"""How many cores this process may use, whatever the machine has, and work that is dealt to them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from m2dexport.errors import UsageError

_IN_WORK = 2 << 30  # bytes that what is done side by side holds at most

Item = TypeVar("Item")
Result = TypeVar("Result")


def threads_for(threads: int | None) -> int:
    """Return how many threads a session gets: as asked for, within what this process may use.

    Raises:
        UsageError: when fewer than one is asked for.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads cannot run anything; ask for 1 or more.")
    return min(threads or usable_cores(), usable_cores())


def workers_for(workers: int | None, threads: int | None) -> int:
    """Return how many batches run at once: as asked for, within the cores that this process has.

    Args:
        workers: as asked for; None: one.
        threads: that run one batch, as for ``threads_for``.

    Raises:
        UsageError: when fewer than one is asked for.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers cannot run anything; ask for 1 or more.")
    return max(1, min(workers or 1, usable_cores() // threads_for(threads)))


def granted_threads(threads: int | None) -> int | None:
    """Return how many of the threads that a user asks for there are; warn when that is fewer.

    Returns:
        None when none are asked for.

    Raises:
        UsageError: when fewer than one is asked for.
    """
    if threads is None:
        return None
    granted = threads_for(threads)
    if granted < threads:
        warnings.warn(
            f"{threads} threads were asked for and this process may use {granted} cores; it runs "
            f"{granted} threads.",
            stacklevel=2,
        )
    return granted


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use, at least 1.

    That is its affinity mask within the smallest CPU quota of its cgroup and of those above, by
    cgroup v2 (cpu.max) and v1 (cpu.cfs_quota_us); a part of a core does not count.

    Args:
        root: the folder with proc/self/cgroup and sys/fs/cgroup.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min([cores, *_quotas(root)]))


def _quotas(root: Path) -> list[int]:
    """Return the CPU quotas that bind this process, in whole cores."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):  # not Linux
        return []
    quotas = []
    for line in lines:
        # "0::/path" is version 2, "4:cpu,cpuacct:/path" a hierarchy of version 1.
        _, controllers, own = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        group = Path(own.lstrip("/"))
        # In a container the mount may begin at its own group, below which ``own`` does not exist.
        for folder in (group, *group.parents):
            quotas += _quota(mount / folder)
    return quotas


def _quota(group: Path) -> list[int]:
    """Return the quota of one cgroup in whole cores; nothing where it has none."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            words = " ".join((group / name).read_text(encoding="ascii") for name in names).split()
            quota, period = (int(word) for word in words)
        except (OSError, ValueError):  # another version, or "max"
            continue
        if quota > 0 and period > 0:  # -1: none
            return [quota // period]
    return []


def at_once(size: int) -> int:
    """Return how many pieces of work to do side by side, each of which holds so many bytes.

    That is one per core, within 2 GiB for all of them, and at least one.
    """
    return max(1, min(usable_cores(), _IN_WORK // max(1, size)))


def side_by_side(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Yield what a function returns for each item, in order, while others are worked on.

    Once one fails, or no more are asked for, those that have not begun are left out.

    Args:
        function: called in threads that live as long as this call; with one worker, in this one.
        items: what it is called with.
        workers: calls at once.
    """
    if workers == 1:
        yield from map(function, items)
        return
    from concurrent.futures import ThreadPoolExecutor  # which one text need not wait for

    threads = ThreadPoolExecutor(workers)
    try:
        yield from threads.map(function, items)
    finally:
        threads.shutdown(cancel_futures=True)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keep torch to one thread: what is recorded must not depend on the number of cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
