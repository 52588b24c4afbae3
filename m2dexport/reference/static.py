"""The torch original of depth 0: the mean of token vectors, as sentence-transformers takes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from m2dexport.checkpoint.jsonfile import read_json
from m2dexport.checkpoint.open import Checkpoint
from m2dexport.checkpoint.static import TABLE, read_table, static_tokenizer_json


class StaticReference:
    """A static model as its owner runs it: torch's EmbeddingBag, float32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        stored = read_json(checkpoint.path / "tokenizer.json")
        tokenizer = static_tokenizer_json(stored, checkpoint.max_length)
        self._tokenizer = Tokenizer.from_str(json.dumps(tokenizer))
        table = torch.from_numpy(read_table(checkpoint.layout.outside[TABLE]))
        self._bag = torch.nn.EmbeddingBag.from_pretrained(table, mode="mean")

    def encode(self, texts: Sequence[str], *, prompt: str = "") -> dict[int, NDArray[np.float32]]:
        """Return 0 -> float32 (texts, dim), not normalised; a text without tokens is zeros."""
        encodings = self._tokenizer.encode_batch([prompt + text for text in texts])
        ids = [[i for i in each.ids if i < self._bag.num_embeddings] for each in encodings]
        starts = [0, *accumulate(len(each) for each in ids)][: len(ids)]
        flat = [i for each in ids for i in each]
        with torch.inference_mode():
            vectors = self._bag(torch.tensor(flat, dtype=torch.long), torch.tensor(starts))
        return {0: vectors.numpy()}
