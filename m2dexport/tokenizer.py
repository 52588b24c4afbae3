"""The checkpoint's tokenizer as transformers runs it, and its tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from m2dexport.errors import CheckpointError, M2DError

_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "tekken.json", "*.model")


def load_tokenizer(folder: Path) -> Any:
    """Return transformers' tokenizer of a checkpoint folder.

    Raises:
        CheckpointError: when there is none, or only one that has no fast form.
    """
    from transformers import AutoTokenizer

    if not any(path for pattern in _VOCABULARIES for path in folder.glob(pattern)):
        # transformers 5 would make up an empty vocabulary and raise nothing.
        raise CheckpointError(f"{folder} has no tokenizer; copy tokenizer.json beside its weights.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, KeyError, ImportError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder} has no tokenizer that transformers can load: {reason}"
        ) from error
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{folder} has only a slow tokenizer, which cannot be written as tokenizer.json."
        )
    return tokenizer


def write_tokenizer(source: Path, folder: Path, *, lowercase: bool) -> None:
    """Write a checkpoint's tokenizer, tokenizer.json included, into another folder.

    What is written is the tokenizer as transformers sets it up, not a copy of the stored file:
    options of tokenizer_config.json that transformers applies when it loads are in it. Stored
    truncation and padding are left out; whoever tokenizes chooses them.

    Args:
        source: the checkpoint's folder.
        folder: the folder to write to.
        lowercase: put a lowercasing step in front, as sentence-transformers' ``do_lower_case``
            does.

    Raises:
        M2DError: when the disk is full.
    """
    path = folder / "tokenizer.json"
    tokenizer = load_tokenizer(source)
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises bare exceptions, of a full disk, too
        raise M2DError(f"{path.name} could not be written: {error}; nothing was kept.") from error
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["truncation"] = stored["padding"] = None
    if lowercase:
        stored["normalizer"] = _lowercased(stored.get("normalizer"))
    path.write_text(json.dumps(stored, ensure_ascii=False), encoding="utf-8")


def _lowercased(normalizer: dict[str, Any] | None) -> dict[str, Any]:
    if normalizer is None:
        return {"type": "Lowercase"}
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    if not any(step["type"] == "Lowercase" for step in steps):
        steps = [{"type": "Lowercase"}, *steps]
    return {"type": "Sequence", "normalizers": steps}
