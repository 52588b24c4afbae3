"""golden.json: its stages, what they may be off by, and what each way to miss them is called."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import m2d
from tiny_artifact import (
    GRAPH,
    VOCABULARY,
    relisted,
    tiny_artifact,
    tiny_graph,
    tiny_ranges,
    tiny_spec,
    unit_vectors,
)

from m2dexport.engines.numpy.table import table_bytes
from m2dexport.errors import DriftError
from m2dexport.files import SPEC
from m2dexport.runtime import golden, spread
from m2dexport.runtime.archive import GOLDEN, open_bundle, write_archive
from m2dexport.runtime.artifact import TOKENIZER, spec_from_json
from m2dexport.runtime.bundle import verify_bundle, write_bundle
from m2dexport.runtime.golden import GoldenFile
from m2dexport.runtime.golden_texts import DOCUMENTS, QUERIES
from m2dexport.runtime.loading import load
from m2dexport.runtime.manifest import MANIFEST, manifest_of
from m2dexport.vectors.codecs import encode_vectors

Files = dict[str, bytes]
CODES = ("int8", "int8-symmetric", "int4", "ubinary", "binary")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound bundle with int8 vectors; read only."""
    folder = tmp_path_factory.mktemp("packed")
    artifact = tiny_artifact(folder / "artifact", tiny_spec(vectors="int8"))
    return write_bundle(artifact, folder / "edge.m2d").path


def golden_of(path: Path) -> GoldenFile:
    files = open_bundle(path)
    return golden.golden_from_json(files[GOLDEN], spec_from_json(files[SPEC], path))


