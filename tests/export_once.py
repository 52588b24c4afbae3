"""The suite's exports: each graph is made once for all tests, since torch takes seconds for one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from m2dexport.checkpoint.hf_config import CONFIG
from m2dexport.checkpoint.open import Checkpoint
from m2dexport.graph.export import graph_from_checkpoint
from m2dexport.graph.vector import depth_output


def exporting_once(folder: Path) -> Callable[..., ir.Model]:
    """Return what stands for ``graph_from_checkpoint`` and keeps its graphs in a folder.

    A graph has all depths of its checkpoint, and is found again by the checkpoint's content. Every
    call reads a model of its own from the file, and leaves in it what was asked for.
    """

    def exported(checkpoint: Checkpoint, depths: Sequence[int] | None = None) -> ir.Model:
        path = folder / f"{_sha256(checkpoint)}.onnx"
        if not path.exists():
            unfinished = path.with_suffix(f".{os.getpid()}")
            ir.save(graph_from_checkpoint(checkpoint), unfinished)
            unfinished.replace(path)
        model = ir.load(path)
        if depths:
            asked = {depth_output(depth) for depth in depths}
            kept = [value for value in model.graph.outputs if value.name in asked]
            model.graph.outputs[:] = kept
            RemoveUnusedNodesPass()(model)
        return model

    return exported


def _sha256(checkpoint: Checkpoint) -> str:
    """Return a hash of what decides a graph: neither prompts, nor the tokenizer, nor the folder."""
    config = (checkpoint.path / CONFIG).read_text(encoding="utf-8")
    code = [path.read_text(encoding="utf-8") for path in sorted(checkpoint.path.glob("*.py"))]
    modules = [replace(module, folder=Path()) for module in checkpoint.head]
    latent = checkpoint.latent and checkpoint.latent.heads
    facts = (config, code, checkpoint.pooling, modules, latent, checkpoint.final_norm)
    return sha256(repr((checkpoint.weights_sha256, *facts)).encode()).hexdigest()
