"""NV-Embed's latent attention: token states that look up trained latents before they are pooled.

Lee et al., "NV-Embed", https://arxiv.org/abs/2405.17428, section 3.1. Each token state asks, as
the query, a small table of latents, which are keys and values, then passes a gated feed-forward;
both have a norm before and a residual around them. The latents do not depend on the text, so their
keys and values are computed once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from m2dexport.checkpoint.st_modules import LatentAttention, read_latent_attention
from m2dexport.checkpoint.tensors import read_tensor, stored_tensors


class LatentAttentionModule(torch.nn.Module):  # type: ignore[misc]
    """Latent attention in float32, as m2dexport runs it and as sentence-transformers loads it.

    Args:
        weights: the tensors of NV-Embed's ``latent_attention_model``, by name.
        heads: its number of attention heads.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], heads: int) -> None:
        super().__init__()
        self.heads = heads
        cross, forward = "cross_attend_blocks.0.", "cross_attend_blocks.1."
        self.query_norm = _norm(weights, f"{cross}norm")
        self.query = _linear(weights, f"{cross}fn.to_q")
        self.out = _linear(weights, f"{cross}fn.to_out")
        self.forward_norm = _norm(weights, f"{forward}norm")
        self.gate = _linear(weights, f"{forward}fn.net.0")
        self.down = _linear(weights, f"{forward}fn.net.2")
        with torch.no_grad():
            latents = _norm(weights, f"{cross}norm_context")(weights["latents"])
            pairs = latents @ weights[f"{cross}fn.to_kv.weight"].T
            key, value = (half.unflatten(-1, (heads, -1)) for half in pairs.chunk(2, dim=-1))
        self.register_buffer("key", key.permute(1, 2, 0).contiguous())  # (heads, width, latents)
        self.register_buffer("value", value.transpose(0, 1).contiguous())
        self.eval()

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return new token states of the same shape, (batch, sequence, hidden)."""
        query = self.query(self.query_norm(tokens)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        scores = torch.matmul(query * query.shape[-1] ** -0.5, self.key)
        looked_up = torch.matmul(torch.softmax(scores, dim=-1), self.value)
        tokens = self.out(looked_up.transpose(1, 2).flatten(2)) + tokens
        up, gate = self.gate(self.forward_norm(tokens)).chunk(2, dim=-1)
        return self.down(up * functional.gelu(gate)) + tokens

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Replace the token embeddings among sentence-transformers' features."""
        features["token_embeddings"] = self.states(features["token_embeddings"].float())
        return features

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **_: Any) -> LatentAttentionModule:
        """Return the module stored in a local folder; called by sentence-transformers."""
        return latent_attention(read_latent_attention(Path(model_name_or_path) / subfolder))


def latent_attention(stored: LatentAttention) -> LatentAttentionModule:
    """Return the torch module of a stored latent attention."""
    weights = {
        name: torch.from_numpy(read_tensor(tensor).astype("float32"))
        for name, tensor in stored_tensors(stored.folder).items()
    }
    return LatentAttentionModule(weights, stored.heads)


def _norm(weights: Mapping[str, torch.Tensor], name: str) -> torch.nn.LayerNorm:
    norm = torch.nn.LayerNorm(len(weights[f"{name}.weight"]))
    norm.load_state_dict({key: weights[f"{name}.{key}"] for key in ("weight", "bias")})
    return norm


def _linear(weights: Mapping[str, torch.Tensor], name: str) -> torch.nn.Linear:
    rows, columns = weights[f"{name}.weight"].shape
    bias = f"{name}.bias" in weights
    linear = torch.nn.Linear(columns, rows, bias=bias)
    linear.load_state_dict(
        {key: weights[f"{name}.{key}"] for key in ("weight", "bias") if f"{name}.{key}" in weights}
    )
    return linear
