"""TensorRT: graphs that the real library takes, engines that it builds, and what is refused.

TensorRT-RTX parses and builds without a GPU; onnxruntime runs the same graphs. What needs a GPU is
marked ``gpu``.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx_ir as ir
import pytest
from command_line import m2d
from tiny import FAMILIES, TEXTS

from m2dexport.build.build import Artifact, build_artifact
from m2dexport.build.recipe import Recipe
from m2dexport.build.source import Source, export_source
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.data import calibration_texts
from m2dexport.engines import Compilation, Device, engine_maker, engine_runner, here
from m2dexport.engines.tensorrt import cuda, library, load, session, store
from m2dexport.engines.tensorrt.recipe import (
    EngineRecipe,
    Profile,
    profiles_for,
    recipe_from_toml,
)
from m2dexport.errors import M2DError, MissingDevice, MissingExtra, UsageError
from m2dexport.quantize.activations import CalibrationTokens
from m2dexport.quantize.typed import compute_half, hide_finitely
from m2dexport.runtime.bundle import verify_bundle, write_bundle
from m2dexport.runtime.loading import load as load_encoder
from m2dexport.runtime.tokenizer import load_tokenizer, tokenize
from m2dexport.vectors.codecs import cosines

trt = pytest.importorskip("tensorrt_rtx_bindings")
RTX = "tensorrt-rtx"
PRECISIONS = engine_maker(RTX).PRECISIONS
ONE_GPU = Compilation(gpus=("8.9",), shapes=((1, 16),), max_length=64)
ORACLE = Device("CPU", threads=1)


def run(*arguments: object) -> str:
    result = m2d(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def failure(*arguments: object) -> str:
    result = m2d(*arguments)
    assert result.exit_code in (1, 2), result.output
    assert result.output.startswith("Error: ") and result.output.count("\n") == 1
    return result.output


@cache
def source(folder: Path) -> Source:
    return export_source(open_checkpoint(folder), (2,), 32, RTX)


@cache
def tokens(folder: Path) -> CalibrationTokens:
    found = source(folder)
    tokenizer = load_tokenizer(found.tokenizer_json)
    ids = [each.ids for each in tokenize(tokenizer, calibration_texts()[:100], found.prompt)]
    return CalibrationTokens(ids, found.pad_id)


@cache
def graph(folder: Path, weights: str) -> ir.Model:
    maker = engine_maker(RTX)
    model: ir.Model = maker.quantize(source(folder).vectors_at(2), weights, tokens(folder))
    return model


def outputs(files: dict[str, bytes]) -> np.ndarray:
    engine = engine_runner(RTX)
    ids = np.array([[2, 7, 9, 3, 0, 0], [2, 8, 5, 6, 7, 3]])
    mask = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    (found,) = engine.run(engine.load(files, ORACLE, "portable"), ids, mask)
    return found


def parsed(content: bytes) -> Any:
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse(content), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    # The network belongs to the builder, which must live as long.
    return network, builder, parser


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_family_is_taken_in_every_precision_and_computes_as_in_float32(small, family) -> None:
    folder = small(family)
    expected = outputs(engine_maker(RTX).files(graph(folder, "fp32"), ONE_GPU))
    for weights in PRECISIONS:
        files = engine_maker(RTX).files(graph(folder, weights), ONE_GPU)
        network, *_owners = parsed(files["model.onnx"])
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        assert [each.name for each in inputs] == ["input_ids", "attention_mask"]
        assert {each.dtype for each in inputs} == {trt.int64}
        output = network.get_output(0)
        assert (output.name, output.dtype, output.shape[1]) == (
            "sentence_embedding",
            trt.float32,
            32,
        )
        floor = {"fp32": 0.999999, "fp16": 0.9999, "int4-weight-only": 0.75}.get(weights, 0.98)
        assert cosines(expected, outputs(files)).min() >= floor, weights


@pytest.mark.parametrize("weights", sorted(PRECISIONS))
def test_an_engine_is_built_of_every_precision(bert, small, weights) -> None:
    maker = engine_maker(RTX)
    files = maker.files(graph(small("bert"), weights), ONE_GPU)
    built = maker.compiled(files, replace(ONE_GPU, keep_engine=True))
    recipe = recipe_from_toml(built["engine.toml"], "engine.toml")
    assert recipe.built is not None and recipe.gpus == ["8.9"]
    assert recipe.built.engine_sha256 == hashlib.sha256(built["model.engine"]).hexdigest()
    assert maker.compiled(files, replace(ONE_GPU, keep_engine=True)) == built  # the same bytes


def test_what_only_newer_gpus_compute_leaves_turing_out(small) -> None:
    maker, all_known = engine_maker(RTX), library.known_gpus(trt)
    assert all_known[0] == "7.5" and "9.0" not in all_known
    for weights, gpus in (("fp16", all_known), ("bf16", all_known[1:])):
        named = Compilation(max_length=64)
        files = maker.compiled(maker.files(graph(small("bert"), weights), named), named)
        assert recipe_from_toml(files["engine.toml"], "e").gpus == gpus
    named = replace(ONE_GPU, gpus=("7.5",))
    with pytest.raises(M2DError, match=r"tensorrt-rtx .* cannot build the graph: .*b16"):
        maker.compiled(maker.files(graph(small("bert"), "bf16"), named), named)


def test_norms_softmax_and_pooling_stay_in_float32_and_products_do_not(small) -> None:
    types = {
        node.op_type: {value.dtype for value in node.inputs if value is not None}
        for node in graph(small("bert"), "fp16").graph
        if node.op_type in ("LayerNormalization", "Softmax", "ReduceSum", "MatMul", "Erf")
    }
    wide, half = ir.DataType.FLOAT, ir.DataType.FLOAT16
    assert types["MatMul"] == types["Erf"] == {half}
    assert types["LayerNormalization"] == types["Softmax"] == {wide}
    assert wide in types["ReduceSum"] and half not in types["ReduceSum"]


def test_masks_are_finite_in_float16(small) -> None:
    for family in ("bert", "modernbert", "qwen3"):
        for value in graph(small(family), "fp16").graph.initializers.values():
            tensor = value.const_value
            assert tensor is not None
            if tensor.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
                assert np.abs(tensor.numpy().astype(np.float32)).max(initial=0) < 65504


def test_hiding_keys_finitely_changes_no_vector(small) -> None:
    model = source(small("modernbert")).vectors_at(2)
    changed = model.clone()
    hide_finitely(changed.graph)
    maker = engine_maker(RTX)
    np.testing.assert_allclose(
        outputs(maker.files(changed, ONE_GPU)), outputs(maker.files(model, ONE_GPU)), atol=1e-6
    )


def test_integer_precisions_have_symmetric_codes_and_no_operators_of_onnxruntime(small) -> None:
    for weights in ("int8", "int8-weight-only", "int4-weight-only"):
        model = graph(small("bert"), weights)
        assert {node.domain for node in model.graph} == {""}
        for node in model.graph:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.inputs) > 2:
                zero = node.inputs[2]
                assert zero is not None and zero.const_value is not None
                assert not zero.const_value.numpy().any()
        quantized = sum(node.op_type == "QuantizeLinear" for node in model.graph)
        assert (quantized > 0) == (weights == "int8")


def test_a_weight_beyond_float16_is_named(small) -> None:
    model = source(small("bert")).vectors_at(2)
    weight = next(v for v in model.graph.initializers.values() if (v.name or "").endswith("weight"))
    array = weight.const_value.numpy().copy()  # type: ignore[union-attr]
    array.flat[0] = 1e6
    weight.const_value = ir.tensor(array, name=weight.name)
    with pytest.raises(M2DError, match=f"weight {weight.name} holds values beyond float16"):
        compute_half(model, ir.DataType.FLOAT16)


@pytest.fixture(scope="module")
def artifact(small, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A small BERT in fp16 with int8 vectors and its engine for one GPU; read only."""
    folder = tmp_path_factory.mktemp("tensorrt")
    checkpoint = open_checkpoint(small("bert"))
    compilation = Compilation(gpus=("8.9",), keep_engine=True)
    recipe = Recipe(RTX, weights="fp16", vectors="int8", compilation=compilation)
    return build_artifact(checkpoint, 2, 32, folder / "a", recipe)


