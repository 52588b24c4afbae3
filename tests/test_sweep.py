"""The sweep: its one-pass surface equals what the separate sub-models give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from killed import TASKS
from scipy.stats import spearmanr
from tiny import small_checkpoint

from m2dexport.build.parity import PROBES
from m2dexport.build.recipe import Recipe
from m2dexport.build.source import Source, export_source
from m2dexport.checkpoint.open import Checkpoint, open_checkpoint
from m2dexport.data import align_texts_path, calibration_texts, default_task_paths, read_texts
from m2dexport.engines import Device
from m2dexport.engines.onnxruntime import make as onnxruntime_make
from m2dexport.engines.onnxruntime import run as onnxruntime
from m2dexport.errors import UsageError
from m2dexport.profile.plan import Plan, default_plan, plan_for
from m2dexport.profile.schema import Profile
from m2dexport.profile.surface import compute_surface, corpus_of
from m2dexport.profile.sweep import Course, profile_checkpoint
from m2dexport.profile.target import load_target
from m2dexport.reference.pooler import Reference
from m2dexport.runtime.loading import load
from m2dexport.vectors import codecs
from m2dexport.vectors.pairs import StsTask
from m2dexport.vectors.quality import evaluate
from m2dexport.vectors.retrieval import RetrievalTask
from m2dexport.vectors.tasks import Task, load_task

CALIBRATION = calibration_texts()[:100]
PLAN = Plan(
    layers=(1, 2),
    dims=(32, 50),
    shapes=((1, 8), (2, 12)),
    device=Device(threads=1),
    repeats=3,
    align=("none",),
)


@pytest.fixture(scope="module")
def tasks() -> tuple[Task, ...]:
    whole = load_task(default_task_paths()[0])
    assert isinstance(whole, StsTask)
    keep = slice(0, 60)
    sts = StsTask(
        "sts", whole.sentences1[keep], whole.sentences2[keep], whole.scores[keep], whole.sha256
    )
    ranking = load_task(default_task_paths()[1])
    assert isinstance(ranking, RetrievalTask)
    few = replace(ranking, queries=ranking.queries[keep], relevance=ranking.relevance[keep])
    return sts, few


@pytest.fixture(scope="module")
def model(shallow: Checkpoint) -> Checkpoint:
    return shallow


@pytest.fixture(scope="module")
def profile(model: Checkpoint, tasks: tuple[Task, ...]) -> Profile:
    return profile_checkpoint(model, tasks, CALIBRATION, PLAN)


@pytest.fixture(scope="module")
def source(model: Checkpoint) -> Source:
    """What a profile of this plan exports; read only."""
    return export_source(model, PLAN.layers, 384)


def test_every_cell_of_the_plan_is_measured(profile: Profile) -> None:
    assert len(profile.cells) == 2 * 2 * 3 * 3 + 1
    for cell in profile.cells[1:]:
        ranking = {"limit-small/ndcg@10", "limit-small/recall@10"}
        if cell.vectors == "ubinary":
            ranking |= {f"{name}+{by}x4" for name in ranking for by in ("ubinary", "int8")}
        ranking |= {f"limit-small/{name}@10" for name in ("mrr", "map", "complete", "overlap")}
        assert set(cell.quality) == {"sts/spearman", "sts/pearson"} | ranking
        assert 0 < cell.p50_ms <= cell.p95_ms
        assert [(p.batch, p.sequence) for p in cell.latency] == [(1, 8), (2, 12)]
        assert cell.used_memory_bytes >= cell.peak_memory_bytes > 20e6
        assert "mixed_precision" not in cell.flags  # plain int8 keeps its floor here
        assert cell.mean_quality == pytest.approx(
            np.mean([cell.quality["sts/spearman"], cell.quality["limit-small/ndcg@10"]])
        )


def test_the_reference_is_measured_though_no_grid_asks_for_it(profile: Profile) -> None:
    reference = profile.reference_cell()
    assert (reference.id, reference.flags[0]) == ("2x384-fp32-float32", "reference")
    assert (reference.retention, reference.loss, reference.ratio) == (1, 0, 1)
    for cell in profile.cells[1:]:
        assert "reference" not in cell.flags
        assert cell.retention == pytest.approx(cell.mean_quality / reference.mean_quality)


def test_fp32_quality_is_that_of_the_torch_original(profile: Profile, model, tasks) -> None:
    reference = Reference(model, (1, 2))
    for task in tasks:
        encoded = [reference.encode(text_set.texts) for text_set in task.texts()]
        for depth in (1, 2):
            expected = evaluate(task, [rows[depth] for rows in encoded], 50, "float32")
            found = profile.cell(f"{depth}x50-fp32-float32").quality
            for metric, points in expected.items():
                assert found[f"{task.name}/{metric}"] == pytest.approx(points, abs=0.05)


@pytest.mark.parametrize("cell_id", ["1x32-int8-int8", "2x50-fp16-ubinary"])
def test_a_cell_promises_what_its_artifact_keeps(profile, model, tasks, artifact, cell_id) -> None:
    cell = profile.cell(cell_id)
    recipe = Recipe(weights=cell.weights, vectors=cell.vectors, calibration=CALIBRATION)
    folder = artifact(model.path, cell.layers, cell.dim, recipe).path
    deployed = sum(
        (folder / name).stat().st_size
        for name in ("model.onnx", "tokenizer.json", "ranges.json")
        if (folder / name).exists()
    )
    assert cell.size_bytes == pytest.approx(deployed, rel=1e-3)
    assert cell.bytes_per_vector == load(folder).encode(["x"]).nbytes
    sts = tasks[0]
    codes = [load(folder).encode(s.texts) for s in sts.texts()]
    if cell.vectors == "ubinary":
        bits = [np.unpackbits(c, axis=1, count=cell.dim).astype(np.float32) * 2 - 1 for c in codes]
        similarity = (bits[0] * bits[1]).sum(axis=1)
    else:
        ranges = codecs.ranges_from_json((folder / "ranges.json").read_text())
        floats = [
            codecs.normalize(codecs.decode_vectors(c, "int8", cell.dim, ranges)) for c in codes
        ]
        similarity = (floats[0] * floats[1]).sum(axis=1)
    points = 100 * spearmanr(similarity, sts.scores).statistic
    assert cell.quality["sts/spearman"] == pytest.approx(points, abs=0.05)


@pytest.mark.parametrize(
    # int8 looks at activations, and is compared with fp32.
    ("weights", "calibrated"),
    [("fp16", 0), ("int8", 2 * len(CALIBRATION))],
)
def test_the_quality_surface_is_one_pass_per_weight_precision(
    source, tasks, monkeypatch, weights, calibrated
) -> None:
    """Each text goes through the transformer once, whatever the number of layers and dims."""
    rows = 0
    run = onnxruntime.run

    def counting(session, input_ids, mask):
        nonlocal rows
        rows += len(input_ids)
        return run(session, input_ids, mask)

    monkeypatch.setattr(onnxruntime, "run", counting)
    corpus = corpus_of(source, tasks, CALIBRATION)
    texts = {text for task in tasks for text_set in task.texts() for text in text_set.texts}
    assert len(corpus.ids) == len(texts | set(CALIBRATION))
    surface = compute_surface(source, weights, corpus, PLAN, lambda *_: None)
    assert set(surface.depths) == set(PLAN.layers)
    assert rows == len(corpus.ids) + 3 * len(PROBES) + calibrated


def test_a_pass_quantizes_and_runs_no_layer_above_its_depths(source, tasks, monkeypatch) -> None:
    """The export may go deeper, for the maps; weights of the layers above would take as long."""
    outputs: list[str | None] = []
    quantize = onnxruntime_make.quantize

    def seen(model, *settings):
        outputs.extend(value.name for value in model.graph.outputs)
        return quantize(model, *settings)

    corpus = corpus_of(source, tasks, CALIBRATION)
    both = compute_surface(source, "int8", corpus, PLAN, lambda *_: None)
    monkeypatch.setattr(onnxruntime_make, "quantize", seen)
    alone = compute_surface(source, "int8", corpus, replace(PLAN, layers=(1,)), lambda *_: None)
    assert outputs == ["depth_1"]
    np.testing.assert_array_equal(alone.depths[1].vectors, both.depths[1].vectors)


def test_the_default_grid_has_all_depths_and_the_trained_dims() -> None:
    plan = default_plan(open_checkpoint())
    assert plan.layers == (0, 1, 2, 3, 4, 5, 6)
    assert plan.align == ("none", "full")
    assert plan.dims == (32, 64, 128, 256, 384)


def test_without_a_trained_grid_dims_are_powers_of_two(bert: Path) -> None:
    assert default_plan(open_checkpoint(bert)).dims == (32,)


def test_a_target_sets_threads_shapes_and_grid() -> None:
    plan = plan_for(open_checkpoint(), load_target("browser"))
    assert (plan.device.threads, plan.weights) == (1, ("int8",))
    assert plan.layers == (0, 1, 2, 3, 4, 5, 6)


def test_a_target_is_measured_on_its_own_provider() -> None:
    plan = plan_for(open_checkpoint(), load_target("server-gpu"))
    assert (plan.engine, plan.device.provider) == ("onnx", "CUDAExecutionProvider")


def test_a_target_says_which_processors_int8_is_made_for(tasks, tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    keys = 'isa = "vnni"\nspin_us = 200\nthreads = 1\n'
    path.write_text(f'description = "x"\nengine = "onnx"\n{keys}')
    plan = plan_for(open_checkpoint(), load_target(path))
    assert (plan.isa, plan.device) == ("vnni", Device(None, 1, spin_us=200))
    openvino = Plan((1,), (32,), weights=("int8",), engine="openvino", isa="vnni")
    with pytest.raises(UsageError, match="isa vnni does not go with the engine openvino"):
        profile_checkpoint(open_checkpoint(), tasks, CALIBRATION, openvino)


def test_a_plan_outside_the_checkpoint_is_refused(tasks) -> None:
    with pytest.raises(UsageError, match="0 to 6 layers, not 7"):
        profile_checkpoint(open_checkpoint(), tasks, CALIBRATION, Plan((7,), (32,)))


def test_two_tasks_of_one_name_are_refused(tasks) -> None:
    with pytest.raises(UsageError, match="two evaluation sets are named 'sts'"):
        profile_checkpoint(open_checkpoint(), (*tasks, tasks[0]), CALIBRATION, PLAN)


def test_untrained_cells_are_flagged(profile: Profile, model: Checkpoint) -> None:
    trained = model.trained
    assert trained is not None
    for cell in profile.cells:
        assert ("untrained" in cell.flags) == ((cell.layers, cell.dim) not in trained)
    assert {cell.dim for cell in profile.cells if "untrained" in cell.flags} == {50}


@pytest.fixture
def tiny(unmeasured_memory: None, tmp_path: Path) -> Path:
    """A tiny checkpoint, whose graphs' memory is not measured."""
    return small_checkpoint(tmp_path / "tiny", "bert")