def changed(source: Path, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Write a bundle with another golden.json, which its manifest knows."""
    files = open_bundle(source)
    stored = json.loads(files[GOLDEN])
    change(stored)
    return repacked(path, files | {GOLDEN: json.dumps(stored).encode()})


def repacked(path: Path, files: Files) -> Path:
    others = {name: content for name, content in files.items() if name != MANIFEST}
    manifest = manifest_of(others, spec_from_json(others[SPEC], path), {}).to_json()
    write_archive(path, others | {MANIFEST: manifest})
    return path


def require_stages(path: Path) -> None:
    """Compare each stage of golden.json with the one before it."""
    encoder, stored = load(path), golden_of(path)
    spec = encoder.spec
    for row in stored.texts:
        assert encoder.tokenize([row.text], prompt=row.prompt) == [row.ids]
    pooled = np.array([row.pooled for row in stored.texts], dtype=np.float32)
    np.testing.assert_allclose(np.linalg.norm(pooled, axis=1), 1, atol=1e-5)
    codes = encode_vectors(pooled, spec.vectors, encoder.ranges, spec.bit_order)
    vectors = np.array([row.vector for row in stored.texts])
    assert np.mean(codes == vectors) > 0.995  # seven decimals are stored


@pytest.mark.parametrize("vectors", CODES)
def test_each_stage_follows_from_the_one_before(tmp_path: Path, vectors: Any) -> None:
    artifact = tiny_artifact(tmp_path / "a", tiny_spec(vectors=vectors))
    require_stages(write_bundle(artifact, tmp_path / "a.m2d").path)


def test_float_vectors_are_the_pooled_ones(tmp_path: Path) -> None:
    path = write_bundle(tiny_artifact(tmp_path / "a"), tmp_path / "a.m2d").path
    for row in golden_of(path).texts:
        assert row.pooled is None and row.vector is not None


def other_engine(folder: Path, engine: str, files: Files) -> Path:
    """Turn a tiny artifact into one of another engine."""
    spec = replace(spec_from_json((folder / SPEC).read_bytes(), folder), engine=engine)
    (folder / SPEC).write_text(replace(spec, min_engine="1").to_json())
    (folder / GRAPH).unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return relisted(folder)


def test_an_openvino_bundle_has_all_stages(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from m2dexport.engines.openvino.make import files_from_onnx

    folder = tiny_artifact(tmp_path / "a", tiny_spec(vectors="int8"))
    other_engine(folder, "openvino", files_from_onnx((folder / GRAPH).read_bytes()))
    path = write_bundle(folder, tmp_path / "a.m2d").path
    require_stages(path)
    assert golden_of(path).spread.rounding is not None


def test_a_static_bundle_has_all_stages(tmp_path: Path) -> None:
    folder = tiny_artifact(tmp_path / "a", tiny_spec(vectors="int4"))
    table = {"rows": unit_vectors(0, len(VOCABULARY), 12)}
    other_engine(folder, "static", {"table.safetensors": table_bytes(table)})
    path = write_bundle(folder, tmp_path / "a.m2d").path
    require_stages(path)
    assert golden_of(path).spread.rounding is not None


def test_the_golden_texts_are_those_that_ports_get_wrong(packed: Path) -> None:
    stored = golden_of(packed)
    for prompt in (None, "query", "document"):
        rows = [row for row in stored.texts if row.prompt == prompt]
        texts = "".join(row.text for row in rows)
        assert {"", " \t\n "} <= {row.text for row in rows}
        assert all(letter in texts for letter in "é😀日안ש م")
        assert [len(row.ids) for row in rows][-3:] == [16, 16, 15]
    assert (stored.order.query_prompt, stored.order.document_prompt) == ("query", "document")
    assert (stored.order.queries, stored.order.documents) == ([*QUERIES], [*DOCUMENTS])


def test_the_order_is_that_of_the_stored_similarities(packed: Path) -> None:
    order = golden_of(packed).order
    for similarity, nearest in zip(order.similarity, order.nearest, strict=True):
        assert sorted(similarity, reverse=True)[:3] == [similarity[row] for row in nearest]


def test_rounding_moves_no_constant_that_means_something_else(packed: Path) -> None:
    """Neither the ranges of the codec, nor single numbers, nor infinities."""
    files = open_bundle(packed)
    spec = spec_from_json(files[SPEC], packed)
    other = spread._rounded(spec, files, 1)
    assert other is not None and other[GRAPH] != files[GRAPH]
    before, after = (np.frombuffer(each[GRAPH], np.uint8) for each in (files, other))
    assert before.shape == after.shape
    encoder = load(repacked(packed.with_name("rounded.m2d"), other))
    np.testing.assert_array_equal(encoder.graph_ranges["range_low"], tiny_ranges(12).low)
    assert golden_of(packed).spread.rounding == pytest.approx(1, abs=1e-3)


def first_alone(stored: dict[str, Any]) -> None:
    del stored["texts"][1:]


def first_again(stored: dict[str, Any]) -> None:
    stored["texts"] = [stored["texts"][0]] * len(stored["texts"])


def without_a_prompt(stored: dict[str, Any]) -> None:
    stored["texts"] = [row for row in stored["texts"] if row["prompt"] != "query"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (first_alone, "1 different texts with the prompt None"),
        (first_again, "1 different texts with the prompt None"),
        (without_a_prompt, "0 different texts with the prompt 'query'"),
    ],
)
def test_golden_texts_that_were_cut_do_not_verify(
    packed: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], told: str
) -> None:
    said = m2d("verify", changed(packed, tmp_path / "a.m2d", change))
    assert said.exit_code == 4
    assert f"{told}, and at least 11 are needed" in said.stderr


@pytest.mark.parametrize("longest", [3, 4, 16])
def test_every_bundle_has_the_texts_that_are_needed(tmp_path: Path, longest: int) -> None:
    """Also where no text fits exactly."""
    for prompts in ({}, {"query": "find: "}):
        spec = tiny_spec(max_length=longest, prompts=prompts)
        folder = tiny_artifact(tmp_path / f"{len(prompts)}", spec)
        stored = golden_of(write_bundle(folder, tmp_path / f"{len(prompts)}.m2d").path)
        for name in (None, *prompts):
            texts = {row.text for row in stored.texts if row.prompt == name}
            assert len(texts) >= golden.MIN_TEXTS


def test_verify_names_the_first_stage_that_differs(packed: Path, tmp_path: Path) -> None:
    def other_tokens(stored: dict[str, Any]) -> None:
        stored["texts"][3]["ids"][1] += 1

    def other_order(stored: dict[str, Any]) -> None:
        similarity = stored["order"]["similarity"][0]
        similarity[:] = [-value for value in similarity]
        stored["order"]["nearest"][0] = sorted(range(12), key=lambda row: -similarity[row])[:3]

    for change, told in ((other_tokens, "becomes other tokens"), (other_order, "orders documents")):
        with pytest.raises(DriftError, match=told):
            verify_bundle(changed(packed, tmp_path / "a.m2d", change))
    for vectors, stage in (("int8", "code"), ("float32", "pooled vector")):
        spec = tiny_spec(vectors=vectors)
        source = write_bundle(tiny_artifact(tmp_path / vectors, spec), tmp_path / "b.m2d").path
        other = tiny_artifact(tmp_path / f"other {vectors}", spec, seed=1)
        files = open_bundle(source) | {GRAPH: (other / GRAPH).read_bytes()}
        with pytest.raises(DriftError, match=f"the {stage} differs; min_cosine is .* made by onnx"):
            verify_bundle(repacked(tmp_path / "c.m2d", files))
        source.unlink()


def test_documents_that_are_as_good_as_equal_may_swap(packed: Path, tmp_path: Path) -> None:
    stored = golden_of(packed)
    allowed = stored.tolerance.swap(12)

    def swap(gap: float) -> Callable[[dict[str, Any]], None]:
        """Two documents are the same, and the golden search found the later one first."""

        def change(stored: dict[str, Any]) -> None:
            order = stored["order"]
            same = order["nearest"][0][0]
            low, high = sorted((same, (same + 1) % 12))
            order["documents"][low] = order["documents"][high] = order["documents"][same]
            for similarity in order["similarity"]:
                similarity[low] = similarity[high] = similarity[same]
            order["similarity"][0][high] += gap
            order["nearest"] = [
                sorted(range(12), key=lambda row: -each[row])[:3] for each in order["similarity"]
            ]

        return change

    assert verify_bundle(changed(packed, tmp_path / "a.m2d", swap(allowed * 0.99)))
    with pytest.raises(DriftError, match="in place 1, less similar by"):
        verify_bundle(changed(packed, tmp_path / "b.m2d", swap(allowed * 1.01)))


def test_golden_similarities_are_those_of_the_vectors(packed: Path, tmp_path: Path) -> None:
    def flat(stored: dict[str, Any]) -> None:
        stored["order"]["similarity"] = [[0] * 12] * 4

    with pytest.raises(DriftError, match="whose similarity is off by"):
        verify_bundle(changed(packed, tmp_path / "a.m2d", flat))


def test_vectors_of_another_length_are_other_vectors(packed: Path, tmp_path: Path) -> None:
    path = write_bundle(tiny_artifact(tmp_path / "a"), tmp_path / "a.m2d").path

    def longer(stored: dict[str, Any]) -> None:
        for row in stored["texts"]:
            row["vector"] = [1.01 * value for value in row["vector"]]

    with pytest.raises(DriftError, match="min_cosine"):
        verify_bundle(changed(path, tmp_path / "b.m2d", longer))


def damaged(files: Files, path: Path) -> None:
    write_archive(path, files)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def foreign(files: Files, path: Path) -> None:
    """A graph with an operator that no build writes."""
    graph = files[GRAPH].replace(b"ReduceL2", b"ReduceL9")
    repacked(path, files | {GRAPH: graph})


def narrow(files: Files, path: Path) -> None:
    repacked(path, files | {GRAPH: tiny_graph(12, "ubinary", None)})


def unreadable_graph(files: Files, path: Path) -> None:
    """A node takes what no other gives."""
    repacked(path, files | {GRAPH: files[GRAPH].replace(b"kept", b"left", 1)})


def unreadable_tokenizer(files: Files, path: Path) -> None:
    stored = json.loads(files[TOKENIZER])
    stored["model"]["vocab"] = 5
    repacked(path, files | {TOKENIZER: json.dumps(stored).encode()})


def not_finite(files: Files, path: Path) -> None:
    """A table of depth 0 whose sums overflow."""
    table = {"rows": np.full((len(VOCABULARY), 12), np.finfo(np.float32).max)}
    spec = spec_from_json(files[SPEC], path)
    files = {**files, SPEC: replace(spec, engine="static").to_json().encode()}
    del files[GRAPH]
    repacked(path, files | {"table.safetensors": table_bytes(table)})


def with_words_for_format(files: Files, path: Path) -> None:
    manifest = json.loads(files[MANIFEST]) | {"format": "2"}
    write_archive(path, files | {MANIFEST: json.dumps(manifest).encode()})


def drifted(files: Files, path: Path) -> None:
    graph = tiny_graph(12, "int8", tiny_ranges(12), seed=1)
    repacked(path, files | {GRAPH: graph})


def newer(files: Files, path: Path) -> None:
    manifest = json.loads(files[MANIFEST]) | {"format": 1000}
    write_archive(path, files | {MANIFEST: json.dumps(manifest).encode()})


def newer_artifact(files: Files, path: Path) -> None:
    stored = json.loads(files[SPEC]) | {"format": 1000}
    files = files | {SPEC: json.dumps(stored).encode()}
    manifest = manifest_of(files, spec_from_json(open_bundle(path)[SPEC], path), {})
    write_archive(path, files | {MANIFEST: manifest.to_json()})


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (repacked, 0),
        (drifted, 3),
        (damaged, 4),
        (foreign, 4),
        (narrow, 4),
        (unreadable_graph, 4),
        (unreadable_tokenizer, 4),
        (not_finite, 3),
        (with_words_for_format, 4),
        (lambda files, path: path.write_text("none"), 4),
        (newer, 2),
        (newer_artifact, 2),
    ],
)
def test_an_exit_code_says_what_is_wrong(packed: Path, tmp_path: Path, change, code: int) -> None:
    path = shutil.copyfile(packed, tmp_path / "a.m2d")
    if change is repacked:
        change(path, open_bundle(packed))
    else:
        change(open_bundle(packed), path)
    ran = m2d("verify", path)
    assert ran.exit_code == code, ran.output
    assert len((ran.stdout + ran.stderr).splitlines()) == 1
    assert str(path) in ran.stdout + ran.stderr
    if code in (2, 4) and change is not narrow:  # which only a run shows
        assert m2d("encode", path, stdin="a\n").exit_code == code
