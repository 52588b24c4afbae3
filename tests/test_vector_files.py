"""Files of vectors: safetensors and sidecars as other tools read them, and reading them back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import m2d
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_artifact import tiny_artifact, tiny_spec, without_rows

import m2dexport
from m2dexport.engines import Device
from m2dexport.errors import UsageError
from m2dexport.runtime.artifact import FORMAT
from m2dexport.runtime.bundle import write_bundle
from m2dexport.runtime.encoder import Encoder
from m2dexport.runtime.loading import load
from m2dexport.runtime.streams import encode_stream
from m2dexport.runtime.vector_files import read_vectors, require_vectors_of

TEXTS = ["a guitar", "", "今日 é", "find a much longer text than sixteen tokens", "b"]
FORMATS = ("v.npy", "v.safetensors", "v.jsonl")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    spec = tiny_spec(vectors="int8")
    return load(tiny_artifact(tmp_path_factory.mktemp("files") / "a", spec), Device(threads=1))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """An encoder of other weights: of another space."""
    spec = tiny_spec(vectors="int8")
    folder = tiny_artifact(tmp_path_factory.mktemp("other") / "a", spec, seed=1)
    return load(folder, Device(threads=1))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A file of texts with and without ids."""
    ids: list[dict[str, Any]] = [{"id": "é\n"}, {"_id": 7}, {}, {"id": None}, {"id": [1, "b"]}]
    rows = [{"text": text, **id_} for text, id_ in zip(TEXTS, ids, strict=True)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_a_safetensors_file_tells_its_space_to_the_library(encoder, texts, tmp_path: Path) -> None:
    summary = encode_stream(encoder, texts, tmp_path / "v.safetensors")
    assert (summary.texts, summary.truncated) == (5, 1)
    with safe_open(tmp_path / "v.safetensors", "numpy") as file:
        metadata, vectors, ids = (
            file.metadata(),
            file.get_tensor("vectors"),
            file.get_tensor("ids"),
        )
    assert metadata == {
        "space_id": encoder.spec.space_id,
        "count": "5",
        "artifact": encoder.spec.to_json(),
    }
    np.testing.assert_array_equal(vectors, encoder.encode(TEXTS))
    assert [json.loads(line) for line in ids.tobytes().splitlines()] == [
        "é\n",
        7,
        None,
        None,
        [1, "b"],
    ]


@pytest.mark.parametrize("count", [0, 3])
def test_texts_without_ids_have_no_tensor_of_ids(encoder, tmp_path: Path, count: int) -> None:
    (tmp_path / "a.txt").write_text("a\n" * count)
    encode_stream(encoder, tmp_path / "a.txt", tmp_path / "v.safetensors")
    found = load_file(tmp_path / "v.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == {"vectors": (count, 12)}
    stored = read_vectors(tmp_path / "v.safetensors", encoder)
    assert (stored.ids, stored.vectors.shape) == (None, (count, 12))


def test_the_vectors_of_a_safetensors_file_can_be_mapped(encoder, texts, tmp_path: Path) -> None:
    encode_stream(encoder, texts, tmp_path / "v.safetensors")
    content = (tmp_path / "v.safetensors").read_bytes()
    assert (8 + int.from_bytes(content[:8], "little")) % 8 == 0


@pytest.mark.parametrize("name", FORMATS)
def test_vectors_are_read_back_with_their_ids(encoder, texts, tmp_path: Path, name: str) -> None:
    encode_stream(encoder, texts, tmp_path / name)
    stored = m2dexport.read_vectors(tmp_path / name, encoder)
    np.testing.assert_array_equal(stored.vectors, encoder.encode(TEXTS))
    assert stored.space_id == encoder.spec.space_id
    assert stored.ids == (None if name == "v.npy" else ["é\n", 7, None, None, [1, "b"]])
    assert isinstance(stored.vectors, np.memmap) == (name != "v.jsonl")
    found = encoder.codec.search(encoder.encode(TEXTS), stored.vectors, top=1)
    assert found.rows[:, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", FORMATS)
def test_vectors_of_another_space_are_not_read(
    encoder, other, texts, tmp_path: Path, name: str
) -> None:
    encode_stream(other, texts, tmp_path / name)
    with pytest.raises(UsageError, match="must not be compared") as refused:
        read_vectors(tmp_path / name, encoder)
    for told in (name, "this encoder", encoder.spec.space_id, other.spec.space_id):
        assert told in str(refused.value)


def test_rows_of_two_spaces_in_one_file_are_refused(encoder, other, texts, tmp_path: Path) -> None:
    for each, name in ((encoder, "a.jsonl"), (other, "b.jsonl")):
        encode_stream(each, texts, tmp_path / name)
    both = (tmp_path / "a.jsonl").read_text() + (tmp_path / "b.jsonl").read_text()
    (tmp_path / "both.jsonl").write_text(both)
    with pytest.raises(UsageError, match=r"both\.jsonl:6 \(space") as refused:
        read_vectors(tmp_path / "both.jsonl", encoder)
    assert encoder.spec.space_id in str(refused.value)
    assert other.spec.space_id in str(refused.value)


def test_a_text_without_a_vector_is_zeros_in_every_format(tmp_path: Path) -> None:
    lacking = load(without_rows(tiny_artifact(tmp_path / "artifact"), 2))
    (tmp_path / "a.txt").write_text("a plain text\na guitar\n")
    for name in FORMATS:
        with pytest.warns(UserWarning, match="no vector"):
            encode_stream(lacking, tmp_path / "a.txt", tmp_path / name)
        stored = read_vectors(tmp_path / name, lacking)
        assert stored.vectors.any(axis=1).tolist() == [True, False]


def test_a_sidecar_says_to_any_reader_whose_vectors_these_are(
    encoder, texts, tmp_path: Path
) -> None:
    encode_stream(encoder, texts, tmp_path / "v.npy")
    sidecar = json.loads((tmp_path / "v.npy.json").read_text(encoding="utf-8"))
    assert sidecar == {
        "format": 1,
        "space_id": encoder.spec.space_id,
        "count": 5,
        "artifact": json.loads(encoder.spec.to_json()),
    }


def test_a_npy_file_needs_no_sidecar(encoder, texts, tmp_path: Path) -> None:
    encode_stream(encoder, texts, tmp_path / "v.npy")
    (tmp_path / "v.npy.json").unlink()
    assert require_vectors_of(tmp_path / "v.npy", encoder.spec, "a") == (5, encoder.spec.space_id)


def test_an_array_that_numpy_saved_is_identified_by_its_sidecar(
    encoder, other, texts, tmp_path: Path
) -> None:
    encode_stream(encoder, texts, tmp_path / "v.npy")
    np.save(tmp_path / "v.npy", np.load(tmp_path / "v.npy"))
    assert read_vectors(tmp_path / "v.npy", encoder).space_id == encoder.spec.space_id
    with pytest.raises(UsageError, match="must not be compared"):
        read_vectors(tmp_path / "v.npy", other)
    np.save(tmp_path / "v.npy", np.load(tmp_path / "v.npy")[:3])
    with pytest.raises(UsageError, match=r"3 vectors, .*\(5, .*do not belong together"):
        read_vectors(tmp_path / "v.npy", encoder)


def test_a_sidecar_of_another_space_is_refused(encoder, other, texts, tmp_path: Path) -> None:
    encode_stream(encoder, texts, tmp_path / "v.npy")
    encode_stream(other, texts, tmp_path / "w.npy")
    (tmp_path / "w.npy.json").replace(tmp_path / "v.npy.json")
    with pytest.raises(UsageError, match="do not belong together") as refused:
        read_vectors(tmp_path / "v.npy", encoder)
    assert encoder.spec.space_id in str(refused.value)
    assert other.spec.space_id in str(refused.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 2}, "has format 2"),
        ({"space_id": "m2d1-x"}, "space_id is 'm2d1-x'"),
        ({"space_id": None}, "space_id is None"),
        ({"count": "5"}, "count is '5'"),
        ({"count": 4}, "do not belong together"),
        ({"more": 1}, "'more' is unknown"),
        ([], "cannot be read"),
        ("no JSON", "cannot be read"),
    ],
)
def test_a_hostile_sidecar_is_one_sentence(encoder, texts, tmp_path, change, told: str) -> None:
    encode_stream(encoder, texts, tmp_path / "v.npy")
    path = tmp_path / "v.npy.json"
    sidecar = json.loads(path.read_text(encoding="utf-8"))
    changed = {**sidecar, **change} if isinstance(change, dict) else change
    path.write_text(change if isinstance(change, str) else json.dumps(changed))
    with pytest.raises(UsageError, match=told) as refused:
        read_vectors(tmp_path / "v.npy", encoder)
    assert "\n" not in str(refused.value)


