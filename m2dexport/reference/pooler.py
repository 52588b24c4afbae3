"""The torch original: one transformer whose single forward pass embeds at every depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from m2dexport.checkpoint.alignment import read_map
from m2dexport.checkpoint.open import Checkpoint
from m2dexport.checkpoint.st_modules import Dense, Head, PoolingMode
from m2dexport.checkpoint.tensors import read_tensor, stored_tensors
from m2dexport.checkpoint.tokenizer import open_tokenizer
from m2dexport.latent import latent_attention
from m2dexport.reference.backbone import Backbone
from m2dexport.reference.tokens import token_batch
from m2dexport.vectors.codecs import normalize

_ACTIVATIONS: dict[str, Callable[[], torch.nn.Module]] = {
    "identity": torch.nn.Identity,
    "tanh": torch.nn.Tanh,
    "relu": torch.nn.ReLU,
    "gelu": torch.nn.GELU,
    "silu": torch.nn.SiLU,
    "sigmoid": torch.nn.Sigmoid,
}


class DepthPooler(torch.nn.Module):  # type: ignore[misc]
    """A transformer that pools the output of several of its layers in one pass.

    Depth-n vectors are the token states of depth n, pooled, then passed through the modules after
    pooling. They are neither cut to a dim, normalised nor aligned.
    """

    def __init__(self, checkpoint: Checkpoint, depths: Sequence[int], attention: str) -> None:
        super().__init__()
        self.backbone = Backbone(checkpoint, attention)
        self.latent = latent_attention(checkpoint.latent) if checkpoint.latent else None
        self.head = torch.nn.Sequential(*(_head_module(module) for module in checkpoint.head))
        self.depths = tuple(depths)
        self.modes = checkpoint.pooling.modes
        self.eval()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return one float32 (batch, dim) tensor per depth from int64 (batch, sequence) inputs."""
        states = self.backbone(input_ids, attention_mask)
        vectors = []
        for depth in self.depths:
            state = states[depth - 1]
            if self.latent is not None:
                state = self.latent.states(state)
            pooled = [pool(state, attention_mask, mode) for mode in self.modes]
            vectors.append(self.head(torch.cat(pooled, dim=-1)))
        return tuple(vectors)


class Reference:
    """The checkpoint as its owner runs it: transformers' own tokenizer and attention, float32."""

    def __init__(self, checkpoint: Checkpoint, depths: Sequence[int] | None = None) -> None:
        self.checkpoint = checkpoint
        self._map = read_map(checkpoint.alignment) if checkpoint.alignment else None
        self.depths = tuple(depths or range(1, checkpoint.layers + 1))
        self._tokenizer = open_tokenizer(checkpoint.path)
        self._model = DepthPooler(checkpoint, self.depths, attention="sdpa")

    def encode(
        self, texts: Sequence[str], *, prompt: str = "", batch_size: int = 32
    ) -> dict[int, NDArray[np.float32]]:
        """Return depth -> float32 (texts, dim), all depths from one forward pass per text.

        The vectors are neither cut nor normalised; those of an aligned sub-model are aligned.
        ``prompt`` is put in front of every text.
        """
        rows: dict[int, list[NDArray[np.float32]]] = {depth: [] for depth in self.depths}
        for start in range(0, len(texts), batch_size):
            prompted = [prompt + text for text in texts[start : start + batch_size]]
            batch = token_batch(self._tokenizer, prompted, self.checkpoint.max_length)
            with torch.inference_mode():
                vectors = self._model(*batch)
            for depth, vector in zip(self.depths, vectors, strict=True):
                rows[depth].append(vector.float().numpy())
        found = {depth: np.concatenate(parts) for depth, parts in rows.items()}
        if self._map is None:
            return found
        return {depth: self._map(normalize(vectors)) for depth, vectors in found.items()}


def pool(state: torch.Tensor, attention_mask: torch.Tensor, mode: PoolingMode) -> torch.Tensor:
    """Pool (batch, sequence, hidden) into (batch, hidden) as sentence-transformers does."""
    if mode in ("cls", "lasttoken"):  # the first or the last real token, whichever side is padded
        places = torch.arange(1, state.shape[1] + 1, device=state.device)
        order = places if mode == "lasttoken" else places.flip(0)
        place = (attention_mask * order).argmax(dim=1)
        return state.gather(1, place[:, None, None].expand(-1, 1, state.shape[2])).squeeze(1)
    mask = attention_mask.unsqueeze(-1).to(state.dtype)
    if mode == "max":
        return state.masked_fill(mask == 0, torch.finfo(state.dtype).min).amax(dim=1)
    if mode == "weightedmean":
        mask = mask * mask.cumsum(dim=1)  # weights 1, 2, ... from the first real token on
    total = (state * mask).sum(dim=1)
    count = mask.sum(dim=1).clamp(min=1e-9)
    return total / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)


class _Truncate(torch.nn.Module):  # type: ignore[misc]
    """The first ``dim`` values of a vector: what an identity Dense of a sub-model means."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, vector: torch.Tensor) -> torch.Tensor:
        return vector[:, : self.dim]


def _head_module(module: Head) -> torch.nn.Module:
    weights = {
        name: torch.from_numpy(read_tensor(tensor).astype(np.float32))
        for name, tensor in stored_tensors(module.folder).items()
    }
    if not isinstance(module, Dense):
        norm = torch.nn.LayerNorm(module.features)
        norm.load_state_dict({name.removeprefix("norm."): w for name, w in weights.items()})
        return norm
    identity = torch.eye(module.out_features, module.in_features)
    plain = module.activation == "identity" and not module.bias
    if plain and torch.equal(weights["linear.weight"], identity):
        return _Truncate(module.out_features)
    linear = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias)
    linear.load_state_dict({name.removeprefix("linear."): w for name, w in weights.items()})
    return torch.nn.Sequential(linear, _ACTIVATIONS[module.activation]())
