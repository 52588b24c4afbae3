"""The suite's exports: each graph is made once for all tests, since torch takes seconds for one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import onnx_ir as ir

from m2dexport.checkpoint.hf_config import CONFIG
from m2dexport.checkpoint.open import Checkpoint
from m2dexport.graph.export import graph_from_checkpoint


def exporting_once(folder: Path) -> Callable[..., ir.Model]:
    """Return what stands for ``graph_from_checkpoint`` and keeps its graphs in a folder.

    A graph is found again by all that decides it: the checkpoint's content, whatever its folder is
    called, and the depths. Every call reads a model of its own from the file.
    """

    def exported(checkpoint: Checkpoint, depths: Sequence[int] | None = None) -> ir.Model:
        path = folder / f"{_sha256(checkpoint, depths)}.onnx"
        if not path.exists():
            unfinished = path.with_suffix(f".{id(checkpoint)}")
            ir.save(graph_from_checkpoint(checkpoint, depths), unfinished)
            unfinished.replace(path)
        return ir.load(path)

    return exported


def _sha256(checkpoint: Checkpoint, depths: Sequence[int] | None) -> str:
    """Return a hash of what decides a graph: neither prompts, nor the tokenizer, nor the folder."""
    config = (checkpoint.path / CONFIG).read_text(encoding="utf-8")
    code = [path.read_text(encoding="utf-8") for path in sorted(checkpoint.path.glob("*.py"))]
    modules = [replace(module, folder=Path()) for module in checkpoint.head]
    latent = checkpoint.latent and checkpoint.latent.heads
    facts = (config, code, checkpoint.pooling, modules, latent, checkpoint.final_norm)
    asked = (checkpoint.weights_sha256, *facts, depths and tuple(depths))
    return sha256(repr(asked).encode()).hexdigest()
