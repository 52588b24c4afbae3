"""Graphs of an export, and how they are run to be compared with the artifact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from m2dexport.consumers.golden import Run
from m2dexport.consumers.source import Source
from m2dexport.engines import ENGINES, Device, engine_runner
from m2dexport.errors import UsageError
from m2dexport.graph.plain import write_plainly
from m2dexport.graph.vector import OUTPUT, STATES, serialize_graph, states_graph

#: The outputs of a graph with states, in order.
OUTPUTS = (STATES, OUTPUT)


def read_graph(source: Source, *, plain: bool) -> ir.Model:
    """Return an artifact's ONNX graph.

    Args:
        source: the artifact, of an engine that takes ONNX.
        plain: write it in standard operators alone.

    Raises:
        UsageError: when there are none for its weights.
    """
    (content,) = source.graph.values()
    model: ir.Model = ir.from_proto(onnx.load_from_string(content))
    left = write_plainly(model) if plain else []
    if left:
        raise UsageError(
            f"weights={source.spec.weights} of {source.path} need {', '.join(left)}, which are not "
            "standard operators; build with --weights fp32, fp16 or bf16 for --plain."
        )
    return model


def with_states(source: Source, *, plain: bool) -> dict[str, bytes]:
    """Return the files of an artifact's graph, by name, with float vectors in the ``OUTPUTS``.

    Args:
        source: the artifact, of engine onnx or openvino.
        plain: write ONNX in standard operators alone.
    """
    if ENGINES[source.spec.engine].format == "ir":
        from m2dexport.engines.openvino.make import with_states as openvino_with_states

        files: dict[str, bytes] = openvino_with_states(source.graph)
        return files
    return {
        name: serialize_graph(states_graph(read_graph(source, plain=plain)))
        for name in source.graph
    }


def runner(source: Source, files: Mapping[str, bytes], outputs: tuple[str, ...]) -> Run:
    """Return what runs a graph on the artifact's engine, in one thread.

    Args:
        source: the artifact.
        files: of the graph, by the engine's names.
        outputs: what its outputs are called, in order.
    """
    engine = engine_runner(source.spec.engine)
    session = engine.load(files, Device(threads=1), source.spec.isa)

    def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        return dict(zip(outputs, engine.run(session, ids, mask), strict=True))

    return run
