"""OpenVINO: the same vectors, files and promises as on ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tiny import tiny_checkpoint
from tiny_artifact import relisted, tiny_graph, tiny_ranges

from m2dexport.build.build import Artifact, build_artifact, make_artifact, quantize_artifact
from m2dexport.build.parity import PROBES
from m2dexport.build.recipe import Recipe
from m2dexport.checkpoint.open import Checkpoint, open_checkpoint
from m2dexport.data import calibration_texts, default_task_paths
from m2dexport.engines import ENGINES, Device, engine_runner, require_version
from m2dexport.engines.onnxruntime.make import quantize as quantize_for_onnxruntime
from m2dexport.engines.onnxruntime.make import runner as onnxruntime_runner
from m2dexport.engines.openvino import run as engine
from m2dexport.engines.openvino.make import PRECISIONS, files, files_from_onnx, quantize
from m2dexport.errors import BundleError, M2DError, MissingExtra, ParityError, UsageError
from m2dexport.files import MODEL_SETTINGS
from m2dexport.graph.export import graph_from_checkpoint
from m2dexport.graph.fuse import fuse_for_onnxruntime
from m2dexport.graph.vector import vector_graph
from m2dexport.precisions import VECTOR_PRECISIONS
from m2dexport.profile.plan import Plan
from m2dexport.profile.sweep import profile_checkpoint
from m2dexport.quantize.activations import CalibrationTokens
from m2dexport.quantize.tables import quantize_tables
from m2dexport.quantize.units import restore, units_of
from m2dexport.runtime import encoder as runtime
from m2dexport.runtime import loading
from m2dexport.runtime.archive import open_bundle
from m2dexport.runtime.artifact import read_spec
from m2dexport.runtime.bundle import verify_bundle, write_bundle
from m2dexport.vectors.codecs import LEVELS
from m2dexport.vectors.tasks import load_task

IDS = np.array([[2, 5, 6, 3], [2, 7, 3, 0]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
TOKENS = CalibrationTokens([list(range(5, 5 + n)) for n in range(4, 30)], 0)


@pytest.fixture(scope="module")
def graph(original) -> ir.Model:
    """The first layer of the shipped checkpoint in standard operators; read only."""
    return original(None, 1, 36, "openvino").graph  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def int8(artifact) -> Artifact:
    """One layer of the shipped checkpoint, int8 weights and vectors; read only."""
    return artifact(None, 1, 36, Recipe("openvino", weights="int8", vectors="int8"))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def quantized(graph: ir.Model) -> ir.Model:
    """The first layer in int8."""
    return quantize(graph, "int8", TOKENS)


def load(graph: ir.Model) -> engine.Session:
    return engine.load(files(graph), Device(threads=1), "portable")


def run(graph: ir.Model, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    return engine.run(load(graph), ids, mask)[0]


def products_of_codes(model: ir.Model) -> int:
    """Count the MatMuls whose inputs are both dequantized: the form that is computed on codes."""
    return sum(
        node.op_type == "MatMul"
        and all(value.producer().op_type == "DequantizeLinear" for value in node.inputs)
        for node in model.graph
    )


def products_in_8_bits(session: engine.Session) -> int:
    """Count the products with constants that the engine says it computes on 8-bit codes."""
    done = [node.get_rt_info() for node in session.compiled.get_runtime_model().get_ops()]
    return sum(
        info["layerType"] == "FullyConnected" and info["runtimePrecision"] == "u8" for info in done
    )


@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_an_fp32_artifact_gives_the_vectors_of_the_onnx_one(family: str, small, artifact) -> None:
    vectors = {}
    for name in ("onnx", "openvino"):
        folder = artifact(small(family), 2, 64, Recipe(name)).path
        assert read_spec(folder).engine == name
        others = {"artifact.json", "files.json", "tokenizer.json", *MODEL_SETTINGS}
        assert {*ENGINES[name].files, *others} == {path.name for path in folder.iterdir()}
        vectors[name] = loading.load(folder).encode(PROBES)
    np.testing.assert_allclose(vectors["openvino"], vectors["onnx"], atol=1e-5)


def test_an_int8_artifact_keeps_what_int8_promises(int8: Artifact) -> None:
    spec = read_spec(int8.path)
    assert spec.batch_invariant
    assert spec.parity["mean_cosine"] > 0.999
    assert spec.coverage > 0.97
    assert all(name.endswith(".spikes") for name in spec.left_in_float32)
    encoder = loading.load(int8.path)
    alone = np.concatenate([encoder.encode([text]) for text in PROBES])
    assert (encoder.encode(PROBES) == alone).mean() >= 0.999


@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_every_precision_of_openvino_passes_the_gates(family: str, small, artifact) -> None:
    for weights, requirement in PRECISIONS.items():
        built = artifact(small(family), 2, 64, Recipe("openvino", weights=weights, min_coverage=0))
        assert built.spec.batch_invariant
        assert built.spec.min_engine == requirement.oldest
        assert (built.spec.fitted_to is not None) == requirement.calibrated


def test_blocks_give_the_vectors_of_the_codes_on_onnxruntime(graph: ir.Model) -> None:
    """The same codes; onnxruntime also rounds activations."""
    for weights, cosine in (("int8-weight-only", 0.999), ("int4-weight-only", 0.995)):
        found = run(quantize(graph, weights), IDS, MASK)
        expected = onnxruntime_runner(quantize_for_onnxruntime(graph, weights))(IDS, MASK)[0]
        assert float((found * expected).sum(axis=1).min()) >= cosine


def test_narrow_weights_make_small_files(graph: ir.Model) -> None:
    sizes = {
        weights: sum(map(len, files(model).values()))
        for weights in ("fp32", "fp16", "int8-weight-only", "int4-weight-only")
        for model in [quantize(graph, weights)]
    }
    assert sizes["fp16"] < 0.51 * sizes["fp32"]
    assert sizes["int8-weight-only"] < 0.3 * sizes["fp32"]
    assert sizes["int4-weight-only"] < 0.2 * sizes["fp32"]


@pytest.mark.parametrize("weights", ["int8-dynamic", "int8-static"])
def test_a_precision_that_openvino_lacks_is_refused_with_those_it_has(tmp_path, weights) -> None:
    with pytest.raises(UsageError, match=f"'{weights}' does not run on openvino; choose from fp32"):
        build_artifact(
            open_checkpoint(), 1, 32, tmp_path / "a", Recipe("openvino", weights=weights)
        )
    plan = Plan((1,), (32,), ("fp32", weights), engine="openvino")
    with pytest.raises(UsageError, match="does not run on openvino"):
        tasks = [load_task(default_task_paths()[1])]
        profile_checkpoint(open_checkpoint(), tasks, calibration_texts(), plan)


def test_an_openvino_that_is_too_old_is_named() -> None:
    with pytest.raises(M2DError, match=r"needs openvino 9999\.1 or newer and \d"):
        require_version("openvino", "9999.1")


def test_weights_that_depend_on_the_batch_are_refused(
    tmp_path: Path, original, monkeypatch
) -> None:
    """The gate measures what the engine returns."""

    def spoiled(session, ids, mask):  # type: ignore[no-untyped-def]
        return [vectors + np.float32(3e-4 * len(ids)) for vectors in run_really(session, ids, mask)]

    run_really = engine.run
    monkeypatch.setattr(engine, "run", spoiled)
    with pytest.raises(ParityError, match="depends on its batch"):
        exported = original(None, 1, 36, "openvino")
        make_artifact(exported, tmp_path / "a", Recipe("openvino", weights="int8"))
    assert not (tmp_path / "a").exists()


def test_a_bundle_verifies_and_encodes(int8: Artifact, tmp_path: Path) -> None:
    write_bundle(int8.path, tmp_path / "a.m2d")
    assert verify_bundle(tmp_path / "a.m2d").space_id == int8.spec.space_id
    found = loading.load(tmp_path / "a.m2d").encode(PROBES)
    np.testing.assert_array_equal(found, loading.load(int8.path).encode(PROBES))


def test_a_bundle_of_another_engine_than_it_names_is_refused(
    int8: Artifact, tmp_path: Path
) -> None:
    write_bundle(int8.path, tmp_path / "a.m2d")
    files = open_bundle(tmp_path / "a.m2d")
    files["artifact.json"] = files["artifact.json"].replace(b'"openvino",', b'"onnx",', 1)
    with pytest.raises(BundleError, match=r"lacks 'model\.onnx', the graph of engine onnx"):
        runtime.encoder_from_files(files, tmp_path / "a.m2d")


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3", "deberta-v2"])
def test_int8_is_that_of_onnxruntime_in_standard_operators(family: str, small, original) -> None:
    """OpenVINO's transformations of quantized graphs must not change what it computes."""
    exported = original(small(family), 2, 64, "openvino").graph
    standard = quantize(exported, "int8", TOKENS)
    assert {node.domain for node in standard.graph} == {""}
    assert set(standard.opset_imports) == {""}
    fused = exported.clone()
    fuse_for_onnxruntime(fused)
    expected = onnxruntime_runner(quantize_for_onnxruntime(fused, "int8", TOKENS))(IDS, MASK)[0]
    assert float((run(standard, IDS, MASK) * expected).sum(axis=1).min()) >= 0.9999


