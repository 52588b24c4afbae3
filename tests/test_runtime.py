"""Runtime: order, batches, prompts, cut texts, threads, and what it does not import."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny_artifact import relisted, tiny_artifact, tiny_graph, tiny_ranges, tiny_spec

from m2dexport.engines import Device
from m2dexport.engines.onnxruntime import run as engine
from m2dexport.errors import M2DError, UsageError
from m2dexport.runtime import artifact
from m2dexport.runtime.bundle import write_bundle
from m2dexport.runtime.encoder import Encoder
from m2dexport.runtime.loading import load

TEXTS = ["a guitar", "", "a much longer text than the others", "今日", "b", "find a guitar"]


def loaded(folder: Path, **options: object) -> Encoder:
    return load(tiny_artifact(folder / "artifact", tiny_spec(**options)), Device(threads=1))  # type: ignore[arg-type]


def batch_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Record the shape of every batch that is run from now on."""
    shapes: list[tuple[int, ...]] = []
    original = engine.run

    def spy(session: object, ids: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
        shapes.append(ids.shape)
        return original(session, ids, mask)

    monkeypatch.setattr(engine, "run", spy)
    return shapes


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_vectors_come_in_the_order_of_the_texts(tmp_path: Path, batch_size: int) -> None:
    encoder = loaded(tmp_path)
    expected = np.concatenate([encoder.encode([text]) for text in TEXTS])
    found = encoder.encode(TEXTS, batch_size=batch_size)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_texts_run_one_at_a_time_when_vectors_depend_on_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = loaded(tmp_path, batch_invariant=False)
    shapes = batch_shapes(monkeypatch)
    encoder.encode(TEXTS, batch_size=32)
    assert [shape[0] for shape in shapes] == [1] * len(TEXTS)
    assert sorted(shape[1] for shape in shapes) == sorted(map(len, encoder.tokenize(TEXTS)))


def test_batches_hold_texts_of_similar_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = loaded(tmp_path)
    shapes = batch_shapes(monkeypatch)
    encoder.encode(["a"] * 3 + ["a a a a a a"] * 3, batch_size=3)
    assert shapes == [(3, 8), (3, 3)]


def test_a_prompt_is_put_in_front_of_each_text(tmp_path: Path) -> None:
    encoder = loaded(tmp_path)
    by_hand = encoder.encode(["find: " + text for text in TEXTS])
    np.testing.assert_array_equal(encoder.encode(TEXTS, prompt="query"), by_hand)
    np.testing.assert_array_equal(encoder.encode(TEXTS, prompt="document"), encoder.encode(TEXTS))


def test_the_default_prompt_is_used_unless_another_or_none_is_asked_for(tmp_path: Path) -> None:
    encoder = loaded(tmp_path, default_prompt="query")
    ids = encoder.tokenize(["find: a", "a"], prompt="")
    assert encoder.tokenize(["a"]) == ids[:1]
    assert encoder.tokenize(["a"], prompt="document") == ids[1:]


def test_an_unknown_prompt_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no prompt named 'qeury'; it has: document, query"):
        loaded(tmp_path).encode(["a"], prompt="qeury")


def test_cut_texts_are_counted(tmp_path: Path) -> None:
    encoder = loaded(tmp_path, max_length=8)
    report = encoder.encode_report(["a " * 6, "a " * 7, "a " * 1000, ""])
    assert report.truncated == 2
    assert report.space_id == encoder.spec.space_id
    assert max(map(len, encoder.tokenize(["a " * 1000]))) == 8


@pytest.mark.parametrize(
    ("vectors", "dtype", "width"),
    [
        ("float32", np.float32, 12),
        ("int8", np.int8, 12),
        ("int8-symmetric", np.int8, 12),
        ("int4", np.uint8, 6),
        ("ubinary", np.uint8, 2),
        ("binary", np.int8, 2),
    ],
)
def test_no_texts_give_no_rows_of_the_right_kind(
    tmp_path: Path, vectors: str, dtype: type, width: int
) -> None:
    encoder = loaded(tmp_path, vectors=vectors)
    for texts, rows in (([], 0), (["a"], 1)):
        found = encoder.encode(texts)
        assert (found.shape, found.dtype) == ((rows, width), dtype)


def test_one_string_is_refused_rather_than_read_as_letters(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="list of strings"):
        loaded(tmp_path).encode("abc")


def test_threads_share_an_encoder(tmp_path: Path) -> None:
    encoder = loaded(tmp_path)
    jobs = [[f"{text} {n}" for text in TEXTS] for n in range(32)]
    expected = [encoder.encode(job) for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(encoder.encode, jobs))
    np.testing.assert_array_equal(np.array(found), np.array(expected))


def test_a_bundle_encodes_as_its_artifact_does(tmp_path: Path) -> None:
    folder = tiny_artifact(tmp_path / "artifact")
    write_bundle(folder, tmp_path / "edge.m2d")
    bundle = load(str(tmp_path / "edge.m2d"), Device(threads=1))
    assert bundle.spec == load(folder, Device(threads=1)).spec
    np.testing.assert_array_equal(
        bundle.encode(TEXTS), load(folder, Device(threads=1)).encode(TEXTS)
    )


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.m2d does not exist"):
        load(tmp_path / "none.m2d")


def test_a_damaged_tokenizer_or_graph_is_one_sentence(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "model.onnx"):
        folder = tiny_artifact(tmp_path / name)
        (folder / name).write_bytes(b"{}")
        relisted(folder)
        with pytest.raises(M2DError, match=r"cannot be (used|read)") as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def test_nan_and_infinite_vectors_are_refused(tmp_path: Path) -> None:
    for value in (np.nan, np.inf):
        folder = tiny_artifact(tmp_path / str(value))
        graph = onnx.load(folder / "model.onnx")
        (table,) = (t for t in graph.graph.initializer if t.name == "table")
        broken = np.full_like(numpy_helper.to_array(table), value)
        table.raw_data = broken.tobytes()
        onnx.save(graph, folder / "model.onnx")
        relisted(folder)
        with pytest.raises(M2DError, match="returns vectors with NaN or infinite values"):
            load(folder).encode(["a"])


def test_a_graph_of_another_kind_of_vectors_is_refused(tmp_path: Path) -> None:
    folder = tiny_artifact(tmp_path / "artifact")
    (folder / "model.onnx").write_bytes(tiny_graph(12, "int8", tiny_ranges(12)))
    relisted(folder)
    with pytest.raises(M2DError, match=r"int8 of shape .* where vectors=float32 of 12 dims are"):
        load(folder).encode(["a"])


def small_table(folder: Path) -> Path:
    """An artifact whose table lacks the rows of the last tokens, "find" and "guitar"."""
    graph = onnx.load(folder / "model.onnx")
    (table,) = (t for t in graph.graph.initializer if t.name == "table")
    rows = numpy_helper.to_array(table)[:-2]
    table.CopyFrom(numpy_helper.from_array(rows, "table"))
    onnx.save(graph, folder / "model.onnx")
    return relisted(folder)


def test_a_text_with_a_token_beyond_the_table_has_no_vector(tmp_path: Path) -> None:
    whole = tiny_artifact(tmp_path / "whole")
    encoder = load(small_table(tiny_artifact(tmp_path / "small")))
    texts = ["a text", "a guitar", "another"]
    report = encoder.encode_report(texts)
    np.testing.assert_allclose(report.vectors[[0, 2]], load(whole).encode(texts)[[0, 2]], atol=1e-6)
    assert not report.vectors[1].any()
    assert list(report.failed) == [1]
    with pytest.raises(UsageError, match=r"text 1 has the token \d+, and the model's table has"):
        encoder.encode(texts)


def test_something_else_than_a_string_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="text 1 is None; pass strings"):
        loaded(tmp_path).encode(["a", None])  # type: ignore[list-item]
    with pytest.raises(M2DError, match="cannot tokenize a text"):
        loaded(tmp_path / "b").encode(["a", "\ud800"])