TINY = Plan(
    layers=(0, 1),
    dims=(32,),
    weights=("fp32", "fp16"),
    vectors=("float32",),
    shapes=((1, 8), (1, 512)),
    device=Device(threads=1),
    repeats=3,
    align_texts=read_texts(align_texts_path())[::6],
)


def test_targets_and_engines_are_measured_in_one_sweep(tiny: Path) -> None:
    plans = [
        replace(TINY, target="edge"),
        replace(TINY, target="edge", engine="openvino", weights=("fp32",)),
        replace(TINY, target="other", layers=(1,), weights=("fp16",), shapes=((2, 4),)),
    ]
    edge, other = (load_target(name) for name in ("edge-cpu", "browser"))
    course = Course(targets={"edge": edge, "other": other})
    found = profile_checkpoint(open_checkpoint(tiny), TASKS, CALIBRATION, plans, course)
    assert [(each.name, each.engines) for each in found.targets] == [
        ("edge", ("onnx", "openvino")),
        ("other", ("onnx",)),
    ]
    cells = {name: {cell.id for cell in found.of_target(name)} for name in ("edge", "other")}
    mapped = {"1x32-aligned-fp32-float32", "1x32-aligned-fp16-float32"} & cells["edge"]
    assert cells["edge"] - mapped - {"1x32-aligned-fp32-float32@openvino"} == {
        "2x64-fp32-float32",
        *("0x32-aligned-fp32-float32", "0x32-aligned-fp16-float32"),
        *("1x32-fp32-float32", "1x32-fp16-float32", "1x32-fp32-float32@openvino"),
    }
    assert {"2x64-fp32-float32", "1x32-fp16-float32"} <= cells["other"]
    first, second = found.targets
    longest = open_checkpoint(tiny).max_length
    assert [shape.sequence for shape in first.shapes] == [8, longest]
    assert [shape.sequence for shape in first.asked] == [8, 512]
    assert second.shapes[0].batch == 2
    assert (first.description, first.budget["size_mb"]) == (edge.description, edge.budget.size_mb)
    same = [found.cell("1x32-fp16-float32", name) for name in ("edge", "other")]
    assert same[0].quality == same[1].quality
    assert [len(cell.latency) for cell in same] == [2, 1]


def test_shards_measure_what_the_whole_does(tiny: Path) -> None:
    def measured(shard: tuple[int, int] | None) -> Profile:
        course = Course(shard=shard)
        return profile_checkpoint(open_checkpoint(tiny), TASKS, CALIBRATION, TINY, course)

    whole, *shards = (measured(shard) for shard in (None, (1, 2), (2, 2)))
    assert [each.shard for each in (whole, *shards)] == [None, "1/2", "2/2"]
    own = [cell for each in shards for cell in each.cells if cell.id != each.reference_cell().id]
    expected = {cell.id: cell for cell in whole.cells if "reference" not in cell.flags}
    assert {cell.id for cell in own} == set(expected)
    for cell in own:
        assert cell.quality == expected[cell.id].quality
        assert cell.as_query == expected[cell.id].as_query
        assert cell.loss == pytest.approx(expected[cell.id].loss)
    assert len(shards[0].cross_depth) == len(whole.cross_depth) > 0
    assert not shards[1].cross_depth
