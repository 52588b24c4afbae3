"""Nested bundles: cells that are whole, share what they can, and take turns on a device."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import m2d
from independent import READER, read_independently
from tiny import tiny_checkpoint
from tiny_artifact import GRAPH, tiny_artifact, tiny_graph, tiny_spec

from m2dexport.build.source import Source, export_sources
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.engines import Compilation, engine_maker
from m2dexport.errors import BundleError, M2DError, UsageError
from m2dexport.files import SPEC
from m2dexport.quantize.activations import CalibrationTokens
from m2dexport.runtime import nested as nested_module
from m2dexport.runtime.archive import GOLDEN, POOL, open_bundle, write_archive
from m2dexport.runtime.artifact import TOKENIZER
from m2dexport.runtime.bundle import verify_bundle, write_bundle
from m2dexport.runtime.cells import open_cells
from m2dexport.runtime.index import read_index
from m2dexport.runtime.loading import load
from m2dexport.runtime.manifest import MANIFEST, Figures, file_entry
from m2dexport.runtime.nested import Nested
from m2dexport.runtime.packing import write_nested
from m2dexport.runtime.sharing import share
from m2dexport.runtime.showing import show_bundle

DEEP, MIDDLE, SHALLOW = "3x12-fp32-int8", "2x12-fp32-float32", "1x8-fp32-ubinary"
SHAPES: dict[str, tuple[int, int, Any]] = {
    DEEP: (3, 12, "int8"),
    MIDDLE: (2, 12, "float32"),
    SHALLOW: (1, 8, "ubinary"),
}
TEXTS = ["a guitar", "find 3 cafés", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """From the id of a cell to its artifact; read only."""
    root = tmp_path_factory.mktemp("artifacts")
    return {
        cell: tiny_artifact(
            root / cell, replace(tiny_spec(dim=dim, vectors=vectors), layers=layers)
        )
        for cell, (layers, dim, vectors) in SHAPES.items()
    }


@pytest.fixture(scope="module")
def packed(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of three cells with figures; read only."""
    out = tmp_path_factory.mktemp("packed") / "nested.m2d"
    figures = {
        cell: Figures("tiny", "a processor", 1, 1, 16, ms, 2 * ms, 10**8, 80 + ms)
        for cell, ms in ((DEEP, 3.0), (MIDDLE, 2.0), (SHALLOW, 1.0))
    }
    assert write_nested(list(folders.values()), out, figures).cells == (DEEP, MIDDLE, SHALLOW)
    return out


def succeeded(*arguments: object) -> str:
    result = m2d(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object, code: int = 2) -> str:
    """Return the one sentence with which a command failed."""
    result = m2d(*arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    (sentence,) = result.stderr.splitlines()
    return sentence


def test_every_cell_gives_the_vectors_of_its_artifact(
    packed: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[:2]))
    for cell, folder in folders.items():
        out = tmp_path / f"{cell}.npy"
        succeeded("encode", packed, "--cell", cell, "--in", tmp_path / "texts.txt", "--out", out)
        expected = load(folder).encode(TEXTS[:2])
        assert np.array_equal(np.load(out), expected)
        assert np.array_equal(load(packed, cell=cell).encode(TEXTS[:2]), expected)
    assert load(packed).spec.layers == 3


def test_verify_checks_every_cell_or_the_one_that_is_named(packed: Path) -> None:
    lines = succeeded("verify", packed).splitlines()
    assert [cell in line for cell, line in zip(SHAPES, lines, strict=True)] == [True] * 3
    (line,) = succeeded("verify", packed, "--cell", SHALLOW).splitlines()
    assert SHALLOW in line
    told = json.loads(succeeded("verify", packed, "--json"))
    assert [told["cell"], *(each["cell"] for each in told["others"])] == list(SHAPES)
    assert "Of a nested bundle: the cell.  [default: all]" in succeeded("verify", "--help")


