"""Sentence pairs, in every form in which they are handed over."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from m2dexport.errors import UsageError
from m2dexport.vectors.classification import PairClassificationTask
from m2dexport.vectors.clustering import ClusteringTask
from m2dexport.vectors.pairs import StsTask
from m2dexport.vectors.quality import score_pairs
from m2dexport.vectors.tasks import load_task


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
        ("a.tsv", "", r"a\.tsv is empty"),
        ("a.tsv", "score\tsentence1\tsentence2\n", "holds 0 sentence pairs"),
        ("a.jsonl", "", "is empty"),
        ("a.tsv", "5\tx\ty\nfour\tx\ty\n", r"a\.tsv, line 2: the score 'four' is not a number"),
        ("a.tsv", "5\tx\ty\nnan\tx\ty\n", "line 2: the score 'nan' is not a number"),
        ("a.tsv", "5\tx\ty\n-inf\tx\ty\n", "line 2: the score '-inf' is not a number"),
        ("a.tsv", "nan\tx\ty\n5\tx\ty\n", "line 1: the score 'nan' is not a number"),
        ("a.csv", "1e999,x,y\n5,x,y\n", "line 1: the score '1e999' is not a number"),
        (
            "a.csv",
            "label,text1,text2\n1,x,y\n1,x,z\n",
            "every score is 1, so there is nothing to tell apart",
        ),
        ("a.csv", "label,text\nx,one\nx,two\n", "the number of topics is 1 for 2 texts"),
        ("a.csv", "label,text\nx,one\ny,two\n", "topics is 2 for 2 texts"),
        ("a.csv", "label,text\nx,one\n ,two\n", "line 3: ' ' is not a topic"),
        ("a.csv", "5,x\n", r"line 1 has no score among \['5', 'x'\]; name the columns"),
        ("a.jsonl", '{"score": 1}\n', "line 1 has no sentence1 among"),
        ("a.jsonl", "{}\n", "line 1 has no score among"),
        ("a.jsonl", "5\n", "line 1 is not a JSON object"),
        ("a.tsv", b"5\t\xff\tx\n", "is not UTF-8 text"),
        ("a.tsv", "5\tx\ty\n4\tx\ty\tz\n", "line 2: 4 columns where 3 are needed"),
        ("a.tsv", "x\ty\t5\nx\ty\t4\n", "line 1 has no score among"),
        ("a.tsv", "5\tx\ty\tz\n", "line 1 has no score among"),
        ("a.tsv", "score\tlabel\tsentence1\tsentence2\n", "two columns could be the score"),
        ("a.csv", '5,x,"y\n4,x,y\n', "line 2 cannot be read: unexpected end of data"),
        ("a.jsonl", '{"score": true, "text1": "x", "text2": "y"}\n', "score True is not a number"),
        ("a.jsonl", '{"score": 1%s, "text1": "x", "text2": "y"}\n' % ("0" * 400), "not a number"),
        ("a.jsonl", "[" * 100_000, "line 1 cannot be read: it is nested too deeply"),
        ("a.jsonl", '{"score": 1', "line 1 cannot be read: "),
        (
            "a.jsonl",
            '{"score": 1, "sentence1": "x", "sentence2": "y", "score": 2}\n',
            "line 1 cannot be read: the key 'score' is there twice",
        ),
        ("a.csv", "1_000,x,y\n2,x,y\n", "line 1 has no score among"),
        ("a.tsv", "5\tx\ty\n1_000\tx\ty\n", "line 2: the score '1_000' is not a number"),
        ("a.tsv", "5\tx\ty\n٣\tx\ty\n", "line 2: the score '٣' is not a number"),
        (
            "a.jsonl",
            '{"score": 1, "text1": "x", "text2": "y"}\n{"score": 2, "text1": "x"}\n',
            "line 2 has no 'text2'",
        ),
        (
            "a.jsonl",
            '{"score": 1, "sentence1": "half \\ud83d", "sentence2": "x"}\n',
            "line 1 holds half of a surrogate pair",
        ),
        ("a.tsv", "3\tx\ty\n3.0\tx\ty\n", "every score is 3, so no correlation exists"),
        ("a.tsv", "3\tx\tx\n4\tx\tx\n", "all texts are the same; pass pairs that differ"),
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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", "genre\tid\tscore\tsentence1\tsentence2\nx\t7\t5.0\ta\tb\nx\t8\t1.5\tc\td\n"),
        ("a.csv", "sentence1,sentence2,score\r\na,b,5.0\r\nc,d,1.5\r\n"),
        (
            "a.tsv",
            "pair_ID\tsentence_A\tsentence_B\trelatedness_score\n1\ta\tb\t5\n2\tc\td\t1.5\n",
        ),
        ("a.csv", "Similarity Score,Text 1,Text 2\n5,a,b\n1.5,c,d\n"),
        (
            "a.jsonl",
            '{"text_a": "a", "text_b": "b", "label": 5}\n'
            '{"label": 1.5, "text_b": "d", "text_a": "c"}\n',
        ),
    ],
)
def test_columns_are_found_by_their_names(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    task = load_task(tmp_path / name)
    assert isinstance(task, StsTask)
    assert task.scores == (5.0, 1.5)
    assert (task.sentences1, task.sentences2) == (("a", "c"), ("b", "d"))


@pytest.mark.parametrize("header", ["", "score\tsentence1\tsentence2\r"])
@pytest.mark.parametrize("last", ["", "\r"])
def test_lines_may_end_in_carriage_returns_alone(tmp_path: Path, header: str, last: str) -> None:
    path = tmp_path / "mac.tsv"
    path.write_bytes(f"{header}5\ta\tb\r1.5\tc\td{last}".encode())
    task = load_task(path)
    assert isinstance(task, StsTask)
    assert (task.scores, task.sentences1, task.sentences2) == ((5.0, 1.5), ("a", "c"), ("b", "d"))


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e200, 1e308])
def test_correlations_do_not_depend_on_the_scale_however_large(tmp_path, scale: float) -> None:
    scores = (1.0, -1.0, 0.25, 0.5, -0.75)
    first = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    found = []
    for name, factor in (("plain", 1.0), ("scaled", scale)):
        rows = [f"{score * factor!r}\ta {place}\tb" for place, score in enumerate(scores)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(rows))
        task = load_task(tmp_path / f"{name}.tsv")
        found.append(score_pairs(replace(task, sha256="0" * 64), first, first[::-1].copy()))
    assert found[1] == pytest.approx(found[0])


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("scale", [1, 5])
@pytest.mark.parametrize("header", ["", "score,sentence1,sentence2"])
def test_scores_of_any_scale_are_read_as_they_stand(
    tmp_path: Path, header: str, scale: int, end: str
) -> None:
    rows = [header, f'{scale},"a, b",c', f"{scale / 2},d,e", "0,f,g"]
    path = tmp_path / "pairs.csv"
    path.write_text(end.join(row for row in rows if row) + end, "utf-8-sig", newline="")
    task = load_task(path)
    assert isinstance(task, StsTask)
    assert task.scores == (scale, scale / 2, 0)
    assert task.sentences1 == ("a, b", "d", "f")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", "label\ttext1\ttext2\n1\ta\tb\n0\tc\td\n"),
        ("a.csv", "id,question1,question2,is_duplicate\n7,a,b,1\n8,c,d,0\n"),
        ("a.csv", "Sentence1,Sentence2,Label\r\na,b,1.0\r\nc,d,0.0\r\n"),
        (
            "a.jsonl",
            '{"text_a": "a", "text_b": "b", "label": true}\n'
            '{"text_a": "c", "text_b": "d", "label": false}\n',
        ),
    ],
)
def test_labels_of_0_and_1_make_pairs_to_be_classified(
    tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    task = load_task(tmp_path / name)
    assert isinstance(task, PairClassificationTask)
    assert (task.sentences1, task.sentences2) == (("a", "c"), ("b", "d"))
    assert task.labels == (True, False)


@pytest.mark.parametrize(
    "text",
    [
        "score,text1,text2\n1,a,b\n0,c,d\n",  # no name of labels
        "label,text1,text2\n1,a,b\n0,c,d\n0.5,e,f\n",  # other values than two
        "1,a,b\n0,c,d\n",  # no names
    ],
)
def test_pairs_that_might_be_scored_are_scored(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    assert isinstance(load_task(tmp_path / "a.csv"), StsTask)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "text,label\na,x\nb,y\nc,x\n"),
        ("a.tsv", "cluster\tid\tsentence\nx\t1\ta\ny\t2\tb\nx\t3\tc\n"),
        (
            "a.jsonl",
            '{"text": "a", "topic": "x"}\n{"text": "b", "topic": "y"}\n'
            '{"text": "c", "topic": "x"}\n',
        ),
    ],
)
def test_texts_with_topics_are_clustered(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    task = load_task(tmp_path / name)
    assert isinstance(task, ClusteringTask)
    assert (task.sentences, task.topics) == (("a", "b", "c"), ("x", "y", "x"))
    assert [text_set.texts for text_set in task.texts()] == [("a", "b", "c")]


def test_a_tsv_file_that_pandas_wrote_is_read_without_its_quotes(tmp_path: Path) -> None:
    rows = [
        ["score", "sentence1", "sentence2"],
        ["5.0", 'He said "hello" to me.', '"'],
        ["1.0", "first line\nsecond line", "a\ttab"],
        ["3.0", "A cat.", "A dog."],
    ]
    path = tmp_path / "pairs.tsv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, delimiter="\t", lineterminator="\n").writerows(rows)  # as pandas does
    task = load_task(path)
    assert isinstance(task, StsTask)
    found = zip(map(str, task.scores), task.sentences1, task.sentences2, strict=True)
    assert [list(row) for row in found] == rows[1:]


def test_quotes_that_are_part_of_a_tsv_text_stay(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text('5\t"Yes," he said.\t"Well"\n1\tan 8" disk\tb\n')
    task = load_task(path)
    assert isinstance(task, StsTask)
    assert task.sentences1 == ('"Yes," he said.', 'an 8" disk')
    assert task.sentences2 == ('"Well"', "b")


def test_quotes_that_could_join_lines_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text('5\t"one\ttwo\n4\tthree"\tfour\n')
    with pytest.raises(UsageError, match="read as text or as marks around texts of several lines"):
        load_task(path)


def test_a_long_field_is_read_and_the_limit_of_csv_is_as_before(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    path = tmp_path / "pairs.csv"
    path.write_text(f'5,x,y\n4,"{"x" * (limit + 1)}",y\n')
    task = load_task(path)
    assert isinstance(task, StsTask)
    assert len(task.sentences1[1]) == limit + 1
    assert csv.field_size_limit() == limit


def test_a_refusal_quotes_little_of_a_long_value(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("5\tx\ty\n" + "x" * 100_000 + "\tx\ty\n")
    with pytest.raises(UsageError, match="line 2: the score 'xxx") as caught:
        load_task(path)
    assert len(str(caught.value)) < len(str(path)) + 200
