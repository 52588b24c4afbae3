"""Aligned cells, from the profile to the bundle: what is deployed keeps what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from command_line import m2d
from numpy.typing import NDArray
from tiny import tiny_checkpoint

from m2dexport.align.texts import sha256_of_texts
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.cli import console
from m2dexport.cores import usable_cores
from m2dexport.data import align_texts_path, calibration_texts, read_texts
from m2dexport.engines import ENGINES, Device
from m2dexport.errors import UsageError
from m2dexport.profile.manifest import read_profile, write_profile
from m2dexport.profile.schema import MEAN, Profile
from m2dexport.reference.pooler import Reference
from m2dexport.runtime.archive import open_bundle
from m2dexport.runtime.cells import cell_of
from m2dexport.runtime.encoder import Encoder
from m2dexport.runtime.loading import load
from m2dexport.runtime.nested import Nested
from m2dexport.runtime.showing import show_bundle
from m2dexport.vectors.codecs import calibrate_ranges, truncate
from m2dexport.vectors.pairs import StsTask
from m2dexport.vectors.quality import BRIEF, comparable, score_pairs, score_ranking
from m2dexport.vectors.ranking import rank
from m2dexport.vectors.retrieval import TOP, RetrievalTask
from m2dexport.vectors.search import Codec
from m2dexport.vectors.tasks import load_task

Floats = NDArray[np.float32]
TARGET = """
description = "a tiny grid"
engine = "onnx"
spin_us = 100
[grid]
layers = [0, 1, 2]
dims = [32, 96]
weights = ["fp32", "fp16", "int8"]
align = ["none", "full"]
[latency]
shapes = [[1, 8]]
"""
INDEX = "2x96-fp32-int8"
SHALLOW = ("1x96-aligned-int8-int8", "0x96-aligned-int8-int8")

pytestmark = pytest.mark.usefixtures("unmeasured_memory")


@dataclass(frozen=True)
class Profiled:
    folder: Path
    profile: Profile
    sts: StsTask
    retrieval: RetrievalTask

    def bundle(self, cell: str, *options: object) -> Result:
        """Bundle a cell as a user does."""
        texts = ("--calibration", self.folder / "calibration.txt")
        return m2d("bundle", self.folder / "p" / "profile.json", "--cell", cell, *texts, *options)


def succeeded(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.output


def refused(result: Result) -> str:
    """Return the one sentence with which a command failed."""
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (sentence,) = result.stderr.splitlines()
    return sentence


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory, few_texts: Path) -> Profiled:
    folder = tmp_path_factory.mktemp("deploy")
    config = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    model = tiny_checkpoint(
        folder / "model", config=config, prompts={"query": "find: ", "document": ""}
    )
    calibration = calibration_texts()[:120]
    (folder / "calibration.txt").write_text("\n".join(calibration), encoding="utf-8")
    (folder / "tiny.toml").write_text(TARGET)
    _write_tasks(folder)
    measured = m2d(
        *("profile", "--model", model, "--target", folder / "tiny.toml", "--out", folder / "p"),
        *("--eval", folder / "sts.tsv", "--eval", folder / "beir"),
        *("--calibration", folder / "calibration.txt", "--align-texts", few_texts),
    )
    succeeded(measured)
    sts, retrieval = load_task(folder / "sts.tsv"), load_task(folder / "beir")
    assert isinstance(sts, StsTask)
    assert isinstance(retrieval, RetrievalTask)
    profile = read_profile(folder / "p" / "profile.json")
    return Profiled(folder, profile, sts, retrieval)


def _write_tasks(folder: Path) -> None:
    """Write pairs of sentences, and documents of which each query has every other word."""
    texts = read_texts(align_texts_path())[1:1800:30]
    words = [text.split() for text in texts]
    halves = [" ".join(each[::2]) for each in words]
    pairs = [f"{i % 6}\t{half}\t{texts[i - i % 6]}\n" for i, half in enumerate(halves)]
    (folder / "sts.tsv").write_text("".join(pairs), encoding="utf-8")
    rows = {
        "corpus": [{"_id": f"d{i}", "text": text} for i, text in enumerate(texts)],
        "queries": [{"_id": f"q{i}", "text": half} for i, half in enumerate(halves)],
        "qrels": [
            {"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(len(texts))
        ],
    }
    (folder / "beir").mkdir()
    for name, items in rows.items():
        lines = "\n".join(json.dumps(item) for item in items)
        (folder / "beir" / f"{name}.jsonl").write_text(lines, encoding="utf-8")


@pytest.fixture(scope="module")
def bundled(
    profiled: Profiled, few_texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """From the id of a cell to its bundle, made once; int8 codes of aligned ones are for INDEX."""

    @cache
    def made(name: str) -> Path:
        out = tmp_path_factory.mktemp("bundled") / f"{name}.m2d"
        options: list[object] = ["--align-texts", few_texts, "--out", out]
        if profiled.profile.cell(name).align == "full" and name.endswith("-int8"):
            options += ["--index", made(INDEX)]
        succeeded(profiled.bundle(name, *options))
        return out

    return made


@pytest.fixture(scope="module")
def original(profiled: Profiled) -> Reference:
    """The torch original of both depths."""
    return Reference(open_checkpoint(profiled.folder / "model"), (1, 2))


def test_depths_below_the_full_one_are_measured_plain_and_aligned(profiled: Profiled) -> None:
    cells = profiled.profile.cells
    found = {(cell.layers, cell.align, cell.weights) for cell in cells}
    kinds = [(0, "full"), (1, "none"), (1, "full"), (2, "none")]
    assert found == {(*kind, weights) for kind in kinds for weights in ("fp32", "fp16", "int8")}
    assert profiled.profile.reference_cell().id == "2x128-fp32-float32"
    assert len(cells) == len(found) * 2 * 3 + 1  # the reference, whose dims no grid asks for
    assert not profiled.profile.failures
    engines = {(cell.engine, cell.device.provider) for cell in cells if cell.layers == 0}
    assert engines == {("static", "CPU")}
    assert all(cell.engine == "onnx" for cell in cells if cell.layers > 0)


def test_the_settings_that_suit_a_graph_best_are_recorded_and_its_bundle_runs_with_them(
    profiled: Profiled, bundled: Any
) -> None:
    cores = usable_cores()
    settings: dict[tuple[int, str], set[tuple[int, int]]] = {}
    for cell in profiled.profile.cells:
        device, static = cell.device, cell.layers == 0
        settings.setdefault((cell.layers, cell.weights), set()).add(
            (device.threads, device.spin_us)
        )
        sets = {(1, 0), *([] if static or cores == 1 else [(cores, 0), (cores, 100)])}
        assert (device.threads, device.spin_us) in sets
        assert device.workers == 1
    assert all(len(found) == 1 for found in settings.values())  # aligned graphs as plain ones
    for name in ("1x96-aligned-int8-int8", "0x96-aligned-int8-int8"):
        expected = Device(**profiled.profile.cell(name).device.model_dump())
        assert load(bundled(name)).spec.device == expected


def test_a_profile_says_what_it_was_aligned_with(profiled: Profiled, few_texts: Path) -> None:
    found = profiled.profile.aligned_with
    assert found is not None
    texts = read_texts(few_texts)
    assert (found.texts, found.sha256) == (len(texts), sha256_of_texts(texts))


@pytest.mark.parametrize(
    "name",
    [
        "1x96-aligned-int8-int8",
        "1x32-aligned-fp16-ubinary",
        "0x32-aligned-fp32-float32",
        "0x96-aligned-int8-int8",
        "0x96-aligned-fp16-ubinary",
    ],
)
def test_an_aligned_cell_promises_what_its_bundle_keeps(
    profiled: Profiled, bundled: Any, name: str
) -> None:
    cell, files = profiled.profile.cell(name), open_bundle(bundled(name))
    names = {*ENGINES[cell.engine].files, "tokenizer.json", "ranges.json"}
    deployed = sum(len(content) for file, content in files.items() if file in names)
    assert cell.size_bytes == pytest.approx(deployed, rel=0.02)
    encoder = load(bundled(name))
    for task in (profiled.sts, profiled.retrieval):
        first, second = (_compared(encoder, part.texts, part.role) for part in task.texts())
        if isinstance(task, StsTask):
            scores = score_pairs(task, first, second)
        else:
            scores = score_ranking(task, rank(first, second, TOP))
        for metric, points in scores.items():
            assert cell.quality[f"{task.name}/{metric}"] == pytest.approx(points, abs=0.05)


def _compared(encoder: Encoder, texts: tuple[str, ...], role: str | None) -> Floats:
    """Return what an encoder's codes of some texts are compared by."""
    codes = encoder.encode(texts, prompt=role)
    return Codec(encoder.spec.vectors, encoder.spec.dim, encoder.ranges).comparable(codes)


