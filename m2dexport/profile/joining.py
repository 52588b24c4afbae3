"""What joining profiles of every kind needs: cells judged anew, the worst of several verdicts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from m2dexport.profile.flags import judged
from m2dexport.profile.recommend import recommend
from m2dexport.profile.schema import Cell, Noise, Profile, TargetInfo
from m2dexport.profile.target import budget_of

_VERDICTS = ("quiet", "noisy", "very noisy")

T = TypeVar("T")


def rejudged(profile: Profile, targets: Sequence[str]) -> Profile:
    """Return a profile whose cells of some targets have their flags, frontier and recommendation.

    Those follow from all cells of a target, so a part of them could not know.
    """
    trained = profile.checkpoint.trained
    cells = {name: judged(profile.of_target(name), trained) for name in targets}
    return profile.model_copy(
        update={
            "targets": tuple(_advised(target, cells) for target in profile.targets),
            "cells": tuple(
                cell
                for target in profile.targets
                for cell in cells.get(target.name, profile.of_target(target.name))
            ),
        }
    )


def _advised(target: TargetInfo, cells: Mapping[str, Sequence[Cell]]) -> TargetInfo:
    """Return a target with the recommendation that follows from its cells, if they are given."""
    if target.name not in cells:
        return target
    budget = budget_of(target.budget) if target.budget else None
    return target.model_copy(update={"recommended": recommend(cells[target.name], budget)})


def noisiest(noises: Sequence[Noise | None]) -> Noise | None:
    """Return the worst of several verdicts; None of none."""
    known = [noise for noise in noises if noise is not None]
    return max(known, key=lambda noise: _VERDICTS.index(noise.verdict), default=None)


def unique(items: Iterable[T], key: Callable[[T], Hashable]) -> tuple[T, ...]:
    """Return the first item of each key."""
    found: dict[Hashable, T] = {}
    for item in items:
        found.setdefault(key(item), item)
    return tuple(found.values())
