"""Triton's model repository: a version of a model, and the config.pbtxt that describes it."""

from __future__ import annotations

from pathlib import Path

from m2dexport.consumers.golden import Run
from m2dexport.consumers.plain_onnx import write_onnx
from m2dexport.consumers.source import Options, Source
from m2dexport.graph.vector import OUTPUT
from m2dexport.vectors.codecs import code_dtype, code_width

MODEL = "embedder"
#: (texts, tokens) of warm-ups where none are named; longer ones are cut to the maximum length.
_SHAPES = ((1, 16), (1, 64), (16, 32))
_TYPES = {"float32": "TYPE_FP32", "int8": "TYPE_INT8", "uint8": "TYPE_UINT8"}


def write_triton(source: Source, folder: Path, options: Options) -> Run:
    """Write a repository of one model, from token ids to the artifact's vectors or codes.

    Args:
        source: an artifact for onnx.
        folder: an empty folder; its tokenizer.json is for clients, since the model takes token ids.
        options: all of them count.
    """
    run = write_onnx(source, folder, options)
    version = folder / MODEL / "1"
    version.mkdir(parents=True)
    for name in source.graph:
        (folder / name).rename(version / name)
    (folder / MODEL / "config.pbtxt").write_text(_config(source, options), encoding="utf-8")
    return run


def _config(source: Source, options: Options) -> str:
    spec, shapes = source.spec, options.shapes or _shapes_of(source)
    most = max(texts for texts, _ in shapes)
    vector = _TYPES[code_dtype(spec.vectors).name]
    warmups = ",\n".join(_warmup(texts, tokens) for texts, tokens in shapes)
    return f"""\
name: "{MODEL}"
backend: "onnxruntime"
max_batch_size: {most}
input [
  {{ name: "input_ids" data_type: TYPE_INT64 dims: [ -1 ] }},
  {{ name: "attention_mask" data_type: TYPE_INT64 dims: [ -1 ] }}
]
output [
  {{ name: "{OUTPUT}" data_type: {vector} dims: [ {code_width(spec.dim, spec.vectors)} ] }}
]
instance_group [ {{ kind: KIND_CPU }} ]
dynamic_batching {{ }}
model_warmup [
{warmups}
]
"""


def _shapes_of(source: Source) -> tuple[tuple[int, int], ...]:
    """Return what to warm up with: the shape that a profile timed, if one did, and fixed ones."""
    known = source.figures
    timed = [(known.batch, known.sequence)] if known else []
    most = source.spec.max_length
    return tuple(dict.fromkeys((texts, min(tokens, most)) for texts, tokens in (*timed, *_SHAPES)))


def _warmup(texts: int, tokens: int) -> str:
    inputs = "\n".join(
        f'    inputs {{ key: "{name}" value: {{ data_type: TYPE_INT64 dims: [ {tokens} ] '
        "zero_data: true } }"
        for name in ("input_ids", "attention_mask")
    )
    return f'  {{\n    name: "{texts}x{tokens}"\n    batch_size: {texts}\n{inputs}\n  }}'