RUNTIME_ONLY = """
import socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("the runtime opened a socket")

socket.socket = socket.create_connection = socket.getaddrinfo = refuse
import m2dexport.runtime.loading, m2dexport.runtime.bundle, m2dexport.runtime.streams
from pathlib import Path
bundle = Path(sys.argv[1])
assert m2dexport.runtime.bundle.verify_bundle(bundle).texts > 0
assert m2dexport.runtime.loading.load(bundle).encode(["a"]).shape == (1, 12)
heavy = {"torch", "transformers", "pydantic", "sentence_transformers", "onnx", "huggingface_hub"}
print(sorted(heavy & set(sys.modules)))
"""


def test_the_runtime_imports_nothing_heavy_and_opens_no_socket(tmp_path: Path) -> None:
    write_bundle(tiny_artifact(tmp_path / "artifact"), tmp_path / "edge.m2d")
    done = subprocess.run(
        [sys.executable, "-c", RUNTIME_ONLY, str(tmp_path / "edge.m2d")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_loading_turns_telemetry_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(
        engine.ort, "disable_telemetry_events", lambda: called.append(1), raising=False
    )
    loaded(tmp_path)
    assert called


@pytest.mark.parametrize("limit", [1 << 28, 100], ids=["read", "by path"])
def test_the_graph_that_runs_is_the_one_that_was_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """A file that is replaced between the two is not run, whether it is read or too large to be."""
    folder = tiny_artifact(tmp_path / "artifact")
    expected = load(folder).encode(TEXTS)
    monkeypatch.setattr(artifact, "GRAPH_LIMIT", limit)
    original = engine.load

    def swap(*arguments: object) -> object:
        other = tmp_path / "other.onnx"
        other.write_bytes(tiny_graph(12, "float32", None, seed=1))
        other.replace(folder / "model.onnx")
        return original(*arguments)

    monkeypatch.setattr(engine, "load", swap)
    if limit == 100:
        with pytest.raises(M2DError, match="the graph changed while it was loaded"):
            load(folder)
    else:
        np.testing.assert_array_equal(load(folder).encode(TEXTS), expected)


def test_an_encoder_with_workers_serves_threads_and_processes_that_fork(tmp_path: Path) -> None:
    folder = tiny_artifact(tmp_path / "artifact")
    expected = load(folder, Device(threads=1)).encode(TEXTS * 20)
    encoder = load(folder, Device(threads=1, workers=2))
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(encoder.encode, [TEXTS * 20] * 8):
            np.testing.assert_allclose(found, expected, atol=1e-6)
    if hasattr(os, "fork"):
        child = os.fork()
        if child == 0:
            same = np.allclose(encoder.encode(TEXTS * 20), expected, atol=1e-6)
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_an_encoders_workers_share_a_short_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m2dexport.cores.usable_cores", lambda: 2)
    encoder = load(tiny_artifact(tmp_path / "artifact"), Device(threads=1, workers=2))
    together, run = threading.Barrier(2, timeout=20), encoder.run

    def waiting(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        together.wait()  # broken unless two batches are here at a time
        return run(ids, mask)

    monkeypatch.setattr(encoder, "run", waiting)
    assert len(encoder.encode(TEXTS[:2])) == 2


FORKED = """
import os
import sys
from m2dexport import Device, load

encoder = load(sys.argv[1], Device(threads=2))
expected = encoder.encode(["a", "guitar"] * 20)
child = os.fork()
same = (encoder.encode(["a", "guitar"] * 20) == expected).all()
if child == 0:
    sys.exit(not same)
sys.exit(os.waitpid(child, 0)[1] != 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_encodes_and_ends(tmp_path: Path) -> None:
    """Its end frees whatever it holds, which must not wait for threads that stayed behind."""
    folder = tiny_artifact(tmp_path / "artifact")
    subprocess.run([sys.executable, "-c", FORKED, str(folder)], check=True, timeout=60)