def test_neither_file_of_two_is_overwritten_without_force(encoder, texts, tmp_path: Path) -> None:
    encode_stream(encoder, texts, tmp_path / "v.npy")
    (tmp_path / "v.npy").unlink()
    with pytest.raises(UsageError, match=r"v\.npy\.json already exists"):
        encode_stream(encoder, texts, tmp_path / "v.npy")
    encode_stream(encoder, texts, tmp_path / "v.npy", force=True)
    assert len(read_vectors(tmp_path / "v.npy", encoder).vectors) == 5


@pytest.mark.parametrize("name", ["v.npy", "v.safetensors"])
def test_files_of_a_version_with_another_artifact_json_are_read(
    encoder, other, texts, tmp_path: Path, name: str
) -> None:
    """The space_id alone decides; artifact.json says what differs, where it can be read."""
    encode_stream(encoder, texts, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    wide = "utf-32-le" if name == "v.npy" else "utf-8"
    quote = '"' if name == "v.npy" else '\\"'
    old, new = (f"{quote}format{quote}: {number}".encode(wide) for number in (FORMAT, 3))
    assert content.count(old) == 1
    (tmp_path / name).write_bytes(content.replace(old, new))
    assert read_vectors(tmp_path / name, encoder).space_id == encoder.spec.space_id
    with pytest.raises(UsageError, match="must not be compared; encode both") as refused:
        read_vectors(tmp_path / name, other)
    assert encoder.spec.space_id in str(refused.value)


def tensors(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


ONE_VECTOR = {"dtype": "I8", "shape": (1, 2), "data_offsets": (0, 2)}


def entry(dtype: object = "I8", shape: object = (1, 2), offsets: object = (0, 2)) -> bytes:
    return tensors({"vectors": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, b"ab")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        tensors(b"{"),
        tensors(b"[" * 10**5),
        tensors([]),
        tensors({}),
        tensors({"vectors": []}),
        entry("F64"),
        entry([]),
        entry(shape=3),
        entry(shape=(-1, -2)),
        entry(shape=(1, 2.0)),
        entry(shape=[1] * 10**4 + [2]),
        entry(shape=(10**30, 10**30), offsets=(0, 10**60)),
        entry(offsets=(1, 3)),
        entry(offsets=(-2, 0)),
        entry(offsets=("a", "b")),
        entry(offsets=(0, 1, 2)),
        entry(),
        tensors({"__metadata__": {"artifact": 5}, "vectors": {}}),
        tensors({"__metadata__": [], "vectors": ONE_VECTOR}, b"ab"),
        tensors({"__metadata__": {"space_id": 5, "artifact": 5}, "vectors": ONE_VECTOR}, b"ab"),
    ],
)
def test_a_hostile_safetensors_file_is_one_sentence(encoder, tmp_path: Path, content) -> None:
    (tmp_path / "v.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match=r"v\.safetensors") as refused:
        read_vectors(tmp_path / "v.safetensors", encoder)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 250 + len(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["ids"].update(data_offsets=[0, header["ids"]["shape"][0]]),
        lambda header: header["ids"].update(shape=[1], data_offsets=[0, 1]),
        lambda header: header["ids"].update(
            shape=[1], data_offsets=[header["ids"]["data_offsets"][0]] * 2
        ),
        lambda header: header["__metadata__"].update(count="99"),
    ],
)
def test_verify_refuses_what_no_reader_takes(encoder, tmp_path: Path, change) -> None:
    path = tmp_path / "v.safetensors"
    (tmp_path / "a.jsonl").write_text('{"text": "a", "id": 1}\n{"text": "b", "id": 2}\n')
    encode_stream(encoder, tmp_path / "a.jsonl", path)
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:size])
    change(header)
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + content[size:])
    for reader in (
        lambda: read_vectors(path, encoder),
        lambda: require_vectors_of(path, encoder.spec, "a bundle"),
    ):
        with pytest.raises(UsageError, match=r"v\.safetensors"):
            reader()


