"""Where each fact about a checkpoint was read: the names of files in its folder."""

from __future__ import annotations

from pathlib import Path

from m2dexport.checkpoint.hf_config import CONFIG
from m2dexport.checkpoint.st_modules import MODULES, SENTENCE_CONFIG, Modules, listed_modules
from m2dexport.checkpoint.tensors import INDEX, WEIGHTS

_DEFAULT = "sentence-transformers' default"


def sources_of(
    folder: Path, modules: Modules, final_norm: str, max_length: str, trained: str
) -> dict[str, str]:
    """Return the source of each fact, by the field of ``Checkpoint`` that holds it.

    Args:
        folder: the checkpoint's.
        modules: its modules.
        final_norm: how a shallow depth treats the final norm.
        max_length: the source of the maximum length.
        trained: the source of the trained grid.
    """
    listed = listed_modules(folder)
    config = _relative(modules.transformer / CONFIG, folder)
    pooling = "--pooling"
    if listed:
        pooling = _relative(listed[2 if modules.latent else 1][1] / CONFIG, folder)
    weights = WEIGHTS if (modules.transformer / WEIGHTS).exists() else INDEX
    ending = (*modules.head, *((modules.alignment,) if modules.alignment else ()))
    dim = _relative(ending[-1].folder / CONFIG, folder) if ending else config
    stated = SENTENCE_CONFIG if (folder / SENTENCE_CONFIG).exists() else _DEFAULT
    norms = {"none": "the family", "applied": "the default of --final-norm", "skipped": config}
    return {
        **dict.fromkeys(("model_type", "layers", "hidden", "vocab_size"), config),
        "widths": f"shapes in {weights}",
        "dim": dim,
        "pooling": pooling,
        "final_norm": norms[final_norm],
        "normalized": MODULES if listed else f"no {MODULES}",
        **dict.fromkeys(("similarity", "prompts", "default_prompt"), stated),
        "max_length": max_length,
        "trained": trained,
    }


def static_sources(folder: Path, *, has_length: bool) -> dict[str, str]:
    """Return the source of each fact about a static model, likewise."""
    stated = SENTENCE_CONFIG if (folder / SENTENCE_CONFIG).exists() else _DEFAULT
    return {
        **dict.fromkeys(("model_type", "layers", "pooling", "normalized"), MODULES),
        **dict.fromkeys(("hidden", "dim", "vocab_size"), f"shapes in {WEIGHTS}"),
        **dict.fromkeys(("similarity", "prompts", "default_prompt"), stated),
        "final_norm": "the family",
        "max_length": "tokenizer.json" if has_length else "assumed",
        "trained": "unknown",
    }


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