def copied(artifact: Artifact) -> dict[str, bytes]:
    names = ("model.onnx", "engine.toml", "model.engine")
    return {name: (artifact.path / name).read_bytes() for name in names}


def test_an_artifact_says_what_checked_it_where_there_is_no_gpu(artifact) -> None:
    assert artifact.spec.checked_by.startswith(("onnxruntime ", "tensorrt-rtx "))
    assert artifact.spec.device == Device()
    assert artifact.spec.parity["mean_cosine"] > 0.9999


def test_a_bundle_carries_its_engine_and_runs_on_the_cpu_when_asked(artifact, tmp_path) -> None:
    info = write_bundle(artifact.path, tmp_path / "a.m2d")
    assert {"engine.toml", "model.engine", "model.onnx"} <= set(info.files)
    encoder = load_encoder(info.path, ORACLE)
    assert encoder.encode(TEXTS).dtype == np.int8
    assert verify_bundle(info.path, ORACLE).worst >= 0.9999
    assert not (tmp_path / "a.m2d.engines").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.engine": b"damaged"}, "model.engine is damaged, or not the one that engine.toml"),
        ({"engine.toml": b"format = "}, "engine.toml cannot be read as TOML"),
        ({"engine.toml": b"format = 2"}, "has format 2 and this version reads format 1; upgrade"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(artifact, change, message) -> None:
    with pytest.raises(M2DError, match=message):
        engine_runner(RTX).load({**copied(artifact), **change}, ORACLE, "portable")


def test_an_engine_of_another_graph_or_library_is_refused(artifact) -> None:
    files, runner = copied(artifact), engine_runner(RTX)
    with pytest.raises(M2DError, match=r"built from another graph than model.onnx"):
        runner.load({**files, "model.onnx": files["model.onnx"] + b"\0"}, ORACLE, "portable")
    recipe = recipe_from_toml(files["engine.toml"], "e")
    foreign = replace(recipe, library="tensorrt").to_toml()
    with pytest.raises(M2DError, match=r"engine.toml is for tensorrt, not for tensorrt-rtx"):
        runner.load({**files, "engine.toml": foreign}, ORACLE, "portable")
    del files["model.engine"]
    with pytest.raises(M2DError, match=r"engine.toml and model.engine do not go together"):
        runner.load(files, ORACLE, "portable")


def test_an_engine_that_the_library_cannot_load_is_one_sentence() -> None:
    with pytest.raises(
        M2DError, match=r"tensorrt-rtx \S+ cannot load the engine: it is damaged\.$"
    ):
        library.read_engine(b"\0" * 4096, recipe())


def test_a_graph_that_the_library_refuses_is_named_with_what_it_says(original) -> None:
    fused = original(None, 1, 32, "onnx").graph  # with onnxruntime's own attention
    content = engine_maker("onnx").files(fused)["model.onnx"]
    with pytest.raises(M2DError, match=r"tensorrt-rtx \S+ cannot read the graph: .*MultiHead") as e:
        library.build_engine(content, recipe(), ["8.9"])
    assert "\n" not in str(e.value) and "checkMacros" not in str(e.value)


GPU = cuda.Gpu(0, "NVIDIA L4", "8.9", 13000)


def recipe(**changes: Any) -> EngineRecipe:
    profiles = [Profile([1, 1], [1, 16], [1, 256]), Profile([1, 1], [32, 64], [32, 64])]
    return replace(EngineRecipe(1, RTX, "float16", ["8.9"], [], profiles), **changes)


def test_an_engine_that_came_along_is_not_used_by_another_version_or_gpu(artifact) -> None:
    files = copied(artifact)
    found = recipe_from_toml(files["engine.toml"], "e")
    version = found.built.version
    assert load._built_for(found, files, version, GPU) == files["model.engine"]
    with pytest.warns(UserWarning, match=f"made by tensorrt-rtx {version}, and 9.9 is installed"):
        assert load._built_for(found, files, "9.9", GPU) is None
    other = replace(GPU, name="NVIDIA RTX 5090", capability="12.0")
    with pytest.warns(UserWarning, match="made for 8.9, and NVIDIA RTX 5090 has 12.0"):
        assert load._built_for(found, files, version, other) is None


def test_a_recipe_survives_its_file() -> None:
    for whole in (recipe(gpus=["8.9", "12.0"]), recipe(compatible=["hardware"], gpus=[])):
        assert recipe_from_toml(whole.to_toml(), "engine.toml") == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profiles": []}, "profiles is missing"),
        ({"profiles": [Profile([2, 1], [2, 1], [2, 2])]}, "not two sizes each that follow one"),
        ({"profiles": [Profile([1, 1], [1, 9], [1, 8])]}, "not two sizes each that follow one"),
        ({"profiles": [Profile([1, 1, 1], [1, 9], [1, 9])]}, "not two sizes each that follow one"),
        ({"profiles": [Profile([1, 1], [1, 9], [1 << 20, 9])]}, "a profile of 9,437,184 tokens"),
        ({"compatible": ["version"]}, "names GPUs and asks for more compatibility"),
        ({"gpus": ["ada"]}, "a compute capability is needed"),
        ({"computes": "int8"}, "computes is 'int8'"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(changes, message) -> None:
    with pytest.raises(M2DError, match=message):
        recipe_from_toml(recipe(**changes).to_toml(), "engine.toml")


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(1, 16), (1, 64), (16, 32)], [(1, 256), (16, 32), (2, 256)]),
        ([(1, 16)], [(1, 256)]),
        ([(32, 128)], [(32, 128), (16, 256)]),
        ([(8, 256)], [(8, 256)]),
        ([(2, 16)], [(2, 16), (1, 256)]),
        ([], [(1, 256), (32, 128), (16, 256)]),
    ],
)
def test_profiles_take_every_text_that_the_model_takes(shapes, expected) -> None:
    assert [tuple(each.most) for each in profiles_for(shapes, 256)] == expected


