"""Every cell of a surface is scored from one set of vectors, by however many threads there are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from m2dexport import cores
from m2dexport.profile import crossing
from m2dexport.profile.crossing import Side, cross_depth
from m2dexport.profile.grid import passes_of
from m2dexport.profile.plan import Plan
from m2dexport.profile.surface import Corpus
from m2dexport.profile.views import View, qualities, scoring_threads
from m2dexport.vectors import codecs
from m2dexport.vectors.clustering import ClusteringTask
from m2dexport.vectors.pairs import StsTask
from m2dexport.vectors.quality import BRIEF, score_ranking, scores_of
from m2dexport.vectors.ranking import rank
from m2dexport.vectors.retrieval import TOP, RetrievalTask

WIDTH, TEXTS = 48, 150
VECTORS = np.random.default_rng(7).standard_normal((TEXTS, WIDTH)).astype(np.float32)
NAMES = tuple(f"text {row}" for row in range(TEXTS))
STS = StsTask("sts", NAMES[:60], NAMES[60:120], tuple(float(row % 7) for row in range(60)), "0")
#: Two of the queries are documents, too.
RETRIEVAL = RetrievalTask(
    "retrieval",
    NAMES[:30],
    NAMES[20:],
    tuple({(row * 3) % 130: 1.0, row: 2.0} for row in range(30)),
    "1",
    own=(*[-1] * 28, 8, 9),
)
TOPICS = ClusteringTask("topics", NAMES, tuple(str(row % 3) for row in range(TEXTS)), "2")
ROWS = ((range(60), range(60, 120)), (range(30), range(20, TEXTS)), (range(TEXTS),))
TASKS = tuple(
    (task, tuple(list(rows) for rows in text_sets))
    for task, text_sets in zip((STS, RETRIEVAL, TOPICS), ROWS, strict=True)
)
CORPUS = Corpus(NAMES, (), (), tuple(range(TEXTS)), TASKS)
PRECISIONS = ("float32", "int8", "int4", "ubinary")


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch) -> int:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(cores, "usable_cores", lambda: 4)
    return request.param  # type: ignore[no-any-return]


def test_a_cell_is_scored_as_if_it_were_alone(threads: int) -> None:
    ranges = {dim: codecs.calibrate_ranges(codecs.truncate(VECTORS, dim)) for dim in (16, 48)}
    views = [View(2, "none", dim, VECTORS, each) for dim, each in ranges.items()]
    wanted = {(2, "none", dim, each): f"{dim}-{each}" for dim in ranges for each in PRECISIONS}
    reference = {"retrieval": np.tile(np.arange(TOP), (30, 1))}
    done: list[tuple[int, int]] = []
    with scoring_threads(threads, VECTORS.nbytes) as executor:
        found = qualities(views, wanted, CORPUS, reference, executor, lambda *n: done.append(n))
    assert list(found) == list(wanted.values())
    assert done == [(1, 2), (2, 2)]
    for (_, _, dim, precision), name in wanted.items():
        for task, rows in TASKS:
            vectors = [VECTORS[row] for row in rows]
            overlaps = reference.get(task.name)
            alone = scores_of(task, vectors, dim, precision, ranges[dim], overlaps)
            for metric, score in alone.items():
                together = found[name][f"{task.name}/{metric}"]
                assert together.points == score.points
                np.testing.assert_array_equal(together.replicates, score.replicates)


@pytest.mark.parametrize("rounded_once", [0, 1 << 20])
def test_queries_of_all_depths_are_ranked_as_those_of_one(
    threads: int, rounded_once: int, monkeypatch
) -> None:
    monkeypatch.setattr(crossing, "_ROUNDED_ONCE", rounded_once)
    plan = Plan(layers=(1, 2), dims=(16, 48), weights=("fp32",), align=("none",))
    (one,) = passes_of((replace(plan, reference=(2, 48, "fp32", "float32")),))
    depths = {1: VECTORS, 2: VECTORS[::-1].copy()}
    tasks = (TASKS[1], (replace(RETRIEVAL, name="other", own=()), TASKS[1][1]))
    views = tuple(
        View(layers, "none", dim, depths[layers], None) for layers in (1, 2) for dim in (16, 48)
    )
    side = Side(one, views, tasks, 2)
    with scoring_threads(threads, VECTORS.nbytes) as executor:
        found = cross_depth(side, executor)
    assert [(each.dim, each.queries, each.documents) for each in found] == [
        (dim, asking, holding) for dim in (16, 48) for asking in "12" for holding in "12"
    ]
    for each in found:
        for task, (queries, documents) in tasks:
            asked, held = (
                codecs.truncate(depths[int(name)][rows], each.dim)
                for name, rows in ((each.queries, queries), (each.documents, documents))
            )
            own = np.array(task.own) if task.own else None
            points = score_ranking(task, rank(asked, held, TOP, own), only=BRIEF)
            assert points == {metric: each.quality[f"{task.name}/{metric}"] for metric in BRIEF}
