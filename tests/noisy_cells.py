"""Cells whose figures have noise, for tests of what compares profiles."""

from __future__ import annotations

from typing import Any

import numpy as np
from tiny_profile import cell

from m2dexport.profile.intervals import Replicates, replicates_of
from m2dexport.profile.schema import Cell, Noise, Profile
from m2dexport.vectors.resample import REPLICATES, Score

VERY_NOISY = Noise(verdict="very noisy", reasons=(), spread=1.1, drift=1.0, stolen=None, busy=1.0)


def noisy(points: float, seed: int = 0, spread: float = 3.0) -> Replicates:
    """Return replicates of a figure: one seed is one draw of the data, two are independent."""
    noise = np.random.default_rng(seed).normal(scale=spread, size=REPLICATES)
    return replicates_of(Score(points, points + noise))


def scored(points: float, seed: int = 0, **values: Any) -> Cell:
    return cell(2, quality=points, replicates={"sts/spearman": noisy(points, seed)}, **values)


def timed(ratio: float, width: float = 1.02, **values: Any) -> Cell:
    interval = {"low": ratio / width, "high": ratio * width}
    return cell(2, ratio=ratio, ratio_interval=interval, **values)


def on_a_very_noisy_machine(measured: Profile) -> Profile:
    noisy = measured.targets[0].model_copy(update={"noise": VERY_NOISY})
    return measured.model_copy(update={"targets": (noisy,)})


def with_task(measured: Profile, **values: Any) -> Profile:
    task = measured.tasks[0].model_copy(update=values)
    return measured.model_copy(update={"tasks": (task,)})
