"""Quality of one cell from vectors that are already there: STS correlation and retrieval.

All metrics are in points, 0 to 100.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from m2dexport.precisions import VectorPrecision
from m2dexport.vectors.codecs import Ranges, encode_vectors, truncate
from m2dexport.vectors.pairs import StsTask
from m2dexport.vectors.ranking import Rows, rank, rescore, rounded
from m2dexport.vectors.resample import (
    Score,
    draws,
    mean_of_items,
    weighted_correlation,
    weighted_ranks,
)
from m2dexport.vectors.retrieval import TOP, RetrievalTask
from m2dexport.vectors.search import Codec
from m2dexport.vectors.tasks import Task

Floats = NDArray[np.float32]

_MULTIPLIER = 4  # times as many candidates are rescored
_PAIR_BLOCK = 4096


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
    """
    floats = [truncate(rows, dim) for rows in vectors]
    first, second = (comparable(rows, precision, ranges) for rows in floats)
    if isinstance(task, StsTask):
        return pair_scores(task, first, second)
    own = np.array(task.own, dtype=np.intp) if task.own else None
    scores = ranking_scores(task, rank(first, second, TOP, own))
    if precision in ("ubinary", "binary") and ranges is not None:
        candidates = rank(first, second, _MULTIPLIER * TOP, own)
        stored = {precision: second, "int8": comparable(floats[1], "int8", ranges)}
        for name, documents in stored.items():
            rescored = ranking_scores(task, rescore(floats[0], documents, candidates, TOP))
            scores |= {f"{key}+{name}x{_MULTIPLIER}": value for key, value in rescored.items()}
    return scores


def comparable(vectors: Floats, precision: VectorPrecision, ranges: Ranges | None) -> Floats:
    """Return what a dot product of stored vectors compares, float32 (texts, dim).

    Args:
        vectors: normalised float32 (texts, dim).
        precision: how they are stored. int8 and int4 are compared by the cosine of decoded values,
            int8-symmetric by that of the codes, ubinary and binary by Hamming distance.
        ranges: the frozen ranges of int8 and int4 vectors.
    """
    codec = Codec(precision, vectors.shape[1], ranges)
    return codec.comparable(encode_vectors(vectors, precision, ranges))


def score_pairs(task: StsTask, first: Floats, second: Floats) -> dict[str, float]:
    """Return metric -> points of ``pair_scores``."""
    return {metric: each.points for metric, each in pair_scores(task, first, second).items()}


def pair_scores(task: StsTask, first: Floats, second: Floats) -> dict[str, Score]:
    """Return the rank and linear correlation of people's scores with the pairs' dot products.

    Both are 0 when all products or all scores are equal, where no correlation exists. The vectors
    are ``comparable`` ones, float32 (pairs, dim).
    """
    similarity = np.concatenate(
        [
            _paired(first[start : start + _PAIR_BLOCK], second[start : start + _PAIR_BLOCK])
            for start in range(0, len(first), _PAIR_BLOCK)
        ]
    )
    given = np.array(task.scores, dtype=np.float64)
    constant = np.ptp(similarity) == 0 or np.ptp(given) == 0
    weights = draws(task.sha256, len(given))
    ranks, given_ranks = (weighted_ranks(values, weights) for values in (similarity, given))
    return {
        "spearman": Score(
            0.0 if constant else _points(stats.spearmanr(similarity, given).statistic),
            100 * weighted_correlation(ranks, given_ranks, weights),
        ),
        "pearson": Score(
            0.0 if constant else _points(stats.pearsonr(similarity, given).statistic),
            100 * weighted_correlation(similarity, given, weights),
        ),
    }


def score_ranking(task: RetrievalTask, ranking: Rows) -> dict[str, float]:
    """Return metric -> points of ``ranking_scores``."""
    return {metric: each.points for metric, each in ranking_scores(task, ranking).items()}


def ranking_scores(task: RetrievalTask, ranking: Rows) -> dict[str, Score]:
    """Return nDCG@10 and recall@10 of rankings of ten documents, (queries, 10), best first."""
    discounts = 1 / np.log2(np.arange(2, TOP + 2))
    judged = task.judged
    gains = judged.gains(ranking)
    ideal = (judged.ideal * discounts).sum(axis=1)
    found = (gains * discounts[: gains.shape[1]]).sum(axis=1)
    # As trec_eval and BEIR: linear gains, and the log2 discount.
    ndcg = np.divide(found, ideal, out=np.zeros_like(found), where=ideal > 0)
    recall = (gains > 0).sum(axis=1) / np.maximum(judged.counts, 1)
    weights = draws(task.sha256, len(ranking))
    return {
        f"ndcg@{TOP}": mean_of_items(100 * ndcg, weights),
        f"recall@{TOP}": mean_of_items(100 * recall, weights),
    }


def _paired(first: Floats, second: Floats) -> NDArray[np.float64]:
    products: NDArray[np.float64] = (rounded(first) * rounded(second)).sum(axis=1)
    return products


def _points(value: float) -> float:
    """Return a share as points."""
    return 100 * float(value)
