"""What the bytes of a graph's files are: tables of token vectors, layers, and the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from m2dexport.engines import ENGINES
from m2dexport.runtime.graph_content import GraphContent
from m2dexport.runtime.graph_guard import examine_graph

_LOOKS_UP = frozenset({"Gather", "Slice", "StridedSlice"})
#: What hands a table on as it is, or widens it.
_PASSES_ON = frozenset({"Cast", "Convert", "DequantizeLinear", "Identity", "Multiply", "Reshape"})
#: What ``graph.vector`` adds behind the pooled vector: map, cut, norm, codes.
_TAIL = (
    *("alignment.", "cut_", "vector_axis", "pooled_axis", "pooled_epsilon", "epsilon"),
    *("range_low", "range_step", "place_values", "code_", "sign_threshold"),
)


@dataclass(frozen=True)
class SizeParts:
    """What the bytes of an artifact's files are; they add up to all of its bytes."""

    embeddings: int  # tables of token, position and type vectors
    layers: int
    tokenizer: int
    other: int  # structure of the graph, map, codec, ranges


def size_parts(
    engine: str, files: Mapping[str, Path | bytes], tokenizer: int, ranges: int = 0
) -> SizeParts:
    """Return what the bytes of an artifact are.

    A table is a constant of two axes or more whose rows are looked up; whatever else is stored, and
    is not behind the pooled vector, counts as layers.

    Args:
        engine: a key of ``ENGINES``.
        files: those of its graph, by name.
        tokenizer: bytes of tokenizer.json.
        ranges: bytes of ranges.json, 0 where there is none.

    Raises:
        M2DError: when the graph cannot be read.
    """
    total = sum(_size(file) for file in files.values())
    content = examine_graph(engine, [files[name] for name in ENGINES[engine].files])
    stored = _stored(content)
    tables = set(stored) if ENGINES[engine].format == "table" else _tables(content)
    embeddings = sum(size for name, size in stored.items() if name in tables)
    others = {name: size for name, size in stored.items() if name not in tables}
    layers = sum(size for name, size in others.items() if not name.startswith(_TAIL))
    return SizeParts(embeddings, layers, tokenizer, total - embeddings - layers + ranges)


def _size(file: Path | bytes) -> int:
    return len(file) if isinstance(file, bytes) else file.stat().st_size


def _stored(content: GraphContent) -> dict[str, int]:
    """Return the bytes of each constant; OpenVINO keeps constants of the same content once."""
    sizes: dict[str, int] = {}
    seen: set[bytes] = set()
    for name, constant in content.constants.items():
        digest = hashlib.blake2b(constant.data, digest_size=16).digest()
        sizes[name] = 0 if digest in seen else constant.data.nbytes
        seen.add(digest)
    return sizes


def _tables(content: GraphContent) -> set[str]:
    """Return the names of the constants whose rows are looked up."""
    #: Value -> the constants that it is made of alone.
    origins = {name: {name} for name, each in content.constants.items() if len(each.shape) > 1}
    found: set[str] = set()
    for node in content.nodes:
        if node.operator in _PASSES_ON and all(
            name in content.constants or name in origins for name in node.inputs
        ):
            made = set().union(*(origins.get(name, set()) for name in node.inputs))
            origins.update(dict.fromkeys(node.outputs, made))
        elif node.operator in _LOOKS_UP:
            found |= origins.get(node.inputs[0], set())
    return found
