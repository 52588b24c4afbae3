"""The map of an aligned sub-model: a Dense between two Normalize, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.checkpoint.st_modules import Dense
from m2dexport.checkpoint.tensors import NewTensor, new_tensor, read_tensor, stored_tensors
from m2dexport.errors import CheckpointError

_WEIGHT, _BIAS = "linear.weight", "linear.bias"


@dataclass(frozen=True)
class LinearMap:
    """``weight @ x + bias``: from normalised vectors of one depth into the full model's space."""

    weight: NDArray[np.float32]  # (dim, width)
    bias: NDArray[np.float32]  # (dim,)

    def __call__(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return float32 (texts, dim), not normalised, of normalised (texts, width) vectors."""
        mapped: NDArray[np.float32] = vectors @ self.weight.T + self.bias
        return mapped

    def tensors(self, dtype: str) -> list[NewTensor]:
        """Return what the Dense stores, as "F32", "F16" or "BF16"."""
        return [new_tensor(_BIAS, self.bias, dtype), new_tensor(_WEIGHT, self.weight, dtype)]


@dataclass(frozen=True)
class FullModel:
    """The full depth at an aligned sub-model's dim, whose space its vectors are in."""

    layers: int
    weights_sha256: str  # of a sub-model of all layers at this dim
    tokenizer_sha256: str  # of its tokenizer.json, as an artifact has it
    pooling: str  # its modes, joined by "+"
    final_norm: str  # as a checkpoint has it


def read_full_model(provenance: Mapping[str, Any]) -> FullModel | None:
    """Return what m2dexport.json says of the model that a sub-model was aligned with, if it was.

    Raises:
        CheckpointError: when that is not as ``slice`` writes it.
    """
    stored = provenance.get("alignment")
    if stored is None:
        return None
    try:
        full = FullModel(**stored["full_model"])
    except (TypeError, KeyError) as error:
        raise CheckpointError("m2dexport.json says half of what a map was fitted to.") from error
    texts = [value for name, value in vars(full).items() if name != "layers"]
    if type(full.layers) is not int or not all(isinstance(text, str) for text in texts):
        raise CheckpointError("m2dexport.json says half of what a map was fitted to.")
    return full


def read_map(dense: Dense) -> LinearMap:
    """Return the map that a Dense stores, in float32."""
    stored = {
        name: read_tensor(tensor).astype(np.float32)
        for name, tensor in stored_tensors(dense.folder).items()
    }
    return LinearMap(stored[_WEIGHT], stored.get(_BIAS, np.zeros(dense.out_features, np.float32)))