def test_a_gelu_as_exported_is_shifted_as_a_fused_one_is(quantized: ir.Model) -> None:
    assert "int8.gelu_floor" in quantized.graph.initializers


def test_int8_is_computed_in_8_bits_but_for_what_stays(
    graph: ir.Model, quantized: ir.Model
) -> None:
    """Every product of codes is one that OpenVINO computes in 8 bits, if it does so at all here."""
    import openvino

    here = "INT8" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    units = list(units_of(graph.graph).values())
    for count in range(len(units) + 1):
        kept = [name for unit in units[:count] for name in unit]
        model = restore(quantized, graph, kept)
        assert products_of_codes(model) == 6 - len(kept)
        assert products_in_8_bits(load(model)) == (6 - len(kept) if here else 0)


def test_keeping_all_weights_leaves_nothing_but_tables_quantized(
    graph: ir.Model, quantized: ir.Model
) -> None:
    every = [name for unit in units_of(graph.graph).values() for name in unit]
    only_tables = graph.clone()
    quantize_tables(only_tables.graph)
    found = run(restore(quantized, graph, every), IDS, MASK)
    np.testing.assert_allclose(found, run(only_tables, IDS, MASK), atol=1e-6)


def test_padding_and_neighbours_change_no_bit_of_an_int8_vector(quantized: ir.Model) -> None:
    """A sum in another order would differ in its last bit, and here and there in a code."""
    session = load(quantized)
    for length in (3, 15, 17, 31):
        ids = np.random.default_rng(length).integers(1000, 30000, (1, length))
        (alone,) = engine.run(session, ids, np.ones_like(ids))[0]
        for width in (length, length + 1, 32, 40, 48, 70):
            others = np.random.default_rng(width).integers(1000, 30000, (5, width))
            mask = np.ones_like(others)
            others[2], mask[2] = 0, 0
            others[2, :length], mask[2, :length] = ids, 1
            np.testing.assert_array_equal(engine.run(session, others, mask)[0][2], alone)


