from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
from command_line import m2d
from tiny import edit_json, tiny_checkpoint

from m2dexport.checkpoint.claims import precision_claims, stored_precision
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.data import align_texts_path, read_texts
from m2dexport.reference.depths import DepthLook, doubt, look_at_depths, no_verdict


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in float32, whose config says so."""
    return tiny_checkpoint(tmp_path_factory.mktemp("claims") / "m")


def claims(folder: Path) -> list[str]:
    return precision_claims(open_checkpoint(folder))


def test_what_is_as_it_is_named_is_not_warned_of(plain: Path) -> None:
    assert claims(plain) == []
    assert stored_precision(open_checkpoint(plain)) == "fp32"
    assert claims(plain.rename(plain.with_name("model-fp32"))) == []
    plain.with_name("model-fp32").rename(plain)


@pytest.mark.parametrize("name", ["model-int8", "bert.Q4_K_M", "BERT-FP16", "bert_bf16"])
def test_a_folder_named_for_another_precision_is_warned_of(name: str, plain: Path) -> None:
    folder = plain.rename(plain.with_name(name))
    try:
        (sentence,) = claims(folder)
        assert name in sentence
        assert "stored in fp32" in sentence
    finally:
        folder.rename(plain)


def test_a_config_of_another_dtype_is_warned_of(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    edit_json(folder / "config.json", dtype="float16")
    assert claims(folder) == [
        "config.json claims float16, and the weights are stored in fp32: loaders may round them."
    ]
    edit_json(folder / "config.json", dtype=None, torch_dtype="bfloat16")
    assert "claims bfloat16" in claims(folder)[0]


def test_files_named_for_another_precision_are_looked_into(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    weights = {"w": np.ones((4, 4), np.float32)}
    safetensors.numpy.save_file(weights, folder / "model.fp16.safetensors")
    (folder / "onnx").mkdir()
    for kind in (np.float32, np.int8):
        tensor = onnx.numpy_helper.from_array(np.ones((4, 4), kind), "w")
        graph = onnx.helper.make_graph([], "g", [], [], [tensor])
        name = f"model_{np.dtype(kind).name}_quantized.onnx".replace("float32_", "")
        onnx.save(onnx.helper.make_model(graph), folder / "onnx" / name)
    (folder / "onnx" / "model_fp16.onnx").write_bytes(b"\xff")
    assert claims(folder) == [
        "the name model.fp16.safetensors claims fp16, and its weights are fp32.",
        "the name onnx/model_quantized.onnx claims integers, and its weights are fp32.",
    ]


def test_a_quantization_config_is_believed_only_of_quantized_bytes(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    edit_json(folder / "config.json", quantization_config={"bits": 4})
    sentence = m2d("inspect", "--model", folder).stderr
    assert "has a quantization_config, and no stored weight is quantized (they are F32)" in sentence
    packed = {"layer.qweight": np.ones((4, 4), np.int32)}
    safetensors.numpy.save_file(packed, folder / "model.safetensors")
    assert "has quantized weights" in m2d("inspect", "--model", folder).stderr


def look(layers: int, mean_cosine: float) -> DepthLook:
    return DepthLook(layers, mean_cosine, 0.5)


def test_depths_in_a_narrow_cone_beside_a_spread_full_depth_are_doubted() -> None:
    # Figures of all-MiniLM-L6-v2, trained at depth 6 only, and of the checkpoint that ships.
    plain = [look(n, c) for n, c in enumerate((0.60, 0.60, 0.53, 0.53, 0.57, 0.02), 1)]
    sentence = doubt(plain)
    assert sentence is not None
    assert "depths 1, 2, 3, 4, 5 do not look trained" in sentence
    assert "0.53 to 0.60 there, and 0.02 at depth 6" in sentence
    trained = [look(n, c) for n, c in enumerate((0.15, 0.13, 0.11, 0.09, 0.08, 0.04), 1)]
    assert doubt(trained) is None
    assert no_verdict(trained) is None


def test_no_verdict_is_given_where_the_full_depth_is_as_narrow() -> None:
    looks = [look(1, 0.99), look(2, 0.55)]
    assert doubt(looks) is None
    assert "mean cosine of 0.55 already at depth 2" in str(no_verdict(looks))


def test_the_depths_of_the_shipped_checkpoint_look_trained() -> None:
    looks = look_at_depths(open_checkpoint(), read_texts(align_texts_path())[::40])
    assert doubt(looks) is None
    cosines = [each.mean_cosine for each in looks]
    assert max(cosines) < 0.25
    shared = [each.neighbours for each in looks]
    assert shared[-1] == 1
    assert shared[0] < shared[2] < shared[4]


def test_inspect_states_sources_warnings_and_looks(plain: Path) -> None:
    found = json.loads(m2d("inspect", "--model", plain, "--json", "--trained", "1-4:8").stdout)
    sources = found["sources"]
    assert sources["layers"] == "config.json"
    assert sources["pooling"] == "1_Pooling/config.json"
    assert sources["max_length"] == "sentence_bert_config.json"
    assert sources["trained"] == "--trained"
    assert found["stored"] == "fp32"
    assert found["depths"][-1]["neighbours"] == 1
    quick = json.loads(m2d("inspect", "--model", plain, "--json", "--no-look-at-depths").stdout)
    assert quick["depths"][0]["mean_cosine"] is None
    assert quick["warnings"] == []
    shown = m2d("inspect", "--model", plain, "--no-look-at-depths").stdout
    assert "(1_Pooling/config.json)" in shown
