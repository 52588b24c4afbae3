"""Bootstrap resamples, against items that are really repeated and scipy's and sklearn's figures."""

from __future__ import annotations

import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from m2dexport.vectors import resample
from m2dexport.vectors.classification import PairClassificationTask, classification_scores
from m2dexport.vectors.clustering import ClusteringTask, clustering_scores
from m2dexport.vectors.resample import (
    REPLICATES,
    Score,
    difference,
    draws,
    given_of,
    groups_of,
    interval,
    intervals,
    mean_of,
    means_of_items,
    pearson,
    spearman,
)

FEW = range(0, REPLICATES, 85)  # replicates that are checked

#: Values that tie often, and values that rarely do.
values = st.one_of(st.integers(0, 4).map(float), st.floats(-1, 1, width=32))
columns = st.lists(st.tuples(values, values), min_size=2, max_size=60)


def drawn(weights: np.ndarray, replicate: int) -> np.ndarray:  # type: ignore[type-arg]
    """Return the rows of the items that a replicate draws, as often as it does."""
    return np.repeat(np.arange(len(weights)), weights[:, replicate])


def correlation(function, first, second) -> float:  # type: ignore[no-untyped-def]
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are nearly constant
        return 100 * float(function(first, second).statistic)


@settings(deadline=None, max_examples=50)
@given(columns)
def test_a_replicate_is_what_scipy_gives_for_the_items_drawn(pairs) -> None:
    x, y = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    weights = draws("5eed", len(x))
    found = spearman(x, given_of(y, "5eed"))
    assert found.points == pytest.approx(correlation(stats.spearmanr, x, y), abs=1e-6)
    for replicate in FEW:
        rows = drawn(weights, replicate)
        expected = correlation(stats.spearmanr, x[rows], y[rows])
        assert found.replicates[replicate] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("different", [1, 3, 40, 300])
def test_what_ties_is_summed_together_however_many_groups_there_are(different: int) -> None:
    values = np.random.default_rng(1).integers(0, different, 300).astype(np.float64)
    weights = draws("5eed", len(values))
    sums = groups_of(values).sums(weights)
    expected = [weights[values == value].sum(axis=0) for value in np.unique(values)]
    np.testing.assert_array_equal(sums, expected)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-9, 9)), min_size=2, max_size=60))
def test_linear_correlation_is_resampled_likewise(pairs) -> None:
    x, y = (np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    weights = draws("5eed", len(x))
    found = pearson(x / 9, given_of(y, "5eed"))
    assert found.points == pytest.approx(correlation(stats.pearsonr, x, y), abs=1e-6)
    for replicate in FEW:
        rows = drawn(weights, replicate)
        expected = correlation(stats.pearsonr, x[rows], y[rows])
        assert found.replicates[replicate] == pytest.approx(expected, abs=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(values, st.booleans()), min_size=2, max_size=60))
def test_average_precision_is_that_of_sklearn_for_the_pairs_drawn(pairs) -> None:
    similarity, labels = np.array([s for s, _ in pairs]), np.array([label for _, label in pairs])
    labels[:2] = True, False
    task = PairClassificationTask("p", (), (), tuple(labels.tolist()), "5eed")
    found = classification_scores(task, similarity)
    expected = 100 * metrics.average_precision_score(labels, similarity)
    assert found["ap"].points == pytest.approx(expected, abs=1e-4)
    called = [similarity >= at for at in [*np.unique(similarity), np.inf]]
    best = {
        "f1": max(metrics.f1_score(labels, each, zero_division=0) for each in called),
        "accuracy": max(metrics.accuracy_score(labels, each) for each in called),
    }
    assert {n: found[n].points / 100 for n in best} == pytest.approx(best, abs=1e-6)
    for replicate in FEW:
        rows = drawn(task.weights, replicate)
        if labels[rows].any():
            expected = 100 * metrics.average_precision_score(labels[rows], similarity[rows])
            assert found["ap"].replicates[replicate] == pytest.approx(expected, abs=1e-4)


def topical(spread: float) -> tuple[ClusteringTask, np.ndarray]:  # type: ignore[type-arg]
    """Return 120 texts of three topics, one in six of them wrong, and vectors near their centre."""
    rng = np.random.default_rng(0)
    centres, topics = rng.standard_normal((3, 16)), np.arange(120) % 3
    vectors = centres[topics] + spread * rng.standard_normal((120, 16))
    told = np.where(np.arange(120) % 6 == 0, (topics + 1) % 3, topics)
    task = ClusteringTask("c", tuple(map(str, range(120))), tuple(map(str, told)), "5eed")
    return task, vectors.astype(np.float32)


