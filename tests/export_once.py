"""The suite's exports: each graph is made once for all tests, since torch takes seconds for one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

import onnx_ir as ir

from m2dexport.checkpoint.open import Checkpoint
from m2dexport.graph.export import graph_from_checkpoint
from m2dexport.profile.identity import model_sha256


def exporting_once(folder: Path) -> Callable[..., ir.Model]:
    """Return what stands for ``graph_from_checkpoint`` and keeps its graphs in a folder.

    A graph is found again by all that decides it: the checkpoint's content, whatever its folder is
    called, and the depths. Every call reads a model of its own from the file.
    """

    def exported(checkpoint: Checkpoint, depths: Sequence[int] | None = None) -> ir.Model:
        asked = f"{model_sha256(checkpoint)} {depths and tuple(depths)}"
        path = folder / f"{sha256(asked.encode()).hexdigest()}.onnx"
        if not path.exists():
            unfinished = path.with_suffix(f".{id(checkpoint)}")
            ir.save(graph_from_checkpoint(checkpoint, depths), unfinished)
            unfinished.replace(path)
        return ir.load(path)

    return exported
