"""What a graph's files hold, as far as it decides whether they are safe to run.

``onnx_content`` and ``openvino_content`` read the two formats into this; ``graph_guard`` judges it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from m2dexport.strict import shown


class UnsafeGraph(Exception):
    """A graph that is malformed or must not be run; the message ends a sentence."""


@dataclass(frozen=True)
class Constant:
    """A tensor that is stored in the graph."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic] | None  # None: a type that numpy lacks
    data: memoryview  # little-endian

    def values(self) -> NDArray[np.generic] | None:
        """Return the values, flat, or None for a type that numpy lacks."""
        return None if self.dtype is None else np.frombuffer(self.data, dtype=self.dtype)


@dataclass(frozen=True)
class Node:
    """An operator and the names of the values that it takes and makes."""

    operator: str  # "Gather"; those of another domain as "com.microsoft.Gelu"
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axis: int | None = None  # its attribute of that name
    keeps_rank: bool = False  # whether a reduction leaves a size of 1 where it reduces
    transposed: tuple[bool, bool] = (False, False)  # which inputs an OpenVINO MatMul transposes


@dataclass(frozen=True)
class GraphContent:
    """The nodes of a graph, in the order in which they run, and its constants by name."""

    nodes: tuple[Node, ...]
    constants: dict[str, Constant]


def require_size(shape: tuple[int, ...], bits: int, found: int, name: str) -> None:
    """Refuse a constant that claims other bytes than are stored.

    Raises:
        UnsafeGraph: naming the constant.
    """
    if len(shape) > 8 or any(not 0 <= size < 1 << 40 for size in shape):
        raise UnsafeGraph(f"the constant {shown(name)} has an impossible shape")
    needed = -(-math.prod(shape) * bits // 8)
    if needed != found:
        raise UnsafeGraph(f"the constant {shown(name)} needs {needed:,} bytes and stores {found:,}")
