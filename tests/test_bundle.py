"""Bundle: the same bytes from the same inputs, and no byte can change unnoticed."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import m2d
from tiny_artifact import GRAPH, relisted, tiny_artifact, tiny_graph, tiny_ranges, tiny_spec

from m2dexport.engines import Device
from m2dexport.engines.onnxruntime import run as engine
from m2dexport.errors import BundleError, DriftError, FormatError, M2DError, UsageError
from m2dexport.files import SPEC
from m2dexport.precisions import BIT_ORDERS, VECTOR_PRECISIONS
from m2dexport.runtime import archive, golden, golden_texts
from m2dexport.runtime.archive import GOLDEN, open_bundle, write_archive
from m2dexport.runtime.artifact import (
    RANGES,
    TOKENIZER,
    space_id_of_artifact,
    spec_from_json,
)
from m2dexport.runtime.bundle import verify_artifact, verify_bundle, write_bundle
from m2dexport.runtime.loading import load
from m2dexport.runtime.manifest import MANIFEST, manifest_of
from m2dexport.runtime.showing import show_bundle
from m2dexport.runtime.tolerance import MIN_COSINE, MIN_EQUAL_BITS, Tolerance
from m2dexport.vectors.codecs import PER_BYTE, Ranges

Files = dict[str, bytes]
FIRST_DAY = (1980, 1, 1, 0, 0, 0)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound bundle with int8 vectors; read only."""
    folder = tmp_path_factory.mktemp("packed")
    artifact = tiny_artifact(folder / "artifact", tiny_spec(vectors="int8"))
    (artifact / "LICENSE").write_text("Do as you like.\n")
    write_bundle(relisted(artifact), folder / "edge.m2d")
    return folder / "edge.m2d"


def repacked(path: Path, files: Files) -> Path:
    """Write ``files`` as a bundle whose manifest matches them."""
    others = {name: content for name, content in files.items() if name != MANIFEST}
    manifest = manifest_of(others, spec_from_json(others[SPEC], path), {}).to_json()
    write_archive(path, others | {MANIFEST: manifest})
    return path