def test_a_width_that_blocks_do_not_divide_is_padded(tmp_path: Path) -> None:
    config = {"hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 1}
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path / "m", config=config))
    exported = vector_graph(graph_from_checkpoint(checkpoint), 72)
    expected = run(exported, IDS, MASK)
    for weights, cosine in (("int8-weight-only", 0.999), ("int4-weight-only", 0.95)):
        found = run(quantize(exported, weights), IDS, MASK)
        assert float((found * expected).sum(axis=1).min()) >= cosine
        assert not np.array_equal(found, expected)


def test_padding_changes_no_fp16_vector(graph: ir.Model) -> None:
    model = quantize(graph, "fp16")
    alone = run(model, IDS[1:, :3], MASK[1:, :3])[0]
    for width in (4, 40):
        ids, mask = (np.pad(a[1:, :3], ((0, 0), (0, width - 3))) for a in (IDS, MASK))
        found = run(model, ids, mask)[0]
        assert float(found @ alone) >= 0.99999


def test_the_same_graph_makes_the_same_bytes() -> None:
    """Also after OpenVINO has numbered other nodes in this process."""
    first = files_from_onnx(tiny_graph(12, "float32", None))
    files_from_onnx(tiny_graph(8, "ubinary", None))
    assert files_from_onnx(tiny_graph(12, "float32", None)) == first


@pytest.mark.parametrize("vectors", VECTOR_PRECISIONS)
def test_a_model_loads_from_files_and_from_bytes(tmp_path: Path, vectors) -> None:
    """And its codes are those of the same graph on ONNX Runtime."""
    graph = tiny_graph(12, vectors, tiny_ranges(12) if vectors in LEVELS else None)
    made = files_from_onnx(graph)
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
    expected = onnxruntime_runner(ir.from_proto(onnx.load_from_string(graph)))(IDS, MASK)[0]
    for given in ({name: tmp_path / name for name in made}, made):
        (found,) = engine.run(engine.load(given, Device(), "portable"), IDS, MASK)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert found.dtype == expected.dtype


