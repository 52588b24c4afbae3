"""The checkpoint's tokenizer as transformers runs it, and its tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from m2dexport.errors import CheckpointError
from m2dexport.jsonfile import read_object, write_json

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
    if tokenizer.pad_token is None:  # padding is masked: any token serves
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
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
    """
    load_tokenizer(source).save_pretrained(folder)
    path = folder / "tokenizer.json"
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


def append_eos(folder: Path) -> None:
    """Make a checkpoint's tokenizer end every text in its end token, where it does not.

    A text beyond the maximum length keeps the token, as it is added after cutting.
    """
    from tokenizers import processors

    tokenizer = load_tokenizer(folder)
    ids, end = tokenizer("a")["input_ids"], tokenizer.eos_token_id
    if ids[-1] != end:
        begin = tokenizer.bos_token if ids[0] == tokenizer.bos_token_id else None
        tokens = [token for token in (begin, tokenizer.eos_token) if token]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin or ''} $A {tokenizer.eos_token}".strip(),
            special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in tokens],
        )
        tokenizer.save_pretrained(folder)
        settings = read_object(folder / "tokenizer_config.json")
        # A family's own class would set up its usual beginning and end again.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(folder / "tokenizer_config.json", settings)
