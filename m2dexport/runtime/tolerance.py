"""How far golden vectors may be off: a limit that follows from how far they move on their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from m2dexport.engines import ENGINES
from m2dexport.runtime.artifact import ArtifactSpec
from m2dexport.strict import Name, Share

Metric = Literal["min_cosine", "min_equal_bits"]
MIN_COSINE: Metric = "min_cosine"  # smallest cosine of one text's vectors
MIN_EQUAL_BITS: Metric = "min_equal_bits"  # smallest share of equal bits of one text's codes

#: A limit below these would let vectors of another model pass.
LOOSEST: dict[Metric, float] = {MIN_COSINE: 0.9, MIN_EQUAL_BITS: 0.5}
#: In a random direction, a vector moves by sqrt(2 (1 - cosine) / dim). A swap has four of them in
#: it, one of the query and one of the document on either side: 8 is three standard deviations.
_SWAP = 8
#: The limit is so many times further from 1 than the worst that was measured: the texts are few. Of
#: eight integer bundles on other onnxruntimes, one moved 2.7 times as far, the others 1.3 at most.
_TIMES = 5


@dataclass(frozen=True)
class Spread:
    """How far vectors move where nothing is wrong: the worst text, by the tolerance's metric."""

    engine: Name  # that made the golden vectors, with its version
    batch: Share  # alone, all together, padded
    #: With the graph's float32 constants moved by a unit in the last place, as other kernels,
    #: releases and threads move what is computed of them. None: there are none, or a GPU ran.
    rounding: Share | None


@dataclass(frozen=True)
class Tolerance:
    """How far the worst golden text may be off."""

    metric: Metric
    limit: float
    reason: str

    def holds(self, worst: float) -> bool:
        """Whether ``worst`` is within the limit; NaN is not."""
        return worst >= self.limit

    def swap(self, dim: int) -> float:
        """Return by how much a document may be less similar than the one in whose place it is."""
        return float(_SWAP * np.sqrt((1 - self.limit) / dim))

    def turn(self) -> float:
        """Return by how much the similarity of two vectors may be off at most: both turned."""
        if self.metric == MIN_EQUAL_BITS:
            return 4 * (1 - self.limit)
        return float(2 * np.arccos(self.limit)) + 1e-5  # stored with six decimals


def metric_of(spec: ArtifactSpec) -> Metric:
    """Return what an artifact's vectors are compared by."""
    return MIN_EQUAL_BITS if spec.vectors in ("ubinary", "binary") else MIN_COSINE


def tolerance_of(spec: ArtifactSpec, spread: Spread) -> Tolerance:
    """Return the limit, from what batches and rounding change and what else is known."""
    metric = metric_of(spec)
    worst = min(spread.batch, 1 if spread.rounding is None else spread.rounding)
    least, why = _least(spec, metric)
    limit = round(1 - max(_TIMES * (1 - worst), least), 9)
    reason = (
        f"{_TIMES} times as far from 1 as the worst of batches and rounding ({worst:.9g}), and at "
        f"least {least:g} from it: {why}."
    )
    return Tolerance(metric, max(LOOSEST[metric], limit), reason)


def _least(spec: ArtifactSpec, metric: Metric) -> tuple[float, str]:
    """Return how far a limit is from 1 at least, and why: what was not measured here."""
    engine, weights = ENGINES[spec.engine], spec.weights
    integer = weights.startswith("int")
    why = ["float sums are taken in another order on other CPUs"]
    if integer:
        why.append("which moves activations to a neighbouring code")
    if integer and spec.isa != "portable":
        why.append(f"made for {spec.isa}: CPUs without it use other, exact kernels")
    if engine.on_gpu:
        why.append("a GPU computes in the weights' precision")
    # Kernels for blocks of weights quantize activations in some releases and on some CPUs only.
    coarse = weights.endswith("weight-only") or (engine.on_gpu and (integer or weights == "bf16"))
    if metric == MIN_EQUAL_BITS:
        # An angle whose cosine is 1 - 0.005 turns 3.2% of the signs.
        return max(0.05 if coarse else 0.01, 1.5 / spec.dim), ", ".join(why)
    # One code of int4 that falls on the other side of its border moves a short vector by .002.
    if coarse or spec.vectors == "int4":
        return 0.005, ", ".join(why)
    narrow = integer or spec.vectors != "float32" or (engine.on_gpu and weights != "fp32")
    return 0.0005 if narrow else 1e-6, ", ".join(why)
