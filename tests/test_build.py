"""build and quantize: artifacts that reproduce the torch original, or nothing at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from sentence_transformers import SentenceTransformer
from tiny import LAYERS, tiny_checkpoint

from m2dexport.build.build import build_artifact, make_artifact, quantize_artifact
from m2dexport.build.parity import PROBES
from m2dexport.build.recipe import Recipe
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.cli import cli
from m2dexport.errors import ParityError, UsageError
from m2dexport.files import MODEL_SETTINGS, SPEC
from m2dexport.runtime import loading as runtime
from m2dexport.runtime.archive import GOLDEN, open_bundle
from m2dexport.runtime.artifact import read_ranges, read_spec, require_same_space
from m2dexport.runtime.bundle import write_bundle
from m2dexport.runtime.manifest import MANIFEST
from m2dexport.slice.slicing import Cut, slice_checkpoint
from m2dexport.vectors.codecs import encode_vectors

ROOT = Path(__file__).parent.parent


def test_an_fp32_artifact_gives_sentence_transformers_vectors(bert: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(bert)
    artifact = build_artifact(checkpoint, 3, 20, tmp_path / "artifact")
    slice_checkpoint(checkpoint, 3, 20, tmp_path / "sub-model")
    expected = SentenceTransformer(str(tmp_path / "sub-model"), device="cpu").encode(list(PROBES))
    found = runtime.load(artifact.path).encode(PROBES)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert artifact.spec.parity["max_difference"] <= 1e-4
    assert artifact.size_bytes == sum(p.stat().st_size for p in artifact.path.iterdir())


def test_the_settings_of_the_sub_model_go_along(bert: Path, artifact, tmp_path: Path) -> None:
    slice_checkpoint(open_checkpoint(bert), 3, 20, tmp_path / "sub-model")
    expected = {name: (tmp_path / "sub-model" / name).read_bytes() for name in MODEL_SETTINGS}
    built = artifact(bert, 3, 20).path
    quantized = quantize_artifact(built, tmp_path / "int8", Recipe(vectors="int8-symmetric"))
    for folder in (built, quantized.path):
        files = open_bundle(write_bundle(folder, tmp_path / "e.m2d", force=True).path)
        assert {name: files[name] for name in MODEL_SETTINGS} == expected


def test_prompts_are_applied_as_sentence_transformers_applies_them(bert, artifact) -> None:
    model = SentenceTransformer(str(bert), device="cpu")
    found = runtime.load(artifact(bert, LAYERS, 32).path).encode(["a red house"], prompt="query")
    np.testing.assert_allclose(found, model.encode(["a red house"], prompt_name="query"), atol=1e-4)


@pytest.mark.parametrize("vectors", ["float32", "int8", "ubinary"])
@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8"])
def test_every_precision_can_be_built_of_the_shipped_checkpoint(artifact, weights, vectors) -> None:
    folder = artifact(None, 1, 36, Recipe(weights=weights, vectors=vectors)).path
    spec = read_spec(folder)
    assert (spec.layers, spec.dim, spec.weights, spec.vectors) == (1, 36, weights, vectors)
    assert spec.batch_invariant
    assert spec.coverage == 1 if weights == "fp32" else spec.coverage > 0.97
    assert (read_ranges(folder) is not None) == (vectors == "int8")
    width = {"float32": 36, "int8": 36, "ubinary": 5}[vectors]
    assert runtime.load(folder).encode(["one", "two"]).shape == (2, width)


@pytest.mark.parametrize(
    ("vectors", "bit_order", "width"),
    [("int8-symmetric", "big", 36), ("int4", "little", 18), ("binary", "big", 5)],
)
def test_every_code_can_be_built(artifact, vectors, bit_order, width) -> None:
    folder = artifact(None, 1, 36, Recipe(vectors=vectors, bit_order=bit_order)).path
    floats = runtime.load(artifact(None, 1, 36).path).encode(PROBES)
    expected = encode_vectors(floats, vectors, read_ranges(folder), bit_order)
    found = runtime.load(folder).encode(PROBES)
    assert found.shape == (len(PROBES), width)
    assert (found == expected).mean() >= 0.999


def test_clipping_is_measured_on_texts_that_the_ranges_have_not_seen(artifact) -> None:
    assert 0 < artifact(None, 1, 36, Recipe(vectors="int8")).spec.clipping_rate < 0.02
    assert artifact(None, 1, 36).spec.clipping_rate is None


def test_a_bit_order_of_unpacked_vectors_is_refused(bert, tmp_path: Path) -> None:
    for vectors, bit_order, told in (
        ("int8", "little", "goes with packed vectors"),
        ("ubinary", "middle", "'middle' is unknown"),
    ):
        with pytest.raises(UsageError, match=told):
            build_artifact(
                open_checkpoint(bert),
                1,
                8,
                tmp_path / "a",
                Recipe(vectors=vectors, bit_order=bit_order),
            )


def test_quantizing_an_artifact_is_building_it_quantized(tmp_path: Path, artifact) -> None:
    recipe = Recipe(weights="int8", vectors="int8")
    built = build_artifact(open_checkpoint(), 1, 36, tmp_path / "built", recipe)
    quantized = quantize_artifact(artifact(None, 1, 36).path, tmp_path / "quantized", recipe)
    assert quantized.spec.space_id == built.spec.space_id
    for name in ("model.onnx", "tokenizer.json", "ranges.json"):
        assert (quantized.path / name).read_bytes() == (built.path / name).read_bytes()


def test_a_single_text_is_encoded_as_in_the_corpus(artifact) -> None:
    encoder = runtime.load(artifact(None, 1, 36, Recipe(weights="int8", vectors="int8")).path)
    texts = ["a man is playing a guitar", "interest rates rise", "x " * 90]
    together = encoder.encode(texts)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    assert (together == alone).mean() >= 0.999
    assert together.any(axis=1).all()


@pytest.fixture(scope="module")
def int8_bundle(artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = artifact(None, 1, 36, Recipe(weights="int8", vectors="int8")).path
    return write_bundle(folder, tmp_path_factory.mktemp("int8") / "edge.m2d").path


def test_rounding_moves_int8_and_the_limit_follows(int8_bundle: Path) -> None:
    """A last bit that differs becomes another code of an activation."""
    stored = json.loads(open_bundle(int8_bundle)[GOLDEN])
    rounding, limit = stored["spread"]["rounding"], stored["tolerance"]["limit"]
    assert 1e-6 < 1 - rounding < 5e-3
    assert limit == pytest.approx(1 - max(5 * (1 - rounding), 0.0005), abs=2e-9)


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="onnxruntime 1.17 has no wheel for it")
def test_a_bundle_verifies_on_the_oldest_onnxruntime_that_it_names(
    int8_bundle: Path, tmp_path: Path
) -> None:
    """All other tests run on the newest one. Its int8 vectors are others, within the limit."""
    oldest = json.loads(open_bundle(int8_bundle)[SPEC])["min_engine"]
    packages = [f"onnxruntime=={oldest}.*", "numpy<2"]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*install, str(tmp_path / "old"), *packages], check=True)
    ran = subprocess.run(
        [sys.executable, "-m", "m2dexport", "verify", str(int8_bundle), "--json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "old"), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert report["limit"] <= report["worst"] < 1
    assert report["equal_codes"] < 1


def test_ranges_come_from_the_precision_that_ships(artifact) -> None:
    texts = tuple(f"text number {n}" for n in range(150))
    folder = artifact(None, 1, 36, Recipe(vectors="int8", calibration=texts)).path
    vectors = runtime.load(artifact(None, 1, 36).path).encode(texts)
    ranges = read_ranges(folder)
    assert ranges is not None
    np.testing.assert_array_equal(ranges.low, vectors.min(axis=0))
    np.testing.assert_array_equal(
        runtime.load(folder).encode(texts), encode_vectors(vectors, "int8", ranges)
    )


def test_an_artifact_that_differs_is_an_error_and_leaves_no_file(bert, original, tmp_path) -> None:
    exported = original(bert, LAYERS, 32)
    other = replace(exported, expected=exported.expected[::-1])
    for weights, told in (("fp32", "differs from the torch original by"), ("fp16", "cosine")):
        with pytest.raises(ParityError, match=told):
            make_artifact(other, tmp_path / "a", Recipe(weights=weights, min_coverage=0))
        assert list(tmp_path.iterdir()) == []


def test_too_little_calibration_text_is_refused(bert, original, tmp_path: Path) -> None:
    recipe = Recipe(vectors="int8", calibration=("a", "b", "c"))
    with pytest.raises(UsageError, match="3 calibration texts are too few"):
        make_artifact(original(bert, LAYERS, 32), tmp_path / "a", recipe)


def test_quantizing_twice_is_refused(tmp_path: Path, artifact) -> None:
    half = artifact(None, 1, 36, Recipe(weights="fp16", vectors="float32")).path
    with pytest.raises(UsageError, match="already quantized"):
        quantize_artifact(half, tmp_path / "b", Recipe(weights="int8", vectors="int8"))


def test_an_existing_output_is_refused_before_any_work(bert, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(UsageError, match="already exists"):
        build_artifact(open_checkpoint(bert), 1, 8, tmp_path / "a")


def test_the_specification_names_what_made_it(bert, artifact) -> None:
    folder = artifact(bert, LAYERS, 32).path
    stored = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))
    assert set(stored["provenance"]) >= {"checkpoint", "m2dexport", "torch", "transformers"}
    assert stored["prompts"] == {"query": "find: ", "document": ""}


def test_the_licence_goes_wherever_the_weights_go(tmp_path: Path) -> None:
    """The shipped checkpoint's, from sub-model to artifact, quantized artifact and bundle."""
    folder = open_checkpoint().path
    expected = {name: (folder / name).read_text(encoding="utf-8") for name in ("LICENSE", "NOTICE")}
    sub_model = slice_checkpoint(open_checkpoint(), 1, 32, tmp_path / "sub-model")
    build_artifact(sub_model, 1, 32, tmp_path / "artifact")
    quantize_artifact(
        tmp_path / "artifact", tmp_path / "coded", Recipe(weights="fp32", vectors="ubinary")
    )
    write_bundle(tmp_path / "coded", tmp_path / "a.m2d")
    for name, text in expected.items():
        for stage in ("sub-model", "artifact", "coded"):
            assert (tmp_path / stage / name).read_text(encoding="utf-8") == text
    manifest = json.loads(open_bundle(tmp_path / "a.m2d")[MANIFEST])
    assert manifest["licenses"] == expected


