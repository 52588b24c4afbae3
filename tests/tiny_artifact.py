"""A tiny artifact folder made without torch: embeddings, masked mean, cut, normalise, codec."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from m2dexport.engines import ENGINES, Device
from m2dexport.files import SPEC
from m2dexport.graph.vector import coded_graph
from m2dexport.precisions import BitOrder, VectorPrecision
from m2dexport.runtime.artifact import (
    FORMAT,
    RANGES,
    TOKENIZER,
    ArtifactSpec,
    space_id_of_artifact,
)
from m2dexport.runtime.file_list import write_file_list
from m2dexport.vectors.codecs import CODEC_VERSION, LEVELS, Ranges, normalize

HIDDEN = 16
GRAPH = ENGINES["onnx"].files[0]
_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:!?'-今日天"
VOCABULARY = (*_SPECIALS, *_LETTERS, *(f"##{letter}" for letter in _LETTERS), "find", "guitar")


def tiny_spec(
    *,
    dim: int = 12,
    weights: str = "fp32",
    vectors: VectorPrecision = "float32",
    bit_order: BitOrder = "big",
    prompts: dict[str, str] | None = None,
    default_prompt: str | None = None,
    max_length: int = 16,
    batch_invariant: bool = True,
) -> ArtifactSpec:
    return ArtifactSpec(
        format=FORMAT,
        engine="onnx",
        device=Device(),
        layers=1,
        dim=dim,
        weights=weights,
        isa="portable",
        vectors=vectors,
        codec=CODEC_VERSION,
        bit_order=bit_order,
        pooling=["mean"],
        similarity="cosine",
        final_norm="none",
        prompts={"query": "find: ", "document": ""} if prompts is None else prompts,
        default_prompt=default_prompt,
        max_length=max_length,
        pad_id=0,
        batch_invariant=batch_invariant,
        trained=None,
        space_id="m2d1-" + "0" * 32,
        speaks=None,
        parity={"max_difference": 0.0},
        checked_by="onnxruntime 1.32.0",
        fitted_to=None,
        kept_sha256=None,
        clipping_rate=None,
        coverage=1.0,
        left_in_float32=[],
        min_engine="1.17",
        provenance={"sub_model": "0" * 64, "m2dexport": "0.1.0"},
    )


def tiny_artifact(folder: Path, spec: ArtifactSpec | None = None, *, seed: int = 0) -> Path:
    """Write an artifact folder; another seed gives another valid model of the same shape."""
    spec = spec or tiny_spec()
    ranges = tiny_ranges(spec.dim) if spec.vectors in LEVELS else None
    tokenizer_json = letter_tokenizer(spec.max_length)
    spec = replace(spec, provenance={**spec.provenance, "sub_model": f"seed {seed}"})
    spec = replace(spec, space_id=space_id_of_artifact(spec, ranges, tokenizer_json))
    folder.mkdir(parents=True)
    (folder / GRAPH).write_bytes(
        tiny_graph(spec.dim, spec.vectors, ranges, spec.bit_order, seed=seed)
    )
    (folder / TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
    (folder / SPEC).write_text(spec.to_json(), encoding="utf-8")
    if ranges:
        (folder / RANGES).write_text(ranges.to_json(), encoding="utf-8")
    return relisted(folder)


def relisted(folder: Path) -> Path:
    """Have an artifact's files.json say that what it holds now is what was built."""
    write_file_list(folder)
    return folder


def without_rows(folder: Path, count: int) -> Path:
    """Take the last rows of an artifact's table, those of "find" and "guitar", away."""
    graph = onnx.load(folder / GRAPH)
    (table,) = (tensor for tensor in graph.graph.initializer if tensor.name == "table")
    table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table)[:-count], "table"))
    onnx.save(graph, folder / GRAPH)
    return relisted(folder)


def tiny_ranges(dim: int) -> Ranges:
    high = np.linspace(0.3, 0.5, dim, dtype=np.float32)
    return Ranges(-high, high)


def letter_tokenizer(max_length: int) -> str:
    """A lowercasing character WordPiece with [CLS] and [SEP] that cuts at ``max_length``."""
    ids = {piece: index for index, piece in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(max_length)
    return str(tokenizer.to_str())


def tiny_graph(
    dim: int,
    vectors: VectorPrecision,
    ranges: Ranges | None,
    bit_order: BitOrder = "big",
    *,
    seed: int = 0,
) -> bytes:
    """The graph's bytes: input_ids and attention_mask to sentence_embedding."""
    rng = np.random.default_rng(seed)
    constants: dict[str, NDArray[np.generic]] = {
        "table": rng.standard_normal((len(VOCABULARY), HIDDEN)).astype(np.float32),
        "last": np.array([-1]),
        "tokens": np.array([1]),
        "start": np.array([0]),
        "end": np.array([dim]),
        "epsilon": np.array(1e-12, dtype=np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["states"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["states", "column"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "tokens"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "tokens"], ["count"], keepdims=1),
        helper.make_node("Div", ["sum", "count"], ["pooled"]),
        helper.make_node("Slice", ["pooled", "start", "end", "tokens"], ["cut"]),
        helper.make_node("ReduceL2", ["cut", "last"], ["norm"], keepdims=1),
        helper.make_node("Max", ["norm", "epsilon"], ["safe"]),
        helper.make_node("Div", ["cut", "safe"], ["vector"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["batch", dim])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    coded = coded_graph(ir.from_proto(model), vectors, ranges, bit_order)
    coded.graph.outputs[0].name = "sentence_embedding"
    proto = ir.to_proto(coded)
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString(deterministic=True))


def unit_vectors(seed: int, texts: int, dim: int) -> NDArray[np.float32]:
    """Return random vectors of length 1, of shape (texts, dim)."""
    rng = np.random.default_rng(seed)
    return normalize(rng.standard_normal((texts, dim)).astype(np.float32))
