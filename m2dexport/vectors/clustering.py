"""Texts with a topic each: does k-means on their vectors find the topics again?"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from m2dexport.errors import UsageError
from m2dexport.strict import shown
from m2dexport.vectors.resample import Doubles, Draws, Score, blocks_of, draws
from m2dexport.vectors.tables import Table
from m2dexport.vectors.texts import TextSet, digest_of, text_of

#: Names of columns, without case, spaces and punctuation.
_TEXTS = ("text", "sentence", "sentences", "document")
_TOPICS = ("label", "labels", "labeltext", "cluster", "category", "class", "topic", "intent")

_STARTS = 3  # k-means runs, of which the tightest counts
_STEPS = 20  # of one run
_SEED = 0
#: Limits and filters of warnings are those of the process: two threads would restore each other's.
_ONE_AT_A_TIME = Lock()


@dataclass(frozen=True)
class ClusteringTask:
    """Texts and the topic of each."""

    name: str
    sentences: tuple[str, ...]
    topics: tuple[str, ...]
    sha256: str

    kind: ClassVar[Literal["clustering"]] = "clustering"
    main_metric: ClassVar[str] = "v_measure"

    def texts(self) -> tuple[TextSet, ...]:
        """Return what must be encoded, in the order in which ``evaluate`` takes the vectors."""
        return (TextSet(self.sentences, None),)

    @cached_property
    def numbers(self) -> NDArray[np.intp]:
        """The topics as numbers from 0, (texts,)."""
        _, numbers = np.unique(np.array(self.topics, dtype=object), return_inverse=True)
        return numbers

    @cached_property
    def weights(self) -> Draws:
        """How often each replicate draws each text, (texts, replicates)."""
        return draws(self.sha256, len(self.topics))


def clustering_columns(table: Table) -> tuple[int, int] | None:
    """Return where text and topic are, or None when the file is not one of texts with topics."""
    texts, topics = table.columns(_TEXTS), table.columns(_TOPICS)
    return (texts[0], topics[0]) if len(texts) == len(topics) == 1 else None


def load_clusters(table: Table, columns: tuple[int, int]) -> ClusteringTask:
    """Read texts with their topics.

    Raises:
        UsageError: when a line is wrong, or the topics are one for all or another for each.
    """
    path, texts, topics = table.path, [], []
    for line, (text, topic) in table.named(columns):
        texts.append(text_of(text, path, line))
        topics.append(_topic(topic, f"{path}, line {line}"))
    require_topics(path, topics)
    return ClusteringTask(path.stem, tuple(texts), tuple(topics), digest_of(texts, topics))


def require_topics(where: object, topics: list[str]) -> None:
    """Refuse topics that no clustering could find.

    Raises:
        UsageError: when there are fewer than two topics, or as many as texts.
    """
    different = len(set(topics))
    if different < 2 or different == len(topics):
        raise UsageError(
            f"{where}: the number of topics is {different} for {len(topics)} texts; pass texts of "
            "two topics or more, some of which share one."
        )


def clustering_scores(task: ClusteringTask, vectors: NDArray[np.float32]) -> dict[str, Score]:
    """Return the V-measure of k-means with as many clusters as there are topics.

    V-measure is the harmonic mean of homogeneity and completeness (Rosenberg and Hirschberg, 2007),
    as in MTEB and scikit-learn. The texts are clustered once, with the same random numbers for
    every cell; replicates resample them with their clusters. A text that is drawn twice agrees with
    itself, which lifts V-measure in all replicates: that bias, by which their mean exceeds the
    figure, is taken off them (Efron and Tibshirani, 1993, section 10.2).

    Args:
        task: the texts.
        vectors: ``comparable`` ones, float32 (texts, dim).
    """
    clusters = _k_means(vectors, 1 + int(task.numbers.max()))
    every = np.ones((len(clusters), 1), dtype=np.uint8)
    replicates = [
        _v_measure(task.numbers, clusters, task.weights[:, block])
        for block in blocks_of(task.weights)
    ]
    points = float(_v_measure(task.numbers, clusters, every)[0])
    values = np.concatenate(replicates)
    return {task.main_metric: Score(points, values - (values.mean() - points))}


def _k_means(vectors: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Return the cluster of each vector: the best of some runs of Lloyd's algorithm."""
    from scipy.cluster.vq import kmeans2
    from threadpoolctl import threadpool_limits  # sets a variable when it is imported

    found, least = np.zeros(len(vectors), dtype=np.intp), np.inf
    random = np.random.default_rng(_SEED)
    for _ in range(_STARTS):
        # More threads take sums in another order; clusters stay empty where vectors are equal.
        with _ONE_AT_A_TIME, threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            start = _seeds(vectors, count, random)
            centres, clusters = kmeans2(vectors, start, _STEPS, minit="matrix", check_finite=False)
        spread = float(((vectors - centres[clusters]) ** 2).sum())
        if spread < least:
            found, least = clusters.astype(np.intp), spread
    return found


def _seeds(
    vectors: NDArray[np.float32], count: int, random: np.random.Generator
) -> NDArray[np.float32]:
    """Return vectors to start from, far from each other: k-means++ (Arthur, Vassilvitskii, 2007).

    scipy's own depends on its release in how it is given its randomness.
    """
    rows = [int(random.integers(len(vectors)))]
    squares = np.einsum("ij,ij->i", vectors, vectors).astype(np.float64)
    nearest = np.full(len(vectors), np.inf)
    while len(rows) < count:
        distances = squares + squares[rows[-1]] - 2 * (vectors @ vectors[rows[-1]])
        nearest = np.minimum(nearest, np.maximum(distances, 0))
        total = np.cumsum(nearest)
        drawn = int(np.searchsorted(total, random.random() * total[-1], "right"))
        rows.append(min(drawn, len(vectors) - 1))
    return vectors[rows]


def _v_measure(topics: NDArray[np.intp], clusters: NDArray[np.intp], weights: Draws) -> Doubles:
    """Return the V-measure in each replicate, (replicates,), in points."""
    both = topics * (1 + int(clusters.max())) + clusters
    joint, of_topics, of_clusters = (
        _entropy(numbers, weights) for numbers in (both, topics, clusters)
    )
    shared = of_topics + of_clusters - joint
    # The harmonic mean of shared / of_topics and shared / of_clusters; 1 where both have none.
    total = of_topics + of_clusters
    found: Doubles = np.ones_like(total)
    np.divide(2 * shared, total, out=found, where=total > 1e-12)
    return 100 * np.clip(found, 0, 1)


def _entropy(numbers: NDArray[np.intp], weights: Draws) -> Doubles:
    """Return the entropy of which group a drawn text is in, (replicates,)."""
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    sizes = np.add.reduceat(weights[order], starts, axis=0, dtype=np.float64)
    shares = sizes / len(numbers)
    entropy: Doubles = -(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=0)
    return entropy


def _topic(value: Any, where: str) -> str:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise UsageError(f"{where}: {shown(value)} is not a topic; write a name or a whole number.")
