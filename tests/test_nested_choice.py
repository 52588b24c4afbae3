"""A nested bundle on a device: which cell is taken, and cells in turn."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import m2d
from independent import read_independently
from nested_bundle import (
    DEEP,
    MIDDLE,
    SHALLOW,
    SHAPES,
    TEXTS,
    refused,
    succeeded,
)
from tiny_artifact import tiny_artifact, tiny_spec

from m2dexport.errors import UsageError
from m2dexport.runtime import nested as nested_module
from m2dexport.runtime.archive import open_bundle
from m2dexport.runtime.bundle import write_bundle
from m2dexport.runtime.index import read_index
from m2dexport.runtime.loading import load
from m2dexport.runtime.manifest import Figures
from m2dexport.runtime.nested import Nested
from m2dexport.runtime.packing import write_nested
from m2dexport.runtime.showing import show_bundle


class Log(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def log() -> Any:
    handler, logger = Log(), logging.getLogger("m2dexport")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def test_limits_choose_the_deepest_cell_within_them_and_the_log_says_why(
    packed: Path, log: Log
) -> None:
    sizes = {each.id: each.size_bytes / 1e6 for each in show_bundle(packed).cells}
    assert load(packed, budget_ms=9).spec.layers == 3
    assert load(packed, budget_ms=2.5).spec.layers == 2
    assert f"chose {MIDDLE}; no deeper cell is within the limits" in log.lines[-1]
    assert "2.00 ms for 1x16 tokens on a processor" in log.lines[-1]
    assert load(packed, max_mb=max(sizes.values())).spec.layers == 3
    assert load(packed, budget_ms=2.5, max_mb=sizes[SHALLOW]).spec.layers == 1
    with pytest.raises(UsageError, match=r"within 0.5 ms and 9 MB; the shallowest, 1x8-fp32-ub"):
        load(packed, budget_ms=0.5, max_mb=9)
    with pytest.raises(UsageError, match="leave one of them out"):
        load(packed, cell=DEEP, budget_ms=9)


def test_a_time_that_is_not_known_is_not_guessed(folders: dict[str, Path], tmp_path: Path) -> None:
    write_nested([folders[DEEP], folders[SHALLOW]], tmp_path / "a.m2d")
    with pytest.raises(UsageError, match=r"says no time of 3x12-fp32-int8.*--within-ms"):
        load(tmp_path / "a.m2d", budget_ms=5)
    assert load(tmp_path / "a.m2d", max_mb=5).spec.layers == 3
    with pytest.raises(UsageError, match="is one cell"):
        load(folders[DEEP], max_mb=5)
    write_bundle(folders[DEEP], tmp_path / "plain.m2d")
    with pytest.raises(UsageError, match="since it was packed from an artifact"):
        load(tmp_path / "plain.m2d", budget_ms=5)


def test_a_bundle_of_one_cell_keeps_what_a_profile_measured(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """It is read as any other of one cell: no message, and no difference, is about its id."""
    path, plain = tmp_path / "one.m2d", tmp_path / "plain.m2d"
    figures = Figures("tiny", "a processor", 1, 1, 16, 3.0, 6.0, 10**8, 80.0)
    assert write_nested([folders[DEEP]], path, {DEEP: figures}).cells == (DEEP,)
    write_bundle(folders[DEEP], plain)
    assert set(open_bundle(path)) == set(open_bundle(plain))
    assert load(path, budget_ms=4).spec.layers == 3
    with pytest.raises(UsageError, match=r"within 2 ms; the shallowest, .*3\.00 ms for 1x16"):
        load(path, budget_ms=2)
    assert "3.00 ms (median) for 1x16 tokens" in succeeded("bundle", "show", path)
    assert succeeded("verify", path) == succeeded("verify", plain).replace(str(plain), str(path))
    changed = m2d("bundle", "diff", plain, path).stdout.splitlines()
    assert "figures.p50_ms: none | 3.0" in changed
    assert all(line.startswith(("bytes: ", "figures.")) for line in changed)
    assert read_independently(path, TEXTS[0]).returncode == 0
    assert read_index(path).name == str(path)


def test_of_the_deepest_cells_the_first_that_is_named_is_the_default(
    tmp_path: Path, log: Log
) -> None:
    specs = [replace(tiny_spec(vectors=each), layers=3) for each in ("int8", "ubinary")]
    specs += [tiny_spec(dim=8)]
    artifacts = [tiny_artifact(tmp_path / each.vectors, each) for each in specs]
    ids = ["3x12-fp32-int8", "3x12-fp32-ubinary", "1x8-fp32-float32"]
    for first in (0, 1):
        order = [first, 1 - first, 2]
        path = tmp_path / f"{first}.m2d"
        named = [artifacts[each] for each in (2, first, 1 - first)]
        expected = [ids[each] for each in order]
        told = succeeded("bundle", *named, "--out", path).splitlines()[1]
        assert told == f"cells: {', '.join(expected)}; {ids[first]} is the default"
        assert load(path).spec.vectors == specs[first].vectors
        shown = json.loads(succeeded("bundle", "show", path, "--json"))
        assert [cell["id"] for cell in shown["cells"]] == expected
        chosen = m2d("encode", path, "--within-ms", 60_000, "--in", __file__)
        assert f"{ids[first]} is within 60000 ms, and no deeper cell is\n" in chosen.stderr
        swapped = [artifacts[each] for each in (first, 2, 1 - first)]
        succeeded("bundle", *swapped, "--out", tmp_path / "again.m2d", "--force")
        assert (tmp_path / "again.m2d").read_bytes() == path.read_bytes()


def test_cells_are_loaded_when_asked_for_and_share_a_tokenizer(packed: Path) -> None:
    nested = Nested(packed)
    assert nested.cells == tuple(SHAPES)
    shallow, deep = nested.cell(SHALLOW), nested.cell()
    assert nested.cell(SHALLOW) is shallow
    assert deep.spec.layers == 3
    assert shallow.tokenizer is deep.tokenizer
    nested.release(SHALLOW)
    assert nested.cell(SHALLOW) is not shallow
    with pytest.raises(UsageError, match="has no cell 'x'"):
        nested.cell("x")


def test_the_policy_takes_the_deepest_cell_within_a_time_limit_here(
    packed: Path, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    nested = Nested(packed)
    times = {3: 5.0, 2: 2.0, 1: 1.0}
    asked: list[tuple[int, tuple[int, int]]] = []

    def timed(encoder: Any, shape: tuple[int, int]) -> float:
        asked.append((encoder.spec.layers, shape))
        return times[encoder.spec.layers]

    monkeypatch.setattr(nested_module, "milliseconds", timed)
    assert nested.within(2.5, shape=(2, 8)).spec.layers == 2
    assert asked == [(3, (2, 8)), (2, (2, 8))]
    assert "chose 2x12-fp32-float32 takes 2.00 ms for 2x8 tokens, within 2.5 ms" in log.lines[-1]
    with pytest.raises(UsageError, match=r"no cell of .* runs within 0.5 ms here; 1x8-fp32-ubin"):
        nested.within(0.5)


def test_times_are_measured_at_any_shape(packed: Path) -> None:
    encoder = load(packed)
    for shape in ((1, 1), (3, 10**6)):
        assert nested_module.milliseconds(encoder, shape) > 0
    for shape in ((0, 4), (10**9, 1)):
        with pytest.raises(UsageError, match=f"{shape[0]}x{shape[1]} cannot be timed"):
            nested_module.milliseconds(encoder, shape)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_a_thread_it_lacks(packed: Path) -> None:
    nested = Nested(packed)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with nested._lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if not child:
        signal.alarm(10)
        nested.release(SHALLOW)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert status == 0


def test_encode_takes_a_cell_within_a_time_limit(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a guitar")
    result = m2d("encode", packed, "--within-ms", 60_000, "--in", tmp_path / "texts.txt")
    assert result.exit_code == 0
    chosen = f"{DEEP} is within 60000 ms, and no deeper cell is"
    assert f"{chosen}\n" in result.stderr
    kept = ("--in", tmp_path / "texts.txt", "--out", tmp_path / "vectors.npy")
    said = m2d("encode", packed, "--within-ms", 60_000, *kept).stderr.splitlines()
    again = f"another day may choose another cell, and space: --cell {DEEP} keeps both"
    assert said[0] == f"{packed}: {chosen}; {again}"
    assert "leave one of them out" in refused("encode", packed, "--within-ms", 1, "--cell", DEEP)
    with pytest.raises(UsageError, match="nan ms is no time limit"):
        Nested(packed).within(float("nan"))
