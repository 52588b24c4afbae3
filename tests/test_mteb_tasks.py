"""Tasks of the mteb package: scored here as mteb scores them."""

from __future__ import annotations

import zlib
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from m2dexport.cli import cli
from m2dexport.errors import M2DError, UsageError
from m2dexport.vectors.mteb_tasks import load_mteb, tasks_from_mteb
from m2dexport.vectors.quality import evaluate

pytest.importorskip("mteb", reason="mteb needs Python 3.11")

DIM = 16
WORDS = [*"abcdefghijklmno"]
RNG = np.random.default_rng(0)
TEXTS = [" ".join(RNG.choice(WORDS, 4)) for _ in range(240)]


def vector(text: str) -> np.ndarray:  # type: ignore[type-arg]
    """Return the sum of a vector for each word of a text."""
    seeds = [zlib.crc32(word.encode()) for word in text.split()]
    return sum((np.random.default_rng(seed).standard_normal(DIM) for seed in seeds), np.zeros(DIM))


class WordEncoder:
    """A model of mteb's, whose vectors are those of ``vector``."""

    mteb_model_meta = SimpleNamespace(name="words", revision="1")

    def encode(self, inputs: Any, **_: Any) -> np.ndarray:  # type: ignore[type-arg]
        return np.array([vector(text) for batch in inputs for text in batch["text"]], np.float32)

    def similarity(self, first: Any, second: Any) -> Any:
        from mteb.similarity_functions import cos_sim

        return cos_sim(first, second)

    def similarity_pairwise(self, first: Any, second: Any) -> Any:
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(first, second)


def task(kind: str, dataset: Any, **attributes: Any) -> Any:
    """Return a task of mteb's that holds its data already."""
    import mteb
    from mteb.abstasks import retrieval

    bases = {
        "STS": mteb.abstasks.AbsTaskSTS,
        "Retrieval": retrieval.AbsTaskRetrieval,
        "PairClassification": mteb.abstasks.AbsTaskPairClassification,
        "Clustering": mteb.abstasks.AbsTaskClustering,
        "Classification": mteb.abstasks.AbsTaskClassification,
    }
    main = {"STS": "cosine_spearman", "Retrieval": "ndcg_at_10", "Clustering": "v_measure"}
    metadata = mteb.TaskMetadata(
        name=f"Made{kind}",
        description="made up",
        dataset={"path": "none", "revision": "none"},
        type=kind,
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=main.get(kind, "cosine_ap"),
    )
    made = type(f"Made{kind}", (bases[kind],), {"metadata": metadata, **attributes})()
    made.dataset, made.data_loaded = dataset, dataset is not None
    return made


@cache
def mteb_scores(made: Any) -> dict[str, float]:
    (scores,) = made.evaluate(WordEncoder(), "test", encode_kwargs={}).values()
    return scores  # type: ignore[no-any-return]


def ours(made: Any) -> dict[str, float]:
    (found,) = tasks_from_mteb(made)
    assert found.name == made.metadata.name
    vectors = [
        np.array([vector(text) for text in text_set.texts], np.float32)
        for text_set in found.texts()
    ]
    return evaluate(found, vectors, DIM, "float32")


def rows(**columns: Any) -> Any:
    from datasets import Dataset

    return {"test": Dataset.from_dict(columns)}


def test_sts_scores_as_in_mteb() -> None:
    scores = RNG.integers(0, 11, 120) / 2
    made = task("STS", rows(sentence1=TEXTS[:120], sentence2=TEXTS[120:], score=scores))
    theirs, found = mteb_scores(made), ours(made)
    assert found["spearman"] == pytest.approx(100 * theirs["cosine_spearman"], abs=1e-4)
    assert found["pearson"] == pytest.approx(100 * theirs["cosine_pearson"], abs=1e-4)


