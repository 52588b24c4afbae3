"""How much each attention head and feed-forward channel matters, measured on texts with torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from m2dexport.checkpoint.families import Block, Part
from m2dexport.checkpoint.open import Checkpoint
from m2dexport.checkpoint.tokenizer import open_tokenizer
from m2dexport.checkpoint.widths import Importance, Widths
from m2dexport.data import texts_sha256
from m2dexport.reference.backbone import Backbone
from m2dexport.reference.tokens import token_batch


def importance_of(
    checkpoint: Checkpoint, texts: Sequence[str], *, batch_size: int = 32
) -> Importance:
    """Return the squared norm of what each unit adds to the hidden state, summed over tokens.

    A unit adds its activation times its columns of the output projection, ``W[:, unit] a[unit]``,
    and leaving it out changes the hidden state by just that. Minitron
    (https://arxiv.org/abs/2407.14679) ranks heads and channels by the activation only; the weights
    that carry it on join it here, as in Wanda's score of single weights
    (https://arxiv.org/abs/2306.11695).

    Args:
        checkpoint: one whose widths are known.
        texts: such as the model will be used on.
        batch_size: texts in one forward pass.
    """
    family, widths = checkpoint.layout.family, cast(Widths, checkpoint.widths)
    columns = cast(Block, family.block).columns
    backbone = Backbone(checkpoint, attention="sdpa")
    sums: list[dict[Part, Any]] = [{"heads": 0, "ffn": 0} for _ in range(checkpoint.layers)]
    real = torch.ones(0, dtype=torch.bool)  # of the batch at hand: which tokens are not padding

    def adder(layer: int, part: Part, size: int) -> Callable[..., None]:
        def add(module: torch.nn.Linear, inputs: tuple[torch.Tensor]) -> None:
            energies = _energies(inputs[0][real], module.weight, size)
            sums[layer][part] += energies.sum(dim=0, dtype=torch.float64)

        return add

    sizes: dict[Part, int] = {"heads": widths.head_dim, "ffn": 1}
    for layer in range(checkpoint.layers):
        for part, size in sizes.items():
            name = f"{family.layers[0]}{layer}.{columns[part]}"
            module = backbone.transformer.get_submodule(name)
            module.register_forward_pre_hook(adder(layer, part, size))
    tokenizer = open_tokenizer(checkpoint.path)
    ordered = sorted(texts, key=len)  # texts of about one length take little padding
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        input_ids, attention_mask = token_batch(tokenizer, batch, checkpoint.max_length)
        real = attention_mask.bool()
        with torch.inference_mode():
            backbone(input_ids, attention_mask)
    return Importance(
        heads=tuple(layer["heads"].numpy() for layer in sums),
        ffn=tuple(layer["ffn"].numpy() for layer in sums),
        texts_sha256=texts_sha256(texts),
    )


def _energies(inputs: torch.Tensor, weight: torch.Tensor, size: int) -> torch.Tensor:
    """Return the squared norm of each unit's part of ``inputs @ weight.T``: (tokens, units).

    The (tokens, units, hidden) parts themselves are never in memory: ``|W a|^2 = a (W W^T) a``.
    """
    columns = weight.T.reshape(-1, size, len(weight))  # (units, size, hidden)
    gram = columns @ columns.transpose(1, 2)
    activations = inputs.reshape(len(inputs), -1, size).transpose(0, 1)  # (units, tokens, size)
    return ((activations @ gram) * activations).sum(dim=2).T