def test_aligned_int8_codes_have_the_ranges_of_the_full_depth(
    profiled: Profiled, bundled: Any, original: Reference
) -> None:
    texts = read_texts(profiled.folder / "calibration.txt")
    expected = calibrate_ranges(truncate(original.encode(texts)[2], 96))
    for name in (INDEX, "1x96-aligned-int8-int8", "0x96-aligned-int8-int8"):
        ranges = load(bundled(name)).ranges
        assert ranges is not None
        np.testing.assert_allclose(ranges.low, expected.low, atol=1e-5)
        np.testing.assert_allclose(ranges.high, expected.high, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "1x96-aligned-int8-int8",
        "0x96-aligned-int8-int8",
        "0x32-aligned-fp32-float32",
        "1x96-fp32-int8",
        "1x32-fp32-float32",
        "1x32-fp32-ubinary",
    ],
)
def test_queries_of_a_cell_are_measured_on_what_the_full_depth_wrote(
    profiled: Profiled, bundled: Any, original: Reference, name: str
) -> None:
    """The codes of both sides are made with the ranges of the index."""
    cell, task = profiled.profile.cell(name), profiled.retrieval
    ranges = load(bundled(INDEX)).ranges if cell.vectors == "int8" else None

    def coded(texts: tuple[str, ...], role: str, depth: int) -> Floats:
        prompt = original.checkpoint.prompts[role]
        floats = truncate(original.encode(texts, prompt=prompt)[depth], cell.dim)
        return comparable(floats, cell.vectors, ranges)

    documents = coded(task.documents, "document", 2)
    if cell.align == "full":
        queries = _compared(load(bundled(name)), task.queries, "query")
    else:
        queries = coded(task.queries, "query", cell.layers)
    expected = score_ranking(task, rank(queries, documents, TOP))
    found = cell.as_query[f"2x{cell.dim}-fp32-{cell.vectors}"]
    points = {f"beir/{metric}": expected[metric] for metric in BRIEF}
    assert found == pytest.approx(points, abs=0.05)