def test_the_same_artifacts_in_any_order_give_the_same_bytes(
    packed: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    for name, paths in (("a", [*folders.values()]), ("b", [*folders.values()][::-1])):
        *_, said = succeeded("bundle", *paths, "--out", tmp_path / f"{name}.m2d").splitlines()
        assert said == (
            f"3 spaces: {DEEP} | {MIDDLE} | {SHALLOW}; an index of one space cannot be queried by "
            "the cells of another"
        )
    assert (tmp_path / "a.m2d").read_bytes() == (tmp_path / "b.m2d").read_bytes()
    for name in (SPEC, GRAPH, GOLDEN):  # what the default cell's own bundle has
        assert open_bundle(tmp_path / "a.m2d")[name] == open_bundle(packed)[name]


def test_an_unknown_cell_is_refused_with_those_there_are(
    packed: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    for command in ("encode", "verify", "bench"):
        told = refused(command, packed, "--cell", "5x8-fp32-int8")
        assert all(cell in told for cell in ("5x8-fp32-int8", *SHAPES))
    assert f"it has {DEEP}" in refused("encode", folders[DEEP], "--cell", SHALLOW)
    write_bundle(folders[DEEP], tmp_path / "plain.m2d")
    assert load(tmp_path / "plain.m2d", cell=DEEP).spec == load(folders[DEEP], cell=DEEP).spec
    with pytest.raises(UsageError, match=f"no cell '{SHALLOW}'; it has {DEEP}"):
        load(tmp_path / "plain.m2d", cell=SHALLOW)


def test_what_cannot_be_packed_together_is_refused(
    folders: dict[str, Path], packed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.m2d"
    told = refused("bundle", folders[DEEP], folders[DEEP], "--out", out)
    assert f"two of the artifacts are the cell {DEEP}" in told
    assert "is not an artifact folder" in refused("bundle", folders[DEEP], packed, "--out", out)
    told = refused("bundle", folders[DEEP], folders[SHALLOW], "--cell", DEEP, "--out", out)
    assert "--cell goes with a profile.json" in told
    assert not list(tmp_path.iterdir())


def test_an_index_of_a_nested_bundle_is_that_of_its_default_cell(packed: Path) -> None:
    index = read_index(packed)
    assert (index.spec.layers, index.name) == (3, f"{packed} ({DEEP})")


Manifest = dict[str, Any]


def with_manifest(packed: Path, path: Path, change: Callable[[Manifest], object]) -> Path:
    """Write a nested bundle whose manifest was changed."""
    files = open_bundle(packed)
    manifest = json.loads(files[MANIFEST])
    change(manifest)
    write_archive(path, files | {MANIFEST: json.dumps(manifest).encode()})
    return path


def file_of(manifest: Manifest, name: str = TOKENIZER) -> Any:
    return manifest["cells"][SHALLOW]["files"][name]


def beyond_the_end(manifest: Manifest) -> None:
    file_of(manifest)["spans"][0]["offset"] = 10**6


def of_no_entry(manifest: Manifest) -> None:
    file_of(manifest)["spans"][0]["entry"] = "../secret"


def of_the_manifest(manifest: Manifest) -> None:
    file_of(manifest)["spans"] = [{"entry": MANIFEST, "offset": 0, "size": 9}]


def of_another_size(manifest: Manifest) -> None:
    file_of(manifest)["size"] += 1


def endless(manifest: Manifest) -> None:
    file = file_of(manifest)
    file["spans"] *= 100
    file["size"] *= 100


def too_large(manifest: Manifest) -> None:
    file_of(manifest, GOLDEN)["size"] = (1 << 25) + 1


def empty_span(manifest: Manifest) -> None:
    file_of(manifest)["spans"].append({"entry": POOL, "offset": 0, "size": 0})


def with_a_file_more(manifest: Manifest) -> None:
    manifest["cells"][SHALLOW]["files"]["evil.py"] = file_of(manifest)


def without_default(manifest: Manifest) -> None:
    del manifest["cells"][DEEP]


def with_another_default(manifest: Manifest) -> None:
    manifest["default_cell"] = SHALLOW


def without_cells(manifest: Manifest) -> None:
    manifest |= {"cells": {}, "default_cell": None}


def without_the_default_named(manifest: Manifest) -> None:
    manifest["default_cell"] = None


def with_too_many_cells(manifest: Manifest) -> None:
    cells = manifest["cells"]
    cells |= {f"{number}x9-fp32-int8": cells[SHALLOW] for number in range(65 - len(cells))}


def with_a_cell_of_no_id(manifest: Manifest) -> None:
    manifest["cells"]["deep"] = manifest["cells"][SHALLOW]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (beyond_the_end, "takes .* bytes at 1,000,000 of '.*', which are not there"),
        (of_no_entry, "of '../secret', which are not there"),
        (of_the_manifest, "of 'manifest.json', which are not there"),
        (of_another_size, "is not as long as its parts"),
        (endless, "is larger than the bundle"),
        (too_large, r"1x8-fp32-ubinary: 'golden\.json' is larger than 33,554,432 bytes"),
        (empty_span, "takes 0 bytes"),
        (with_a_file_more, r"1x8-fp32-ubinary holds 'evil\.py', which does not belong"),
        (without_default, "lacks its default cell"),
        (with_another_default, "are not its entries"),
        (without_cells, "names no cells"),
        (without_the_default_named, "only together"),
        (with_a_cell_of_no_id, "a cell's id is needed"),
        (with_too_many_cells, "cells has 65 entries where 0 to 64 are needed"),
    ],
)
def test_cells_that_are_no_parts_of_the_bundle_are_refused(
    packed: Path, tmp_path: Path, change: Callable[[Manifest], object], told: str
) -> None:
    path = with_manifest(packed, tmp_path / "a.m2d", change)
    for reader in (open_cells, load, verify_bundle, Nested, show_bundle, read_index):
        with pytest.raises(BundleError, match=told) as error:
            reader(path)
        assert len(str(error.value)) < 400 + len(str(path))


def other_digest(manifest: Manifest) -> None:
    file_of(manifest)["sha256"] = "0" * 64


def without_golden(manifest: Manifest) -> None:
    del manifest["cells"][SHALLOW]["files"][GOLDEN]


def with_another_space(manifest: Manifest) -> None:
    manifest["cells"][SHALLOW]["space_id"] = manifest["space_id"]


def with_other_vectors(manifest: Manifest) -> None:
    manifest["cells"][SHALLOW]["vectors"]["dim"] = 9


def with_ids_swapped(manifest: Manifest) -> None:
    cells = manifest["cells"]
    cells[SHALLOW], cells[MIDDLE] = cells[MIDDLE], cells[SHALLOW]


def under_another_id(manifest: Manifest) -> None:
    manifest["cells"]["1x9-fp32-ubinary"] = manifest["cells"].pop(SHALLOW)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (other_digest, r"1x8-fp32-ubinary: tokenizer\.json does not match its sha256"),
        (without_golden, r"1x8-fp32-ubinary lacks 'golden\.json'"),
        (with_another_space, "1x8-fp32-ubinary: manifest.json and artifact.json disagree"),
        (with_other_vectors, "1x8-fp32-ubinary: .* disagree about its vectors"),
        (with_ids_swapped, "[12]x.*: .* disagree about its id"),
        (under_another_id, "1x9-fp32-ubinary: manifest.json and artifact.json disagree"),
    ],
)
def test_what_is_wrong_in_a_cell_that_is_not_the_default_is_found(
    packed: Path, tmp_path: Path, change: Callable[[Manifest], object], told: str
) -> None:
    path = with_manifest(packed, tmp_path / "a.m2d", change)
    with pytest.raises(BundleError, match=told):
        verify_bundle(path)
    assert verify_bundle(path, cell=DEEP).cell == DEEP
    shallowest = Nested(path).cells[-1]
    out = tmp_path / "out"
    for command in (
        ("encode", path, "--cell", shallowest, "--in", __file__),
        ("export", path, "--cell", shallowest, "--for", "onnx", "--out", out),
        ("bundle", "show", path),
    ):
        assert re.search(told, refused(*command, code=4))


