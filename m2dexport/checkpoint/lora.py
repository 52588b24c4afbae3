"""LoRA adapters in PEFT's format, added to the weights of their base model block by block."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.checkpoint.jsonfile import read_object
from m2dexport.checkpoint.tensors import (
    NewTensor,
    StoredTensor,
    as_dtype,
    copied,
    read_tensor,
    row_blocks_of,
    tensors_in,
)
from m2dexport.errors import CheckpointError, one_line

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "adapter_model.safetensors"
_ROOT = "base_model.model."
_REFUSED = {
    "use_dora": "DoRA also rescales every column",
    "fan_in_fan_out": "its matrices are transposed",
    "megatron_config": "it is written for Megatron",
    "trainable_token_indices": "it replaces single rows of the token table",
    "layer_replication": "it changes the order of the layers",
}


@dataclass(frozen=True)
class Adapter:
    """What an adapter adds to, and puts in place of, the weights of its base model."""

    added: Mapping[str, LowRank]  # by module: "layers.0.self_attn.q_proj"
    replaced: Mapping[str, StoredTensor]  # by tensor name, for modules trained whole


@dataclass(frozen=True)
class LowRank:
    """``scale * up @ down``, float32."""

    up: NDArray[np.float32]  # (out, rank)
    down: NDArray[np.float32]  # (rank, in)
    scale: float


def read_adapter(folder: Path) -> Adapter:
    """Read adapter_config.json and adapter_model.safetensors.

    Raises:
        CheckpointError: when the adapter is not a plain LoRA of linear layers.
    """
    config = read_object(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{folder} is a {config.get('peft_type')} adapter; only LORA can be merged."
        )
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise CheckpointError(f"{folder} cannot be merged: {key} is set, and {reason}.")
    ups: dict[str, StoredTensor] = {}
    downs: dict[str, StoredTensor] = {}
    replaced: dict[str, StoredTensor] = {}
    for stored_name, tensor in tensors_in(folder / ADAPTER).items():
        name = stored_name.removeprefix(_ROOT)
        if name.endswith(".lora_A.weight"):
            downs[name.removesuffix(".lora_A.weight")] = tensor
        elif name.endswith(".lora_B.weight"):
            ups[name.removesuffix(".lora_B.weight")] = tensor
        elif "lora_" in name:
            raise CheckpointError(
                f"{folder} cannot be merged: {stored_name!r} is not a LoRA of a linear layer."
            )
        else:
            replaced[name] = tensor
    _require_pairs(folder, ups, downs)
    added = {
        module: LowRank(
            read_tensor(ups[module]).astype(np.float32),
            read_tensor(downs[module]).astype(np.float32),
            _scale(folder, config, module, downs[module].shape[0]),
        )
        for module in sorted(ups)
    }
    return Adapter(added, replaced)


def _require_pairs(
    folder: Path, ups: Mapping[str, StoredTensor], downs: Mapping[str, StoredTensor]
) -> None:
    if set(ups) != set(downs):
        raise CheckpointError(f"{folder} is incomplete: A and B matrices do not pair up.")
    for module, up in ups.items():
        up_shape, down_shape = up.shape, downs[module].shape
        matrices = len(up_shape) == len(down_shape) == 2
        if not matrices or up_shape[1] != down_shape[0] or up_shape[1] == 0:
            raise CheckpointError(
                f"{folder} cannot be merged: the matrices of {module!r}, {up_shape} and "
                f"{down_shape}, have no rank in common."
            )


def _scale(folder: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", 8)
    try:
        for pattern, value in dict(config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
                break
        alpha = float(alpha)
    except (TypeError, ValueError, OverflowError, re.error) as error:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} has no lora_alpha that is a number: {one_line(error)}."
        ) from error
    if not math.isfinite(alpha):
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} has a lora_alpha of {alpha}.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def merged_tensors(
    tensors: Mapping[str, StoredTensor], adapter: Adapter, where: object
) -> list[NewTensor]:
    """Return the base model's tensors, each with what the adapter adds to it.

    Args:
        tensors: the base model's, by stored name.
        adapter: what to add.
        where: the adapter's folder, for messages.

    Raises:
        CheckpointError: when the adapter names a module that the base does not have.
    """
    added = {_base_name(f"{m}.weight", tensors, where): d for m, d in adapter.added.items()}
    replaced = {_base_name(name, tensors, where): t for name, t in adapter.replaced.items()}
    new = []
    for name, tensor in sorted(tensors.items()):
        if name in added:
            low_rank = added[name]
            if tensor.shape != (low_rank.up.shape[0], low_rank.down.shape[1]):
                raise CheckpointError(f"{where} does not fit its base model at {name!r}.")
            new.append(NewTensor(name, tensor.dtype, tensor.shape, _sum(tensor, low_rank)))
        else:
            new.append(copied(replaced.get(name, tensor), name, dtype=tensor.dtype))
    return new


def _sum(tensor: StoredTensor, low_rank: LowRank) -> Any:
    def blocks() -> Iterator[NDArray[Any]]:
        start = 0
        for block in row_blocks_of(tensor):
            rows = low_rank.up[start : start + len(block)]
            total = block.astype(np.float32) + low_rank.scale * (rows @ low_rank.down)
            yield as_dtype(total, tensor.dtype, tensor.name)
            start += len(block)

    return blocks


def _base_name(name: str, tensors: Mapping[str, StoredTensor], where: object) -> str:
    """Return the stored name of a tensor that the adapter names from the model it was trained in.

    That model may be a wrapper of the stored one, or the stored one a wrapper of that.
    """
    parts = name.split(".")
    for start in range(len(parts) - 1):
        tail = ".".join(parts[start:])
        matches = [n for n in tensors if n == tail or n.endswith(f".{tail}")]
        if len(matches) == 1:
            return matches[0]
        if matches:
            break
    raise CheckpointError(f"{where} adapts {name!r}, which its base model does not have.")