def test_v_measure_of_clear_clusters_is_that_of_sklearn_for_the_texts_drawn() -> None:
    task, vectors = topical(spread=0.01)
    found = clustering_scores(task, vectors)["v_measure"]
    clusters = np.arange(120) % 3
    expected = 100 * metrics.v_measure_score(task.topics, clusters)
    assert 40 < expected < 90
    assert found.points == pytest.approx(expected)
    drawn_rows = [drawn(task.weights, replicate) for replicate in range(REPLICATES)]
    told = np.array(task.topics)
    lifted = np.array([100 * metrics.v_measure_score(told[r], clusters[r]) for r in drawn_rows])
    assert lifted.mean() > found.points  # by texts that are there twice, which is taken off
    np.testing.assert_allclose(found.replicates, lifted - lifted.mean() + found.points)


def test_vectors_without_structure_find_no_topics() -> None:
    task, vectors = topical(spread=100)
    assert clustering_scores(task, vectors)["v_measure"].points < 10
    collapsed = clustering_scores(task, np.ones_like(vectors))["v_measure"]
    assert collapsed.points == pytest.approx(0, abs=1e-9)


def test_means_are_those_of_the_items_drawn() -> None:
    rows = np.random.default_rng(0).uniform(size=(3, 40))
    weights = draws("5eed", 40)
    for row, found in zip(rows, means_of_items(rows, "5eed"), strict=True):
        assert found.points == pytest.approx(row.mean())
        expected = [row[drawn(weights, replicate)].mean() for replicate in range(REPLICATES)]
        np.testing.assert_allclose(found.replicates, expected)


def test_the_draws_follow_from_content_and_draw_as_many_items_as_there_are() -> None:
    first, again, other = draws("ab", 30), draws.__wrapped__("ab", 30), draws("cd", 30)
    assert (first == again).all()
    assert (first != other).any()
    assert (first.sum(axis=0) == 30).all()


def test_what_two_cells_share_cancels_out_of_their_difference() -> None:
    rng = np.random.default_rng(0)
    given_scores = rng.uniform(0, 5, 300)
    given_scored = given_of(given_scores, "ab")
    good = given_scores + rng.normal(scale=2, size=300)
    found = spearman(good, given_scored)
    worse = spearman(good + rng.normal(scale=0.5, size=300), given_scored)
    low, high = interval(found)
    apart = interval(difference(found, worse))
    assert low < found.points < high
    assert apart[1] - apart[0] < (high - low) / 2


def test_an_interval_is_about_as_wide_as_theory_has_it() -> None:
    """Of Fisher: the standard error of atanh(r) is 1 / sqrt(n - 3)."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal(1000)
    y = 0.8 * x + 0.6 * rng.standard_normal(1000)
    low, high = interval(pearson(x, given_of(y, "ab")))
    width = 2 * 1.96 / np.sqrt(997)
    assert np.arctanh(high / 100) - np.arctanh(low / 100) == pytest.approx(width, rel=0.25)


def test_several_intervals_are_those_of_each() -> None:
    rng = np.random.default_rng(0)
    scores = [Score(float(rng.normal(50, 9)), rng.normal(50, 3, REPLICATES)) for _ in range(7)]
    assert intervals(scores) == [interval(score) for score in scores]
    assert all(
        low <= each.points <= high
        for each, (low, high) in zip(scores, intervals(scores), strict=True)
    )


def test_a_mean_of_tasks_has_the_mean_of_their_replicates() -> None:
    scores = [Score(10.0, np.full(4, 8.0)), Score(30.0, np.full(4, 40.0))]
    found = mean_of(scores)
    assert (found.points, found.replicates.tolist()) == (20.0, [24.0] * 4)


def test_many_items_are_resampled_some_replicates_at_a_time(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(30_000)
    once = np.ones((30_000, REPLICATES), dtype=np.uint8)
    monkeypatch.setattr(resample, "draws", lambda *_: once)
    given_scored = given_of(x + rng.standard_normal(30_000), "5eed")
    tracemalloc.start()
    found = spearman(x, given_scored)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.replicates == pytest.approx(np.full(REPLICATES, found.points), abs=1e-3)
    assert most < 30_000 * REPLICATES * 8
