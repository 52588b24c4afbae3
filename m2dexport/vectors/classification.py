"""Sentence pairs that are to be told apart by similarity: duplicates and others, for example."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from m2dexport.vectors.resample import Doubles, Draws, Score, blocks_of, draws, groups_of
from m2dexport.vectors.texts import TextSet


@dataclass(frozen=True)
class PairClassificationTask:
    """Sentence pairs of two classes: those that mean the same, and others."""

    name: str
    sentences1: tuple[str, ...]
    sentences2: tuple[str, ...]
    labels: tuple[bool, ...]
    sha256: str

    kind: ClassVar[Literal["pair_classification"]] = "pair_classification"
    main_metric: ClassVar[str] = "ap"

    def texts(self) -> tuple[TextSet, ...]:
        """Return what must be encoded, in the order in which ``evaluate`` takes the vectors."""
        return TextSet(self.sentences1, None), TextSet(self.sentences2, None)

    @cached_property
    def weights(self) -> Draws:
        """How often each replicate draws each pair, (pairs, replicates)."""
        return draws(self.sha256, len(self.labels))


def classification_scores(task: PairClassificationTask, similarity: Doubles) -> dict[str, Score]:
    """Return how well a threshold on similarity tells the classes apart.

    ``ap`` is the average precision over all thresholds, as in MTEB and scikit-learn (cosine_ap);
    ``f1`` and ``accuracy`` are those of the best threshold, which each replicate chooses anew.

    Args:
        task: the pairs.
        similarity: (pairs,); pairs that tie lie on one side of any threshold.
    """
    labels = np.array(task.labels, dtype=np.bool_)
    points = _metrics(-similarity, labels, np.ones((len(labels), 1), dtype=np.uint8))
    replicates = [
        _metrics(-similarity, labels, task.weights[:, block]) for block in blocks_of(task.weights)
    ]
    names = ("ap", "f1", "accuracy")
    return {
        name: Score(float(points[row, 0]), np.concatenate([each[row] for each in replicates]))
        for row, name in enumerate(names)
    }


def _metrics(distances: Doubles, labels: NDArray[np.bool_], weights: Draws) -> Doubles:
    """Return average precision and the best F1 and accuracy, (3, replicates), in points.

    A replicate without a positive pair has no precision: its average and F1 are 0.
    """
    groups = groups_of(distances)
    found = groups.cumulated(weights)  # pairs that each threshold calls positive
    hits = groups.cumulated(weights * labels[:, None])  # those of them that are
    positives, count = hits[-1], found[-1]
    precision = hits / np.maximum(found, 1)
    precision[1:] *= np.diff(hits, axis=0)
    precision[0] *= hits[0]
    average = precision.sum(axis=0, dtype=np.float64) / np.maximum(positives, 1)
    # Precision and recall are hits over what is found and over all positives.
    f1 = (2 * hits / np.maximum(found + positives, 1)).max(axis=0)
    # Right: the hits, and the negatives that were not found; with no threshold, all negatives.
    right = np.maximum((2 * hits - found).max(axis=0), 0) + count - positives
    return 100 * np.stack([average, f1, right / count]).astype(np.float64)