def test_nothing_is_computed_below_float32_unasked() -> None:
    session = engine.load(
        files_from_onnx(tiny_graph(12, "float32", None)), Device(threads=1), "portable"
    )
    read = session.compiled.get_property
    assert read("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert read("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0
    assert read("INFERENCE_NUM_THREADS") == 1


def test_another_reader_learns_not_to_quantize_activations(quantized: ir.Model) -> None:
    import openvino

    xml, weights = files(quantized).values()
    core = openvino.Core()
    read = core.read_model(xml, openvino.Tensor(np.frombuffer(weights, np.uint8)))
    compiled = core.compile_model(read, "CPU")
    assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0


def test_one_session_serves_several_threads() -> None:
    session = engine.load(
        files_from_onnx(tiny_graph(12, "float32", None)), Device(threads=1), "portable"
    )
    expected = engine.run(session, IDS, MASK)[0]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: engine.run(session, IDS, MASK)[0], range(40)))
    for vectors in found:
        np.testing.assert_array_equal(vectors, expected)


def test_a_profile_has_cells_of_the_engine(shallow: Checkpoint) -> None:
    plan = Plan(
        (1,),
        (32,),
        ("fp32", "int8"),
        ("float32",),
        ((1, 8),),
        engine="openvino",
        device=Device(threads=1),
        repeats=3,
        align=("none",),
    )
    tasks = [load_task(default_task_paths()[1])]
    found = profile_checkpoint(shallow, tasks, calibration_texts()[:120], plan)
    assert found.reference_cell().id == "2x384-fp32-float32@openvino"
    cells = [cell for cell in found.cells if cell.layers == 1]
    assert [cell.engine for cell in cells] == ["openvino", "openvino"]
    assert cells[1].size_bytes < 0.35 * cells[0].size_bytes  # model.bin is counted
    assert abs(cells[1].mean_quality - cells[0].mean_quality) < 1
    assert all(cell.p50_ms > 0 and cell.load_ms > 0 for cell in cells)


def test_an_openvino_artifact_is_not_quantized_again(int8: Artifact, tmp_path: Path) -> None:
    spec = int8.path / "artifact.json"
    plain = tmp_path / "plain"
    plain.mkdir()
    text = spec.read_text().replace('"weights": "int8"', '"weights": "fp32"')
    (plain / "artifact.json").write_text(text.replace('"vectors": "int8"', '"vectors": "float32"'))
    relisted(plain)
    with pytest.raises(UsageError, match="build with --engine openvino --weights int8"):
        quantize_artifact(plain, tmp_path / "out", Recipe(weights="int8", vectors="int8"))


@pytest.mark.parametrize("damaged", ["model.xml", "model.bin"])
def test_a_damaged_model_is_one_sentence(tmp_path: Path, damaged: str) -> None:
    made = files_from_onnx(tiny_graph(12, "float32", None))
    made[damaged] = made[damaged][:100]
    with pytest.raises(M2DError, match="OpenVINO cannot load the model: ") as caught:
        engine.load(made, Device(), "portable")
    assert "\n" not in str(caught.value)
    assert "src/" not in str(caught.value)


def test_a_device_that_is_not_there_is_named() -> None:
    made = files_from_onnx(tiny_graph(12, "float32", None))
    with pytest.raises(UsageError, match="ABACUS is not an OpenVINO device of this machine"):
        engine.load(made, Device("ABACUS"), "portable")


def test_an_operator_that_openvino_does_not_know_is_one_sentence() -> None:
    model = onnx.load_from_string(tiny_graph(12, "float32", None))
    model.graph.node[-1].op_type = "Abacus"
    with pytest.raises(M2DError, match="OpenVINO cannot read the graph: ") as caught:
        files_from_onnx(model.SerializeToString())
    assert "\n" not in str(caught.value)


def test_without_openvino_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "m2dexport.engines.openvino.run")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtra, match=r'run: pip install "m2dexport\[openvino\]"'):
        engine_runner("openvino")


def test_a_device_needs_no_onnxruntime(int8: Artifact, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from m2dexport.runtime.loading import load\n"
        "print(load(sys.argv[1]).encode(['a']).shape)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(int8.path)], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "(1, 36)"), ran.stderr


def test_a_compiled_model_is_kept_where_the_device_says(tmp_path: Path) -> None:
    made = files_from_onnx(tiny_graph(12, "float32", None))
    device = Device(threads=1, cache=tmp_path / "cache")
    first, second = (engine.run(engine.load(made, device, "portable"), IDS, MASK) for _ in range(2))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".blob"]
    np.testing.assert_array_equal(first, second)
    with pytest.raises(UsageError, match="onnxruntime compiles nothing"):
        engine_runner("onnx").load({}, device, "portable")