def test_int8_for_vnni_is_another_space_and_says_so(tmp_path: Path, artifact) -> None:
    fp32 = str(artifact(None, 1, 36).path)
    specs = {}
    for isa in ("portable", "vnni"):
        out = "--isa", isa, "--out", str(tmp_path / isa)
        result = CliRunner().invoke(cli, ["quantize", fp32, "--weights", "int8", *out])
        assert result.exit_code == 0, result.output
        specs[isa] = read_spec(tmp_path / isa)
        assert specs[isa].isa == isa
    with pytest.raises(UsageError, match=r"differ in isa \('portable', 'vnni'\);"):
        require_same_space(specs["portable"], specs["vnni"], "index", "bundle")


@pytest.mark.parametrize("options", ["--weights fp16", "--weights int8 --engine openvino"])
def test_an_isa_that_nothing_follows_from_is_a_usage_error(tmp_path: Path, options: str) -> None:
    out = "--isa", "vnni", "--out", str(tmp_path / "a")
    result = CliRunner().invoke(cli, ["build", *options.split(), *out])
    assert result.exit_code == 2
    assert "--isa vnni does not go with --weights" in " ".join(result.output.split())


def test_a_dot_product_model_is_built_only_as_one_of_unit_vectors(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", normalize=False)
    path = model / "config_sentence_transformers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "similarity_fn_name": "dot"}))
    with pytest.raises(UsageError, match="compared by dot and keep their norms"):
        build_artifact(open_checkpoint(model), 1, 20, tmp_path / "a")
    unit = slice_checkpoint(open_checkpoint(model), 1, 20, tmp_path / "unit", Cut(normalize=True))
    spec = build_artifact(unit, 1, 20, tmp_path / "a").spec
    assert spec.similarity == "dot"
    assert "similarity" in (tmp_path / "a" / "artifact.json").read_text()