def test_queries_are_measured_on_an_index_in_the_weights_of_the_reference_and_in_their_own(
    profiled: Profiled,
) -> None:
    profile = profiled.profile
    for cell in profile.cells:
        weights = {"fp32", cell.weights}
        expected = {f"2x{cell.dim}-{each}-{cell.vectors}" for each in weights} - {cell.id}
        assert set(cell.as_query) == expected
        assert all(
            set(found) == {"beir/ndcg@10", "beir/recall@10"} for found in cell.as_query.values()
        )
        if cell.layers == 2:
            own = profile.query_metric(cell, cell, MEAN)
            assert own == cell.quality["beir/ndcg@10"]


def test_the_printed_profile_has_a_table_of_queries_by_depth(profiled: Profiled) -> None:
    shown = m2d("profile", "show", profiled.folder / "p" / "profile.json")
    lines = succeeded(shown).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Queries of each depth"))
    assert "index of depth 2, beir/ndcg@10, fp32 weights, float32 vectors" in lines[start]
    table = [line.split() for line in lines[start + 1 : start + 6]]
    assert table[0] == ["queries", "of", "depth", "d=32", "d=96", "d=128"]
    assert [row[0] for row in table[1:]] == ["0-aligned", "1", "1-aligned", "2"]
    aligned = profiled.profile.cell("1x96-aligned-fp32-float32").as_query["2x96-fp32-float32"]
    assert table[3][2] == f"{aligned['beir/ndcg@10']:.2f}"
    full = profiled.profile.cell("2x32-fp32-float32").quality
    assert table[4][1] == f"{full['beir/ndcg@10']:.2f}"