def test_another_graph_with_matching_hashes_in_a_cell_does_not_verify(
    packed: Path, tmp_path: Path
) -> None:
    """The guards and golden texts of a cell are its own."""
    files = open_bundle(packed)
    for graph, told in (
        (tiny_graph(8, "ubinary", None, seed=1), "golden"),
        (b"?", "not an ONNX file"),
    ):
        pool = files[POOL] + graph
        manifest = json.loads(files[MANIFEST])
        span = {"entry": POOL, "offset": len(files[POOL]), "size": len(graph)}
        entry = file_entry(graph)
        file_of(manifest, GRAPH).update(sha256=entry.sha256, size=entry.size, spans=[span])
        manifest["files"][POOL] = vars(file_entry(pool))
        path = tmp_path / "a.m2d"
        write_archive(path, files | {POOL: pool, MANIFEST: json.dumps(manifest).encode()})
        with pytest.raises(M2DError, match=told):
            verify_bundle(path)
        assert load(path).spec.layers == 3


def test_no_byte_of_the_shared_entry_can_change_unnoticed(packed: Path, tmp_path: Path) -> None:
    sound = packed.read_bytes()
    start = sound.index(POOL.encode()) + len(POOL)
    path = tmp_path / "flipped.m2d"
    for position in random.Random(0).sample(
        range(start, start + len(open_bundle(packed)[POOL])), 50
    ):
        flipped = bytearray(sound)
        flipped[position] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(BundleError):
            open_cells(path)


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


