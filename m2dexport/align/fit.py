"""Fit the maps of some depths in one pass over texts, and choose their strength on held-out ones.

No label is needed: the target of a text is what the full depth makes of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from m2dexport.align.ridge import Eigen, Moments
from m2dexport.checkpoint.alignment import LinearMap
from m2dexport.errors import UsageError
from m2dexport.vectors.codecs import cosines, truncate

Floats = NDArray[np.float32]

#: Different texts that a fit needs; far more help (docs/aligned.md).
MIN_TEXTS = 100
#: The strengths that are tried, for vectors of length 1.
STRENGTHS = tuple(float(10 ** (exponent / 2)) for exponent in range(-6, 7))
_HOLD_OUT = 5  # one text in so many is held out
_MOST_HELD = 2000  # held-out texts whose vectors are kept


@dataclass(frozen=True)
class Fit:
    """The map of one depth and dim, and how it was found."""

    map: LinearMap
    texts: int  # that it was fitted on, in the end all of them
    strength: float  # of the ridge
    cosine_before: float  # held-out texts: mean cosine to the full depth's vector, without a map
    cosine_after: float  # with the map that was fitted to the other texts


class Fitting:
    """One pass over texts, from which the fits of several depths and dims follow.

    Which texts are held out is decided by their content, so that a text that occurs twice is not
    fitted and held out. Memory does not grow with the number of texts.

    Args:
        widths: depth -> values of its input rows.
        dims: the dims to fit.
        without_intercept: depths whose maps have no intercept.
    """

    def __init__(
        self,
        widths: Mapping[int, int],
        dims: Sequence[int],
        without_intercept: Sequence[int] = (),
    ) -> None:
        ends = list(accumulate(dims))
        self._outputs = {d: slice(end - d, end) for d, end in zip(dims, ends, strict=True)}
        seen, kept_back = (
            {
                depth: Moments(width, ends[-1], intercept=depth not in without_intercept)
                for depth, width in widths.items()
            }
            for _ in range(2)
        )
        self._seen, self._kept_back = seen, kept_back
        self._held: dict[int, list[Floats]] = {depth: [] for depth in widths}
        self._held_targets: list[Floats] = []
        self._held_count = 0
        self._different: set[bytes] = set()
        self._decomposed: dict[int, tuple[Eigen, Eigen]] = {}

    @property
    def depths(self) -> tuple[int, ...]:
        """The depths that are fitted."""
        return tuple(self._seen)

    def add(self, texts: Sequence[str], inputs: Mapping[int, Floats], targets: Floats) -> None:
        """Count texts in.

        Args:
            texts: the texts, without prompts.
            inputs: depth -> float32 (texts, width) rows of length 1.
            targets: float32 (texts, any) vectors of the full depth, as wide as the widest dim.
        """
        held = np.array([self._is_held(text) for text in texts], dtype=bool)
        joined = np.concatenate([truncate(targets, dim) for dim in self._outputs], axis=1)
        for depth, rows in inputs.items():
            self._seen[depth].add(rows[~held], joined[~held])
            self._kept_back[depth].add(rows[held], joined[held])
        room = np.flatnonzero(held)[: _MOST_HELD - self._held_count]
        if not len(room):
            return
        self._held_count += len(room)
        self._held_targets.append(targets[room])
        for depth, rows in inputs.items():
            self._held[depth].append(rows[room])

    def require_texts(self) -> None:
        """Refuse texts that are too few, or all alike.

        Raises:
            UsageError: with the number that was found.
        """
        if len(self._different) < MIN_TEXTS:
            raise UsageError(
                f"{len(self._different)} different texts are too few to align a depth; pass at "
                f"least {MIN_TEXTS}, better 2,000, that are like those to be encoded."
            )

    def fit(self, depth: int, dim: int) -> Fit:
        """Return the map of one depth and dim, of the strength that is best on held-out texts.

        Raises:
            UsageError: when the texts are too few, or no strength brings held-out texts nearer to
                the full depth.
        """
        self.require_texts()
        outputs = self._outputs[dim]
        held = np.concatenate(self._held[depth])
        targets = truncate(np.concatenate(self._held_targets), dim)
        others, all_rows = self._eigen(depth)
        candidates = others.maps(STRENGTHS, outputs)
        found = [float(cosines(candidate(held), targets).mean()) for candidate in candidates]
        best = int(np.argmax(found))
        before = 0.0  # of rows that are shorter than the targets
        if held.shape[1] >= dim:
            before = float(cosines(held[:, :dim], targets).mean())
        count = self._seen[depth].rows + self._kept_back[depth].rows
        if not found[best] > before:
            raise UsageError(
                f"{count} texts do not align depth {depth} at {dim} dims: held-out texts have "
                f"a mean cosine of {before:.4f} to the full model without a map, and of "
                f"{found[best]:.4f} with one; pass more texts, or such as the model was made for."
            )
        (final,) = all_rows.maps([STRENGTHS[best]], outputs)
        return Fit(final, count, STRENGTHS[best], before, found[best])

    def _eigen(self, depth: int) -> tuple[Eigen, Eigen]:
        """Return what maps follow from: of the texts that are not held out, and of all."""
        if depth not in self._decomposed:
            seen = self._seen[depth]
            self._decomposed[depth] = seen.eigen(), seen.joined(self._kept_back[depth]).eigen()
        return self._decomposed[depth]

    def _is_held(self, text: str) -> bool:
        digest = hashlib.sha256(text.encode()).digest()[:8]
        if len(self._different) < MIN_TEXTS:
            self._different.add(digest)
        return int.from_bytes(digest, "big") % _HOLD_OUT == 0
