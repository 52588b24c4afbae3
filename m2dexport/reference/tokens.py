"""Texts to token ids, as the torch original takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def token_batch(
    tokenizer: Any, texts: Sequence[str], max_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return padded ids and mask; a text without any token is one pad token, as at run time.

    Args:
        tokenizer: from ``open_tokenizer``.
        texts: at least one.
        max_length: in tokens, specials included; what is longer is cut on its right.

    Returns:
        Two int64 (batch, sequence) tensors.
    """
    batch = tokenizer(
        list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt"
    )
    ids, mask = batch["input_ids"].long(), batch["attention_mask"].long()
    if ids.shape[1] == 0:
        ids = torch.full((len(texts), 1), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
    first = -1 if tokenizer.padding_side == "left" else 0
    mask[mask.sum(dim=1) == 0, first] = 1
    return ids, mask