def test_a_safetensors_file_that_was_saved_again_is_read(encoder, texts, tmp_path: Path) -> None:
    """Its tensors are in another order then, and its metadata go with it or not."""
    path = tmp_path / "v.safetensors"
    encode_stream(encoder, texts, path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    found = load_file(path)
    save_file(found, path, metadata)
    assert read_vectors(path, encoder).ids == ["é\n", 7, None, None, [1, "b"]]
    save_file({**found, "ids": found["ids"][:-9]}, path, metadata)
    with pytest.raises(UsageError, match="holds 4 ids of 5 vectors"):
        read_vectors(path, encoder)
    save_file(found, path)
    with pytest.raises(UsageError, match="does not name the space of its vectors"):
        read_vectors(path, encoder)
    save_file({"vectors": found["vectors"].view(np.uint8)}, path, metadata)
    with pytest.raises(UsageError, match=r"holds uint8 of shape \(5, 12\) where"):
        read_vectors(path, encoder)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    floats = load(tiny_artifact(tmp_path / "artifact"))
    (tmp_path / "a.txt").write_text("a\nb\n")
    encode_stream(floats, tmp_path / "a.txt", tmp_path / "v.safetensors")
    read_vectors(tmp_path / "v.safetensors", floats).vectors  # noqa: B018
    content = bytearray((tmp_path / "v.safetensors").read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    (tmp_path / "v.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match="its row 1 holds nan"):
        read_vectors(tmp_path / "v.safetensors", floats)


def test_the_command_line_writes_and_verifies_safetensors(texts, tmp_path: Path) -> None:
    folder = tiny_artifact(tmp_path / "artifact", tiny_spec(vectors="ubinary"))
    bundle = write_bundle(folder, tmp_path / "edge.m2d").path
    out = tmp_path / "v.safetensors"
    ran = m2d("encode", bundle, "--in", texts, "--out", out)
    assert ran.exit_code == 0
    assert "5 texts" in ran.stderr
    assert "1 cut at the maximum length" in ran.stderr
    assert "5 vectors of this space" in m2d("verify", bundle, "--vectors", out).stdout
    foreign = tiny_artifact(tmp_path / "foreign", tiny_spec(vectors="ubinary"), seed=1)
    refused = m2d("verify", foreign, "--vectors", out)
    assert refused.exit_code == 2
    assert "must not be compared" in refused.stderr
