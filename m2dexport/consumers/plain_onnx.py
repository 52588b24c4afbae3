"""The graph itself with its tokenizer, for programs that run ONNX and tokenize on their own."""

from __future__ import annotations

from pathlib import Path

from m2dexport.consumers.golden import Run
from m2dexport.consumers.graphs import read_graph, runner
from m2dexport.consumers.source import Options, Source
from m2dexport.graph.vector import OUTPUT, serialize_graph
from m2dexport.runtime.artifact import RANGES, TOKENIZER


def write_onnx(source: Source, folder: Path, options: Options) -> Run:
    """Write model.onnx, whose output are the artifact's own vectors or codes, and tokenizer.json.

    Args:
        source: an artifact for onnx.
        folder: an empty folder.
        options: of these, plain counts.
    """
    graph = source.graph
    if options.plain:
        graph = {name: serialize_graph(read_graph(source, plain=True)) for name in graph}
    files = {name: source.files[name] for name in (TOKENIZER, RANGES) if name in source.files}
    for name, content in {**graph, **files}.items():
        (folder / name).write_bytes(content)
    return runner(source, graph, (OUTPUT,))