def test_a_shape_beyond_the_model_is_refused() -> None:
    with pytest.raises(UsageError, match="the shape 1x512 is beyond the model, which takes 1 to"):
        profiles_for([(1, 512)], 256)


@pytest.mark.parametrize(
    ("texts", "tokens", "expected"), [(1, 16, 0), (32, 16, 1), (2, 64, 1), (1, 200, 0), (99, 64, 1)]
)
def test_a_batch_runs_with_the_smallest_profile_that_takes_it(texts, tokens, expected) -> None:
    assert session.choose_profile(recipe().profiles, texts, tokens) == expected


def test_a_text_beyond_every_profile_is_one_sentence() -> None:
    with pytest.raises(M2DError, match="takes texts of 256 tokens at most, not 300"):
        session.choose_profile(recipe().profiles, 1, 300)


def test_what_is_kept_is_found_again_unless_anything_changed(tmp_path: Path) -> None:
    key = store.key_of(b"graph", b"recipe", (RTX, "1.7"), GPU)
    store.keep(tmp_path / "new", key, "engine", b"engine")
    assert store.stored(tmp_path / "new", key, "engine") == b"engine"
    changed = [
        store.key_of(b"other", b"recipe", (RTX, "1.7"), GPU),
        store.key_of(b"graph", b"other", (RTX, "1.7"), GPU),
        store.key_of(b"graph", b"recipe", (RTX, "1.8"), GPU),
        store.key_of(b"graph", b"recipe", ("tensorrt", "1.7"), GPU),
        *(
            store.key_of(b"graph", b"recipe", (RTX, "1.7"), replace(GPU, **{name: value}))
            for name, value in (("name", "L40"), ("capability", "9.0"), ("driver", 1))
        ),
    ]
    assert len({each.name() for each in (key, *changed)}) == 8
    assert all(store.stored(tmp_path / "new", each, "engine") is None for each in changed)
    (tmp_path / "new" / f"{key.name()}.engine").write_bytes(b"damaged")
    assert store.stored(tmp_path / "new", key, "engine") is None


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    key = store.key_of(b"", b"", (RTX, "1.7"), GPU)
    with pytest.warns(UserWarning, match=r"folder'; it is made again next time"):
        store.keep(tmp_path / "file" / "folder", key, "engine", b"")


