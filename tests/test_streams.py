"""Streams: texts in as lines or JSONL, vectors out as .npy or JSONL, space_id included."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_artifact import tiny_artifact, tiny_spec

from m2dexport.engines import Device
from m2dexport.errors import UsageError
from m2dexport.runtime import streams
from m2dexport.runtime.encoder import Encoder, load
from m2dexport.runtime.streams import encode_stream, read_space_id, require_vectors_of

TEXTS = ["a guitar", "", "今日 é", "find a much longer text than sixteen tokens", "b"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load(tiny_artifact(tmp_path_factory.mktemp("streams") / "artifact"), Device(threads=1))


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """A file of one text a line."""
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    return path


def stdin(monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content.encode())))


def rows_of(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_lines_become_rows_of_a_npy_file(encoder: Encoder, lines: Path, tmp_path: Path) -> None:
    summary = encode_stream(encoder, lines, tmp_path / "v.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), encoder.encode(TEXTS))
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy", mmap_mode="r"), encoder.encode(TEXTS))
    assert (summary.texts, summary.truncated) == (len(TEXTS), 1)
    assert summary.space_id == encoder.spec.space_id
    assert summary.seconds > 0
    assert encoder.spec.space_id in summary.sentence()


def test_a_npy_file_tells_its_space(encoder: Encoder, lines: Path, tmp_path: Path) -> None:
    encode_stream(encoder, lines, tmp_path / "v.npy")
    assert read_space_id(tmp_path / "v.npy") == encoder.spec.space_id
    np.save(tmp_path / "plain.npy", np.zeros((2, 3)))
    assert read_space_id(tmp_path / "plain.npy") is None
    with pytest.raises(UsageError, match=r"texts\.txt is not a \.npy file"):
        read_space_id(lines)


@pytest.mark.parametrize("name", ["v.npy", "v.jsonl"])
def test_an_index_of_another_space_is_refused(encoder, lines, tmp_path, name) -> None:
    encode_stream(encoder, lines, tmp_path / name)
    require_vectors_of(tmp_path / name, encoder.spec, "edge.m2d")
    other = load(tiny_artifact(tmp_path / "other", tiny_spec(vectors="ubinary"))).spec
    with pytest.raises(UsageError, match="must not be compared") as refused:
        require_vectors_of(tmp_path / name, other, "edge.m2d")
    for told in (name, "edge.m2d", encoder.spec.space_id, other.space_id):
        assert told in str(refused.value)
    if name == "v.npy":  # a row of JSONL tells its space, but not what that is made of
        assert "vectors ('float32', 'ubinary')" in str(refused.value)


def test_vectors_that_do_not_tell_their_space_are_refused(encoder, tmp_path: Path) -> None:
    np.save(tmp_path / "plain.npy", np.zeros((2, 3)))
    (tmp_path / "plain.jsonl").write_text('{"vector": [1, 2]}\n')
    for name, told in (("plain.npy", "does not tell the space"), ("plain.jsonl", "jsonl:1 is not")):
        with pytest.raises(UsageError, match=told):
            require_vectors_of(tmp_path / name, encoder.spec, "edge.m2d")


@pytest.mark.parametrize("vectors", ["float32", "int8", "ubinary"])
@pytest.mark.parametrize("chunk", [1, 2, 1024])
def test_both_formats_hold_the_vectors_exactly(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vectors: str, chunk: int
) -> None:
    monkeypatch.setattr(streams, "_CHUNK", chunk)
    spec = tiny_spec(vectors=vectors, batch_invariant=False)  # type: ignore[arg-type]
    encoder = load(tiny_artifact(tmp_path / "artifact", spec), Device(threads=1))
    expected = encoder.encode(TEXTS)
    encode_stream(encoder, lines, tmp_path / "v.npy")
    encode_stream(encoder, lines, tmp_path / "v.jsonl")
    found = np.load(tmp_path / "v.npy")
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    rows = rows_of((tmp_path / "v.jsonl").read_text())
    stored = np.array([row["vector"] for row in rows]).astype(expected.dtype)
    np.testing.assert_array_equal(stored, expected)
    assert {row["space_id"] for row in rows} == {encoder.spec.space_id}


def test_jsonl_keeps_ids_of_any_kind(
    encoder: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text(
        '\ufeff{"text": "a", "id": "é\\ud83d"}\n\n{"id": null, "text": "b"}\r\n'
        '{"text": "c", "x": 1}',
        encoding="utf-8",
    )
    assert encode_stream(encoder, source).texts == 3
    rows = rows_of(capsys.readouterr().out)
    assert [row.get("id", "none") for row in rows] == ["é\ud83d", None, "none"]
    np.testing.assert_array_equal(
        np.array([row["vector"] for row in rows], dtype=np.float32), encoder.encode(["a", "b", "c"])
    )


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("a\n\nb", ["a", "", "b"]),
        ("a\r\nb\r\n", ["a", "b"]),
        ("\ufeffa\n", ["a"]),
        ("a\u2028b\x0cc\n", ["a\u2028b\x0cc"]),
        ('{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        ('{braces} are text\n{"text": 1}', ["{braces} are text", '{"text": 1}']),
        ("[1]\n", ["[1]"]),
        ("", []),
    ],
)
def test_stdin_is_lines_unless_its_first_line_is_an_object_with_a_text(
    encoder: Encoder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str,
    texts: list[str],
) -> None:
    stdin(monkeypatch, content)
    assert encode_stream(encoder, batch_size=1).texts == len(texts)
    rows = rows_of(capsys.readouterr().out)
    expected = [encoder.encode([text])[0].tolist() for text in texts]
    np.testing.assert_allclose([row["vector"] for row in rows], expected, rtol=1e-6)


def test_a_text_file_is_never_read_as_jsonl(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('{"text": "a"}\nplain\n')
    assert encode_stream(encoder, tmp_path / "a.txt", tmp_path / "v.npy").texts == 2


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("plain", "is not JSON"),
        ("[1]", 'is not an object with a "text" string'),
        ('{"id": 1}', 'is not an object with a "text" string'),
        ('{"text": null}', 'is not an object with a "text" string'),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ("[" * 100_000, "is not JSON"),
    ],
)
@pytest.mark.parametrize("out", ["v.npy", "v.jsonl"])
def test_a_bad_line_is_named_and_no_output_is_left(
    encoder: Encoder, tmp_path: Path, line: str, told: str, out: str
) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(UsageError, match=f"texts.jsonl:2 .*{told}"):
        encode_stream(encoder, source, tmp_path / out)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(("v", "."))] == []


def test_a_line_that_is_not_utf8_is_named(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\nb\n\xff\n")
    with pytest.raises(UsageError, match=r"a\.txt:3 is not UTF-8"):
        encode_stream(encoder, tmp_path / "a.txt", tmp_path / "v.npy")


def test_paths_and_prompts_are_checked_before_any_text_is_read(
    encoder: Encoder, lines: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"name it \.npy or \.jsonl"):
        encode_stream(encoder, lines, tmp_path / "v.csv")
    with pytest.raises(UsageError, match="is not a file"):
        encode_stream(encoder, tmp_path / "none.txt", tmp_path / "v.npy")
    with pytest.raises(UsageError, match="no prompt named 'q'"):
        encode_stream(encoder, lines, tmp_path / "v.npy", prompt="q")
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def test_a_prompt_reaches_the_encoder(encoder: Encoder, lines: Path, tmp_path: Path) -> None:
    encode_stream(encoder, lines, tmp_path / "v.npy", prompt="query")
    expected = encoder.encode(TEXTS, prompt="query")
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), expected)


def test_no_texts_make_an_empty_array(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("")
    assert encode_stream(encoder, tmp_path / "none.txt", tmp_path / "v.npy").texts == 0
    assert np.load(tmp_path / "v.npy").shape == (0, 12)


def test_only_one_chunk_of_texts_is_read_ahead(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read: list[int] = []
    seen: list[int] = []
    original = encoder.encode_report

    def endless() -> object:
        for number in range(5000):
            read.append(number)
            yield b"a\n"

    def spy(texts: list[str], **options: object) -> object:
        seen.append(len(read))
        return original(texts, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(encoder, "encode_report", spy)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=endless()))
    assert encode_stream(encoder, None, tmp_path / "v.npy").texts == 5000
    assert seen == [0, 1024, 2048, 3072, 4096, 5000]


def test_texts_are_not_overwritten_by_their_vectors(encoder: Encoder, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a guitar"}\n')
    (tmp_path / "link.jsonl").symlink_to(texts)
    for out in (texts, tmp_path / "link.jsonl"):
        with pytest.raises(UsageError, match="is the file of the texts"):
            encode_stream(encoder, texts, out)
    assert texts.read_text() == '{"text": "a guitar"}\n'


def test_an_output_that_is_a_folder_is_refused_before_any_text(
    encoder: Encoder, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "v.npy").mkdir()
    monkeypatch.setattr(encoder, "encode_report", None)
    with pytest.raises(UsageError, match="is a folder"):
        encode_stream(encoder, lines, tmp_path / "v.npy")


@pytest.mark.parametrize("closed", ["stdin", "stdout"])
def test_a_closed_stream_is_one_sentence(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    monkeypatch.setattr(sys, closed, None)
    with pytest.raises(UsageError, match=f"{closed} is closed"):
        encode_stream(encoder)
