"""Every weight precision on every kind of architecture, and the gates that an artifact passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tiny import tiny_checkpoint
from tiny_artifact import tiny_artifact, tiny_spec

from m2dexport.build.build import make_artifact, quantize_artifact
from m2dexport.build.parity import PROBES
from m2dexport.build.recipe import Recipe, require_recipe
from m2dexport.data import calibration_texts
from m2dexport.engines.onnxruntime.make import quantize, runner
from m2dexport.errors import CheckpointError, M2DError, MissingExtra, ParityError, UsageError
from m2dexport.graph.edit import table_users
from m2dexport.precisions import WEIGHT_PRECISIONS
from m2dexport.quantize.activations import CalibrationTokens
from m2dexport.quantize.dynamic import quantize_dynamic as quantize_dynamic_here
from m2dexport.runtime import loading as runtime
from m2dexport.runtime.artifact import read_spec

TEXTS = calibration_texts()[:100]
FAMILIES = ("bert", "roberta", "modernbert", "qwen3", "gemma3_text", "t5", "deberta-v2")
INVARIANT = tuple(w for w in WEIGHT_PRECISIONS if w not in ("int8-dynamic", "int8-static"))


@pytest.fixture(scope="module")
def fp32(small, artifact) -> Callable[[str], Path]:
    """From a family to an fp32 artifact of it, from which the precisions are made."""
    return lambda family: artifact(small(family), 2, 64).path


def quantized(artifact: Path, out: Path, weights: str, **options):  # type: ignore[no-untyped-def]
    return quantize_artifact(
        artifact,
        out,
        Recipe(
            weights=weights,
            vectors="float32",
            calibration=TEXTS,
            min_coverage=options.pop("min_coverage", 0.45),
            **options,
        ),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_precision_passes_the_gates_on_every_family(fp32, tmp_path, family) -> None:
    sizes = {}
    for weights in INVARIANT:
        artifact = quantized(fp32(family), tmp_path / weights, weights)
        assert artifact.spec.batch_invariant
        assert artifact.spec.left_in_float32 == []
        sizes[weights] = (artifact.path / "model.onnx").stat().st_size
    assert sizes["fp32"] > sizes["bf16"] > sizes["int8-weight-only"]
    assert sizes["int8-weight-only"] > sizes["int4-weight-only"]


@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_int8_depends_on_the_batch_and_needs_a_flag(fp32, tmp_path, family) -> None:
    with pytest.raises(ParityError, match=r"depends on its batch .* --allow-batch-dependent"):
        quantized(fp32(family), tmp_path / "refused", "int8-dynamic")
    assert list(tmp_path.iterdir()) == []
    artifact = quantized(fp32(family), tmp_path / "a", "int8-dynamic", allow_batch_dependent=True)
    assert not read_spec(artifact.path).batch_invariant
    assert artifact.spec.parity["batch_codes"] < 0.999
    encoder = runtime.load(artifact.path)  # one text at a time
    alone = np.concatenate([encoder.encode([text]) for text in PROBES[:6]])
    np.testing.assert_array_equal(encoder.encode(PROBES[:6]), alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_static_int8_passes_the_gates_on_every_family(fp32, tmp_path, family) -> None:
    artifact = quantized(fp32(family), tmp_path / "a", "int8-static")
    assert artifact.spec.batch_invariant
    assert artifact.spec.provenance["nncf"]


def test_static_int8_without_nncf_names_the_extra(fp32, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nncf", None)
    with pytest.raises(MissingExtra, match=r'pip install "m2dexport\[nncf\]"'):
        quantized(fp32("bert"), tmp_path / "a", "int8-static")


def test_an_uncalibrated_static_model_is_refused(fp32) -> None:
    model = ir.load(fp32("bert") / "model.onnx")
    few = CalibrationTokens([[1, 2, 3]] * 3, 0)
    for calibration, number in ((None, 0), (few, 3)):
        with pytest.raises(UsageError, match=f"{number} calibration texts are too few"):
            quantize(model, "int8-static", calibration)


def test_dynamic_int8_is_what_onnxruntime_makes(fp32, tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    graph = fp32("bert") / "model.onnx"
    quantize_dynamic(
        graph,
        tmp_path / "theirs.onnx",
        per_channel=True,
        op_types_to_quantize=["MatMul"],
        extra_options={"WeightSymmetric": True},
    )
    ours = ir.load(graph)
    quantize_dynamic_here(ours.graph)
    ids = np.array([[5, 9, 20, 31, 7], [8, 6, 1, 0, 0]])
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found, expected = (
        runner(model)(ids, mask)[0] for model in (ours, ir.load(tmp_path / "theirs.onnx"))
    )
    np.testing.assert_array_equal(found, expected)


def test_too_little_coverage_is_an_error_that_names_what_was_left(tmp_path: Path, original) -> None:
    head, config = [torch.nn.Linear(32, 512)], {"num_hidden_layers": 1}
    exported = original(tiny_checkpoint(tmp_path / "m", head=head, config=config), 1, 512)
    with pytest.raises(M2DError, match=r"needed; left in float32: .*head.*--min-coverage"):
        make_artifact(exported, tmp_path / "a", Recipe(weights="int8", min_coverage=0.5))
    assert not (tmp_path / "a").exists()
    with pytest.raises(UsageError, match="--min-coverage 90 is not a share"):
        require_recipe(Recipe(weights="int8", min_coverage=90))


def test_weights_that_hold_nan_or_exceed_half_are_named(fp32) -> None:
    for spoiled, weights, message in (
        (np.nan, "int8-weight-only", "holds NaN"),
        (1e5, "fp16", "holds values beyond float16"),
    ):
        model = ir.load(fp32("bert") / "model.onnx")
        value = next(v for v in model.graph.initializers.values() if table_users(v))
        array = value.const_value.numpy().copy()
        array[0, 0] = spoiled
        value.const_value = ir.tensor(array)
        with pytest.raises(CheckpointError, match=f"weight {value.name} {message}"):
            quantize(model, weights, None)


def test_an_onnxruntime_that_is_too_old_is_named(tmp_path: Path) -> None:
    artifact = tiny_artifact(tmp_path / "a", replace(tiny_spec(), min_engine="99.1"))
    with pytest.raises(M2DError, match=r"needs onnxruntime 99\.1 or newer"):
        runtime.load(artifact)


def test_8_bit_blocks_state_the_onnxruntime_that_knows_them(fp32, tmp_path: Path) -> None:
    artifact = quantized(fp32("bert"), tmp_path / "a", "int8-weight-only")
    stored = json.loads((artifact.path / "artifact.json").read_text(encoding="utf-8"))
    assert stored["min_engine"] == "1.22"
