"""Timing machinery: what is recorded, never how fast."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from tiny_artifact import letter_tokenizer, tiny_artifact, tiny_spec

from m2dexport.cores import usable_cores
from m2dexport.engines import Device
from m2dexport.errors import M2DError
from m2dexport.measure.footprint import measure_footprint
from m2dexport.measure.latency import (
    Candidate,
    Conditions,
    Loaded,
    groups_of,
    measure_latency,
    time_shape,
)
from m2dexport.measure.quantiles import quantile_range, ratio_of, tail_comment
from m2dexport.measure.requests import requests_of, time_tokenization
from m2dexport.measure.size import size_parts
from m2dexport.profile import costs
from m2dexport.profile.cells import Graph
from m2dexport.profile.intervals import Interval
from m2dexport.profile.plan import Plan
from m2dexport.profile.schema import SharedLatency
from m2dexport.report.facts import samples_comment
from m2dexport.runtime.tokenizer import load_tokenizer

CONDITIONS = Conditions(vocab_size=20, repeats=5)
TEXTS = ("find a guitar", "the rain of 1998 in spain, and so on", "no")


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


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 600), st.sampled_from([0.5, 0.95]))
def test_an_interval_of_a_quantile_covers_it_19_times_in_20(count: int, share: float) -> None:
    """The confidence of two order statistics is a sum of binomial probabilities, here by scipy."""
    low, high = quantile_range(range(1, count + 1), share)
    below = binom(count, share)
    assert below.cdf(low - 1) <= 0.025 or low == 1
    assert below.sf(high - 1) <= 0.025 or high == count
    # Neither bound is further away than it must be.
    assert below.cdf(low) > 0.025
    assert below.sf(high - 2) > 0.025


def test_the_interval_of_a_median_of_100_is_that_of_the_tables() -> None:
    assert quantile_range(range(1, 101), 0.5) == (40, 61)


def test_a_ratio_is_of_rounds_in_which_both_ran() -> None:
    """A machine that is twice as slow for half of the rounds is so for both."""
    base = np.random.default_rng(0).normal(10, 0.1, 200) * np.repeat([1, 2], 100)
    ratio = ratio_of(base * 1.5, base)
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    other = ratio_of(np.random.default_rng(1).permutation(base), base)
    assert other.low < 1 < other.high


def test_a_p95_of_ten_times_the_p50_is_commented_on() -> None:
    assert tail_comment(1.0, 9.9) is None
    assert str(tail_comment(2.0, 24.0)).startswith("the p95 of 24.00 ms is 12 times the p50 of")


def _fake(*names: str) -> Loaded[str]:
    return Loaded(dict.fromkeys(names, lambda ids, mask: ids), {}, 0.0, names[0])


@pytest.mark.parametrize(
    ("repeats", "seconds", "first", "rounds"),
    [(7, 9.0, True, 7), (None, 1e-9, True, 100), (None, 1e-9, False, 30), (None, 1e9, False, 300)],
)
def test_rounds_are_as_asked_or_as_there_is_time_for(repeats, seconds, first, rounds) -> None:
    shares: list[float] = []
    conditions = Conditions(20, repeats, seconds)
    timed = time_shape(_fake("a", "b"), (1, 4), conditions, {} if first else None, shares.append)
    assert {point.runs for point in timed.points.values()} == {rounds}
    assert all((point.p99_ms is None) == (rounds < 300) for point in timed.points.values())
    assert len(timed.reference_ms) == rounds
    assert timed.points["a"].ratio is not None
    assert timed.points["a"].ratio.value == 1
    assert (shares[0], shares[-1]) == (0, 1)
    assert shares == sorted(shares)


def test_the_reference_is_in_every_group_of_graphs(tmp_path: Path, monkeypatch) -> None:
    graphs = {}
    for name in "abcd":
        (tmp_path / name).write_bytes(bytes(10))
        graphs[name] = _of(tmp_path / name)
    monkeypatch.setattr("m2dexport.measure.latency._GROUP_BYTES", 30)
    assert groups_of(graphs, "c") == [["c", "a", "b"], ["c", "d"]]
    assert groups_of(graphs, None) == [["a", "b", "c"], ["d"]]


def test_requests_are_real_texts_of_as_many_tokens_as_the_shape() -> None:
    tokenizer = load_tokenizer(letter_tokenizer(64))
    requests = requests_of(tokenizer, TEXTS, "find: ", (3, 24))
    words = set(" ".join(TEXTS).split())
    for number in range(8):
        ids, mask = requests.ids(number)
        assert ids.shape == (3, 24)
        assert mask.all()
        assert {word for text in requests.texts[number] for word in text.split()} <= words
    found = time_tokenization(requests)
    assert (found.batch, found.sequence) == (3, 24)
    assert 0 < found.p50_ms <= found.p95_ms


def test_from_text_to_vector_is_timed_in_the_same_rounds(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(letter_tokenizer(16))
    shapes = []
    group = Loaded({"a": lambda ids, mask: shapes.append(ids.shape)}, {}, 0.0, None)
    requests = {"a": requests_of(tokenizer, TEXTS, "", (2, 8))}
    timed = time_shape(group, (2, 8), Conditions(20, 9), requests)
    point = timed.points["a"]
    assert point.text_p50_ms is not None
    assert point.ratio is None
    assert point.runs == 9
    assert set(shapes) == {(2, 8)}


@pytest.mark.parametrize("vectors", ["float32", "int8", "ubinary"])
def test_the_parts_of_a_size_add_up_to_every_byte(tmp_path: Path, vectors) -> None:
    folder = tiny_artifact(tmp_path / "a", tiny_spec(vectors=vectors))
    graph = {"model.onnx": folder / "model.onnx"}
    parts = size_parts("onnx", graph, 1000, 50)
    whole = (folder / "model.onnx").stat().st_size
    assert sum(vars(parts).values()) == whole + 1050
    table = len(json.loads(letter_tokenizer(16))["model"]["vocab"]) * 16 * 4
    assert parts.embeddings == table
    assert parts.tokenizer == 1000
    assert parts.layers < 100  # axes of sums


def _kept(store: dict[str, str]) -> Callable[[str, Any, Callable[[], Any]], Any]:
    """Return what remembers parts as a file would: as JSON, by what they were measured on."""

    def remember(step: str, inputs: Any, measure: Callable[[], Any]) -> Any:
        key = json.dumps([step, inputs], sort_keys=True)
        if key not in store:
            store[key] = json.dumps(measure())
        return json.loads(store[key])

    return remember


def test_every_part_of_what_graphs_cost_is_measured_once(tmp_path: Path, monkeypatch) -> None:
    device = Device(spin_us=0)
    graphs = {
        Graph(n, "fp32"): replace(
            _candidate(tiny_artifact(tmp_path / f"{n}", tiny_spec(dim=4 * n))), device=device
        )
        for n in (1, 2)
    }
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    graphs[Graph(1, "int8")] = replace(_of(tmp_path / "broken.onnx"), device=device)
    samples = {"1x4-fp32-float32": costs.Sample(Graph(1, "fp32"), graphs[Graph(1, "fp32")])}
    texts = costs.Texts(TEXTS, "", letter_tokenizer(16), "")
    plan = Plan((1, 2), (4,), ("fp32", "int8"), shapes=((1, 8), (2, 4)), repeats=9)
    steps: list[tuple[str, int, int]] = []
    store: dict[str, str] = {}

    def measure() -> costs.Costs:
        step = lambda *said: steps.append(said)  # noqa: E731
        return costs.measure_costs(graphs, samples, texts, plan, 20, _kept(store), step)

    found = measure()
    assert set(found.latency) == set(found.footprints) == {Graph(1, "fp32"), Graph(2, "fp32")}
    assert set(found.failures) == {Graph(1, "int8")}
    assert [point.runs for point in found.latency[Graph(1, "fp32")]] == [9, 9]
    first, second = found.latency[Graph(2, "fp32")]  # the reference
    assert first.ratio is not None
    assert first.ratio.value == 1
    assert first.text_p50_ms is not None
    assert second.text_p50_ms is None
    assert [(each.batch, each.sequence) for each in found.tokenization] == [(1, 8), (2, 4)]
    (sample,) = found.samples
    assert sample.cell == "1x4-fp32-float32"
    ratio = sample.p50_ms / sample.shared_p50_ms
    assert sample.ratio_interval.low <= ratio <= sample.ratio_interval.high
    assert found.noise is not None
    assert {graph.device.threads for graph in found.graphs.values()} <= {1, usable_cores()}
    for step in ("settings", "latency", "memory"):
        said = [each[1:] for each in steps if each[0] == step]
        assert said == sorted(said)
        done, total = said[-1]
        assert done == total
    for name in ("time_shape", "measure_footprint", "choose_settings", "time_tokenization"):
        monkeypatch.setattr(costs, name, None)
    again = measure()
    assert replace(again, seconds=found.seconds) == found


@pytest.mark.parametrize(
    ("p50_ms", "shared_p50_ms", "low", "high", "told"),
    [
        (1.2, 1.0, 1.17, 1.25, True),
        (1.0, 1.2, 0.8, 0.87, True),
        (1.2, 1.0, 0.98, 1.41, False),  # it may be noise
        (1.04, 1.0, 1.03, 1.05, False),  # little
        (0.05, 0.04, 1.2, 1.3, False),  # ten microseconds
    ],
)
def test_a_sample_is_commented_on_if_it_surely_takes_longer_or_less_than_what_it_shares(
    p50_ms: float, shared_p50_ms: float, low: float, high: float, told: bool
) -> None:
    between = {"low": low, "high": high}
    sample = SharedLatency(
        cell="1x32-fp32-ubinary",
        p50_ms=p50_ms,
        shared_p50_ms=shared_p50_ms,
        ratio_interval=Interval.model_validate(between),
    )
    said = (
        f"1x32-fp32-ubinary has a p50 of {p50_ms:.2f} ms by itself, {p50_ms / shared_p50_ms:.2f} "
        f"times ({low:.2f} to {high:.2f}) that of what it shares its latency with, "
        f"{shared_p50_ms:.2f} ms: read the latencies of its depth with care."
    )
    assert samples_comment([sample]) == (said if told else None)


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
