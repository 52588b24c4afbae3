"""The longest input of a checkpoint: what is stored, within the positions that exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from m2dexport.checkpoint.families import Family
from m2dexport.checkpoint.hf_config import CONFIG
from m2dexport.checkpoint.jsonfile import read_object
from m2dexport.checkpoint.st_modules import Modules, settings_path

DEFAULT_LENGTH = 512
NO_LENGTH = f"the maximum length is {DEFAULT_LENGTH} tokens, as the checkpoint stores none."
_TOKENIZER_CONFIG = "tokenizer_config.json"
_UNLIMITED = 1_000_000  # tokenizers without a limit store 1e30 or 2**63 as model_max_length


@dataclass(frozen=True)
class MaxLength:
    """The longest input, and where that was read."""

    tokens: int  # specials included
    source: str  # the name of a file, or "assumed"
    notes: tuple[str, ...] = ()  # a sentence where it is not stored as such


def read_max_length(modules: Modules, config: Any, family: Family) -> MaxLength:
    """Return the longest input: the Transformer module's, else the tokenizer's, within positions.

    Args:
        modules: the checkpoint's.
        config: transformers' view of its config.json.
        family: the family of its model.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and family.position_offset:
        positions -= int(config.pad_token_id or 0) + 1
    stored, source = modules.max_length, settings_path(modules.transformer).name
    if stored is None:
        tokenizer = read_object(modules.transformer / _TOKENIZER_CONFIG)
        stored, source = tokenizer.get("model_max_length"), _TOKENIZER_CONFIG
    known = [
        (int(n), name)
        for n, name in ((stored, source), (positions, CONFIG))
        if isinstance(n, int | float) and 0 < n < _UNLIMITED
    ]
    tokens, source = min(known, default=(DEFAULT_LENGTH, "assumed"), key=lambda each: each[0])
    steady = _steady_positions(config)
    if steady is not None and (steady < tokens or not known):
        sentence = (
            f"the maximum length is {steady} tokens, as stored for longrope: beyond it, a text's "
            "positions would depend on the longest text of its batch."
        )
        return MaxLength(steady, CONFIG, (sentence,))
    return MaxLength(tokens, source, () if known else (NO_LENGTH,))


def _steady_positions(config: Any) -> int | None:
    """Return up to where longrope's positions are those of its short factors, if it is used."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) not in ("longrope", "su"):
        return None
    known = (rope, vars(config))
    limits = [each.get("original_max_position_embeddings") for each in known]
    return next((int(limit) for limit in limits if limit), None)
