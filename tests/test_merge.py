"""One profile from several: shards, other targets, results from devices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from command_line import m2d
from tiny_profile import TIMED, cell, profile, target

from m2dexport.errors import UsageError
from m2dexport.profile.joining import rejudged
from m2dexport.profile.manifest import read_profile, write_profile
from m2dexport.profile.merge import merge_files
from m2dexport.profile.schema import Cell, Profile

QUALITY = {(6, "fp32"): 80.0, (6, "int8"): 79.5, (2, "fp32"): 70.0, (2, "int8"): 69.0}


def grid(*weights: str) -> list[Cell]:
    """Return the cells of these weights, which are the smaller the fewer bits they have."""
    return [
        cell(n, weights=w, quality=QUALITY[n, w], size_bytes=n * (2 if w == "fp32" else 1) * 10**6)
        for n in (6, 2)
        for w in weights
    ]


def whole(*cells: Cell, **values: Any) -> Profile:
    return rejudged(profile(*cells, **values), ["local"])


def shards(**second: Any) -> list[Profile]:
    """Return the two shards of a sweep of fp32 and int8; each measured the reference."""
    spare = cell(6, quality=80.0, size_bytes=12 * 10**6, p50_ms=1.5, flags=("reference",))
    values = {"targets": [target(spare, "local")], "created": "2026-01-02T00:00:00+00:00"}
    return [
        whole(*grid("fp32"), shard="1/2"),
        whole(spare, *grid("int8"), **{"shard": "2/2", **values, **second}),
    ]


def written(folder: Path, profiles: Sequence[Profile]) -> list[Path]:
    paths = [folder / f"{number}.json" for number in range(1, len(profiles) + 1)]
    for path, each in zip(paths, profiles, strict=True):
        write_profile(each, path, force=True)
    return paths


def test_shards_in_any_order_become_the_sweep_that_was_not_split(tmp_path: Path) -> None:
    expected = whole(*grid("fp32", "int8"))
    for paths in permutations(written(tmp_path, shards())):
        merged = merge_files(paths)
        assert merged.shard is None
        assert merged.cells == expected.cells
        assert merged.targets == expected.targets
        assert merged.created == "2026-01-02T00:00:00+00:00"
        assert merged.seconds == {"export": 2.0}
    assert "reference" not in merged.reference_cell().flags


def test_a_reference_that_no_shard_has_in_its_grid_stays_one_for_comparison(tmp_path) -> None:
    spare = cell(6, quality=80.0, flags=("reference",))
    small = [cell(2, weights=w, quality=70.0) for w in ("fp16", "int8")]
    parts = [whole(spare, each, shard=f"{i}/2") for i, each in enumerate(small, start=1)]
    merged = merge_files(written(tmp_path, parts))
    assert [each.id for each in merged.cells if "reference" in each.flags] == [spare.id]
    assert len(merged.cells) == 3


def elsewhere(**machine: Any) -> dict[str, Any]:
    there = target(cell(6), "local")
    return {"targets": [{**there, "machine": {**there["machine"], **machine}}]}


def budgeted(**limits: float) -> dict[str, Any]:
    return {"targets": [target(cell(6), "local", budget={**limits, "metric": "mean"})]}


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        (shards()[:1], "of the 2 shards, 2/2 is missing"),
        ([shards()[0]] * 2, "1.json and .*2.json are both the shard 1/2"),
        (shards(shard="2/3"), "sweeps in 2 and 3 parts"),
        (shards(tools={"m2dexport": "9"}), "measured by m2dexport 0.1.0 and 9"),
        (shards(tools={"m2dexport": "0.1.0", "onnxruntime": "2"}), "by onnxruntime none and 2"),
        (shards(**elsewhere(cpu="another")), r"local on two machines \(a processor, 2 cores; ano"),
        (
            shards(**budgeted(p50_ms=5.0)),
            "the target local at different shapes, .*budgets; measure",
        ),
        (shards(decided_by="1" * 64), "1.json and .*2.json are shards of different sweeps: their"),
        (
            [shards()[0], whole(cell(6, quality=30.0, flags=("reference",)), shard="2/2")],
            "1.json and .*2.json have a reference cell of 80.00 and of 30.00 points for the target",
        ),
    ],
    ids=[
        *("missing", "twice", "of another split", "another version", "another tool"),
        *("another machine", "another budget", "another sweep", "another reference"),
    ],
)
def test_shards_that_are_no_whole_are_refused(tmp_path: Path, profiles, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merge_files(written(tmp_path, profiles))


def on_edge(**values: Any) -> Profile:
    cells = [each.model_copy(update={"target": "edge"}) for each in grid("int8")]
    return profile(*cells, **{"targets": [target(cells[0], "edge")], **values})


def test_targets_of_other_names_stand_beside_each_other(tmp_path: Path) -> None:
    here = whole(*grid("fp32"))
    merged = merge_files(written(tmp_path, [here, on_edge()]))
    assert merged.of_target("local") == here.cells
    assert merged.of_target("edge") == on_edge().cells
    assert merged.target("edge") == on_edge().target("edge")
    assert merged.decided_by not in (here.decided_by, on_edge().decided_by)


def changed(measured: Profile, part: str, **values: Any) -> Profile:
    if part == "tasks":
        task = measured.tasks[0].model_copy(update=values)
        name = f"{task.name}/{task.main_metric}"
        cells = tuple(
            each.model_copy(update={"quality": {name: each.mean_quality}, "replicates": {}})
            for each in measured.cells
        )
        return measured.model_copy(update={"tasks": (task,), "cells": cells})
    return measured.model_copy(update={"checkpoint": measured.checkpoint.model_copy(update=values)})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            whole(*grid("fp32"), **elsewhere(cpu="another")),
            r"1.json and .*2.json both have the target local, of two machines \(a processor, 2 cor",
        ),
        (whole(*grid("int8")), "both have the target local; profile one of them"),
        (changed(on_edge(), "tasks", sha256="1" * 64), "have a task sts each, of different conten"),
        (changed(on_edge(), "tasks", name="more"), "have different tasks, sts/spearman and more/s"),
        (changed(on_edge(), "checkpoint", sha256="1" * 64), "1.json and .*2.json are of different"),
        (
            changed(on_edge(), "checkpoint", model_sha256="1" * 64),
            "of the same weights with another",
        ),
        (on_edge(calibration_sha256="1" * 64), "calibrated or aligned with different texts"),
    ],
    ids=[
        "two machines",
        "one target twice",
        "task",
        "tasks",
        "checkpoint",
        "pooling",
        "calibration",
    ],
)
def test_what_does_not_go_together_is_refused_by_its_files(tmp_path, other, message) -> None:
    with pytest.raises(UsageError, match=message):
        merge_files(written(tmp_path, [whole(*grid("fp32")), other]))


def result(layers: int = 2, weights: str = "int8", p50_ms: float = 9.0, **values: Any) -> Any:
    """Return what ``bench --json`` prints of a bundle."""
    timed = {**TIMED, "p50_ms": p50_ms, "p50_interval": {"low": p50_ms, "high": p50_ms}}
    machine = {**target(cell(6), "x")["machine"], "cpu": "a small processor"}
    return {
        "format": 1,
        "kind": "bench",
        "name": "pi5",
        "created": "2026-01-01T00:00:00+00:00",
        "bundle": {"path": "edge.m2d", "sha256": "1" * 64, "size_bytes": 9},
        "cell": {
            **{"layers": layers, "dim": 64, "align": "none", "weights": weights},
            **{"vectors": "float32", "engine": "onnx", "isa": "portable"},
            "device": {
                "provider": "CPUExecutionProvider",
                "threads": 4,
                "spin_us": 0,
                "workers": 1,
            },
            "checkpoint_sha256": "0" * 64,
            "full_model_sha256": None,
            "size_bytes": 7_000_000,
            "size_parts": {"embeddings": 1, "layers": 2, "tokenizer": 3, "other": 4},
            "bytes_per_vector": 256,
        },
        "machine": machine,
        "versions": {"m2dexport": "0.1.0"},
        "shapes": [{"batch": 1, "sequence": 16}],
        "asked": [{"batch": 1, "sequence": 16}],
        "latency": [{**timed, "p95_ms": 12.0}],
        "tokenization": [],
        "text_p50_ms": 9.5,
        **{"load_ms": 200.0, "first_ms": 20.0},
        **{"peak_memory_bytes": 50_000_000, "used_memory_bytes": 60_000_000},
        "noise": None,
        **values,
    }


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a profile and the results of two bundles on a device."""
    monkeypatch.chdir(tmp_path)
    write_profile(whole(*grid("fp32", "int8")), "profile.json")
    Path("large.json").write_text(json.dumps(result(6, p50_ms=27.0)))
    Path("small.json").write_text(json.dumps(result(2)))
    return tmp_path