def zipped(path: Path, entries: list[tuple[zipfile.ZipInfo, bytes]]) -> Path:
    """Write a ZIP archive as any other tool would."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as stream:
        warnings.simplefilter("ignore")  # of duplicate names
        for info, content in entries:
            stream.writestr(info, content)
    return path


def plain_entries(files: Files) -> list[tuple[zipfile.ZipInfo, bytes]]:
    return [(plain_info(name), content) for name, content in sorted(files.items())]


def plain_info(name: str, mode: int = 0o100644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, FIRST_DAY)
    info.create_system, info.external_attr = 3, mode << 16
    return info


@pytest.mark.parametrize("vectors", VECTOR_PRECISIONS)
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_a_bundle_verifies(tmp_path: Path, weights: str, vectors: Any) -> None:
    artifact = tiny_artifact(tmp_path / "a", tiny_spec(weights=weights, vectors=vectors))
    info = write_bundle(artifact, tmp_path / "edge.m2d")
    report = verify_bundle(info.path)
    assert info.files == tuple(sorted(open_bundle(info.path)))
    assert (report.space_id, report.files) == (info.space_id, len(info.files))
    assert info.size_bytes == info.path.stat().st_size
    assert report.texts == 3 * (len(golden_texts.TEXTS) + 3)  # no prompt, query and document
    assert info.space_id in report.sentence()
    assert "\n" not in report.sentence()


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_bundle(tiny_artifact(tmp_path / name), tmp_path / f"{name}.m2d")
    assert (tmp_path / "one.m2d").read_bytes() == (tmp_path / "two.m2d").read_bytes()


def test_any_zip_reader_reads_a_bundle(packed: Path) -> None:
    with zipfile.ZipFile(packed) as stream:
        assert stream.testzip() is None
        assert {info.filename: stream.read(info) for info in stream.infolist()} == open_bundle(
            packed
        )
        assert {info.date_time for info in stream.infolist()} == {FIRST_DAY}
        assert stream.namelist() == sorted({*archive.REQUIRED, GRAPH, MANIFEST, RANGES})


def test_archive_bytes_are_pinned(tmp_path: Path) -> None:
    write_archive(tmp_path / "a", {"a": b"hi"})
    header = b"PK\3\4\x14\0\0\0\0\0\0\0!\0\xac*\x93\xd8\2\0\0\0\2\0\0\0\1\0\0\0a"
    directory = (
        b"PK\1\2\x14\3\x14\0\0\0\0\0\0\0!\0\xac*\x93\xd8\2\0\0\0\2\0\0\0\1\0\0\0\0\0\0\0\0\0"
        b"\0\0\xa4\x81\0\0\0\0a"
    )
    end = b"PK\5\6\0\0\0\0\1\0\1\0/\0\0\0!\0\0\0\0\0"
    assert (tmp_path / "a").read_bytes() == header + b"hi" + directory + end


@pytest.mark.parametrize("bit_order", BIT_ORDERS)
@pytest.mark.parametrize("vectors", PER_BYTE)
def test_packed_vectors_verify_in_either_bit_order(tmp_path: Path, vectors, bit_order) -> None:
    spec = tiny_spec(vectors=vectors, bit_order=bit_order)
    info = write_bundle(tiny_artifact(tmp_path / "a", spec), tmp_path / "edge.m2d")
    assert verify_bundle(info.path).equal_codes == 1
    told = json.loads(open_bundle(info.path)[MANIFEST])["vectors"]
    assert told == {"precision": vectors, "dim": 12, "codec": 1, "bit_order": bit_order}


def test_the_manifest_tells_versions_and_licences(packed: Path) -> None:
    manifest = json.loads(open_bundle(packed)[MANIFEST])
    assert manifest["licenses"] == {"LICENSE": "Do as you like.\n"}
    assert manifest["created_by"]["m2dexport"] == "0.1.0"
    assert manifest["format"] == 2


def test_golden_texts_cover_the_maximum_length(packed: Path) -> None:
    files = open_bundle(packed)
    rows = golden.golden_from_json(files[GOLDEN], spec_from_json(files[SPEC], packed)).texts
    for prompt in (None, "query", "document"):
        lengths = [len(row.ids) for row in rows if row.prompt == prompt]
        assert lengths[-3:] == [16, 16, 15]
    assert any(len(row.text.split()) >= 4 * 16 for row in rows)


def test_flipping_any_byte_is_found(packed: Path, tmp_path: Path) -> None:
    sound = packed.read_bytes()
    with zipfile.ZipFile(packed) as stream:
        starts = [info.header_offset for info in stream.infolist()]
        directory = stream.start_dir
    # Every byte of the headers and of the directory, and a sample of the contents.
    positions = {at + i for at in starts for i in range(48)} | set(range(directory, len(sound)))
    positions |= set(random.Random(0).sample(range(len(sound)), 1500))
    path = tmp_path / "flipped.m2d"
    for position in sorted(positions):
        flipped = bytearray(sound)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(BundleError):
            open_bundle(path)


def test_a_wrong_digest_is_found_where_every_crc_is_right(packed: Path, tmp_path: Path) -> None:
    files = open_bundle(packed)
    manifest = json.loads(files[MANIFEST])
    digest = manifest["files"][TOKENIZER]["sha256"]
    changed = files[MANIFEST].replace(digest.encode(), digest[::-1].encode())
    write_archive(tmp_path / "a.m2d", files | {MANIFEST: changed})
    with pytest.raises(BundleError, match=r"tokenizer\.json does not match its sha256"):
        open_bundle(tmp_path / "a.m2d")


def test_truncated_and_extended_files_are_refused(packed: Path, tmp_path: Path) -> None:
    sound = packed.read_bytes()
    path = tmp_path / "cut.m2d"
    for length in [*range(0, len(sound), 997), len(sound) - 1]:
        path.write_bytes(sound[:length])
        with pytest.raises(BundleError):
            open_bundle(path)
    for content in (sound + b"\0", b"\0" + sound, sound + sound):
        path.write_bytes(content)
        with pytest.raises(BundleError):
            open_bundle(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\5\6", bytes(100), b"PK\3\4" * 1000])
def test_a_file_that_is_no_zip_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.m2d").write_bytes(content)
    with pytest.raises(BundleError, match="is not a bundle"):
        open_bundle(tmp_path / "a.m2d")


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "folder/model.onnx", "..", "..\\evil", "C:evil", "a\0b", ""]
)
def test_names_that_leave_the_bundle_are_refused(packed: Path, tmp_path: Path, name: str) -> None:
    files = open_bundle(packed)
    placeholder = "x" * len(name.encode())
    path = zipped(tmp_path / "a.m2d", [*plain_entries(files), (plain_info(placeholder), b"")])
    # Patched in, because zipfile itself would not write some of them.
    header, _, tail = path.read_bytes().rpartition(b"PK\1\2")
    path.write_bytes(header + b"PK\1\2" + tail.replace(placeholder.encode(), name.encode(), 1))
    with pytest.raises(BundleError):
        open_bundle(path)


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "folder/model.onnx"])
def test_the_message_names_the_path(packed: Path, tmp_path: Path, name: str) -> None:
    entries = [*plain_entries(open_bundle(packed)), (plain_info(name), b"")]
    with pytest.raises(BundleError, match=f"{name}.*no folders and no absolute names"):
        open_bundle(zipped(tmp_path / "a.m2d", entries))


def duplicate(files: Files) -> list[tuple[zipfile.ZipInfo, bytes]]:
    return [*plain_entries(files), (plain_info(GRAPH), b"another")]


def symlink(files: Files) -> list[tuple[zipfile.ZipInfo, bytes]]:
    rest = {name: content for name, content in files.items() if name != TOKENIZER}
    return [*plain_entries(rest), (plain_info(TOKENIZER, 0o120777), b"/etc/passwd")]


def compressed(files: Files) -> list[tuple[zipfile.ZipInfo, bytes]]:
    entries = plain_entries(files)
    entries[0][0].compress_type = zipfile.ZIP_DEFLATED
    return entries


def bomb(files: Files) -> list[tuple[zipfile.ZipInfo, bytes]]:
    entries = plain_entries(files | {GRAPH: bytes(50_000_000)})
    entries[3][0].compress_type = zipfile.ZIP_DEFLATED
    return entries


def many(files: Files) -> list[tuple[zipfile.ZipInfo, bytes]]:
    return plain_entries(files | {f"f{number}": b"" for number in range(100)})


def later_date(files: Files) -> list[tuple[zipfile.ZipInfo, bytes]]:
    entries = plain_entries(files)
    entries[0][0].date_time = (2024, 1, 1, 0, 0, 0)
    return entries


def unsorted(files: Files) -> list[tuple[zipfile.ZipInfo, bytes]]:
    return plain_entries(files)[::-1]


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        (duplicate, "'model.onnx' twice"),
        (symlink, "'tokenizer.json' is a link"),
        (compressed, "'artifact.json' is compressed"),
        (bomb, "'model.onnx' is compressed"),
        (many, "lists 106 files"),
        (later_date, "was not written by m2dexport"),
        (unsorted, "was not written by m2dexport"),
    ],
)
def test_hostile_archives_are_refused(
    packed: Path,
    tmp_path: Path,
    entries: Callable[[Files], list[tuple[zipfile.ZipInfo, bytes]]],
    told: str,
) -> None:
    path = zipped(tmp_path / "a.m2d", entries(open_bundle(packed)))
    with pytest.raises(BundleError, match=told):
        open_bundle(path)


def test_overlapping_entries_are_refused(packed: Path, tmp_path: Path) -> None:
    """Sizes told in the directory alone must not make the reader read more than there is."""
    content = bytearray(packed.read_bytes())
    directory = struct.unpack("<L", content[-6:-2])[0]
    for field in (20, 24):  # stored and real size of the first entry
        struct.pack_into("<L", content, directory + field, len(content))
    (tmp_path / "a.m2d").write_bytes(content)
    with pytest.raises(BundleError):
        open_bundle(tmp_path / "a.m2d")


def without_tokenizer(files: Files) -> Files:
    return {name: content for name, content in files.items() if name != TOKENIZER}


def with_surplus(files: Files) -> Files:
    return files | {"surplus.txt": b"hello"}


def with_manifest(**change: Any) -> Callable[[Files], Files]:
    def changed(files: Files) -> Files:
        manifest = json.loads(files[MANIFEST]) | change
        return files | {MANIFEST: json.dumps(manifest).encode()}

    return changed


def with_padding(name: str, most: int) -> Callable[[Files], Files]:
    return lambda files: files | {name: files[name].ljust(most + 1)}


def without_manifest(files: Files) -> Files:
    return {name: content for name, content in files.items() if name != MANIFEST}


def other_size(files: Files) -> Files:
    manifest = json.loads(files[MANIFEST])
    manifest["files"][GRAPH]["size"] += 1
    return files | {MANIFEST: json.dumps(manifest).encode()}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without_tokenizer, "lacks 'tokenizer.json'"),
        (without_manifest, "has no manifest.json"),
        (with_surplus, "holds 'surplus.txt', which does not belong in"),
        (with_manifest(files={}), "which its manifest does not list"),
        (with_manifest(files=[]), "manifest.json cannot be read"),
        (with_manifest(files={"a": 1}), "manifest.json cannot be read"),
        (other_size, "model.onnx has"),
        (lambda files: files | {MANIFEST: b"["}, "manifest.json cannot be read"),
        (lambda files: files | {MANIFEST: b"[" * 200_000}, "nested too deeply"),
        (with_manifest(format=[1]), r"has format \[1\]"),
        (with_manifest(space_id=["a"]), r"space_id is \['a'\]"),
        (with_manifest(licenses={"LICENSE": 5}), r"licenses\['LICENSE'\] is 5"),
        (with_manifest(licenses={"..": "x"}), r"is '\.\.' where the name of a licence file"),
        (with_manifest(licenses={"model.onnx": "x"}), "where the name of a licence file"),
        (with_manifest(licenses={"LICENSE/../x": "x"}), "where the name of a licence file"),
        (
            lambda files: files | {MANIFEST: b"[" + b"[]," * 2_800_000 + b"[]]"},
            r"manifest\.json is larger than 8,388,608 bytes",
        ),
        (with_padding(GOLDEN, 1 << 25), r"golden\.json' is larger than 33,554,432 bytes"),
        (with_padding(SPEC, 1 << 22), r"artifact\.json' is larger than 4,194,304 bytes"),
        (with_padding(RANGES, 1 << 22), r"ranges\.json' is larger than 4,194,304 bytes"),
        (with_manifest(files={"a": {"sha256": "x" * 10**6, "size": 1}}), "a sha256 is needed"),
        (
            with_manifest(files={"model.onnx": {"sha256": "0" * 64, "size": 10**400}}),
            "size is 1000",
        ),
        (with_manifest(files={"x" * 299: {"sha256": "0" * 64, "size": 1}}), "lacks 'xxx"),
        (with_manifest(more=1), "'more' is unknown"),
        (with_manifest(created_by=None), "created_by is None where an object is needed"),
    ],
)
def test_canonical_archives_of_wrong_content_are_refused(
    packed: Path, tmp_path: Path, change: Callable[[Files], Files], told: str
) -> None:
    write_archive(tmp_path / "a.m2d", change(open_bundle(packed)))
    with pytest.raises(BundleError, match=told) as refused:
        open_bundle(tmp_path / "a.m2d")
    assert len(str(refused.value)) < 300 + len(str(tmp_path))


def test_a_bundle_of_another_format_is_no_damaged_one(packed: Path, tmp_path: Path) -> None:
    write_archive(tmp_path / "a.m2d", with_manifest(format=3)(open_bundle(packed)))
    with pytest.raises(FormatError, match="has format 3 and this version reads format 2; upgrade"):
        open_bundle(tmp_path / "a.m2d")


@pytest.mark.parametrize(
    "vectors",
    [
        {"precision": "ubinary", "dim": 12, "codec": 1, "bit_order": None},
        {"precision": "int8", "dim": 11, "codec": 1, "bit_order": None},
        {"precision": "int8", "dim": 12, "codec": 2, "bit_order": None},
        {"precision": "int8", "dim": 12, "codec": 1, "bit_order": "little"},
    ],
)
def test_a_manifest_that_says_something_else_of_the_vectors_does_not_verify(
    packed: Path, tmp_path: Path, vectors: dict[str, Any]
) -> None:
    write_archive(tmp_path / "a.m2d", with_manifest(vectors=vectors)(open_bundle(packed)))
    for reader in (verify_bundle, load, show_bundle):
        with pytest.raises(BundleError, match=r"artifact\.json disagree about vectors"):
            reader(tmp_path / "a.m2d")


def test_ranges_that_are_not_those_of_the_graph_do_not_verify(packed: Path, tmp_path: Path) -> None:
    """The space_id can be made to match; the codes cannot."""
    files = open_bundle(packed)
    other = Ranges(tiny_ranges(12).low, tiny_ranges(12).high * 2)
    spec = spec_from_json(files[SPEC], "")
    spec = replace(spec, space_id=space_id_of_artifact(spec, other, files[TOKENIZER].decode()))
    changed = files | {RANGES: other.to_json().encode(), SPEC: spec.to_json().encode()}
    path = repacked(tmp_path / "a.m2d", changed)
    for reader in (verify_bundle, load):
        with pytest.raises(BundleError, match="does not hold the ranges that the graph codes with"):
            reader(path)


def test_an_artifact_folder_verifies_as_far_as_it_can(packed: Path, tmp_path: Path) -> None:
    report = verify_artifact(packed.parent / "artifact")
    assert (report.files, report.texts) == (4, len(golden_texts.TEXTS))
    assert report.space_id == verify_bundle(packed).space_id
    assert "an artifact has no golden texts" in report.sentence()
    other = tiny_artifact(tmp_path / "a", tiny_spec(vectors="int8", max_length=15))
    shutil.copyfile(packed.parent / "artifact" / RANGES, other / RANGES)
    (other / SPEC).write_bytes((packed.parent / "artifact" / SPEC).read_bytes())
    with pytest.raises(M2DError, match="must cut texts at 16 tokens"):
        verify_artifact(relisted(other))


def test_a_pipe_is_not_a_bundle(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.m2d")
    for reader in (verify_bundle, load):
        with pytest.raises(UsageError, match="is not a bundle file"):
            reader(tmp_path / "a.m2d")


def test_another_valid_graph_with_matching_hashes_does_not_verify(tmp_path: Path) -> None:
    for vectors in VECTOR_PRECISIONS:
        spec = tiny_spec(vectors=vectors, weights="int8")
        write_bundle(tiny_artifact(tmp_path / vectors, spec), tmp_path / f"{vectors}.m2d")
        other = tiny_artifact(tmp_path / f"{vectors} of another model", spec, seed=1)
        files = open_bundle(tmp_path / f"{vectors}.m2d") | {GRAPH: (other / GRAPH).read_bytes()}
        path = repacked(tmp_path / f"{vectors}-swapped.m2d", files)
        open_bundle(path)
        with pytest.raises(DriftError, match="does not reproduce its golden vectors"):
            verify_bundle(path)


def test_a_graph_of_another_width_does_not_verify(tmp_path: Path) -> None:
    write_bundle(tiny_artifact(tmp_path / "artifact"), tmp_path / "a.m2d")
    files = open_bundle(tmp_path / "a.m2d") | {GRAPH: tiny_graph(8, "ubinary", None)}
    with pytest.raises(M2DError, match=r"the graph returns uint8 of shape \(1, 1\) where vectors"):
        verify_bundle(repacked(tmp_path / "b.m2d", files))


def test_a_changed_prompt_with_matching_hashes_does_not_verify(
    packed: Path, tmp_path: Path
) -> None:
    files = open_bundle(packed)
    spec = replace(spec_from_json(files[SPEC].decode(), ""), prompts={"query": "found: "})
    path = repacked(tmp_path / "a.m2d", files | {SPEC: spec.to_json().encode()})
    for reader in (verify_bundle, load, show_bundle):
        with pytest.raises(BundleError, match="a prompt, the tokenizer or the ranges changed"):
            reader(path)


def test_other_token_ids_do_not_verify(packed: Path, tmp_path: Path) -> None:
    files = open_bundle(packed)
    stored = json.loads(files[GOLDEN])
    stored["texts"][3]["ids"][1] += 1
    path = repacked(tmp_path / "a.m2d", files | {GOLDEN: json.dumps(stored).encode()})
    with pytest.raises(DriftError, match=r"guitar.*becomes other tokens"):
        verify_bundle(path)


def golden_text(**change: Any) -> dict[str, Any]:
    row = {"text": "a", "prompt": None, "ids": [2, 3], "pooled": [0] * 12, "vector": [0] * 12}
    return row | change


LOOSE = {"metric": "min_cosine", "limit": 0.95, "reason": ""}


def order(**change: Any) -> dict[str, Any]:
    return {
        "documents": ["a", "b", "c"],
        "queries": ["a"],
        "document_prompt": None,
        "query_prompt": None,
        "similarity": [[1, 0.5, 0]],
        "nearest": [[0, 1, 2]],
    } | change


@pytest.mark.parametrize(
    "change",
    [
        {"texts": []},
        {"texts": [{}]},
        {"texts": 5},
        {"tolerance": {}},
        {"tolerance": {"metric": "hash", "limit": 1, "reason": ""}},
        {"tolerance": {"metric": "min_equal_bits", "limit": 0.9, "reason": ""}},
        {"tolerance": {"metric": "min_cosine", "limit": 0.8, "reason": ""}},
        {"tolerance": {"metric": "min_cosine", "limit": -1, "reason": ""}},
        {"tolerance": {"metric": "min_cosine", "limit": 2, "reason": ""}},
        {"tolerance": {"metric": "min_cosine", "limit": True, "reason": ""}},
        {"tolerance": {"metric": "min_cosine", "limit": 0.99, "reason": ["x" * 10**6]}},
        {"texts": [golden_text(prompt="answer")]},
        {"texts": [golden_text(prompt=5)]},
        {"texts": [golden_text(ids=[1] * 17)]},
        {"texts": [golden_text(ids=[-1])]},
        {"texts": [golden_text(ids=[10**400])]},
        {"texts": [golden_text(vector=[0] * 11)]},
        {"texts": [golden_text(vector=["0"] * 12)]},
        {"texts": [golden_text(vector=[0.5] * 12)]},
        {"texts": [golden_text(vector=[300] * 12)]},
        {"texts": [golden_text(pooled=[0] * 11)]},
        {"order": order(documents=["a"])},
        {"order": order(query_prompt="answer")},
        {"order": order(nearest=[[0, 1, 3]])},
        {"order": order(nearest=[[0, 1]])},
        {"order": order(similarity=[[0, 1]])},
        {"order": order(similarity=[[0, 1, 400]])},
        {"order": order(nearest=[[0, 0, 0]])},
        {"order": order(nearest=[[2, 1, 0]])},
        {"order": order(similarity=[[-1, -0.5, 0]])},
        {"spread": {"engine": "x", "batch": 1, "rounding": 2}},
        {"spread": {"engine": "x", "batch": -0.1, "rounding": 1}},
        {"spread": {"engine": "x", "batch": 1, "rounding": 1}, "tolerance": LOOSE},
        {"texts": [golden_text(pooled=None)]},
        {"texts": [golden_text(pooled=[0.5] * 12)]},
        {"texts": [golden_text(vector=None)]},
        {"texts": [golden_text(text="\ud800")]},
    ],
    ids=lambda change: str(change)[:60],
)
def test_a_damaged_golden_file_is_one_sentence(
    packed: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    files = open_bundle(packed)
    stored = json.loads(files[GOLDEN])
    if change.get("texts") not in ([], 5, None):  # beside those that are needed
        change = {"texts": stored["texts"] + change["texts"]}
    content = json.dumps(stored | change).encode()
    with pytest.raises(BundleError, match=r"golden\.json") as refused:
        verify_bundle(repacked(tmp_path / "a.m2d", files | {GOLDEN: content}))
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(("isa", "told"), [("portable", False), ("vnni", True)])
def test_the_reason_of_a_limit_says_what_the_processor_changes(
    tmp_path: Path, isa: str, told: bool
) -> None:
    spec = replace(tiny_spec(weights="int8"), isa=isa)
    write_bundle(tiny_artifact(tmp_path / "a", spec), tmp_path / "a.m2d")
    reason = verify_bundle(tmp_path / "a.m2d").reason
    assert ("vnni" in reason) == told
    assert "saturate" not in reason


def test_nan_does_not_pass_any_tolerance() -> None:
    for metric in (MIN_COSINE, MIN_EQUAL_BITS):
        assert not Tolerance(metric, 0.5, "").holds(float("nan"))


def test_nothing_is_written_over_or_from_half_an_artifact(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already exists"):
        write_bundle(packed.parent / "artifact", packed)
    broken = shutil.copytree(packed.parent / "artifact", tmp_path / "broken")
    (broken / "ranges.json").unlink()
    with pytest.raises(UsageError, match=r"has no ranges\.json"):
        write_bundle(relisted(broken), tmp_path / "a.m2d")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_an_artifact_whose_files_do_not_belong_together_is_not_bundled(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "artifact")
    spec = spec_from_json((artifact / SPEC).read_text(), "")
    (artifact / SPEC).write_text(replace(spec, layers=2).to_json())
    with pytest.raises(BundleError, match="its content makes"):
        write_bundle(relisted(artifact), tmp_path / "a.m2d")
    assert not (tmp_path / "a.m2d").exists()


def test_verify_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        verify_bundle(tmp_path / "none.m2d")


def test_long_golden_texts_are_only_tokenized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "RUN_TOKENS", 15)
    write_bundle(tiny_artifact(tmp_path / "artifact"), tmp_path / "a.m2d")
    files = open_bundle(tmp_path / "a.m2d")
    rows = golden.golden_from_json(files[GOLDEN], spec_from_json(files[SPEC], "")).texts
    assert {row.vector is None for row in rows if len(row.ids) == 16} == {True}
    assert {row.vector is None for row in rows if len(row.ids) < 16} == {False}


def test_files_too_large_for_an_archive_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "_LIMIT", 1 << 17)
    with pytest.raises(Exception, match="choose a smaller cell"):
        write_archive(tmp_path / "a", {"a": bytes(1 << 17)})


def test_a_bundle_is_measured_with_one_thread_on_any_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes would follow the number of cores, else; it is verified with all of them."""
    threads, original = [], engine.load

    def spy(files: Any, device: Device, isa: Any) -> Any:
        threads.append(device.threads)
        return original(files, device, isa)

    monkeypatch.setattr(engine, "load", spy)
    write_bundle(tiny_artifact(tmp_path / "artifact"), tmp_path / "a.m2d")
    assert (set(threads[:-1]), threads[-1]) == ({1}, None)


@pytest.mark.parametrize(
    "command",
    [("verify", "--key", "key.pub"), ("verify", "--cell", "x"), ("encode", "--within-ms", 5)],
)
def test_an_option_of_bundles_is_refused_for_a_folder(
    command: tuple[object, ...], tmp_path: Path
) -> None:
    folder = tiny_artifact(tmp_path / "a")
    said = m2d(command[0], folder, *command[1:])
    assert said.exit_code == 2
    assert f"{command[1]} needs a bundle, and {folder} is a folder" in said.stderr