def test_a_gpu_that_the_library_does_not_know_is_named_and_the_oracle_stands_in(
    monkeypatch,
) -> None:
    gpu = cuda.Gpu(0, "NVIDIA H100", "9.0", 13000)
    monkeypatch.setattr(load, "require_gpu", lambda index, engine: gpu)
    monkeypatch.setattr(load, "gpu_count", lambda: 1)
    assert engine_runner(RTX).devices() == ("CPU",)
    with pytest.raises(MissingDevice, match=r"makes no engines for NVIDIA H100 .*9.0.*, only for"):
        engine_runner(RTX).require_device(Device("CUDA"))
    assert here(RTX, Device()).device.provider == "CPU"


def test_an_engine_is_built_once_and_kept(small, tmp_path: Path) -> None:
    files = engine_maker(RTX).files(graph(small("bert"), "fp16"), ONE_GPU)
    content, made = files["model.onnx"], recipe_from_toml(files["engine.toml"], "e")
    key = store.key_of(content, files["engine.toml"], (RTX, "1.7"), GPU)
    with pytest.warns(
        UserWarning, match=r"an engine is built for NVIDIA L4, and kept in .*seconds"
    ):
        built = load._kept_or_built(made, content, key, GPU, tmp_path / "e")
    assert load._kept_or_built(made, b"", key, GPU, tmp_path / "e") == built


