"""Depth 0 for model2vec and sentence-transformers: a table of token vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.batches import padded
from m2dexport.checkpoint.static import write_static
from m2dexport.consumers.golden import Run
from m2dexport.consumers.hub import sentence_config
from m2dexport.consumers.source import Options, Source
from m2dexport.engines.numpy.table import read_table, rows_of
from m2dexport.errors import UsageError
from m2dexport.graph.vector import OUTPUT
from m2dexport.runtime.artifact import RANGES, TOKENIZER
from m2dexport.vectors.codecs import normalize


def write_model2vec(source: Source, folder: Path, options: Options) -> Run:
    """Write the same for model2vec, which adds no vectors of unknown tokens.

    Raises:
        UsageError: when the table has one, as those of other makers do.
    """
    run = write_table(source, folder, options)
    tokenizer = source.encoder.tokenizer
    model = json.loads(source.files[TOKENIZER])["model"]
    unknown = tokenizer.token_to_id(model.get("unk_token") or "")
    unknown = model.get("unk_id") if unknown is None else unknown
    if unknown is not None and run(*padded([[unknown]], source.spec.pad_id))[OUTPUT].any():
        raise UsageError(
            f"model2vec leaves unknown tokens out, and the table of {source.path} has a vector for "
            "them; export --for sentence-transformers takes it."
        )
    return run


def write_table(source: Source, folder: Path, options: Options) -> Run:
    """Write the table in 16 bits where the artifact has it so, else in float32.

    Args:
        source: an artifact for static.
        folder: an empty folder.
        options: none of them counts.
    """
    ((name, content),) = source.graph.items()
    table = read_table(memoryview(content), name)
    rows = rows_of(table, np.arange(source.spec.pad_id))  # the padding's, of zeros, comes last
    dtype = "F16" if source.spec.weights == "fp16" else "F32"
    tokenizer = json.loads(source.files[TOKENIZER])
    write_static(folder, rows, tokenizer, sentence_config(source), dtype)
    if RANGES in source.files:
        (folder / RANGES).write_bytes(source.files[RANGES])

    def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        pairs = zip(ids, mask, strict=True)
        sums = [rows[text[(kept != 0) & (text < len(rows))]].sum(axis=0) for text, kept in pairs]
        return {OUTPUT: normalize(np.stack(sums))}

    return run
