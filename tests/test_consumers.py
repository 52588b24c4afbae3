"""export: folders that other programs open as they are, each read here as that program reads it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import model2vec
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import openvino
import pytest
import torch
import transformers
from command_line import m2d
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import transformer as st_transformer
from sentence_transformers.sentence_transformer import modules as st
from tiny import TEXTS, edit_json, tiny_checkpoint
from tiny_artifact import relisted, tiny_artifact, tiny_spec
from tokenizers import Tokenizer

import m2dexport
from m2dexport.build.recipe import Recipe
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.consumers import plain_onnx
from m2dexport.consumers.export import CONSUMERS
from m2dexport.engines.openvino.make import files_from_onnx
from m2dexport.files import MODEL_SETTINGS
from m2dexport.graph.plain import write_plainly
from m2dexport.runtime.archive import open_bundle, write_archive
from m2dexport.runtime.bundle import write_bundle
from m2dexport.runtime.manifest import Figures
from m2dexport.runtime.packing import write_nested
from m2dexport.slice.slicing import slice_checkpoint

CLOSE = 1e-5
DIM = 20
SLICE = ("--layers", 2, "--dim", 8)
LONG = "a cat sat on the mat " * 40
HUB = ("sentence-transformers", "optimum", "fastembed", "text-embeddings-inference")
#: As each program of the hub's layout may pool token states, by states and mask.
POOLINGS = {
    "cls": lambda states, mask: states[:, 0],
    "mean": lambda states, mask: (states * mask).sum(1) / mask.sum(1),
    "max": lambda states, mask: np.where(mask > 0, states, -9).max(1),
    "last": lambda states, mask: states[:, -1],
}


@pytest.fixture(scope="module")
def built(bert: Path, artifact: Callable[..., Any]) -> Path:
    return artifact(bert, 2, DIM).path


@pytest.fixture(scope="module")
def coded(bert: Path, artifact: Callable[..., Any]) -> Path:
    return artifact(bert, 2, DIM, Recipe(vectors="int8")).path


@pytest.fixture(scope="module")
def lengths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a checkpoint that states three lengths, and its artifact."""
    folder = tmp_path_factory.mktemp("lengths")
    parent = tiny_checkpoint(folder / "m", pooling="cls")
    edit_json(parent / "tokenizer_config.json", model_max_length=64, max_length=8)
    edit_json(parent / "sentence_bert_config.json", max_seq_length=16)
    succeeds("build", "--model", parent, *SLICE, "--out", folder / "artifact")
    return folder


@pytest.fixture
def table(bert: Path, tmp_path: Path) -> Callable[..., Path]:
    """From the vector of unknown tokens, all of whose values are equal, to a model of depth 0."""

    def made(*, unknown: float) -> Path:
        tokenizer = Tokenizer.from_file(str(bert / "tokenizer.json"))
        module = st.StaticEmbedding(tokenizer, embedding_dim=8)
        with torch.no_grad():
            module.embedding.weight[tokenizer.token_to_id("[UNK]")] = unknown
        model = SentenceTransformer(modules=[module, st.Normalize()], device="cpu")
        model.save(str(tmp_path / "theirs"))
        out = tmp_path / "artifact"
        succeeds("build", "--model", tmp_path / "theirs", "--vectors", "int8", "--out", out)
        return out

    return made


def succeeds(*arguments: object) -> str:
    result = m2d(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: object) -> str:
    result = m2d(*arguments)
    assert result.exit_code in (1, 2, 4), result.output
    assert result.stderr.count("\n") == 1
    return result.stderr


def golden(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "golden.json").read_text(encoding="utf-8"))["texts"]