def test_pair_classification_scores_as_in_mteb() -> None:
    labels = RNG.integers(0, 2, 120)
    made = task(
        "PairClassification", rows(sentence1=TEXTS[:120], sentence2=TEXTS[120:], labels=labels)
    )
    theirs, found = mteb_scores(made), ours(made)
    assert found["ap"] == pytest.approx(100 * theirs["cosine_ap"], abs=1e-4)


@pytest.mark.parametrize("identical", [False, True])
def test_retrieval_scores_as_in_mteb(identical: bool) -> None:
    """With titles, grades, a query without answers, and queries that are documents."""
    from datasets import Dataset

    ids = [f"t{i}" for i in range(240)]
    titles = [TEXTS[i] if i % 3 else "" for i in range(100)]
    corpus = {"id": ids[:100], "title": titles, "text": TEXTS[100:200]}
    queries = {"id": ids[90:120], "text": TEXTS[90:120]}
    judged = {
        query: {ids[i]: int(RNG.integers(0, 3)) for i in RNG.permutation(100)[:12]}
        for query in ids[92:120]
    }
    data = {
        "corpus": Dataset.from_dict(corpus),
        "queries": Dataset.from_dict(queries),
        "relevant_docs": {**judged, "t90": {"t0": 0}, "t91": {}},
        "top_ranked": None,
    }
    made = task("Retrieval", {"default": {"test": data}}, ignore_identical_ids=identical)
    found, theirs = ours(made), mteb_scores(made)
    for name in ("ndcg@10", "map@10", "recall@10", "mrr@10"):
        assert found[name] == pytest.approx(100 * theirs[name.replace("@", "_at_")], abs=1e-2), name


def test_clustering_scores_as_in_mteb_where_the_clusters_are_clear() -> None:
    """Of texts of three topics, a quarter of them labelled as another."""
    topics = [i % 3 for i in range(240)]
    texts = [" ".join([WORDS[topic]] * 3 + [WORDS[3 + i % 2]]) for i, topic in enumerate(topics)]
    labels = [(topic + (i % 4 == 0)) % 3 for i, topic in enumerate(topics)]
    made = task(
        "Clustering",
        rows(sentences=texts, labels=labels),
        max_fraction_of_documents_to_embed=None,
    )
    found, theirs = ours(made)["v_measure"], 100 * mteb_scores(made)["v_measure"]
    assert 20 < found < 80
    assert found == pytest.approx(theirs, abs=3)


def test_subsets_become_tasks_of_their_own() -> None:
    scored = rows(sentence1=["a", "b"], sentence2=["c", "d"], score=[0, 1])
    made = task("STS", {"en": scored, "de": scored})
    made.hf_subsets = ["en", "de"]
    assert [each.name for each in tasks_from_mteb(made)] == ["MadeSTS-en", "MadeSTS-de"]
    assert [each.name for each in tasks_from_mteb(made, "de")] == ["MadeSTS"]


def test_other_types_data_that_do_not_load_and_unknown_names_are_refused(monkeypatch) -> None:
    with pytest.raises(UsageError, match=r"MadeClassification is of the type Classification"):
        tasks_from_mteb(task("Classification", None))
    made = task("STS", None)
    monkeypatch.setattr(type(made), "load_data", lambda self: 1 / 0, raising=False)
    with pytest.raises(M2DError, match=r"cannot be loaded \(ZeroDivisionError: division by zero\)"):
        tasks_from_mteb(made)
    with pytest.raises(UsageError, match=r"no task 'STSBenchmrk': .*Did you mean: 'STSBenchmark'"):
        load_mteb(["STSBenchmrk"])
    with pytest.raises(UsageError, match=r"STSBenchmark has no subset 'de'; it has: default"):
        load_mteb(["STSBenchmark:de"])


def test_profile_says_in_a_sentence_what_mteb_lacks(tmp_path) -> None:
    arguments = ["profile", "--mteb", "Banking77Classification", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert "Banking77Classification is of the type Classification" in result.stderr
