"""The engines that this machine built, kept beside a bundle: they take seconds to make.

A file's name is a hash of all that an engine depends on, so that another graph, GPU, driver or
library makes another. What is kept is not trusted: a file must have the sha256 beside it, and
whoever loads a bundle runs its golden texts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from m2dexport.engines.tensorrt.cuda import Gpu
from m2dexport.files import keep_file
from m2dexport.strict import sha256_of_json

TIMING = "timing.cache"


@dataclass(frozen=True)
class Key:
    """All that an engine depends on."""

    graph_sha256: str
    recipe_sha256: str
    library: str
    version: str
    gpu: str
    capability: str
    driver: int

    def name(self) -> str:
        """Return the stem of the files that belong to it."""
        return sha256_of_json(vars(self))[:32]


def key_of(graph: bytes, recipe: bytes, library: tuple[str, str], gpu: Gpu) -> Key:
    """Return the key of an engine.

    Args:
        graph: the ONNX file.
        recipe: the content of engine.toml.
        library: the engine's name and version.
        gpu: what it runs on.
    """
    hashes = [hashlib.sha256(content).hexdigest() for content in (graph, recipe)]
    return Key(hashes[0], hashes[1], *library, gpu.name, gpu.capability, gpu.driver)


def stored(folder: Path, key: Key, kind: str) -> bytes | None:
    """Return what was kept under a key, None when there is nothing, or it is damaged.

    Args:
        folder: where it is kept.
        key: the engine's.
        kind: "engine", or "jit" for what TensorRT-RTX compiled while it ran.
    """
    path = folder / f"{key.name()}.{kind}"
    try:
        content = path.read_bytes()
        expected = path.with_suffix(f".{kind}.sha256").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return content if hashlib.sha256(content).hexdigest() == expected else None


def keep(folder: Path, key: Key, kind: str, content: bytes) -> None:
    """Keep a file under a key; warn where the folder cannot be written."""
    path = folder / f"{key.name()}.{kind}"
    digest = f"{hashlib.sha256(content).hexdigest()}\n".encode()
    if keep_file(path, content):
        keep_file(path.with_suffix(f".{kind}.sha256"), digest)