def read_as_transformers_does(folder: Path, texts: list[str]) -> tuple[Any, Any, Any]:
    """Return states, vectors and mask of texts, tokenized and run by other programs' means."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
    names = ("input_ids", "attention_mask")
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
    states, vectors = session.run(
        ["last_hidden_state", "sentence_embedding"],
        {name: batch[name].astype(np.int64) for name in names},
    )
    return states, vectors, batch["attention_mask"][:, :, None]


def test_a_slice_states_one_maximum_length(lengths: Path, tmp_path: Path) -> None:
    """512, 128 and 256 stood in three files, and three readers cut at three places."""
    sub = slice_checkpoint(open_checkpoint(lengths / "m"), 2, 8, tmp_path / "sub").path
    settings = json.loads((sub / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 16
    assert "max_length" not in settings  # which fastembed would take
    ids = Tokenizer.from_file(str(sub / "tokenizer.json")).encode(LONG).ids
    assert len(ids) == 16
    tokenizer = transformers.AutoTokenizer.from_pretrained(sub)
    assert tokenizer(LONG, truncation=True)["input_ids"] == ids
    found = m2dexport.load(lengths / "artifact")
    assert found.tokenize([LONG]) == [ids]
    expected = SentenceTransformer(str(sub), device="cpu").encode([LONG])
    np.testing.assert_allclose(found.encode([LONG]), expected, atol=CLOSE)


@pytest.mark.parametrize("consumer", HUB)
def test_any_pooling_of_the_states_gives_the_vectors(consumer: str, built, tmp_path: Path) -> None:
    bundle = write_bundle(built, tmp_path / "e.m2d").path
    out = tmp_path / "out"
    output = succeeds("export", bundle, "--for", consumer, "--out", out)
    assert "agree (smallest cosine 1.000000)" in output
    assert ("find: " in output) == (consumer != "sentence-transformers")  # who applies prompts?
    assert not list(out.rglob("*.safetensors"))
    texts = [*TEXTS, LONG]
    expected = m2dexport.load(built).encode(texts)
    states, vectors, mask = read_as_transformers_does(out, texts)
    np.testing.assert_allclose(vectors, expected, atol=CLOSE)
    for pooling, pooled in POOLINGS.items():
        np.testing.assert_allclose(pooled(states, mask), expected, atol=CLOSE, err_msg=pooling)


def test_sentence_transformers_reads_the_rest_of_the_folder(
    built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its backend itself needs Optimum, and an older transformers; an example checks that."""
    succeeds("export", built, "--for", "sentence-transformers", "--out", tmp_path / "out")
    monkeypatch.setattr(st_transformer, "load_onnx_model", GraphModel)
    model = SentenceTransformer(str(tmp_path / "out"), backend="onnx", device="cpu")
    rows = golden(tmp_path / "out")
    found = [model.encode(row["text"], prompt_name=row["prompt"]) for row in rows]
    np.testing.assert_allclose(found, [row["vector"] for row in rows], atol=CLOSE)
    assert model.get_embedding_dimension() == DIM


class GraphModel(torch.nn.Module):
    """What Optimum makes of the folder: the graph's first output, under its name."""

    def __init__(self, model_name_or_path: str, config: Any, **_: Any) -> None:
        super().__init__()
        path = Path(model_name_or_path) / "onnx" / "model.onnx"
        self.config, self.session = config, onnxruntime.InferenceSession(path)

    def forward(self, input_ids: Any, attention_mask: Any, return_dict: bool = True) -> Any:
        feeds = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        (states,) = self.session.run(["last_hidden_state"], feeds)
        return transformers.modeling_outputs.BaseModelOutput(torch.from_numpy(states))


def test_codes_are_left_to_who_takes_them(coded, tmp_path: Path) -> None:
    texts = list(TEXTS)
    encoder = m2dexport.load(coded)
    output = succeeds("export", coded, "--for", "optimum", "--out", tmp_path / "floats")
    assert "the int8 codes are made of" in output
    _, vectors, _ = read_as_transformers_does(tmp_path / "floats", texts)
    assert vectors.dtype == np.float32
    ranges = m2dexport.runtime.artifact.read_ranges(tmp_path / "floats")
    codes = m2dexport.vectors.codecs.encode_vectors(vectors, "int8", ranges)
    assert np.mean(codes == encoder.encode(texts)) > 0.99
    for consumer, name in (("onnx", "model.onnx"), ("triton", "embedder/1/model.onnx")):
        out = tmp_path / consumer
        assert "codes are made of" not in succeeds("export", coded, "--for", consumer, "--out", out)
        session = onnxruntime.InferenceSession(out / name)
        for row in golden(out):
            ids = np.array([row["ids"]])
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            assert session.run(None, feeds)[0].tolist() == [row["vector"]]