def test_vectors_are_of_the_cell_that_wrote_them(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a guitar")
    for cell in (DEEP, SHALLOW):
        out = tmp_path / f"{cell}.npy"
        wrote = m2d("encode", packed, "--cell", cell, "--in", tmp_path / "texts.txt", "--out", out)
        assert wrote.exit_code == 0
        told = m2d("verify", packed, "--vectors", out).stdout.splitlines()[-1]
        assert told == f"{out}: 1 vectors of the space of {cell}"


def test_show_says_what_a_bundle_is(packed: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    told = json.loads(succeeded("bundle", "show", packed, "--json"))
    assert [cell["id"] for cell in told["cells"]] == list(SHAPES)
    assert told["cells"][0]["figures"]["p50_ms"] == 3.0
    owned = sum(cell["own_bytes"] for cell in told["cells"])
    assert 0 < owned < sum(told["files"].values())
    text = succeeded("bundle", "show", packed)
    assert "3 cells, 3x12-fp32-int8 by default" in text
    assert "quality 83.00" in text
    write_bundle(folders[DEEP], tmp_path / "plain.m2d")
    assert "format 2" in succeeded("bundle", "show", tmp_path / "plain.m2d")
    (cell,) = show_bundle(tmp_path / "plain.m2d").cells
    assert cell.own_bytes == cell.size_bytes


def test_the_bytes_of_one_cell_alone_are_those_that_no_other_cell_has(packed: Path) -> None:
    opened = open_cells(packed)
    users: dict[tuple[str, int], set[str]] = {}
    for cell, entry in opened.manifest.cells.items():
        for span in (span for file in entry.files.values() for span in file.spans):
            for place in range(span.offset, span.offset + span.size):
                users.setdefault((span.entry, place), set()).add(cell)
    shown = {each.id: each.own_bytes for each in show_bundle(packed).cells}
    assert shown == {cell: [*users.values()].count({cell}) for cell in SHAPES}
    assert 0 < sum(shown.values()) < sum(each.size for each in opened.manifest.cells.values())


def test_diff_says_what_differs_and_exits_like_diff(
    packed: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    assert "are the same bytes" in succeeded("bundle", "diff", packed, packed)
    for cell in (DEEP, SHALLOW):
        write_bundle(folders[cell], tmp_path / f"{cell}.m2d")
    plain = [tmp_path / f"{cell}.m2d" for cell in (DEEP, SHALLOW)]
    result = m2d("bundle", "diff", *plain)
    assert result.exit_code == 1
    assert "layers: 3 | 1" in result.stdout.splitlines()
    assert "ranges.json: 6" not in result.stdout
    assert result.stdout.count(TOKENIZER) == 0
    result = m2d("bundle", "diff", packed, plain[1], "--json")
    told = json.loads(result.stdout)
    assert (result.exit_code, told["same"]) == (1, False)
    assert (told["only_in_first"], told["only_in_second"]) == ([DEEP, MIDDLE], [])
    facts = {each["what"]: each for each in told["differences"]}
    assert facts["default cell"]["second"] == SHALLOW
    assert not any(what.startswith((DEEP, MIDDLE)) for what in facts)
    lines = m2d("bundle", "diff", plain[1], packed).stdout.splitlines()
    assert lines[:2] == [f"only in {packed}: cell {cell}" for cell in (DEEP, MIDDLE)]
    assert "does not exist" in refused("bundle", "diff", packed, tmp_path / "none.m2d")
    assert "is not a bundle file" in refused("bundle", "show", folders[DEEP])


def test_a_manifest_alone_that_differs_is_a_difference(packed: Path, tmp_path: Path) -> None:
    other = with_manifest(packed, tmp_path / "a.m2d", lambda _: None)  # without indentation
    result = m2d("bundle", "diff", packed, other)
    assert result.exit_code == 1
    assert result.stdout.startswith("bytes: ")


def joined(spans: Any, entries: dict[str, bytes]) -> bytes:
    return b"".join(entries[s.entry][s.offset : s.offset + s.size] for s in spans)


@pytest.mark.parametrize("seed", range(8))
def test_files_are_put_together_again_from_what_is_stored(seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = [rng.bytes(int(rng.integers(1, 20_000))) for _ in range(6)]
    blocks += [bytes(5000), b"\x07" * 9000, b"", b"ab" * 3000]
    stored = {name: b"".join(rng.choice(np.array(blocks, object), 4)) for name in ("x", "y")}
    cells = [
        {name: b"".join(rng.choice(np.array(blocks, object), 5)) for name in ("x", "z")}
        for _ in range(3)
    ]
    more, spans = share(stored, cells, "rest")
    entries = {**stored, "rest": more}
    for files, found in zip(cells, spans, strict=True):
        assert {name: joined(found[name], entries) for name in files} == files
    assert share(stored, cells, "rest") == (more, spans)


def test_what_stands_elsewhere_behind_other_bytes_is_stored_once() -> None:
    rng = np.random.default_rng(0)
    weights = [rng.bytes(1 << 16) for _ in range(4)]
    deep = b"header".join(weights)
    shallow = b"another one" + weights[2] + b"?" + weights[0]
    more, _ = share({"model": deep}, [{"model": shallow}], "rest")
    assert len(more) < 32_000  # less than a piece at each of four ends
    assert share({"model": deep}, [{"model": deep, "copy": deep}], "rest")[0] == b""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """From engine to two depths of a BERT whose last layer computes the CLS token alone."""
    config = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    folder = tmp_path_factory.mktemp("cls") / "m"
    model = open_checkpoint(tiny_checkpoint(folder, config=config, pooling="cls"))
    return export_sources(model, (1, 2), 128, ("onnx", "openvino"))


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_the_depths_of_a_checkpoint_share_their_weights(
    sources: dict[str, Source], engine: str, weights: Any
) -> None:
    maker = engine_maker(engine)
    texts = CalibrationTokens([list(range(5, 5 + n)) for n in range(4, 30)], 0)
    shallow, deep = (
        maker.files(
            maker.quantize(sources[engine].vectors_at(depth), weights, texts), Compilation()
        )
        for depth in (1, 2)
    )
    name = max(shallow, key=lambda name: len(shallow[name]))
    _, (spans,) = share(deep, [{name: shallow[name]}], POOL)
    again = sum(span.size for span in spans[name] if span.entry == POOL)
    assert again < 0.2 * len(shallow[name])  # a few pieces of 6 kB


def test_the_independent_reader_is_short_and_imports_nothing_of_this_package() -> None:
    source = READER.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 100
    imports = re.findall(r"^\s*(?:import|from) (\w+)", source, re.M)
    assert set(imports) <= {
        "hashlib",
        "json",
        "numpy",
        "onnxruntime",
        "sys",
        "tokenizers",
        "zipfile",
    }


def test_the_independent_reader_gives_the_same_vectors(
    packed: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    write_bundle(folders[SHALLOW], tmp_path / "plain.m2d")
    for path, cells in ((packed, sorted(SHAPES)), (tmp_path / "plain.m2d", [SHALLOW])):
        found = read_independently(path, TEXTS[0])
        assert found.returncode == 0, found.stderr
        lines = found.stdout.splitlines()
        for cell, said, vector in zip(cells, lines[::2], lines[1::2], strict=True):
            encoder = load(path, cell=cell)
            assert encoder.spec.space_id in said
            expected = encoder.encode(TEXTS[:1])[0].tolist()
            assert json.loads(vector) == pytest.approx(expected, abs=1e-6)


def test_the_independent_reader_refuses_what_this_one_does(packed: Path, tmp_path: Path) -> None:
    changes = (beyond_the_end, of_no_entry, of_another_size, endless, other_digest)
    for number, change in enumerate(changes):
        path = with_manifest(packed, tmp_path / f"{number}.m2d", change)
        found = read_independently(path)
        assert found.returncode != 0
        assert found.stdout == ""
