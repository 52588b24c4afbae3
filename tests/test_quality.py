"""Metrics, against references computed by hand or by scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from m2dexport.errors import UsageError
from m2dexport.vectors.codecs import (
    calibrate_ranges,
    decode_vectors,
    encode_vectors,
    normalize,
    truncate,
)
from m2dexport.vectors.pairs import StsTask
from m2dexport.vectors.quality import evaluate, score_ranking
from m2dexport.vectors.ranking import NO_ROW
from m2dexport.vectors.retrieval import RetrievalTask

RNG = np.random.default_rng(0)


def sts(scores: list[float]) -> StsTask:
    texts = tuple(str(i) for i in range(len(scores)))
    return StsTask("sts", texts, texts, tuple(scores), "0")


def unit(rows: int, dim: int) -> np.ndarray:  # type: ignore[type-arg]
    return RNG.standard_normal((rows, dim)).astype(np.float32)


def test_float_similarity_is_the_cosine_of_the_cut_vectors() -> None:
    a, b = unit(50, 24), unit(50, 24)
    scores = RNG.uniform(0, 5, 50).tolist()
    cosine = (normalize(a[:, :10]) * normalize(b[:, :10])).sum(axis=1)
    found = evaluate(sts(scores), (a, b), 10, "float32")
    assert found["spearman"] == pytest.approx(100 * stats.spearmanr(cosine, scores).statistic)
    assert found["pearson"] == pytest.approx(100 * stats.pearsonr(cosine, scores).statistic)


def test_ubinary_similarity_is_hamming_distance() -> None:
    a, b = unit(50, 24), unit(50, 24)
    scores = RNG.uniform(0, 5, 50).tolist()
    distance = ((a[:, :13] > 0) != (b[:, :13] > 0)).sum(axis=1)
    found = evaluate(sts(scores), (a, b), 13, "ubinary")
    assert found["spearman"] == pytest.approx(100 * stats.spearmanr(-distance, scores).statistic)


def test_int8_similarity_is_the_cosine_of_decoded_codes() -> None:
    a, b = unit(50, 24), unit(50, 24)
    scores = RNG.uniform(0, 5, 50).tolist()
    ranges = calibrate_ranges(truncate(unit(500, 24), 16))
    decoded = [
        normalize(
            decode_vectors(encode_vectors(truncate(x, 16), "int8", ranges), "int8", 16, ranges)
        )
        for x in (a, b)
    ]
    expected = stats.spearmanr((decoded[0] * decoded[1]).sum(axis=1), scores).statistic
    found = evaluate(sts(scores), (a, b), 16, "int8", ranges)
    assert found["spearman"] == pytest.approx(100 * expected, abs=1e-3)


def retrieval(relevance: tuple[dict[int, float], ...], documents: int) -> RetrievalTask:
    queries = tuple(f"q{row}" for row in range(len(relevance)))
    return RetrievalTask("r", queries, tuple(map(str, range(documents))), relevance, "0")


@pytest.mark.parametrize("precision", ["ubinary", "binary"])
def test_one_bit_codes_are_scored_rescored_too(precision: str) -> None:
    documents, ranges = unit(200, 32), calibrate_ranges(truncate(unit(500, 32), 32))
    # Each query is a document with noise; its code alone often finds a neighbour first.
    queries = documents[:50] + 1.2 * unit(50, 32)
    task = retrieval(tuple({row: 1.0} for row in range(50)), 200)
    found = evaluate(task, (queries, documents), 32, precision, ranges)
    floats = evaluate(task, (queries, documents), 32, "float32")["ndcg@10"]
    assert found["ndcg@10"] < found[f"ndcg@10+{precision}x4"] < found["ndcg@10+int8x4"]
    assert found["ndcg@10+int8x4"] == pytest.approx(floats, abs=2)
    assert found["recall@10"] <= found["recall@10+int8x4"]
    plain = evaluate(task, (queries, documents), 32, precision)
    assert plain == {name: found[name] for name in ("ndcg@10", "recall@10")}


def test_nan_vectors_are_refused_rather_than_scored() -> None:
    broken = unit(5, 4)
    broken[3, 1] = np.nan
    with pytest.raises(UsageError, match="vector 3 holds NaN"):
        evaluate(sts([1, 2, 3, 4, 5]), (unit(5, 4), broken), 4, "float32")


def test_a_collapsed_model_has_no_correlation_rather_than_nan() -> None:
    constant = np.ones((5, 4), np.float32)
    with np.errstate(all="ignore"):
        found = evaluate(sts([1, 2, 3, 4, 5]), (constant, constant), 4, "float32")
    assert found == {"spearman": 0.0, "pearson": 0.0}


def test_ndcg_and_recall_as_computed_by_hand() -> None:
    documents = np.eye(12, dtype=np.float32)
    queries = np.zeros((2, 12), np.float32)
    queries[0, :3] = (0.9, 0.3, 0.2)  # ranks document 0, then 1, then 2
    queries[1, 11] = 1.0
    task = retrieval(({1: 1.0, 2: 2.0}, {5: 1.0}), 12)
    found = evaluate(task, (queries, documents), 12, "float32")
    gain = 1 / np.log2(3) + 2 / np.log2(4)
    ideal = 2 / np.log2(2) + 1 / np.log2(3)
    # The second query's answer ties with ten others of score 0: rank 7, as ties go by row.
    other = 1 / np.log2(8)
    assert found["ndcg@10"] == pytest.approx(100 * (gain / ideal + other) / 2, abs=1e-4)
    assert found["recall@10"] == pytest.approx(100.0)


@settings(deadline=None)
@given(st.data(), st.integers(1, 8), st.integers(1, 20))
def test_rankings_score_as_in_a_plain_loop(
    data: st.DataObject, queries: int, documents: int
) -> None:
    """With judged documents that the corpus lacks, and rankings that end early."""
    places = min(10, documents)
    judged = st.dictionaries(
        st.integers(0, documents + 5), st.sampled_from([0.5, 1.0, 2.0, 3.0]), max_size=15
    )
    relevance = tuple(data.draw(st.lists(judged, min_size=queries, max_size=queries)))
    relevance = (*relevance, {0: 1.0})
    ranking = []
    for _ in relevance:
        order = data.draw(st.permutations(range(documents)))
        length = data.draw(st.integers(0, places))
        ranking.append([*order[:length], *[NO_ROW] * places][:places])
    gains, recalls = [], []
    for row, relevant in zip(ranking, relevance, strict=True):
        found = sum(relevant.get(i, 0.0) / np.log2(at + 2) for at, i in enumerate(row))
        best = sorted(relevant.values(), reverse=True)[:10]
        ideal = sum(gain / np.log2(at + 2) for at, gain in enumerate(best))
        gains.append(found / ideal if ideal else 0.0)
        recalls.append(sum(i in relevant for i in row) / max(1, len(relevant)))
    scores = score_ranking(retrieval(relevance, documents), np.array(ranking))
    assert scores["ndcg@10"] == pytest.approx(100 * np.mean(gains))
    assert scores["recall@10"] == pytest.approx(100 * np.mean(recalls))