def test_triton_is_told_types_sizes_and_what_to_warm_up_with(coded, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    succeeds("export", coded, "--for", "triton", "--shapes", "1x4,8x16", "--out", out)
    config = " ".join((out / "embedder" / "config.pbtxt").read_text().split())
    assert 'name: "embedder" backend: "onnxruntime" max_batch_size: 8' in config
    output = f'{{ name: "sentence_embedding" data_type: TYPE_INT8 dims: [ {DIM} ] }}'
    assert output in config
    assert "batch_size: 8 inputs" in config
    assert "--shapes goes with --for triton" in refused(
        "export", coded, "--for", "onnx", "--shapes", "1x4", "--out", tmp_path / "x"
    )


def warm_ups(source: Path, out: Path) -> tuple[list[str], str]:
    """Return the shapes that Triton warms a model up with by default, and its largest batch."""
    succeeds("export", source, "--for", "triton", "--out", out)
    config = (out / "embedder" / "config.pbtxt").read_text()
    return re.findall(r'name: "(\d+x\d+)"', config), *re.findall(r"max_batch_size: (\d+)", config)


def test_triton_is_warmed_up_with_no_more_tokens_than_the_model_takes(tmp_path: Path) -> None:
    folder = tiny_artifact(tmp_path / "a", tiny_spec(max_length=16))
    for shape in ("1x17", "1x16,8x300"):
        options = ("--for", "triton", "--shapes", shape, "--out", tmp_path / "out")
        message = refused("export", folder, *options)
        assert f"has more tokens than {folder} takes, 16 at most; name" in message
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert warm_ups(folder, tmp_path / "out") == (["1x16", "16x16"], "16")


def test_triton_is_warmed_up_with_what_a_profile_timed(tmp_path: Path) -> None:
    folder = tiny_artifact(tmp_path / "a", tiny_spec(max_length=64))
    figures = Figures("tiny", "a processor", 1, 32, 128, 3.0, 6.0, 10**8, 80.0)
    write_nested([folder], tmp_path / "a.m2d", {"1x12-fp32-float32": figures})
    shapes = ["32x64", "1x16", "1x64", "16x32"]
    assert warm_ups(tmp_path / "a.m2d", tmp_path / "out") == (shapes, "32")


def test_plain_graphs_have_standard_operators_alone(built, tmp_path: Path) -> None:
    fused = onnx.load(built / "model.onnx").graph.node
    assert {"MultiHeadAttention", "Gelu"} <= {node.op_type for node in fused if node.domain}
    succeeds("export", built, "--for", "onnx", "--plain", "--out", tmp_path / "plain")
    model = onnx.load(tmp_path / "plain" / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [each.domain for each in model.opset_import] == [""]
    assert "ReduceL2" not in {node.op_type for node in model.graph.node}
    for row in golden(tmp_path / "plain"):
        (expected,) = m2dexport.load(built).encode([row["text"]], prompt=row["prompt"])
        np.testing.assert_allclose(row["vector"], expected, atol=CLOSE)


def test_plain_cls_pooling_keeps_the_last_layer_pruned(lengths: Path, tmp_path: Path) -> None:
    out, expected = tmp_path / "out", m2dexport.load(lengths / "artifact").encode(TEXTS)
    for options in ((), ("--plain",)):
        succeeds(
            *("export", lengths / "artifact", "--for", "optimum", *options),
            *("--out", out, "--force"),
        )
        _, vectors, _ = read_as_transformers_does(out, list(TEXTS))
        np.testing.assert_allclose(vectors, expected, atol=CLOSE)


def test_what_has_no_standard_operator_is_named() -> None:
    node = ir.node("MatMulNBits", [], {}, domain="com.microsoft")
    graph = ir.Graph([], node.outputs, nodes=[node], opset_imports={"": 18}, name="x")
    assert write_plainly(ir.Model(graph, ir_version=8)) == ["com.microsoft.MatMulNBits"]


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_one_folder_opens_in_all_programs_of_its_layout(
    weights: str, built, tmp_path: Path
) -> None:
    """transformers.js would look for model_quantized.onnx, which the others do not find."""
    folder = with_settings(built, tiny_artifact(tmp_path / "a", tiny_spec(weights=weights)))
    contents = []
    for consumer in (*HUB, "transformers.js"):
        out = tmp_path / consumer
        output = succeeds("export", folder, "--for", consumer, "--out", out)
        files = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
        contents.append({path: (out / path).read_bytes() for path in files})
        del contents[-1][Path("golden.json")]  # which names the program
    assert "'a long text a long text ...'" in output  # what transformers.js cuts
    assert all(each == contents[0] for each in contents)
    assert Path("onnx/model.onnx") in contents[0]
    config = json.loads(contents[0][Path("config.json")])
    assert config["transformers.js_config"] == {"dtype": "fp32"}  # the name's, which is model.onnx


def test_what_fastembed_is_told_can_be_copied(
    built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, fastembed = tmp_path / "NAME of DIM", Mock()
    output = succeeds("export", built, "--for", "fastembed", "--out", out)
    code = output.split("Open it with:\n")[1].split("\nNote: ")[0]
    for name in ("fastembed", "fastembed.common", "fastembed.common.model_description"):
        monkeypatch.setitem(sys.modules, name, fastembed)
    exec(compile(code, "printed", "exec"), {})
    (call,) = fastembed.TextEmbedding.add_custom_model.call_args_list
    assert call.kwargs == {
        "model": "local/NAME of DIM",
        "pooling": fastembed.PoolingType.DISABLED,
        "normalization": False,
        "output_name": "sentence_embedding",
        "sources": fastembed.ModelSource.return_value,
        "dim": DIM,
        "model_file": "onnx/model.onnx",
    }
    fastembed.TextEmbedding.assert_called_with("local/NAME of DIM", specific_model_path=str(out))


def with_settings(built: Path, folder: Path) -> Path:
    """Give an artifact the settings that the other has."""
    for name in MODEL_SETTINGS:
        shutil.copy(built / name, folder)
    return relisted(folder)


def test_openvino_gives_the_same_two_outputs(built, tmp_path: Path) -> None:
    folder = with_settings(built, tiny_artifact(tmp_path / "a", tiny_spec(vectors="ubinary")))
    files = files_from_onnx((folder / "model.onnx").read_bytes())
    for name, content in files.items():
        (folder / name).write_bytes(content)
    edit_json(folder / "artifact.json", engine="openvino", min_engine="2026.4")
    relisted(folder)
    out = tmp_path / "out"
    succeeds("export", folder, "--for", "sentence-transformers", "--out", out)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    path = out / "openvino" / "openvino_model.xml"
    model = openvino.Core().compile_model(path, "CPU", exact)
    ids = np.array([row["ids"] for row in golden(out) if row["truncated"]])
    outputs = model({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    expected = m2dexport.load(folder).run(ids, np.ones_like(ids))
    vectors = outputs["sentence_embedding"]
    np.testing.assert_array_equal(np.packbits(vectors > 0, axis=1), expected)
    states = outputs["last_hidden_state"]
    assert states.shape == (*ids.shape, 12)
    np.testing.assert_allclose(states, np.broadcast_to(vectors[:, None], states.shape))


@pytest.mark.parametrize("consumer", ["model2vec", "sentence-transformers"])
def test_depth_0_is_a_table_for_its_readers(consumer: str, table, tmp_path: Path) -> None:
    folder, out = table(unknown=0), tmp_path / "out"
    succeeds("export", folder, "--for", consumer, "--out", out)
    rows = golden(out)
    if consumer == "model2vec":
        found = model2vec.StaticModel.from_pretrained(out).encode([row["input"] for row in rows])
    else:
        found = SentenceTransformer(str(out), device="cpu").encode([row["input"] for row in rows])
    np.testing.assert_allclose(found, [row["vector"] for row in rows], atol=CLOSE)
    assert "--plain is about ONNX" in refused(
        "export", folder, "--for", consumer, "--plain", "--out", tmp_path / "plain"
    )


def test_a_vector_of_unknown_tokens_is_nothing_for_model2vec(table, tmp_path: Path) -> None:
    message = refused("export", table(unknown=1), "--for", "model2vec", "--out", tmp_path / "out")
    assert "model2vec leaves unknown tokens out, and" in message


@pytest.mark.parametrize(
    ("change", "consumer", "message"),
    [
        ({}, "vespa", "--for 'vespa' is unknown; choose from sentence-transformers, optimum"),
        ({}, "model2vec", "built for the engine onnx; build with --engine static --layers 0"),
        ({}, "optimum", "does not carry the model's config.json"),
        ({"batch_invariant": False}, "triton", "a text's vector depends on its batch, and triton"),
    ],
)
def test_what_a_program_cannot_take_is_refused_with_the_reason(
    change: dict[str, Any], consumer: str, message: str, tmp_path: Path
) -> None:
    folder = tiny_artifact(tmp_path / "a", tiny_spec(**change))
    assert message in refused("export", folder, "--for", consumer, "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_code_of_the_checkpoints_own_is_refused(built, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "a"))
    edit_json(folder / "config.json", auto_map={"AutoModel": "modeling.Model"})
    message = refused("export", relisted(folder), "--for", "fastembed", "--out", tmp_path / "out")
    assert "Python code that came with the checkpoint" in message


@pytest.mark.parametrize("content", ["[]", "{", '"x"'])
def test_settings_that_are_damaged_are_refused(content: str, built, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built, tmp_path / "a"))
    (folder / "config.json").write_text(content)
    message = refused("export", relisted(folder), "--for", "fastembed", "--out", tmp_path / "out")
    assert "config.json" in message


def test_a_licence_is_not_written_elsewhere(tmp_path: Path) -> None:
    files = open_bundle(write_bundle(tiny_artifact(tmp_path / "a"), tmp_path / "a.m2d").path)
    manifest = json.loads(files["manifest.json"])
    content = json.dumps({**manifest, "licenses": {"../LICENSE": "x"}}).encode()
    write_archive(tmp_path / "b.m2d", {**files, "manifest.json": content})
    message = refused("export", tmp_path / "b.m2d", "--for", "onnx", "--out", tmp_path / "out")
    assert "is '../LICENSE' where the name of a licence file" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.m2d", "b.m2d"]


def test_a_graph_that_gives_other_vectors_is_not_handed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (tiny_artifact(tmp_path / f"{seed}", seed=seed) for seed in (0, 1))
    other = ir.load(two / "model.onnx")
    monkeypatch.setattr(plain_onnx, "read_graph", lambda *_, **__: other)
    message = refused("export", one, "--for", "onnx", "--plain", "--out", tmp_path / "out")
    assert "gives other vectors than it" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_a_cell_of_a_nested_bundle_is_exported(tmp_path: Path) -> None:
    artifacts = [tiny_artifact(tmp_path / f"{dim}", tiny_spec(dim=dim)) for dim in (12, 8)]
    nested = tmp_path / "nested.m2d"
    succeeds("bundle", *artifacts, "--out", nested)
    cell = ("--cell", "1x8-fp32-float32")
    succeeds("export", nested, *cell, "--for", "onnx", "--out", tmp_path / "out")
    rows = [row for row in golden(tmp_path / "out") if row["prompt"] is None]
    expected = m2dexport.load(artifacts[1]).encode([row["text"] for row in rows])
    np.testing.assert_allclose([row["vector"] for row in rows], expected, atol=CLOSE)
    message = refused("export", nested, "--cell", "x", "--for", "onnx", "--out", tmp_path / "no")
    assert "has no cell 'x'; it has 1x12-fp32-float32, 1x8-fp32-float32" in message


def test_an_export_replaces_an_export_and_nothing_else(tmp_path: Path) -> None:
    folder, out = tiny_artifact(tmp_path / "a"), tmp_path / "out"
    stated = json.loads(succeeds("export", folder, "--for", "onnx", "--out", out, "--json"))
    assert stated["agreement"]["min_cosine"] == pytest.approx(1)
    assert stated["size_bytes"] == sum(path.stat().st_size for path in out.iterdir())
    assert "already exists" in refused("export", folder, "--for", "onnx", "--out", out)
    succeeds("export", folder, "--for", "triton", "--out", out, "--force")
    assert not (out / "model.onnx").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    message = refused("export", folder, "--for", "onnx", "--out", tmp_path / "mine", "--force")
    assert "not an output of m2dexport" in message


def test_the_help_names_every_program() -> None:
    output = " ".join(succeeds("export", "--help").split()).replace("- ", "-")
    assert [name for name in CONSUMERS if name not in output] == []
