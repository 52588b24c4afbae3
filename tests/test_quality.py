"""Metrics, against references computed by hand or by scipy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from m2dexport.errors import UsageError
from m2dexport.vectors.classification import PairClassificationTask
from m2dexport.vectors.clustering import ClusteringTask
from m2dexport.vectors.codecs import (
    calibrate_ranges,
    decode_vectors,
    encode_vectors,
    normalize,
    truncate,
)
from m2dexport.vectors.pairs import StsTask
from m2dexport.vectors.quality import evaluate, ranking_of, score_ranking, scores_of
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
    assert plain == {name: points for name, points in found.items() if "+" not in name}


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
    gains, figures = [], []
    for row, relevant in zip(ranking, relevance, strict=True):
        found = sum(relevant.get(i, 0.0) / np.log2(at + 2) for at, i in enumerate(row))
        best = sorted(relevant.values(), reverse=True)[:10]
        ideal = sum(gain / np.log2(at + 2) for at, gain in enumerate(best))
        gains.append(found / ideal if ideal else 0.0)
        at = [place for place, i in enumerate(row, start=1) if i in relevant]
        precision = [so_far / place for so_far, place in enumerate(at, start=1)]
        judged_count = max(1, len(relevant))
        figures.append(
            (len(at) / judged_count, 1 / at[0] if at else 0, sum(precision) / judged_count)
        )
    scores = score_ranking(retrieval(relevance, documents), np.array(ranking))
    assert scores["ndcg@10"] == pytest.approx(100 * np.mean(gains))
    names = ("recall@10", "mrr@10", "map@10")
    assert [scores[name] for name in names] == pytest.approx(100 * np.mean(figures, axis=0))


def test_rankings_score_as_in_trec_eval() -> None:
    """By the package that BEIR and MTEB score with."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rankings = np.array([RNG.permutation(40)[:10] for _ in range(30)])
    relevance = tuple(
        {int(i): float(RNG.integers(1, 4)) for i in RNG.permutation(40)[: 1 + query % 15]}
        for query in range(30)
    )
    judged = {
        f"q{query}": {f"d{i}": int(gain) for i, gain in gains.items()}
        for query, gains in enumerate(relevance)
    }
    run = {
        f"q{query}": {f"d{i}": float(-at) for at, i in enumerate(row)}
        for query, row in enumerate(rankings)
    }
    names = {"ndcg_cut_10": "ndcg@10", "recall_10": "recall@10", "map_cut_10": "map@10"}
    names["recip_rank"] = "mrr@10"  # of a run of ten documents
    theirs = pytrec_eval.RelevanceEvaluator(judged, set(names)).evaluate(run).values()
    ours = score_ranking(retrieval(relevance, 40), rankings)
    for metric, name in names.items():
        assert ours[name] == pytest.approx(100 * np.mean([each[metric] for each in theirs]))


def test_a_query_is_complete_when_all_its_documents_are_among_the_ten() -> None:
    task = retrieval(({0: 1.0, 1: 1.0}, {2: 1.0, 99: 1.0}, {5: 1.0}), 200)
    found = score_ranking(task, np.array([range(10)] * 3))
    assert found["complete@10"] == pytest.approx(100 * 2 / 3)
    single = retrieval(({0: 1.0},), 200)  # it would be recall
    assert "complete@10" not in score_ranking(single, np.array([range(10)]))


def test_overlap_is_the_share_of_the_references_ten_that_are_found() -> None:
    reference = np.array([[0, 1, 2, 3, NO_ROW], [5, 6, 7, 8, 9]])
    ranking = np.array([[3, 9, 0, NO_ROW, NO_ROW], [9, 8, 7, 6, 5]])
    task = retrieval(({0: 1.0}, {5: 1.0}), 10)
    assert score_ranking(task, ranking, reference)["overlap@10"] == pytest.approx(75)


def test_the_reference_overlaps_with_itself_and_its_signs_less() -> None:
    queries, documents = unit(40, 32), unit(300, 32)
    task = retrieval(tuple({row: 1.0} for row in range(40)), 300)
    vectors = queries, documents
    reference = ranking_of(task, vectors, 32)
    same = scores_of(task, vectors, 32, "float32", reference=reference)["overlap@10"]
    coded = scores_of(task, vectors, 32, "ubinary", reference=reference)["overlap@10"]
    assert same.points == 100
    assert (same.replicates == 100).all()
    assert 20 < coded.points < 90


def test_pairs_of_two_classes_and_topics_are_scored_from_their_vectors() -> None:
    texts = tuple(map(str, range(40)))
    vectors = unit(40, 8)
    same = tuple(row % 2 == 0 for row in range(40))
    others = np.where(np.array(same)[:, None], vectors, -vectors)
    pairs = PairClassificationTask("p", texts, texts, same, "0")
    assert evaluate(pairs, (vectors, others), 8, "int8-symmetric") == pytest.approx(
        {"ap": 100, "f1": 100, "accuracy": 100}
    )
    topics = ClusteringTask("c", texts, tuple(map(str, same)), "0")
    ones = np.where(np.array(same)[:, None], 1, -1) * np.ones((40, 8), np.float32)
    assert evaluate(topics, (ones,), 8, "ubinary") == pytest.approx({"v_measure": 100})
