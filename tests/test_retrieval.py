"""Retrieval sets in BEIR's layout and in what others make of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from m2dexport.errors import UsageError
from m2dexport.vectors.codecs import Ranges
from m2dexport.vectors.quality import evaluate
from m2dexport.vectors.retrieval import MissingDocumentsWarning, RetrievalTask
from m2dexport.vectors.tasks import load_task


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
            "line 1: 'q9' is not the _id of a query",
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
            "line 1 cannot be read: Infinity is not JSON",
        ),
        ({"corpus.jsonl": '{"_id": "d1", "text": null}\n'}, "line 1: None is not a text"),
        ({"corpus.jsonl": '{"_id": "d1", "text": "", "title": 5}\n'}, "line 1: 5 is not a text"),
        ({"corpus.jsonl": '{"_id": ["d1"], "text": "x"}\n'}, r"line 1: \['d1'\] is not an _id"),
        (
            {"corpus.jsonl": '{"_id": "1", "text": "x"}\n{"_id": 1, "text": "y"}\n'},
            "line 2: the _id '1' is that of line 1, too",
        ),
        (
            {"queries.jsonl": '{"_id": "q1", "text": "x"}\n\n{"_id": "q1", "text": "x"}\n'},
            "line 3: the _id 'q1' is that of line 1, too",
        ),
        (
            {"corpus.jsonl": '{"_id": "d1", "text": "", "title": "half \\ud83d"}\n'},
            r"corpus\.jsonl, line 1 holds half of a surrogate pair",
        ),
        (
            {"queries.jsonl": '{"_id": "q1", "text": "half \\ud83d"}\n'},
            r"queries\.jsonl, line 1 holds half of a surrogate pair",
        ),
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
    with pytest.raises(UsageError, match=r"test\.tsv is not UTF-8 text"):
        load_task(folder)


BIG = {
    "corpus.jsonl": "".join(f'{{"_id": "d{i}", "text": "text {i}"}}\n' for i in range(1, 6)),
    "queries.jsonl": "".join(f'{{"_id": "q{i}", "text": "?"}}\n' for i in range(1, 5)),
}


def split(folder: Path, name: str, text: str, **files: str) -> Path:
    """Write a folder whose judgements are ``qrels/NAME``."""
    beir(folder, **{**BIG, **files})
    (folder / "qrels.jsonl").unlink()
    (folder / "qrels").mkdir()
    (folder / "qrels" / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t1\nq3\td5\t2\n",
        "q1\td1\t1\nq2\td2\t1\nq3\td5\t2\n",
        "q1\t0\td1\t1\nq2\t0\td2\t1\nq3\t0\td5\t2\n",
        "q1 Q0 d1 1\r\nq2 Q0 d2 1\r\nq3 Q0 d5 2\r\n",
        "relevance\tdoc_id\tquery_id\n1\td1\tq1\n1\td2\tq2\n2\td5\tq3\n",
        "qid\titer\tdocno\trel\nq1\t0\td1\t1\nq2\t1\td2\t1\nq3\t0\td5\t2\n",
    ],
    ids=["header", "no header", "TREC", "TREC with spaces", "other order", "TREC with header"],
)
def test_columns_of_judgements_are_recognised(tmp_path: Path, text: str) -> None:
    task = load_task(split(tmp_path / "set", "test.tsv", text))
    assert isinstance(task, RetrievalTask)
    assert task.relevance == ({0: 1.0}, {1: 1.0}, {4: 2.0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("q1\td1\n", "line 1: the 2 columns are neither query, document and score nor TREC's four"),
        ("q1\td1\t1\t7\n", "line 1: the 4 columns are neither"),
        ("query\tqid\tcorpus-id\tscore\n", "line 1: the 4 columns are neither"),
        ("a\tb\tc\nq1\td1\t1\n", "line 1 is not a query id, a document id and a number"),
        ("q1\td1\t1\nq2\t0\td2\t1\n", "line 2 has other columns than line 1"),
        ("q1\t0\td1\t1\nq2\td2\t1\t7\n", "line 2 has other columns than line 1"),
        ("d1\tq1\t1\n", "line 1: 'd1' is not the _id of a query"),
        ("q1\td1\t1\nq1\td1\t2\n", r"line 2 judges \('q1', 'd1'\) as 2, and a line before it as 1"),
        ("q1\td9\t1\nq2\td1\t0\n", r"names no relevant document that .*corpus\.jsonl has"),
    ],
)
def test_ambiguous_judgements_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_task(split(tmp_path / "set", "test.tsv", text))


def test_number_ids_are_not_mistaken_for_scores(tmp_path: Path) -> None:
    numbers = "".join(f'{{"_id": "{i}", "text": "text {i}"}}\n' for i in range(10, 60))
    files = {"corpus.jsonl": numbers, "queries.jsonl": '{"_id": "7", "text": "?"}\n'}
    task = load_task(split(tmp_path / "set", "test.tsv", "7\t0\t57\t2\n", **files))
    assert isinstance(task, RetrievalTask)
    assert task.relevance == ({47: 2.0},)


def test_another_split_is_named_by_its_file(tmp_path: Path) -> None:
    folder = split(tmp_path / "set", "dev.tsv", "q2\td2\t1\n")
    with pytest.raises(UsageError, match=r"only of: dev; name the file .*set/qrels/dev\.tsv"):
        load_task(folder)
    task = load_task(folder / "qrels" / "dev.tsv")
    assert isinstance(task, RetrievalTask)
    assert (task.name, task.relevance) == ("set-dev", ({1: 1.0},))


def test_the_test_split_by_its_file_is_that_of_the_folder(tmp_path: Path) -> None:
    folder = split(tmp_path / "set", "test.tsv", "q2\td2\t1\n")
    assert load_task(folder / "qrels" / "test.tsv") == load_task(folder)


def test_a_folder_with_two_files_of_judgements_is_refused(tmp_path: Path) -> None:
    folder = split(tmp_path / "set", "test.tsv", "q2\td2\t1\n")
    (folder / "qrels.jsonl").write_text('{"query-id": "q1", "corpus-id": "d1", "score": 1}\n')
    with pytest.raises(UsageError, match="name one"):
        load_task(folder)
    task = load_task(folder / "qrels.jsonl")
    assert isinstance(task, RetrievalTask)
    assert (task.name, task.relevance) == ("set", ({0: 1.0},))


def test_documents_that_the_corpus_lacks_are_warned_about_once_and_count_as_missed(
    tmp_path: Path,
) -> None:
    judged = "q1\td1\t1\nq2\td2\t1\nq2\td9\t1\nq3\td8\t2\n"
    with pytest.warns(MissingDocumentsWarning, match=r"lacks \(2, such as 'd9'\)") as caught:
        task = load_task(split(tmp_path / "set", "test.tsv", judged))
    assert len(caught) == 1
    assert isinstance(task, RetrievalTask)
    documents = np.eye(5, dtype=np.float32)
    found = evaluate(task, (documents[:3], documents), 5, "float32")
    halved = 1 / (1 + 1 / np.log2(3))  # the best that a ranking without d9 can do
    assert found["ndcg@10"] == pytest.approx(100 * (1 + halved + 0) / 3)
    assert found["recall@10"] == pytest.approx(100 * (1 + 0.5 + 0) / 3)


def test_a_query_that_is_a_document_does_not_find_itself(tmp_path: Path) -> None:
    lines = [f'{{"_id": "{side}{i}", "text": "{side}"}}\n' for side in "ab" for i in range(5)]
    judged = "".join(f"a{i}\tb{i}\t1\n" for i in range(5))
    files = {"corpus.jsonl": "".join(lines), "queries.jsonl": "".join(lines[:5])}
    task = load_task(split(tmp_path / "set", "test.tsv", judged, **files))
    assert isinstance(task, RetrievalTask)
    assert task.own == (0, 1, 2, 3, 4)
    queries = np.eye(6, dtype=np.float32)[:5]
    answers = queries.copy()
    answers[:, 5] = 0.5  # next to each query, after the query itself
    vectors = queries, np.concatenate([queries, answers])
    assert evaluate(task, vectors, 6, "float32")["ndcg@10"] == pytest.approx(100)
    ranges = Ranges(np.full(6, -1, np.float32), np.full(6, 1, np.float32))
    assert evaluate(task, vectors, 6, "ubinary", ranges)["ndcg@10+int8x4"] == pytest.approx(100)


def test_a_document_that_is_judged_relevant_for_the_query_of_its_id_is_ranked(
    tmp_path: Path,
) -> None:
    numbers = "".join(f'{{"_id": {i}, "text": "{i}"}}\n' for i in range(4))
    files = {"corpus.jsonl": numbers, "queries.jsonl": numbers}
    task = load_task(split(tmp_path / "set", "test.tsv", "0\t0\t1\n1\t2\t1\n", **files))
    assert isinstance(task, RetrievalTask)
    assert task.own == (-1, 1)
    documents = np.eye(4, dtype=np.float32)
    queries = documents[[0, 1]] + documents[[3, 2]] / 2
    assert evaluate(task, (queries, documents), 4, "float32")["ndcg@10"] == pytest.approx(100)
