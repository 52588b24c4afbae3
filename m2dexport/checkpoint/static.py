"""A static model: a table of token vectors and their mean, in sentence-transformers' layout.

::

    modules.json                        StaticEmbedding, Normalize
    model.safetensors                   embedding.weight, (tokens, dim)
    tokenizer.json                      cuts at the maximum length; special tokens are not added
    config_sentence_transformers.json   prompts, similarity; "normalize" and "max_length" are for
                                        model2vec
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.checkpoint.jsonfile import read_json, write_json
from m2dexport.checkpoint.st_modules import MODULES, SENTENCE_CONFIG, STATIC, listed_modules
from m2dexport.checkpoint.tensors import (
    FLOATS,
    WEIGHTS,
    StoredTensor,
    new_tensor,
    read_tensor,
    tensors_in,
    write_tensors,
)
from m2dexport.checkpoint.tokenizer import truncation_at
from m2dexport.errors import CheckpointError

TABLE = "embedding.weight"
_TOKENIZER = "tokenizer.json"
_TYPES = tuple(f"sentence_transformers.models.{kind}" for kind in (STATIC, "Normalize"))


@dataclass(frozen=True)
class StaticParts:
    """What a static model's folder holds."""

    folder: Path  # of the table and the tokenizer
    table: StoredTensor  # (tokens, dim)
    normalized: bool
    max_length: int | None  # tokens; None: texts are not cut


def read_static(folder: Path) -> StaticParts | None:
    """Return the parts of a static model, None of a folder that is not one.

    Raises:
        CheckpointError: when it is one that cannot be exported.
    """
    listed = listed_modules(folder)
    kinds = [type_name.rpartition(".")[2] for type_name, _ in listed]
    if kinds[:1] != [STATIC]:
        return None
    if kinds[1:] not in ([], ["Normalize"]):
        raise CheckpointError(
            f"{folder / MODULES} has {kinds[1]} after {STATIC}, which is not supported."
        )
    where = listed[0][1]
    table = tensors_in(where / WEIGHTS).get(TABLE)
    if table is None or len(table.shape) != 2 or table.dtype not in FLOATS:
        raise CheckpointError(f"{where / WEIGHTS} holds no table of token vectors named {TABLE}.")
    truncation = read_json(where / _TOKENIZER).get("truncation") or {}
    return StaticParts(where, table, len(kinds) == 2, truncation.get("max_length"))


def read_table(table: StoredTensor) -> NDArray[np.float32]:
    """Return the token vectors of a static model, float32 (tokens, dim)."""
    return read_tensor(table).astype(np.float32)


def static_tokenizer_json(stored: Mapping[str, Any], max_length: int) -> dict[str, Any]:
    """Return a tokenizer.json that adds no special tokens and cuts at the maximum length."""
    cut = truncation_at(max_length)
    return {**stored, "post_processor": None, "padding": None, "truncation": cut}


def write_static(
    folder: Path,
    table: NDArray[np.float32],
    tokenizer: Mapping[str, Any],
    sentence_config: Mapping[str, Any],
    dtype: str = "F32",
) -> None:
    """Write a static model that sentence-transformers and model2vec load.

    Args:
        folder: an empty folder.
        table: float32 (tokens, dim).
        tokenizer: from ``static_tokenizer_json``.
        sentence_config: what config_sentence_transformers.json says.
        dtype: to store the table in, "F32", "F16" or "BF16".
    """
    write_tensors(folder / WEIGHTS, [new_tensor(TABLE, table, dtype)])
    (folder / _TOKENIZER).write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    listed = [
        {"idx": i, "name": str(i), "path": f"{i}_Normalize" if i else "", "type": type_name}
        for i, type_name in enumerate(_TYPES)
    ]
    (folder / "1_Normalize").mkdir()
    write_json(folder / "1_Normalize" / "config.json", {})
    write_json(folder / MODULES, listed)
    for_model2vec = {"normalize": True, "max_length": tokenizer["truncation"]["max_length"]}
    write_json(folder / SENTENCE_CONFIG, {**sentence_config, **for_model2vec})
