"""What a profile is of, and what decides its figures, as hashes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from m2dexport.checkpoint.hf_config import CONFIG
from m2dexport.checkpoint.jsonfile import read_object
from m2dexport.checkpoint.open import Checkpoint
from m2dexport.checkpoint.st_modules import read_lowercase
from m2dexport.checkpoint.tokenizer import open_tokenizer
from m2dexport.files import sha256_of
from m2dexport.profile.plan import Plan
from m2dexport.runtime.artifact import TOKENIZER
from m2dexport.strict import parse_json, sha256_of_json

#: Of config.json: who wrote it. Keys that begin with "_" say where it came from.
_WRITER = ("architectures", "transformers_version")


def model_sha256(checkpoint: Checkpoint) -> str:
    """Return a hash of all of a checkpoint that decides a vector, by content and not by name.

    What ``space_id`` is for one artifact, this is for all that are made of a checkpoint: its
    weights, configuration, tokenizer, pooling, head, prompts and maximum length.

    Raises:
        CheckpointError: when its tokenizer cannot be read.
    """
    config = read_object(checkpoint.path / CONFIG)
    code = sorted(checkpoint.path.glob("*.py")) if checkpoint.own_code else []
    named = ("final_norm", "normalized", "similarity", "prompts", "default_prompt", "max_length")
    decides = {
        "weights": checkpoint.weights_sha256,
        "config": {k: v for k, v in config.items() if k[0] != "_" and k not in _WRITER},
        "code": [(path.name, sha256_of(path)) for path in code],
        "tokenizer": _tokenizer(checkpoint.path),
        "pooling": asdict(checkpoint.pooling),
        "latent": checkpoint.latent and checkpoint.latent.heads,
        "head": [_without_folder(module) for module in checkpoint.head],
        **{name: getattr(checkpoint, name) for name in named},
    }
    return sha256_of_json({**decides, "prompts": dict(checkpoint.prompts)})


def plans_as_json(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """Return all of some plans that decides figures: grid, shapes, device, repeats.

    The texts that maps are fitted on are left out, since they may be any iterable.
    """
    alone = (
        replace(plan, align_texts=None, device=replace(plan.device, cache=None)) for plan in plans
    )
    return [asdict(plan) for plan in alone]


def _tokenizer(folder: Path) -> list[Any]:
    """Return what decides token ids: tokenizer.json as stored, which no library's version changes.

    Where it last cut or padded texts says nothing: that is set anew.
    """
    path = folder / TOKENIZER
    stored = (
        read_object(path)
        if path.exists()
        else parse_json(open_tokenizer(folder).backend_tokenizer.to_str(), path)
    )
    ids = {name: value for name, value in stored.items() if name not in ("truncation", "padding")}
    ends = read_object(folder / "tokenizer_config.json").get("add_eos_token") is True
    return [ids, ends, read_lowercase(folder)]


def _without_folder(module: Any) -> list[Any]:
    facts = {name: value for name, value in vars(module).items() if name != "folder"}
    return [type(module).__name__, facts]