@pytest.mark.parametrize("name", SHALLOW)
def test_a_bundle_for_an_index_says_what_the_profile_measured_there(
    profiled: Profiled, bundled: Any, tmp_path: Path, name: str
) -> None:
    corpus, vectors = tmp_path / "corpus.txt", tmp_path / "index.npy"
    corpus.write_text("\n".join(profiled.retrieval.documents), encoding="utf-8")
    succeeded(m2d("encode", bundled(INDEX), "--in", corpus, "--out", vectors))
    verify = ("verify", bundled(name), "--vectors", vectors)
    points = profiled.profile.cell(name).as_query[INDEX]["beir/ndcg@10"]
    native = profiled.profile.cell(INDEX).quality["beir/ndcg@10"]
    said = f"beir/ndcg@10 {points:.2f} where the native encoder has {native:.2f}"
    assert f"(2 layers in fp32); {said}" in succeeded(m2d(*verify))
    reported = json.loads(succeeded(m2d(*verify, "--json")))["vectors"]["spoken"]
    assert reported["measured"]["beir/ndcg@10"] == {"points": points, "native": native}


@pytest.mark.parametrize("name", ["1x96-aligned-int8-int8", "0x32-aligned-fp32-float32"])
def test_other_texts_than_those_that_were_aligned_on_are_refused(
    profiled: Profiled, tmp_path: Path, name: str
) -> None:
    for given in ([], ["--align-texts", profiled.folder / "calibration.txt"]):
        sentence = refused(profiled.bundle(name, *given, "--out", tmp_path / "x.m2d"))
        assert "aligned on other texts; name the same file by --align-texts" in sentence
    assert not any(tmp_path.iterdir())


def test_an_index_of_other_codes_is_refused(
    profiled: Profiled, bundled: Any, few_texts: Path, tmp_path: Path
) -> None:
    options = ("--align-texts", few_texts, "--index", bundled(INDEX), "--out", tmp_path / "x.m2d")
    sentence = refused(profiled.bundle("0x96-aligned-fp16-ubinary", *options))
    assert "holds vectors=int8" in sentence
    assert not any(tmp_path.iterdir())


def test_a_cell_whose_vectors_depend_on_the_batch_is_bundled_with_consent_only(
    profiled: Profiled, tmp_path: Path
) -> None:
    name = "2x32-int8-int8"
    cells = tuple(
        cell.model_copy(update={"flags": ("batch_dependent",)}) if cell.id == name else cell
        for cell in profiled.profile.cells
    )
    path, out = tmp_path / "profile.json", tmp_path / "b.m2d"
    write_profile(profiled.profile.model_copy(update={"cells": cells}), path)
    texts = ("--calibration", profiled.folder / "calibration.txt")
    asked = ("bundle", path, "--cell", name, *texts, "--out", out)
    assert "depends on the texts beside it; accept that by --allow" in refused(m2d(*asked))
    succeeded(m2d(*asked, "--allow-batch-dependent"))
    assert out.exists()


