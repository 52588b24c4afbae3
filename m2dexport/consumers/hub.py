"""The folder of a model as the hub has them: transformers' JSON files around a graph.

::

    onnx/model.onnx, or openvino/openvino_model.xml and .bin
                         token ids -> last_hidden_state, sentence_embedding
    config.json, tokenizer.json, tokenizer_config.json
    modules.json, 1_Pooling, 2_Normalize, sentence_bert_config.json,
    config_sentence_transformers.json
    ranges.json          of int8 and int4 vectors, which their reader makes of the floats

There are no weights beside the graph. Vectors come out finished: 1_Pooling says "cls", since the
first of the tokens holds the vector, and so do all others.
"""

from __future__ import annotations

from pathlib import Path

from m2dexport.checkpoint.jsonfile import write_json
from m2dexport.checkpoint.st_modules import SENTENCE_CONFIG, Modules, Pooling
from m2dexport.checkpoint.st_write import write_modules
from m2dexport.consumers.golden import Run
from m2dexport.consumers.graphs import OUTPUTS, runner, with_states
from m2dexport.consumers.source import Options, Source
from m2dexport.errors import UsageError
from m2dexport.runtime.artifact import RANGES, TOKENIZER

_CONFIG, _TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
#: The names that readers look for, by those that the engines' files have.
_NAMES = {
    "model.onnx": "onnx/model.onnx",
    "model.xml": "openvino/openvino_model.xml",
    "model.bin": "openvino/openvino_model.bin",
}


def write_hub(source: Source, folder: Path, options: Options) -> Run:
    """Write a model's folder; return what runs its graph.

    Args:
        source: an artifact for onnx or openvino.
        folder: an empty folder.
        options: of these, plain counts.

    Raises:
        UsageError: when the architecture is Python code, which the folder does not carry.
    """
    graph = with_states(source, plain=options.plain)
    for name, content in graph.items():
        path = folder / _NAMES[name]
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    write_json(folder / _CONFIG, _config(source))
    _write_tokenizer(source, folder)
    _write_modules(source, folder)
    if RANGES in source.files:
        (folder / RANGES).write_bytes(source.files[RANGES])
    return runner(source, graph, OUTPUTS)


def _config(source: Source) -> dict[str, object]:
    config = source.setting(_CONFIG)
    if "auto_map" in config:
        raise UsageError(
            f"the architecture of {source.path} is Python code that came with the checkpoint, and "
            "other programs know only their own; export --for onnx writes the graph alone."
        )
    # transformers.js makes a file's name of a dtype. This one is model.onnx, which the others look
    # for, too, whatever its weights are.
    named = {"transformers.js_config": {"dtype": "fp32"}} if source.spec.engine == "onnx" else {}
    return {**config, **named}


def _write_tokenizer(source: Source, folder: Path) -> None:
    (folder / TOKENIZER).write_bytes(source.files[TOKENIZER])
    settings = source.setting(_TOKENIZER_CONFIG)
    # The graph was compared with texts padded on their right.
    write_json(folder / _TOKENIZER_CONFIG, {**settings, "padding_side": "right"})


def _write_modules(source: Source, folder: Path) -> None:
    spec = source.spec
    modules = Modules(
        transformer=folder,
        max_length=spec.max_length,
        raw_output=False,
        latent=None,
        pooling=Pooling(("cls",)),
        head=(),
        normalized=True,
    )
    write_modules(modules, spec.dim, dim=spec.dim, dtype=None)
    write_json(folder / SENTENCE_CONFIG, sentence_config(source))


def sentence_config(source: Source) -> dict[str, object]:
    """Return what config_sentence_transformers.json says of an artifact."""
    spec = source.spec
    return {
        "model_type": "SentenceTransformer",
        "prompts": dict(spec.prompts),
        "default_prompt_name": spec.default_prompt,
        "similarity_fn_name": spec.similarity,
    }
