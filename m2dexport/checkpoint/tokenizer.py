"""The checkpoint's tokenizer as transformers runs it, and its tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from m2dexport.checkpoint.jsonfile import read_json, read_object, write_json
from m2dexport.errors import CheckpointError, M2DError

_FILE = "tokenizer.json"
_COPIES = ("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "tekken.json", "*.model")
_VOCABULARIES = (_FILE, "vocab.txt", "vocab.json", "tekken.json", "*.model")


def open_tokenizer(folder: Path) -> Any:
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

    Raises:
        M2DError: when the disk is full.
    """
    path = folder / _FILE
    tokenizer = open_tokenizer(source)
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises bare exceptions, of a full disk, too
        raise M2DError(f"{path.name} could not be written: {error}; nothing was kept.") from error
    stored = read_json(path)
    stored["truncation"] = stored["padding"] = None
    if lowercase:
        stored["normalizer"] = _lowercased(stored.get("normalizer"))
    path.write_text(json.dumps(stored, ensure_ascii=False), encoding="utf-8")


def replace_tokenizer(folder: Path, tokenizer: Mapping[str, Any], ids: Mapping[int, int]) -> None:
    """Put another tokenizer.json in the place of the one that ``write_tokenizer`` wrote.

    Other files that hold the old vocabulary are removed.

    Args:
        folder: the folder.
        tokenizer: the new tokenizer.json.
        ids: the new id of each old one that is left.

    Raises:
        CheckpointError: when transformers makes something else of it.
    """
    for path in [path for pattern in _COPIES for path in folder.glob(pattern)]:
        path.unlink()
    (folder / _FILE).write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = read_object(path)
    if "added_tokens_decoder" in config:  # transformers < 5
        added = config["added_tokens_decoder"]
        config["added_tokens_decoder"] = {str(ids[int(i)]): token for i, token in added.items()}
        write_json(path, config)
    written = Tokenizer.from_file(str(folder / _FILE))
    loaded = open_tokenizer(folder).backend_tokenizer
    if loaded.get_vocab() != written.get_vocab() or _model(loaded) != _model(written):
        raise CheckpointError(
            f"transformers builds its {config.get('tokenizer_class')} otherwise than the pruned "
            "tokenizer.json says; name PreTrainedTokenizerFast as tokenizer_class in the "
            "checkpoint's tokenizer_config.json."
        )


def _model(tokenizer: Tokenizer) -> Any:
    return json.loads(tokenizer.to_str())["model"]


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

    tokenizer = open_tokenizer(folder)
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
