"""Quality of one cell from vectors that are already there, by the kind of task.

All metrics are in points, 0 to 100, and each has its bootstrap replicates (``resample``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from m2dexport.precisions import VectorPrecision
from m2dexport.vectors.classification import PairClassificationTask, classification_scores
from m2dexport.vectors.clustering import ClusteringTask, clustering_scores
from m2dexport.vectors.codecs import Ranges, encode_vectors, truncate
from m2dexport.vectors.pairs import StsTask
from m2dexport.vectors.ranking import NO_ROW, Rows, rank, rescore, rounded
from m2dexport.vectors.resample import Doubles, Score, means_of_items, pearson, spearman
from m2dexport.vectors.retrieval import DISCOUNTS, TOP, RetrievalTask
from m2dexport.vectors.search import Codec
from m2dexport.vectors.tasks import Task

Floats = NDArray[np.float32]

_MULTIPLIER = 4  # times as many candidates are rescored
_BLOCK_VALUES = 1 << 17  # of vectors, or of one side of pairs
#: Metrics of rankings beside a cell's own: rescored ones, and those of other cells' queries.
BRIEF = (f"ndcg@{TOP}", f"recall@{TOP}")


def evaluate(
    task: Task,
    vectors: Sequence[Floats],
    dim: int,
    precision: VectorPrecision,
    ranges: Ranges | None = None,
) -> dict[str, float]:
    """Return metric -> points of what ``scores_of`` says."""
    found = scores_of(task, vectors, dim, precision, ranges)
    return {metric: score.points for metric, score in found.items()}


def scores_of(
    task: Task,
    vectors: Sequence[Floats],
    dim: int,
    precision: VectorPrecision,
    ranges: Ranges | None = None,
    reference: Rows | None = None,
) -> dict[str, Score]:
    """Return metric -> points, and replicates, for one dim and vector precision.

    Retrieval with one-bit codes is scored rescored, too: ``ndcg@10+int8x4`` is that of the best
    4 x 10 documents by Hamming distance, ranked again by the product of the float query with int8
    documents, which must be stored beside the bits; ``ndcg@10+ubinaryx4`` with the bits themselves.

    Args:
        task: what to score.
        vectors: pooled float32 (texts, width) of each of ``task.texts()``, neither cut nor
            normalised.
        dim: leading width to keep.
        precision: how the vectors are stored; see ``comparable``.
        ranges: the frozen ranges of int8 and int4 vectors, of this dim; without them, one-bit codes
            are not rescored.
        reference: the ``ranking_of`` the reference cell, of retrieval: adds ``overlap@10``.
    """
    return stored_scores(task, [truncate(v, dim) for v in vectors], precision, ranges, reference)


def stored_scores(
    task: Task,
    floats: Sequence[Floats],
    precision: VectorPrecision,
    ranges: Ranges | None = None,
    reference: Rows | None = None,
) -> dict[str, Score]:
    """Return what ``scores_of`` does, of vectors that are cut and normalised already."""
    stored = [comparable(rows, precision, ranges) for rows in floats]
    if isinstance(task, StsTask):
        return pair_scores(task, *stored)
    if isinstance(task, PairClassificationTask):
        return classification_scores(task, similarities(*stored))
    if isinstance(task, ClusteringTask):
        return clustering_scores(task, *stored)
    first, second = stored
    rescores = precision in ("ubinary", "binary") and ranges is not None
    best = rank(first, second, (_MULTIPLIER if rescores else 1) * TOP, _own(task))
    scores = ranking_scores(task, best[:, :TOP], reference)
    if rescores:
        documents_by = {precision: second, "int8": comparable(floats[1], "int8", ranges)}
        for name, documents in documents_by.items():
            found = ranking_scores(task, rescore(floats[0], documents, best, TOP), only=BRIEF)
            scores |= {f"{key}+{name}x{_MULTIPLIER}": value for key, value in found.items()}
    return scores


def ranking_of(task: RetrievalTask, vectors: Sequence[Floats], dim: int) -> Rows:
    """Return the ten documents that unquantized vectors find for each query, (queries, 10).

    Args:
        task: the queries and documents.
        vectors: as ``scores_of`` takes them.
        dim: leading width to keep.
    """
    queries, documents = (truncate(rows, dim) for rows in vectors)
    return rank(queries, documents, TOP, _own(task))


def _own(task: RetrievalTask) -> Rows | None:
    return np.array(task.own, dtype=np.intp) if task.own else None


def comparable(vectors: Floats, precision: VectorPrecision, ranges: Ranges | None) -> Floats:
    """Return what a dot product of stored vectors compares, float32 (texts, dim).

    Args:
        vectors: normalised float32 (texts, dim).
        precision: how they are stored. int8 and int4 are compared by the cosine of decoded values,
            int8-symmetric by that of the codes, ubinary and binary by Hamming distance.
        ranges: the frozen ranges of int8 and int4 vectors.
    """
    codec = Codec(precision, vectors.shape[1], ranges)
    codes = encode_vectors(vectors, precision, ranges)
    found = np.empty(vectors.shape, dtype=np.float32)
    for rows in _blocks(vectors):
        found[rows] = codec.comparable(codes[rows])
    return found


def _blocks(vectors: Floats) -> Iterator[slice]:
    """Yield the rows of as many vectors at a time as stay in the processor's cache."""
    count, dim = vectors.shape
    size = max(1, _BLOCK_VALUES // dim)
    for start in range(0, count, size):
        yield slice(start, start + size)


def score_pairs(task: StsTask, first: Floats, second: Floats) -> dict[str, float]:
    """Return metric -> points of ``pair_scores``."""
    return {metric: each.points for metric, each in pair_scores(task, first, second).items()}


def pair_scores(task: StsTask, first: Floats, second: Floats) -> dict[str, Score]:
    """Return the rank and linear correlation of people's scores with the pairs' dot products.

    Both are 0 when all products or all scores are equal, where no correlation exists. The vectors
    are ``comparable`` ones, float32 (pairs, dim).
    """
    similarity = similarities(first, second)
    return {
        "spearman": spearman(similarity, task.given),
        "pearson": pearson(similarity, task.given),
    }


def similarities(first: Floats, second: Floats) -> Doubles:
    """Return the dot product of each pair of ``comparable`` vectors, (pairs,)."""
    products = np.empty(len(first))
    for rows in _blocks(first):
        products[rows] = np.einsum("ij,ij->i", rounded(first[rows]), rounded(second[rows]))
    return products


def score_ranking(
    task: RetrievalTask,
    ranking: Rows,
    reference: Rows | None = None,
    only: Collection[str] | None = None,
) -> dict[str, float]:
    """Return metric -> points of ``ranking_scores``, without resampling."""
    figures = _per_query(task, ranking, reference, only)
    return {metric: float(values.mean()) for metric, values in figures.items()}


def ranking_scores(
    task: RetrievalTask,
    ranking: Rows,
    reference: Rows | None = None,
    only: Collection[str] | None = None,
) -> dict[str, Score]:
    """Return the metrics of rankings of ten documents, each a mean over queries.

    * ``ndcg@10``, ``map@10`` and ``recall@10`` as in trec_eval, and so in BEIR and MTEB: linear
      gains with the log2 discount; precision at each relevant document found, over all that are
      relevant; the share of them that was found. ``mrr@10``: one over the first one's place.
    * ``complete@10``, where some query has several relevant documents: the share of queries all of
      whose relevant documents are among the ten. A vector of d dims cannot represent every
      combination of documents, however it was trained (Weller et al., "On the Theoretical
      Limitations of Embedding-Based Retrieval", 2025, whose data set is LIMIT).
    * ``overlap@10``, with a reference: the share of its ten documents that are among the ten.

    Args:
        task: the queries and what answers them.
        ranking: (queries, 10) rows of documents, best first, or ``NO_ROW``.
        reference: the ``ranking_of`` the reference cell.
        only: metrics to return; None: all.
    """
    figures = _per_query(task, ranking, reference, only)
    values = np.stack(list(figures.values()))
    scores = means_of_items(values, task.sha256)
    return dict(zip(figures, scores, strict=True))


def _per_query(
    task: RetrievalTask, ranking: Rows, reference: Rows | None, only: Collection[str] | None
) -> dict[str, Doubles]:
    """Return metric -> points of each query."""
    judged, places = task.judged, ranking.shape[1]
    gains = judged.gains(ranking)
    relevant = gains > 0
    found, all_of_them = relevant.sum(axis=1), np.maximum(judged.counts, 1)

    def average_precision() -> Doubles:
        precision = np.cumsum(relevant, axis=1) / np.arange(1, places + 1)
        found_at: Doubles = (precision * relevant).sum(axis=1)
        return found_at / all_of_them

    metrics: dict[str, Callable[[], Doubles]] = {
        f"ndcg@{TOP}": lambda: (gains * DISCOUNTS[:places]).sum(axis=1) / judged.ideal,
        f"recall@{TOP}": lambda: found / all_of_them,
        f"mrr@{TOP}": lambda: (relevant / np.arange(1, places + 1)).max(axis=1, initial=0),
        f"map@{TOP}": average_precision,
    }
    if (judged.counts > 1).any():
        metrics[f"complete@{TOP}"] = lambda: (found == all_of_them).astype(np.float64)
    if reference is not None:
        metrics[f"overlap@{TOP}"] = lambda: _overlap(ranking, reference)
    return {name: 100 * of() for name, of in metrics.items() if only is None or name in only}


def _overlap(ranking: Rows, reference: Rows) -> Doubles:
    """Return which share of a reference's documents each query's ranking holds, (queries,)."""
    there = reference != NO_ROW
    shared = np.zeros(reference.shape, dtype=np.bool_)
    for place in range(ranking.shape[1]):
        shared |= reference == ranking[:, place, None]
    shared &= there
    shares: Doubles = shared.sum(axis=1) / np.maximum(there.sum(axis=1), 1)
    return shares
