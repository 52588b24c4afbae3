"""Figures of quality as profile.json holds them: intervals, and replicates to compare cells by."""

from __future__ import annotations

import base64
from typing import Annotated

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from m2dexport.profile.bounds import LEAST, MOST, Figure
from m2dexport.vectors.resample import Score, interval

_CODES = 127  # of a replicate, on either side of the figure itself
_BASE64 = "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"


class Model(BaseModel):
    """A part of profile.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Interval(Model):
    """Where a figure lies with 95% confidence."""

    low: Figure
    high: Figure

    @model_validator(mode="after")
    def _in_order(self) -> Interval:
        if self.low > self.high:
            raise ValueError("low should not be above high")
        return self


def _positive(interval: Interval) -> Interval:
    if not LEAST <= interval.low <= interval.high <= MOST:
        raise ValueError(f"should lie within {LEAST:g} and {MOST:g}")
    return interval


#: Of what is above 0: a duration in ms, or a ratio of two.
PositiveInterval = Annotated[Interval, AfterValidator(_positive)]


class Replicates(Model):
    """A figure on each bootstrap resample of its data; two cells compare replicate by replicate.

    Replicate i is the figure itself + ``scale`` x code i.
    """

    scale: float = Field(ge=0, le=1000)
    codes: str = Field(pattern=_BASE64, description="base64 of an int8 per replicate")

    @property
    def count(self) -> int:
        """How many replicates there are."""
        return len(self.codes) // 4 * 3 - self.codes[-2:].count("=")


def interval_of(score: Score) -> Interval:
    """Return the interval of a figure."""
    low, high = interval(score)
    return Interval(low=low, high=high)


def replicates_of(score: Score) -> Replicates:
    """Return the replicates of a figure as they are stored."""
    moved = score.replicates - score.points
    scale = float(np.abs(moved).max()) / _CODES
    codes = np.rint(moved / scale) if scale > 0 else np.zeros(len(moved))
    return Replicates(
        scale=scale, codes=base64.b64encode(codes.astype(np.int8).tobytes()).decode("ascii")
    )


def score_from(points: float, stored: Replicates) -> Score:
    """Return a figure with its replicates as they were stored."""
    codes = np.frombuffer(base64.b64decode(stored.codes), dtype=np.int8).astype(np.float64)
    return Score(points, points + stored.scale * codes)
