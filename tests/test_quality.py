"""Evaluation data and metrics, against references computed by hand or by scipy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from m2dexport.data import default_task_paths
from m2dexport.errors import UsageError
from m2dexport.vectors.codecs import (
    calibrate_ranges,
    decode_vectors,
    encode_vectors,
    normalize,
    truncate,
)
from m2dexport.vectors.quality import evaluate
from m2dexport.vectors.tasks import RetrievalTask, StsTask, default_tasks, load_task

RNG = np.random.default_rng(0)


def sts(scores: list[float]) -> StsTask:
    texts = tuple(str(i) for i in range(len(scores)))
    return StsTask("sts", texts, texts, tuple(scores), "0")


def unit(rows: int, dim: int) -> np.ndarray:  # type: ignore[type-arg]
    return RNG.standard_normal((rows, dim)).astype(np.float32)


def test_the_shipped_tasks_are_stsb_dev_and_limit_small() -> None:
    first, second = default_tasks()
    assert isinstance(first, StsTask)
    assert isinstance(second, RetrievalTask)
    assert (first.name, len(first.scores)) == ("stsb-dev", 1500)
    assert (second.name, len(second.queries), len(second.documents)) == ("limit-small", 1000, 46)
    assert all(len(relevant) == 2 for relevant in second.relevance)


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


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl"])
def test_pairs_are_read_from_every_format(tmp_path: Path, suffix: str) -> None:
    rows = [(4.5, 'a "quoted" man', "b\u2028c, d"), (0.0, "e", "f")]
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".tsv":
        text = "score\tsentence1\tsentence2\n" + "".join(f"{s}\t{a}\t{b}\n" for s, a, b in rows)
    elif suffix == ".csv":
        text = '4.5,"a ""quoted"" man","b\u2028c, d"\n0.0,e,f\n'
    else:
        keys = ("score", "sentence1", "sentence2")
        text = "\n".join(json.dumps(dict(zip(keys, r, strict=True))) for r in rows) + "\n"
    path.write_text(text, encoding="utf-8")
    task = load_task(path)
    assert isinstance(task, StsTask)
    assert list(zip(task.scores, task.sentences1, task.sentences2, strict=True)) == rows


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.tsv", "", "holds 0 sentence pairs"),
        ("a.tsv", "score\tsentence1\tsentence2\n", "holds 0 sentence pairs"),
        ("a.jsonl", "", "is empty"),
        ("a.tsv", "5\tx\ty\nfour\tx\ty\n", r"a\.tsv, line 2: the score 'four' is not a number"),
        ("a.tsv", "5\tx\ty\nnan\tx\ty\n", "line 2: the score 'nan' is not a number"),
        ("a.csv", "5,x\n", "line 1: 2 columns where"),
        ("a.jsonl", '{"score": 1}\n', "line 1 has no 'sentence1'"),
        ("a.jsonl", "{}\n[\n", "line 1 has no 'score'"),
        ("a.jsonl", "5\n", "line 1 is not a JSON object"),
        ("a.tsv", b"5\t\xff\tx\n", "is not UTF-8 text"),
        ("a.csv", f'5,x,y\n4,"{"x" * 200_000}",y\n', "line 2 cannot be read: field larger"),
        ("a.jsonl", '"score sentence1 sentence2"\n', "line 1 is not a JSON object"),
        (
            "a.jsonl",
            '{"score": 1, "sentence1": null, "sentence2": "x"}\n',
            "line 1: None is not a text",
        ),
        ("a.txt", "5\tx\ty\n", r"neither \.tsv, \.csv nor \.jsonl"),
    ],
)
def test_wrong_pairs_are_refused_by_file_and_line(tmp_path, name, text, message) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message):
        load_task(tmp_path / name)


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_value(tmp_path: Path, suffix: str) -> None:
    text = {
        ".tsv": "5.0\ta\tb\n1.0\tc\td\n",
        ".csv": "score,sentence1,sentence2\r\n5.0,a,b\r\n1.0,c,d\r\n",
        ".jsonl": '{"score": 5.0, "sentence1": "a", "sentence2": "b"}\n'
        '{"score": 1.0, "sentence1": "c", "sentence2": "d"}\n',
    }[suffix]
    path = tmp_path / f"pairs{suffix}"
    path.write_text(text, encoding="utf-8-sig", newline="")
    task = load_task(path)
    assert isinstance(task, StsTask)
    assert task.scores == (5.0, 1.0)


def beir(folder: Path, **files: str) -> Path:
    folder.mkdir()
    contents = {
        "corpus.jsonl": '{"_id": "d1", "title": "T", "text": "one"}\n'
        '{"_id": "d2", "text": "two"}\n',
        "queries.jsonl": '{"_id": "q1", "text": "?"}\n{"_id": "q2", "text": "unjudged"}\n',
        "qrels.jsonl": '{"query-id": "q1", "corpus-id": "d2", "score": 1}\n',
    }
    for name, text in {**contents, **files}.items():
        (folder / name).write_text(text)
    return folder


def test_a_beir_folder_is_read_and_unjudged_queries_are_left_out(tmp_path: Path) -> None:
    task = load_task(beir(tmp_path / "set"))
    assert isinstance(task, RetrievalTask)
    assert (task.name, task.queries, task.documents) == ("set", ("?",), ("T one", "two"))
    assert task.relevance == ({1: 1.0},)
    assert [text_set.role for text_set in task.texts()] == ["query", "document"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"corpus.jsonl": ""}, r"corpus\.jsonl is empty"),
        ({"qrels.jsonl": ""}, r"qrels\.jsonl is empty"),
        (
            {"qrels.jsonl": '{"query-id": "q9", "corpus-id": "d1", "score": 1}\n'},
            "line 1: 'q9' is no known id",
        ),
        (
            {"qrels.jsonl": '{"query-id": "q1", "corpus-id": "d1", "score": "x"}\n'},
            "line 1 is not a query id, a document id and a number",
        ),
        (
            {"qrels.jsonl": '{"query-id": "q1", "corpus-id": "d1", "score": 0}\n'},
            "names no relevant document",
        ),
        (
            {"qrels.jsonl": '{"query-id": "q1", "corpus-id": "d1", "score": Infinity}\n'},
            "line 1 is not a query id, a document id and a number",
        ),
        ({"corpus.jsonl": '{"_id": "d1", "text": null}\n'}, "line 1: None is not a text"),
    ],
)
def test_a_wrong_beir_folder_is_refused_by_file_and_line(tmp_path, files, message) -> None:
    with pytest.raises(UsageError, match=message):
        load_task(beir(tmp_path / "set", **files))


def test_judgements_that_are_no_text_are_refused(tmp_path: Path) -> None:
    folder = beir(tmp_path / "set")
    (folder / "qrels.jsonl").unlink()
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"test\.tsv cannot be read as UTF-8"):
        load_task(folder)


def test_paths_that_are_no_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_task(tmp_path / "missing.tsv")
    with pytest.raises(UsageError, match=r"corpus\.jsonl cannot be read"):
        load_task(tmp_path)


def test_default_task_paths_are_in_the_package() -> None:
    assert all(path.exists() for path in default_task_paths())
