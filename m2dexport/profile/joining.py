"""What joining profiles of every kind needs: cells judged anew, the worst of several verdicts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from m2dexport.profile.flags import judged
from m2dexport.profile.schema import Noise, Profile
from m2dexport.profile.select import recommend

_VERDICTS = ("quiet", "noisy", "very noisy")

T = TypeVar("T")


def rejudged(profile: Profile, targets: Sequence[str]) -> Profile:
    """Return a profile whose cells of some targets have their flags, frontier and recommendation.

    Those follow from all cells of a target, so a part of them could not know.
    """
    trained = profile.checkpoint.trained
    cells = {name: judged(profile.of_target(name), trained) for name in targets}
    order = dict.fromkeys(target.name for target in profile.targets)
    return profile.model_copy(
        update={
            "targets": tuple(
                target.model_copy(update={"recommended": recommend(cells[target.name])})
                if target.name in cells
                else target
                for target in profile.targets
            ),
            "cells": tuple(
                cell for name in order for cell in cells.get(name, profile.of_target(name))
            ),
        }
    )


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
