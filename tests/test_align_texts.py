"""The texts of an alignment: lines, JSONL, a BEIR folder, and what is none of these."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import m2d

from m2dexport.align.texts import (
    align_texts,
    chunks_of,
    prompted,
    prompts_of,
    sha256_of_texts,
)
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.data import texts_sha256
from m2dexport.vectors.tasks import default_tasks


def found(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return list(align_texts(path))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a cat\nun caf\xc3\xa9\n", ["a cat", "un café"]),
        (b"a cat\r\ntwo dogs\r\n", ["a cat", "two dogs"]),
        (b"\xef\xbb\xbfa cat\ntwo dogs", ["a cat", "two dogs"]),
        (b"\n\na cat\n \t\n\ntwo dogs\n\n", ["a cat", "two dogs"]),
        (b"  a cat \n", ["  a cat "]),
        ("a\u2028b\x0bc\n".encode(), ["a\u2028b\x0bc"]),
        (b'{"text": "a cat"}\n', ['{"text": "a cat"}']),
    ],
)
def test_a_file_has_a_text_on_each_line(tmp_path: Path, content: bytes, expected) -> None:
    assert found(tmp_path / "texts.txt", content) == expected


@pytest.mark.parametrize("name", ["texts.jsonl", "texts.ndjson"])
def test_jsonl_has_an_object_on_each_line(tmp_path: Path, name: str) -> None:
    rows = [
        {"text": "a cat"},
        {"_id": "7", "title": "Dogs", "text": "two of them", "metadata": {"n": 1}},
        {"title": None, "text": "no title"},
        {"title": "", "text": "an empty title"},
        {"text": "ein Käfer"},
        {"title": "", "text": ""},
        {"title": "A title alone", "text": ""},
    ]
    lines = "\r\n".join(json.dumps(row) for row in rows)
    assert found(tmp_path / name, b"\xef\xbb\xbf" + lines.encode() + b"\n\n") == [
        "a cat",
        "Dogs two of them",
        "no title",
        "an empty title",
        "ein Käfer",
        "A title alone",
    ]


def test_a_beir_folder_gives_its_corpus(tmp_path: Path) -> None:
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "a query"}\n')
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "title": "Cats", "text": "sit"}\n')
    assert list(align_texts(tmp_path)) == ["Cats sit"]


def test_a_file_is_read_anew_each_time(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a\nb\n")
    texts = align_texts(tmp_path / "texts.txt")
    assert list(texts) == list(texts) == ["a", "b"]


def test_the_texts_that_ship_are_many_and_none_of_the_evaluation() -> None:
    shipped = list(align_texts(None))
    assert len(shipped) == len(set(shipped)) == 1885
    for task in default_tasks():
        for part in task.texts():
            assert not set(shipped) & set(part.texts)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\n \r\n\t\n", "holds no text"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.txt", b"a cat\nun caf\xe9\n", ":2 is not UTF-8"),
        ("a.jsonl", b'{"text": "\xff"}\n', ":1 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ":2 cannot be read"),
        ("a.jsonl", b'{"text": NaN}\n', ":1 cannot be read"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', ":1 cannot be read"),
        ("a.jsonl", b"[" * 100_000, ":1 cannot be read"),
        ("a.jsonl", b'["a"]\n', ':1 is not an object with a "text" string'),
        ("a.jsonl", b'"a"\n', ':1 is not an object with a "text" string'),
        ("a.jsonl", b'{"text": 5}\n', ':1 is not an object with a "text" string'),
        ("a.jsonl", b'{"title": "a"}\n', ':1 is not an object with a "text" string'),
        ("a.jsonl", b'{"title": ["a"], "text": "b"}\n', ':1 is not an object with a "text"'),
        ("a.jsonl", b'{"text": "\\ud800"}\n', ':1 is not an object with a "text" string'),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_file_that_cannot_be_read_is_one_sentence(
    bert: Path, tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(content)
    sentence = refused(bert, tmp_path / name)
    assert told in sentence
    assert f"{tmp_path / name}" in sentence


def test_what_is_no_file_is_one_sentence(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "corpus.jsonl").mkdir()
    for name in ("none.txt", "folder", "corpus"):
        assert "name a file of texts, or a BEIR folder" in refused(bert, tmp_path / name)
    assert "corpus.jsonl is not a file" in refused(bert, tmp_path / "folder")


def refused(model: Path, texts: Path) -> str:
    out = texts.parent / "out"
    arguments = ["--model", model, "--layers", 1, "--align", "--align-texts", texts, "--out", out]
    result = m2d("slice", *arguments)
    assert result.exit_code == 2, result.output
    assert not out.exists()
    (line,) = result.stderr.splitlines()
    assert len(line) < 400 + len(str(texts))
    return line


def test_texts_without_align_are_refused(bert: Path, few_texts: Path, tmp_path: Path) -> None:
    arguments = ["--model", bert, "--layers", 1, "--align-texts", few_texts]
    for command in ("slice", "build"):
        result = m2d(command, *arguments, "--out", tmp_path / "out")
        assert (result.exit_code, "--align-texts goes with --align" in result.stderr) == (2, True)
    assert not (tmp_path / "out").exists()


def test_the_hash_of_texts_is_that_of_a_list_of_them(few_texts: Path) -> None:
    for texts in (["a"], ["a", "b", "é"], list(align_texts(few_texts))):
        assert sha256_of_texts(iter(texts)) == texts_sha256(texts)
    assert sha256_of_texts(["a", "b"]) != sha256_of_texts(["ab"])


def test_chunks_hold_all_texts_in_order() -> None:
    assert list(chunks_of(iter("abcdefg"), 3)) == [["a", "b", "c"], ["d", "e", "f"], ["g"]]
    assert list(chunks_of([], 3)) == []


def test_prompts_take_turns_wherever_a_chunk_starts(bert: Path) -> None:
    checkpoint = open_checkpoint(bert)
    assert prompts_of(checkpoint) == ("", "find: ")
    texts = ["a", "b", "c", "d", "e"]
    expected = ["a", "find: b", "c", "find: d", "e"]
    for cut in range(6):
        first = prompted(texts[:cut], prompts_of(checkpoint))
        assert [*first, *prompted(texts[cut:], prompts_of(checkpoint), cut)] == expected
