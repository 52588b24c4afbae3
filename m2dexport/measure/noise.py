"""How quiet a machine was while latency was measured, and how that is known."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

Verdict = Literal["quiet", "noisy", "very noisy"]

_VERDICTS: tuple[Verdict, ...] = ("quiet", "noisy", "very noisy")
_STAT = Path("/proc/stat")
_QUARTERS = 4
#: Above the first of each, a machine is noisy; above the second, very noisy (``noise_of``).
_SPREAD, _DRIFT, _STOLEN, _BUSY = (1.3, 2.0), (1.05, 1.2), (0.01, 0.05), (0.1, 0.5)


@dataclass(frozen=True)
class Noise:
    """How quiet the machine was while latency was measured, and how that is known."""

    verdict: Verdict
    reasons: tuple[str, ...]  # a sentence each
    spread: float  # p95 over p50 of the reference
    drift: float  # the reference's slowest quarter over its fastest
    stolen: float | None  # share of time that the host took; None: unknown
    busy: float | None  # cores that others kept busy; None: unknown


@dataclass(frozen=True)
class Usage:
    """What became of the processor for a while, in seconds of cores."""

    seconds: float  # by the clock on the wall
    total: float  # of all cores, idle ones included; 0: unknown
    stolen: float  # by the host, for its other guests
    others: float  # kept busy by other processes


@dataclass(frozen=True)
class Moment:
    """Counters of the processor at one time, in seconds since it started."""

    clock: float
    total: float
    stolen: float
    busy: float  # by all processes
    own: float  # by this one


def moment(stat: Path = _STAT) -> Moment:
    """Read the counters; where the system has none, they are 0.

    Args:
        stat: Linux' /proc/stat, whose first line is described in proc(5).
    """
    try:
        words = stat.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
        ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in words]
    except (OSError, ValueError, AttributeError):  # not Linux
        ticks = []
    clock, own = time.perf_counter(), time.process_time()
    if len(ticks) < 8:
        return Moment(clock, 0, 0, 0, own)
    user, nice, system, idle, waiting, interrupts, soft, stolen = ticks
    busy = user + nice + system + interrupts + soft
    return Moment(clock, busy + idle + waiting + stolen, stolen, busy, own)


def usage_since(start: Moment, stat: Path = _STAT) -> Usage:
    """Return what became of the processor since a moment."""
    end = moment(stat)
    others = end.busy - start.busy - (end.own - start.own)
    return Usage(
        end.clock - start.clock,
        end.total - start.total,
        end.stolen - start.stolen,
        max(0.0, others),
    )


def noise_of(times: Sequence[float], usages: Iterable[Usage], name: str = "the reference") -> Noise:
    """Judge how quiet the machine was; the worst of four signs decides.

    ==========================================  ==========  ===============
    sign                                        noisy from  very noisy from
    ==========================================  ==========  ===============
    p95 of the reference over its p50           1.3         2
    its slowest quarter over its fastest        1.05        1.2
    share of time that the host took            1%          5%
    cores that other processes kept busy        0.1         0.5
    ==========================================  ==========  ===============

    A graph does the same work in every run, so what its times spread by is the machine's. With a
    p95 of twice the p50, a p95 says more about the machine than about the graph. Cells within 5% of
    one another count as equally fast; a drift of 5% is as much between two moments of one run.
    A core that others have for a tenth of the time, or a host that takes a hundredth, is where runs
    begin to wait that use all cores, though medians hold; with half a core, or a twentieth, medians
    move, too.

    Args:
        times: milliseconds of the reference at one shape, in the order in which they were taken.
        usages: of the processor while latency was measured.
        name: what the sentences call the reference.
    """
    p50, p95 = np.percentile(times, (50, 95))
    spread, drift = float(p95 / p50), _drift(times)
    found = list(usages)
    total, seconds = sum(each.total for each in found), sum(each.seconds for each in found)
    stolen = sum(each.stolen for each in found) / total if total > 0 else None
    busy = sum(each.others for each in found) / seconds if total > 0 and seconds > 0 else None
    signs = (
        (spread, _SPREAD, f"{name}'s p95 is {spread:.2f} times its p50"),
        (drift, _DRIFT, f"its slowest quarter took {drift:.2f} times its fastest"),
        (stolen, _STOLEN, f"the host took {100 * (stolen or 0):.1f}% of the time"),
        (busy, _BUSY, f"other processes kept {busy or 0:.2f} cores busy"),
    )
    grades = [
        (sum(value >= limit for limit in limits), sentence)
        for value, limits, sentence in signs
        if value is not None
    ]
    worst = max(grade for grade, _ in grades)
    reasons = tuple(f"{text[0].upper()}{text[1:]}." for grade, text in grades if grade == worst)
    return Noise(_VERDICTS[worst], reasons, spread, drift, stolen, busy)


def _drift(times: Sequence[float]) -> float:
    """Return the slowest quarter's median over the fastest's, 1 where there are too few times."""
    if len(times) < 2 * _QUARTERS:
        return 1.0
    medians = [float(np.median(quarter)) for quarter in np.array_split(times, _QUARTERS)]
    return max(medians) / min(medians)