def test_results_from_a_device_answer_select_for_it(device: Path) -> None:
    files = ["profile.json", "small.json", "large.json", "--name", "pi", "--out", "all.json"]
    done = m2d("profile", "merge", *files)
    assert done.exit_code == 0, done.output
    assert done.stdout == "all.json: 6 cells, 4 of local, 2 of pi\n"
    assert "already exists" in m2d("profile", "merge", *files).stderr
    merged = read_profile("all.json")
    pi = merged.target("pi")
    small, large = (merged.cell(f"{n}x64-int8-float32", "pi") for n in (2, 6))
    assert (pi.machine.cpu, pi.reference) == ("a small processor", large.id)
    assert (small.p50_ms, small.size_bytes, small.device.threads) == (9.0, 7_000_000, 4)
    assert small.ratio == pytest.approx(1 / 3)
    assert small.mean_quality == merged.cell(small.id, "local").mean_quality
    assert small.replicates == merged.cell(small.id, "local").replicates
    chosen = m2d("select", "all.json", "--target", "pi", "--p50-ms", 10, "--json")
    assert chosen.exit_code == 0, chosen.output
    assert json.loads(chosen.stdout)["cell"]["id"] == small.id
    assert m2d("select", "all.json", "--target", "pi", "--p50-ms", 5).exit_code == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "result of bench in format 2, and this version reads format 1"),
        ({"load_ms": "fast"}, "is not a result of bench: load_ms"),
        (
            {"name": "local"},
            "target local, which the profile has already; merge all results of one",
        ),
        ({"machine": target(cell(6), "x")["machine"]}, "measured the target pi5 on two machines"),
        ({"cell": {**result()["cell"], "checkpoint_sha256": "2" * 64}}, "of another checkpoint"),
        (
            {"cell": {**result()["cell"], "checkpoint_sha256": None}},
            "does not say which checkpoint",
        ),
        ({"latency": [{**TIMED, "sequence": 512}]}, "has latency of other shapes than it names"),
        ({"cell": {**result()["cell"], "dim": 32}}, "2x32-int8-float32 of isa=portable, and the p"),
        ({"cell": result(6)["cell"]}, "6x64-int8-float32, which another file has for pi5"),
    ],
    ids=[
        *("format", "value", "name", "machine", "checkpoint", "no checkpoint", "shapes"),
        *("cell", "twice"),
    ],
)
def test_a_result_that_does_not_fit_is_refused_by_its_file(device, change, message) -> None:
    Path("small.json").write_text(json.dumps(result(**change)))
    with pytest.raises(UsageError, match=message) as refused:
        merge_files(["profile.json", "large.json", "small.json"])
    assert "small.json" in str(refused.value)


def test_results_without_a_profile_and_a_name_without_results_are_refused(device: Path) -> None:
    with pytest.raises(UsageError, match="no profile is among the files"):
        merge_files(["small.json"])
    with pytest.raises(UsageError, match="there are none"):
        merge_files(["profile.json"], "pi")