@pytest.mark.usefixtures("no_gpu")
class TestWithoutGpu:
    """What the command line says where there is no GPU."""

    @pytest.fixture
    def no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from cuda.bindings import runtime

        none = runtime.cudaError_t.cudaErrorNoDevice
        monkeypatch.setattr(runtime, "cudaGetDeviceCount", lambda: (none, None))

    def test_a_bundle_does_not_run_on_the_cpu_unasked(self, artifact, tmp_path: Path) -> None:
        bundle = write_bundle(artifact.path, tmp_path / "a.m2d").path
        said = failure("verify", bundle)
        assert "tensorrt-rtx needs an NVIDIA GPU and its driver" in said
        assert "by onnxruntime with --provider CPU" in said
        assert "33 golden texts reproduced" not in said
        assert "reproduced" in run("verify", bundle, "--provider", "CPU")

    def test_build_says_what_checked_the_graph(self, small, tmp_path: Path) -> None:
        out = tmp_path / "a"
        said = run(
            "build", "--model", small("bert"), "--engine", RTX, "--gpu", "8.9, 12.0", "--out", out
        )
        assert "weights=fp16" in said and "run by onnxruntime" in said and "no GPU is here" in said
        assert 'gpus = ["8.9", "12.0"]' in (out / "engine.toml").read_text()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--engine", RTX, "--gpu", "9.0"), "no engines for the compute capability '9.0'"),
            (("--engine", RTX, "--provider", "CUDA:x"), "runs on CUDA, on CUDA:1 where"),
            (("--engine", RTX, "--provider", "CUDA"), "CUDA finds none here"),
            (("--engine", RTX, "--compatible", "version"), "are portable; leave --compatible"),
            (("--gpu", "8.9"), "--gpu, --compatible and --with-engine do not go with onnx"),
        ],
    )
    def test_what_cannot_be_built_is_one_sentence(self, bert, tmp_path, options, message) -> None:
        said = failure("build", "--model", bert, *options, "--out", tmp_path / "a")
        assert message in said
        assert not (tmp_path / "a").exists()

    def test_tensorrt_itself_needs_the_gpu_that_it_builds_for(
        self, bert, tmp_path, monkeypatch
    ) -> None:
        """The functions of the other library have the same names, so it can stand in."""
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        said = failure("build", "--model", bert, "--engine", "tensorrt", "--out", tmp_path / "a")
        assert "tensorrt needs an NVIDIA GPU" in said