def test_a_log_has_a_line_of_every_step_of_a_bundle_that_takes_a_while(
    profiled: Profiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_A_WHILE", 0)
    name = "1x32-fp32-float32"
    result = profiled.bundle(name, "--out", tmp_path / "b.m2d", "--json")
    succeeded(result)
    steps = [line.partition(": 1 in ")[0] for line in result.stderr.splitlines()]
    assert steps == [f"build {name}", "pack and verify"]
    assert json.loads(result.stdout)["spaces"] == [[name]]


@pytest.fixture(scope="module")
def nested(
    profiled: Profiled, few_texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A bundle of a deep cell and aligned shallow ones, and what making it printed; read only."""
    out = tmp_path_factory.mktemp("nested") / "nested.m2d"
    cells = [part for name in SHALLOW for part in ("--cell", name)]
    texts = ("--align-texts", few_texts)
    result = profiled.bundle(INDEX, *cells, *texts, "--out", out)
    succeeded(result)
    return out, result.stdout


def test_documents_of_the_deep_cell_are_found_by_queries_of_a_shallow_one(
    profiled: Profiled, nested: tuple[Path, str], tmp_path: Path
) -> None:
    """One file, one index: the aligned cells of a nested bundle speak the deep cell's space."""
    path, printed = nested
    assert printed.splitlines()[1:] == [
        f"cells: {', '.join([INDEX, *SHALLOW])}; {INDEX} is the default",
        "all cells speak one space, so one index serves them all",
    ]
    (tmp_path / "documents.txt").write_text("\n".join(profiled.retrieval.documents))
    documents = tmp_path / "documents.npy"
    wrote = m2d(
        *("encode", path, "--within-ms", 60_000),
        *("--in", tmp_path / "documents.txt", "--out", documents),
    )
    again = f"another day may choose another cell, which speaks the same space: --cell {INDEX} keep"
    assert wrote.exit_code == 0
    assert again in wrote.stderr
    for name in SHALLOW:
        lines = succeeded(m2d("verify", path, "--cell", name, "--vectors", documents)).splitlines()
        assert "speaks (2 layers in fp32)" in lines[-1]
    encoders = Nested(path)
    found = _compared(encoders.cell(SHALLOW[0]), profiled.retrieval.queries, "query")
    deep = _compared(encoders.cell(INDEX), profiled.retrieval.documents, "document")
    scores = score_ranking(profiled.retrieval, rank(found, deep, TOP))
    measured = profiled.profile.cell(SHALLOW[0]).as_query[INDEX]
    assert scores["ndcg@10"] == pytest.approx(measured["beir/ndcg@10"], abs=0.05)


def test_every_cell_says_which_checkpoint_it_is_of(
    profiled: Profiled, nested: tuple[Path, str]
) -> None:
    bom = json.loads(m2d("bundle", "sbom", nested[0]).stdout)
    models = [each for each in bom["components"] if each["type"] == "machine-learning-model"]
    stated = [{p["name"]: p["value"] for p in each["properties"]} for each in models]
    assert [each["name"] for each in models] == sorted([INDEX, *SHALLOW])
    assert {p["m2dexport:checkpoint"] for p in stated} == {profiled.profile.checkpoint.sha256}


def test_a_nested_bundle_says_what_the_profile_measured_and_a_device_chooses_by_it(
    profiled: Profiled, nested: tuple[Path, str]
) -> None:
    path, _ = nested
    shown = {cell.id: cell for cell in show_bundle(path).cells}
    for name in (INDEX, *SHALLOW):
        cell, figures = profiled.profile.cell(name), shown[name].figures
        assert figures is not None
        assert (figures.p50_ms, figures.quality) == (cell.p50_ms, cell.mean_quality)
        assert (figures.batch, figures.sequence) == (1, 8)
        assert figures.peak_memory_bytes == cell.peak_memory_bytes
    times = {name: profiled.profile.cell(name).p50_ms for name in (INDEX, *SHALLOW)}
    limit = times[SHALLOW[-1]] * 1.0001
    expected = next(name for name, taken in times.items() if taken <= limit)
    assert cell_of(load(path, budget_ms=limit).spec) == expected


def test_a_bundle_of_one_cell_says_it_too(profiled: Profiled, bundled: Any) -> None:
    measured, path = profiled.profile.cell(INDEX), bundled(INDEX)
    (shown,) = show_bundle(path).cells
    assert shown.figures is not None
    assert (shown.figures.p50_ms, shown.figures.quality) == (measured.p50_ms, measured.mean_quality)
    assert cell_of(load(path, budget_ms=measured.p50_ms).spec) == INDEX
    with pytest.raises(UsageError, match=f"the shallowest, {INDEX}, takes"):
        load(path, budget_ms=measured.p50_ms / 2)


def test_a_cell_that_is_named_twice_is_refused_before_the_work(
    profiled: Profiled, tmp_path: Path
) -> None:
    sentence = refused(profiled.bundle(INDEX, "--cell", INDEX, "--out", tmp_path / "a.m2d"))
    assert f"the cell {INDEX} is named twice" in sentence


def test_a_result_of_an_aligned_cell_with_fewer_dims_joins_its_profile(
    profiled: Profiled, bundled: Any, tmp_path: Path
) -> None:
    """Its bundle knows the checkpoint; what it is aligned with is another model, of its dims."""
    path, name = bundled("1x32-aligned-fp16-ubinary"), "board"
    measured = m2d("bench", path, "--shapes", "1x8", "--name", name, "--json")
    assert measured.exit_code == 0, measured.output
    (tmp_path / "board.json").write_text(measured.stdout, encoding="utf-8")
    files = (profiled.folder / "p" / "profile.json", tmp_path / "board.json")
    out = tmp_path / "merged.json"
    succeeded(m2d("profile", "merge", *files, "--out", out))
    (cell,) = read_profile(out).of_target(name)
    assert cell.id == "1x32-aligned-fp16-ubinary"
