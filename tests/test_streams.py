"""Streams: texts in as lines or JSONL, vectors out as .npy or JSONL, space_id included."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file
from tiny_artifact import tiny_artifact, tiny_spec, without_rows

from m2dexport import lines as lines_module
from m2dexport.cli import cli
from m2dexport.engines import Device
from m2dexport.errors import UsageError
from m2dexport.runtime import streams
from m2dexport.runtime.bundle import write_bundle
from m2dexport.runtime.encoder import Encoder
from m2dexport.runtime.loading import load
from m2dexport.runtime.streams import encode_stream
from m2dexport.runtime.vector_files import require_vectors_of

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
    with (tmp_path / "v.npy").open("rb") as stream:
        _, space_id, spec = (np.load(stream) for _ in range(3))
    assert (str(space_id), str(spec)) == (encoder.spec.space_id, encoder.spec.to_json())
    np.save(tmp_path / "plain.npy", np.zeros((2, 3)))
    with pytest.raises(UsageError, match=r"plain\.npy does not name the space of its vectors"):
        require_vectors_of(tmp_path / "plain.npy", encoder.spec, "edge.m2d")
    with pytest.raises(UsageError, match=r"texts\.txt is not a \.npy file"):
        require_vectors_of(lines, encoder.spec, "edge.m2d")


@pytest.mark.parametrize("name", ["v.npy", "v.safetensors", "v.jsonl"])
def test_an_index_of_another_space_is_refused(encoder, lines, tmp_path, name) -> None:
    encode_stream(encoder, lines, tmp_path / name)
    require_vectors_of(tmp_path / name, encoder.spec, "edge.m2d")
    other = load(tiny_artifact(tmp_path / "other", tiny_spec(vectors="ubinary"))).spec
    with pytest.raises(UsageError, match="must not be compared") as refused:
        require_vectors_of(tmp_path / name, other, "edge.m2d")
    for told in (name, "edge.m2d", encoder.spec.space_id, other.space_id):
        assert told in str(refused.value)
    if name != "v.jsonl":  # a row of JSONL tells its space, but not what that is made of
        assert "vectors ('float32', 'ubinary')" in str(refused.value)


def test_vectors_that_do_not_tell_their_space_are_refused(encoder, tmp_path: Path) -> None:
    np.save(tmp_path / "plain.npy", np.zeros((2, 3)))
    (tmp_path / "plain.jsonl").write_text('{"vector": [1, 2]}\n')
    for name, told in (("plain.npy", "does not name the space"), ("plain.jsonl", "jsonl:1 is not")):
        with pytest.raises(UsageError, match=told):
            require_vectors_of(tmp_path / name, encoder.spec, "edge.m2d")


@pytest.mark.parametrize("vectors", ["float32", "int8", "ubinary"])
@pytest.mark.parametrize("chunk", [1, 2, 1024])
def test_all_formats_hold_the_vectors_exactly(
    lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vectors: str, chunk: int
) -> None:
    monkeypatch.setattr(streams, "_CHUNK", chunk)
    spec = tiny_spec(vectors=vectors, batch_invariant=False)  # type: ignore[arg-type]
    encoder = load(tiny_artifact(tmp_path / "artifact", spec), Device(threads=1))
    expected = encoder.encode(TEXTS)
    encode_stream(encoder, lines, tmp_path / "v.npy")
    encode_stream(encoder, lines, tmp_path / "v.jsonl")
    encode_stream(encoder, lines, tmp_path / "v.safetensors")
    for found in (np.load(tmp_path / "v.npy"), load_file(tmp_path / "v.safetensors")["vectors"]):
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
        '{"text": "c", "x": 1}\n{"_id": "d1", "text": "d"}\n{"_id": "d2", "id": 2, "text": "e"}',
        encoding="utf-8",
    )
    assert encode_stream(encoder, source).texts == 5
    rows = rows_of(capsys.readouterr().out)
    assert [row.get("id", "none") for row in rows] == ["é\ud83d", None, "none", "d1", 2]
    np.testing.assert_array_equal(
        np.array([row["vector"] for row in rows], dtype=np.float32), encoder.encode(list("abcde"))
    )


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ("a\n\nb", ["a", "", "b"]),
        ("a\r\nb\r\n", ["a", "b"]),
        ("\ufeffa\n", ["a"]),
        ("a\u2028b\x0cc\n", ["a\u2028b\x0cc"]),
        ('{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        (' { "_id": 1, "text": "a"}\n', ["a"]),
        ('{braces} are text\n{"text": 1}', ["{braces} are text", '{"text": 1}']),
        ("[1]\n", ["[1]"]),
        ("", []),
    ],
)
def test_stdin_is_lines_unless_its_first_line_is_an_object(
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


@pytest.mark.parametrize("line", ['{"title": "a"}', '{"text": "a"', '{"text": 1}', "{}"])
def test_an_object_that_cannot_be_used_is_not_encoded_as_a_text(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    stdin(monkeypatch, f"{line}\nplain\n")
    with pytest.raises(UsageError, match="stdin:1 is not"):
        encode_stream(encoder, None, tmp_path / "v.npy")
    (tmp_path / "a.txt").write_text(f"{line}\nplain\n")
    with pytest.raises(UsageError, match=r"a\.txt:1 looks like JSONL; name the file \.jsonl"):
        encode_stream(encoder, tmp_path / "a.txt", tmp_path / "v.npy")


def test_only_the_first_line_decides_what_a_text_file_is(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('plain\n{"text": "a"}\n')
    assert encode_stream(encoder, tmp_path / "a.txt", tmp_path / "v.npy").texts == 2


def test_a_line_without_end_is_refused(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines_module, "_MOST_BYTES", 1000)
    (tmp_path / "a.txt").write_bytes(b"a" * 1000 + b"\n")
    with Path("/dev/zero").open("rb") as endless:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=endless))
        with pytest.raises(UsageError, match="stdin:1 has more than 1,000 bytes"):
            encode_stream(encoder, None, tmp_path / "v.npy")
    with pytest.raises(UsageError, match=r"a\.txt:1 has more than 1,000 bytes"):
        encode_stream(encoder, tmp_path / "a.txt", tmp_path / "v.npy")


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
@pytest.mark.parametrize("out", ["v.npy", "v.safetensors", "v.jsonl"])
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
    with pytest.raises(UsageError, match=r"name it \.npy, \.safetensors or \.jsonl"):
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


@pytest.mark.parametrize("out", ["v.npy", "v.safetensors", "v.jsonl"])
def test_only_one_chunk_of_texts_is_read_ahead(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, out: str
) -> None:
    read: list[int] = []
    seen: list[int] = []
    original = encoder.encode_report

    def readline(_: int) -> bytes:
        if len(read) == 5000:
            return b""
        read.append(len(read))
        return b"a\n"

    def spy(texts: list[str], **options: object) -> object:
        seen.append(len(read))
        return original(texts, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(encoder, "encode_report", spy)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=SimpleNamespace(readline=readline)))
    assert encode_stream(encoder, None, tmp_path / out).texts == 5000
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


def test_a_text_beyond_the_table_is_named_by_its_line_and_the_others_are_encoded(
    tmp_path: Path,
) -> None:
    bundle = without_rows(tiny_artifact(tmp_path / "artifact"), 2)
    texts = tmp_path / "beyond.txt"
    texts.write_text("a plain text\na guitar\nanother text\n")
    arguments = ["encode", str(bundle), "--in", str(texts), "--out"]
    ran = CliRunner().invoke(cli, [*arguments, str(tmp_path / "v.npy")])
    assert ran.exit_code == 0
    assert f"Warning: {texts}:2 has the token" in ran.stderr
    assert "3 texts" in ran.stderr
    assert "1 without a vector" in ran.stderr
    expected = load(bundle).encode(["a plain text", "another text"])
    rows = np.load(tmp_path / "v.npy")
    np.testing.assert_array_equal(rows[[0, 2]], expected)
    assert not rows[1].any()
    CliRunner().invoke(cli, [*arguments, str(tmp_path / "v.jsonl")])
    vectors = [row["vector"] for row in rows_of((tmp_path / "v.jsonl").read_text())]
    assert vectors[1] is None
    np.testing.assert_array_equal(np.array([vectors[0], vectors[2]], np.float32), expected)


def test_many_texts_beyond_the_table_are_counted(tmp_path: Path) -> None:
    encoder = load(without_rows(tiny_artifact(tmp_path / "artifact"), 2))
    (tmp_path / "a.txt").write_text("a guitar\n" * 50)
    with pytest.warns(UserWarning, match="no vector") as warned:
        summary = encode_stream(encoder, tmp_path / "a.txt", tmp_path / "v.npy")
    assert (summary.texts, summary.failed, len(warned)) == (50, 50, 11)


@pytest.mark.parametrize("value", ["NaN", "[1, -Infinity]", "1e999", '{"a": NaN}'])
def test_an_id_that_is_not_json_is_not_printed(encoder, tmp_path: Path, value: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a", "id": {value}}}\n')
    with pytest.raises(UsageError, match=r"a\.jsonl:1 has an id that is not JSON"):
        encode_stream(encoder, tmp_path / "a.jsonl", tmp_path / "v.jsonl")


def test_long_texts_are_held_a_few_at_a_time(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_CHUNK_CHARACTERS", 100)
    sizes = []
    original = encoder.encode_report

    def spy(texts: list[str], **options: object) -> object:
        sizes.append(len(texts))
        return original(texts, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(encoder, "encode_report", spy)
    (tmp_path / "a.txt").write_text(f"{'a' * 60}\n" * 5 + f"{'a' * 500}\na\n")
    assert encode_stream(encoder, tmp_path / "a.txt", tmp_path / "v.npy").texts == 7
    assert sizes == [0, 2, 2, 2, 1]


def npy(header: str, body: bytes = b"", version: bytes = b"\1\0") -> bytes:
    content = header.encode("latin1")
    size = len(content).to_bytes(2 if version == b"\1\0" else 4, "little")
    return b"\x93NUMPY" + version + size + content + body


VECTORS = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }\n", bytes(8))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        npy("x"),
        npy("(" * 9000),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999, 9999999999), }\n"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 2), }\n"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1, 2), }\n"),
        npy("{'descr': 5, 'fortran_order': False, 'shape': (1, 2), }\n"),
        npy("{'descr': '<f4', 'fortran_order': False, 'shape': ('a', 2), }\n"),
        npy("{}", version=b"\x09\0"),
        VECTORS + npy("{'descr': '<U999999999', 'fortran_order': False, 'shape': (), }\n"),
        VECTORS + npy("{'descr': '<U1', 'fortran_order': False, 'shape': (2,), }\n", bytes(8)),
        VECTORS + npy("{'descr': '<U1', 'fortran_order': False, 'shape': (), }\n", b"\xff" * 4),
        VECTORS + b"surplus",
    ],
)
def test_a_hostile_npy_file_is_one_sentence(encoder: Encoder, tmp_path: Path, content) -> None:
    (tmp_path / "v.npy").write_bytes(content)
    with pytest.raises(UsageError, match=r"v\.npy") as refused:
        require_vectors_of(tmp_path / "v.npy", encoder.spec, "edge.m2d")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 250 + len(str(tmp_path))


def test_an_index_is_compared_in_shape_and_type_too(encoder, lines, tmp_path: Path) -> None:
    encode_stream(encoder, lines, tmp_path / "v.npy")
    content = (tmp_path / "v.npy").read_bytes()
    (tmp_path / "v.npy").write_bytes(content.replace(b"'<f4'", b"'<i4'", 1))
    with pytest.raises(UsageError, match=r"holds int32 of shape \(5, 12\) where vectors of"):
        require_vectors_of(tmp_path / "v.npy", encoder.spec, "edge.m2d")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"vector": ...}, "is not a vector with its space_id"),
        ({"vector": [0.5] * 11}, "holds .* where a vector of edge.m2d is 12 values of float32"),
        ({"vector": ["0.5"] * 12}, "12 values of float32"),
        ({"vector": [True] * 12}, "12 values of float32"),
        ({"vector": [1e39] * 12}, "12 values of float32"),
        ({"vector": [float("nan")] * 12}, "cannot be read: NaN is not JSON"),
        ({"vector": 0.5}, "12 values of float32"),
    ],
)
def test_rows_of_an_index_are_compared_in_shape_and_type(
    encoder, tmp_path: Path, row: dict[str, Any], told: str
) -> None:
    sound = {"vector": [1, 0.5] * 6, "space_id": encoder.spec.space_id}
    changed = {key: value for key, value in (sound | row).items() if value is not ...}
    (tmp_path / "v.jsonl").write_text(f"{json.dumps(sound)}\n{json.dumps(changed)}\n")
    with pytest.raises(UsageError, match=rf"v\.jsonl:2 .*{told}"):
        require_vectors_of(tmp_path / "v.jsonl", encoder.spec, "edge.m2d")
    (tmp_path / "v.jsonl").write_text(json.dumps(sound)[:-1] + ', "space_id": "x"}')
    with pytest.raises(UsageError, match="'space_id' is there twice"):
        require_vectors_of(tmp_path / "v.jsonl", encoder.spec, "edge.m2d")


@pytest.mark.parametrize("value", [128, -129, 1.0])
def test_rows_of_bytes_hold_bytes(tmp_path: Path, value: float) -> None:
    spec = tiny_spec(vectors="int8")
    row = {"vector": [value] * 12, "space_id": spec.space_id}
    (tmp_path / "v.jsonl").write_text(json.dumps(row))
    with pytest.raises(UsageError, match="12 values of int8"):
        require_vectors_of(tmp_path / "v.jsonl", spec, "edge.m2d")


def test_a_row_without_a_vector_that_encode_wrote_is_accepted(encoder, tmp_path: Path) -> None:
    row = {"vector": None, "space_id": encoder.spec.space_id}
    (tmp_path / "v.jsonl").write_text(json.dumps(row))
    expected = (1, encoder.spec.space_id)
    assert require_vectors_of(tmp_path / "v.jsonl", encoder.spec, "edge.m2d") == expected


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_index_of_other_than_finite_numbers_is_refused(
    encoder, lines, tmp_path: Path, value: float
) -> None:
    encode_stream(encoder, lines, tmp_path / "v.npy")
    vectors = np.load(tmp_path / "v.npy", mmap_mode="r+")
    vectors[3, 1] = value
    vectors.flush()
    with pytest.raises(UsageError, match=f"its row 3 holds {value}"):
        require_vectors_of(tmp_path / "v.npy", encoder.spec, "edge.m2d")


def test_verify_says_that_an_index_is_of_this_space(encoder, lines, tmp_path: Path) -> None:
    write_bundle(tiny_artifact(tmp_path / "artifact"), tmp_path / "edge.m2d")
    for name in ("v.npy", "v.safetensors", "v.jsonl"):
        encode_stream(encoder, lines, tmp_path / name)
        for path in (tmp_path / "edge.m2d", tmp_path / "artifact"):
            arguments = ["verify", str(path), "--vectors", str(tmp_path / name)]
            ran = CliRunner().invoke(cli, arguments)
            assert ran.exit_code == 0, ran.output
            assert f"{tmp_path / name}: 5 vectors of this space" in ran.stdout
            facts = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
            assert facts["vectors"]["count"] == len(TEXTS)
            assert facts["vectors"]["space_id"] == encoder.spec.space_id == facts["space_id"]


def test_verify_reads_a_bundle_once(encoder, lines, tmp_path: Path, monkeypatch) -> None:
    path = write_bundle(tiny_artifact(tmp_path / "artifact"), tmp_path / "edge.m2d").path
    encode_stream(encoder, lines, tmp_path / "v.npy")
    opened, original = [], Path.open

    def spy(self: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(self)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", spy)
    arguments = ["verify", str(path), "--vectors", str(tmp_path / "v.npy")]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    assert (opened.count(path), opened.count(tmp_path / "v.npy")) == (1, 1)


def test_a_pipe_in_the_place_of_an_index_is_not_waited_for(encoder, tmp_path: Path) -> None:
    for name in ("v.npy", "v.safetensors", "v.jsonl"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UsageError, match="is not a file"):
            require_vectors_of(tmp_path / name, encoder.spec, "edge.m2d")