def test_tensorrt_is_configured_as_asked(small, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    files = engine_maker("tensorrt").files(
        graph(small("bert"), "fp16"), Compilation(max_length=64, compatible=("hardware", "version"))
    )
    made = recipe_from_toml(files["engine.toml"], "e")
    assert (made.library, made.gpus, made.compatible) == ("tensorrt", [], ["hardware", "version"])
    config = Mock(spec=trt.IBuilderConfig)  # a real one ignores what is not TensorRT-RTX's
    library._configure(trt, config, made, [])
    assert config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS
    config.set_flag.assert_called_once_with(trt.BuilderFlag.VERSION_COMPATIBLE)
    config.clear_flag.assert_called_once_with(trt.BuilderFlag.TF32)


def test_16_bits_without_a_gpu_name_the_install_that_runs_them(small, monkeypatch) -> None:
    files = engine_maker(RTX).files(graph(small("bert"), "fp16"), ONE_GPU)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(MissingExtra, match=r"16 bits without a GPU needs the onnx_ir .*export"):
        engine_runner(RTX).load(files, ORACLE, "portable")


def test_the_oracle_overflows_where_float16_does(small, tmp_path: Path) -> None:
    """onnxruntime by itself computes such graphs in float32, in which nothing overflows."""
    model = source(small("bert")).vectors_at(2)
    for value in model.graph.initializers.values():
        if "dense.weight" in str(value.name) and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy() * 3e3, name=value.name)
    maker = engine_maker(RTX)
    found = {
        weights: outputs(maker.files(maker.quantize(model, weights), ONE_GPU))
        for weights in ("fp32", "fp16", "bf16")
    }
    assert np.isfinite(found["fp32"]).all() and np.isfinite(found["bf16"]).all()
    assert not np.isfinite(found["fp16"]).all()


@pytest.mark.parametrize("weights", ["int8", "int4-weight-only"])
def test_a_dead_channel_is_built_and_a_weight_beyond_float16_named(small, weights) -> None:
    model, maker = source(small("bert")).vectors_at(2), engine_maker(RTX)
    names = [str(name) for name in model.graph.initializers if name.endswith("dense.weight")]
    value = model.graph.initializers[names[0]]
    array = value.const_value.numpy().copy()  # type: ignore[union-attr]
    array[:, 3] = 0
    value.const_value = ir.tensor(array, name=value.name)
    files = maker.files(maker.quantize(model, weights, tokens(small("bert"))), ONE_GPU)
    assert maker.compiled(files, ONE_GPU)["model.onnx"] == files["model.onnx"]
    array[0, 0] = 2e5
    value.const_value = ir.tensor(array, name=value.name)
    with pytest.raises(M2DError, match=f"weight {value.name} holds values beyond float16"):
        maker.quantize(model, weights, tokens(small("bert")))


@pytest.mark.gpu
@pytest.mark.parametrize("weights", sorted(PRECISIONS))
def test_a_gpu_gives_the_vectors_of_the_oracle(small, tmp_path: Path, weights) -> None:
    recipe = Recipe(RTX, weights=weights)
    built = build_artifact(open_checkpoint(small("bert")), 2, 32, tmp_path / "a", recipe)
    texts = [*TEXTS, *calibration_texts()[:70]]  # of several profiles, more than one takes
    on_gpu, on_cpu = (
        load_encoder(built.path, device).encode(texts) for device in (Device(), ORACLE)
    )
    assert cosines(on_gpu, on_cpu).min() >= (0.999999 if weights == "fp32" else 0.995)


@pytest.mark.gpu
def test_a_bundle_verifies_on_the_gpu_and_keeps_its_engine(artifact, tmp_path: Path) -> None:
    bundle = write_bundle(artifact.path, tmp_path / "a.m2d").path
    with pytest.warns(UserWarning, match="an engine is built for"):
        assert verify_bundle(bundle).texts > 0
    first = load_encoder(bundle)
    assert first.on_gpu
    again = [first.encode(TEXTS) for _ in range(5)]  # some of them replayed
    for vectors in again[1:]:
        np.testing.assert_array_equal(vectors, again[0])
    assert list((tmp_path / "a.m2d.engines").glob("*.engine"))
