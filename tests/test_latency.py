"""Timing machinery: what is recorded, never how fast."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from tiny_artifact import tiny_artifact, tiny_spec

from m2dexport.cores import usable_cores
from m2dexport.engines import Device
from m2dexport.errors import M2DError
from m2dexport.measure.footprint import measure_footprint
from m2dexport.measure.latency import Candidate, Conditions, measure_latency

CONDITIONS = Conditions(vocab_size=20, repeats=5)


def _candidate(folder: Path) -> Candidate:
    return _of(folder / "model.onnx")


def _of(graph: Path) -> Candidate:
    return Candidate({"model.onnx": graph}, "portable", "onnx", Device(threads=1))


def test_every_candidate_is_timed_at_every_shape(tmp_path: Path) -> None:
    graphs = {
        name: _candidate(tiny_artifact(tmp_path / name, tiny_spec(dim=dim)))
        for name, dim in (("a", 8), ("b", 12))
    }
    points = measure_latency(graphs, [(1, 4), (3, 7)], CONDITIONS, "b")
    assert set(points) == {"a", "b"}
    for measured in points.values():
        assert [(p.batch, p.sequence, p.runs) for p in measured] == [(1, 4, 5), (3, 7, 5)]
        assert all(0 < p.p50_ms <= p.p95_ms for p in measured)


def test_memory_is_that_of_a_process_without_torch_at_the_shape_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = _candidate(tiny_artifact(tmp_path / "a"))
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    one, many = (
        measure_footprint(graph, [(1, 4), shape], CONDITIONS) for shape in ((1, 4), (256, 4096))
    )
    tokens_as_int64 = 2 * 256 * 4096 * 8  # ids and mask
    assert many.peak_memory_bytes > one.peak_memory_bytes + tokens_as_int64
    assert one.load_ms > 0
    for footprint in (one, many):
        assert footprint.used_memory_bytes >= footprint.peak_memory_bytes


def test_a_process_that_fails_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(M2DError, match=r"memory of .*broken\.onnx failed"):
        measure_footprint(_of(tmp_path / "broken.onnx"), [(1, 4)], CONDITIONS)


@pytest.mark.skipif(sys.platform != "linux", reason="affinity masks are Linux's")
def test_never_more_threads_than_the_affinity_mask_allows() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
