"""Prune a checkpoint's vocabulary: what changes in its tokenizer, config and token table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from m2dexport.checkpoint.families import Layout
from m2dexport.checkpoint.hf_config import read_config
from m2dexport.checkpoint.jsonfile import read_json
from m2dexport.checkpoint.open import Checkpoint
from m2dexport.checkpoint.st_modules import read_lowercase
from m2dexport.checkpoint.tensors import NewTensor, selected
from m2dexport.checkpoint.tokenizer import write_tokenizer
from m2dexport.data import calibration_texts
from m2dexport.errors import CheckpointError, UsageError
from m2dexport.files import scratch_folder
from m2dexport.slice.vocabulary import prune_vocabulary, token_use


@dataclass(frozen=True)
class PruningPlan:
    """What is left of a checkpoint's vocabulary, and what the checkpoint must change for it."""

    tokenizer: Mapping[str, Any]  # tokenizer.json
    rows: tuple[int, ...]  # of the token table, to be kept: the old id of each new one
    rows_before: int  # of the token table
    config: Mapping[str, Any]  # new values of config.json
    report: Mapping[str, Any]  # pieces, and tokens per text by name of the texts, before and after

    @property
    def ids(self) -> dict[int, int]:
        """The new id of each old one that stays."""
        return {old: new for new, old in enumerate(self.rows)}


def plan_pruning(
    checkpoint: Checkpoint, texts: Sequence[str] | None = None, size: int | None = None
) -> PruningPlan:
    """Return what is left of a checkpoint's vocabulary.

    Every text counts by itself and behind each of the checkpoint's prompts. Where positions are
    learned, all pieces up to the padding token stay: RoBERTa and its kind count from its id.

    Args:
        checkpoint: what to prune.
        texts: keep the pieces that these use; None takes the calibration texts that ship.
        size: keep this many pieces at most, those first that the texts use most; None keeps all
            that the texts use, and no others.

    Raises:
        UsageError: when ``size`` is too small, or the checkpoint is a static model.
        CheckpointError: when a tokenizer of its kind cannot be pruned.
    """
    if checkpoint.layers == 0:
        raise UsageError(f"{checkpoint.path} is a static model; prune what it was made of.")
    sets = {"calibration": calibration_texts()}
    if texts is not None:
        sets = {"corpus": tuple(texts), **sets}
    tokenizer = _tokenizer(checkpoint)
    token_ids = _token_ids(checkpoint)
    named = {i for value in token_ids.values() for i in _listed(value) if i < checkpoint.vocab_size}
    prompts = sorted({"", *checkpoint.prompts.values()})
    asked = (prompt + text for prompt in prompts for text in next(iter(sets.values())))
    keep = {*named, *_before_positions(checkpoint, token_ids)}
    pruned = prune_vocabulary(tokenizer, token_use(tokenizer, asked).counts, size, keep)
    # config.json may name a row that is not a piece of the tokenizer.
    rows = (*pruned.rows, *sorted(named - set(pruned.rows)))
    if max(rows) >= checkpoint.vocab_size:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.path} numbers a token {max(rows)}, and the token table "
            f"has {checkpoint.vocab_size} rows; remove the added tokens that the model lacks."
        )
    new = {old: i for i, old in enumerate(rows)}
    tokens = {
        name: [token_use(t, found).per_text for t in (tokenizer, pruned.tokenizer)]
        for name, found in sets.items()
    }
    return PruningPlan(
        pruned.tokenizer,
        rows,
        checkpoint.vocab_size,
        {key: _mapped(value, new) for key, value in token_ids.items()} | {"vocab_size": len(rows)},
        {"pieces": [checkpoint.vocab_size, len(rows)], "tokens_per_text": tokens},
    )


def pruned_tensors(
    pruning: PruningPlan, tensors: Sequence[NewTensor], layout: Layout
) -> list[NewTensor]:
    """Return tensors to be written, the token tables with the rows that are left.

    Args:
        pruning: which rows are left.
        tensors: all tensors.
        layout: of the checkpoint, whose token tables these are.
    """
    tables = layout.token_tables(pruning.rows_before)
    rows = np.array(pruning.rows, dtype=np.int64)
    return [
        selected(tables[t.name], t.name, rows, dtype=t.dtype) if t.name in tables else t
        for t in tensors
    ]


def _tokenizer(checkpoint: Checkpoint) -> dict[str, Any]:
    with scratch_folder() as folder:
        write_tokenizer(checkpoint.path, folder, lowercase=read_lowercase(checkpoint.path))
        found: dict[str, Any] = read_json(folder / "tokenizer.json")
    return found


def _token_ids(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return pad_token_id and its like, those that config.json leaves to their defaults, too."""
    config = read_config(checkpoint.path, trust_remote_code=checkpoint.own_code).to_dict()
    return {key: ids for key, ids in config.items() if key.endswith("_token_id") and _listed(ids)}


def _before_positions(checkpoint: Checkpoint, token_ids: Mapping[str, Any]) -> range:
    """Return the ids that must not move, where positions may be counted from the padding's id."""
    layout = checkpoint.layout
    if not any("position_embeddings" in name for name in layout.outside):
        return range(0)
    padding = _listed(token_ids.get("pad_token_id"))
    # MPNet counts from 1, whatever its config says.
    return range(1 + max([int(layout.family.position_offset), *padding]))


def _listed(ids: Any) -> Sequence[int]:
    """Return a config's token ids as a list: there may be none, one, or several."""
    listed = ids if isinstance(ids, list) else [ids]
    return [i for i in listed if isinstance(i, int) and i >= 0]  # -1 stands for none, too


def _mapped(ids: Any, new: Mapping[int, int]) -> Any:
    if isinstance(ids, list):
        return [new.get(i, i) for i in ids]
    return new.get(ids, ids)
