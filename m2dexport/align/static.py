"""Depth 0: token vectors weighted by rarity, and their map folded into one table.

A text's vector is that of its tokens' mean: with weights w and the token table E,
``m = sum of w[t] * E[t]`` over its tokens. The map takes ``m / |m|`` and, in the place of an
intercept, ``sum of w[t] / |m|``: both are sums over tokens up to one factor, which normalising
removes. So ``w[t] * (W @ E[t] + b)`` can be stored for each token, exactly.

Weights are inverse document frequencies (Spärck Jones, 1972): ``log((N + 1) / (df + 1)) + 0.1``,
with df the number of the N texts that have the token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from tokenizers import Tokenizer

from m2dexport.align.texts import chunks_of
from m2dexport.checkpoint.alignment import LinearMap
from m2dexport.checkpoint.jsonfile import read_json
from m2dexport.checkpoint.open import Checkpoint
from m2dexport.checkpoint.static import static_tokenizer_json
from m2dexport.checkpoint.tensors import StoredTensor, read_tensor
from m2dexport.errors import CheckpointError
from m2dexport.vectors.codecs import NORM_EPSILON

Floats = NDArray[np.float32]
_COMMON = 0.1  # what the weight of a token that every text has stays above
_CHUNK = 4096
_PADDING = ("[PAD]", "<pad>")


class TokenTable:
    """The token table of a checkpoint, its tokenizer, and how rare each token is.

    Args:
        checkpoint: whose token vectors to take; its tokenizer.json is read.
        texts: whose tokens are counted.

    Raises:
        CheckpointError: when it has no table of token vectors.
    """

    def __init__(self, checkpoint: Checkpoint, texts: Iterable[str]) -> None:
        self.rows: Floats = read_tensor(_token_table(checkpoint)).astype(np.float32)
        stored = read_json(checkpoint.path / "tokenizer.json")
        #: tokenizer.json of the static model.
        self.tokenizer = static_tokenizer_json(stored, checkpoint.max_length)
        self._tokenizer = Tokenizer.from_str(self.tokenizer_json)
        self._weights = self._rarities(texts)
        # Rows of about length 1 keep the ridge's hold on W and b alike, in any family.
        self._scale = float(np.linalg.norm(self.rows, axis=1).mean())

    @property
    def width(self) -> int:
        """Values of a row of ``inputs``."""
        return int(self.rows.shape[1]) + 1

    @property
    def tokenizer_json(self) -> str:
        """The content of the static model's tokenizer.json."""
        return json.dumps(self.tokenizer, ensure_ascii=False)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens; those beyond the table go."""
        encodings = self._tokenizer.encode_batch(list(texts))
        return [[i for i in each.ids if i < len(self.rows)] for each in encodings]

    def inputs(self, texts: Sequence[str]) -> Floats:
        """Return what the map takes: float32 (texts, width); a text without tokens is zeros."""
        found = np.zeros((len(texts), self.width), dtype=np.float32)
        for number, ids in enumerate(self.ids(texts)):
            row = found[number]
            weights = self._weights[ids]
            row[:-1] = (weights[:, None] * self.rows[ids]).sum(axis=0)
            row[-1] = weights.sum() * self._scale
            row /= max(float(np.linalg.norm(row[:-1])), float(NORM_EPSILON))
        return found

    def folded(self, linear: LinearMap) -> Floats:
        """Return the table whose rows' mean points where the map of ``inputs`` does.

        The rows of the unknown token and of padding are zero: they say nothing about a text.

        Args:
            linear: of ``width`` inputs, without intercept.

        Returns:
            float32 (tokens, dim).
        """
        weight, bias = linear.weight[:, :-1], linear.weight[:, -1] * self._scale
        with threadpool_limits(1):  # the table must not depend on how many cores there are
            table: Floats = self._weights[:, None] * (self.rows @ weight.T + bias)
        table[self._unknown()] = 0
        return table.astype(np.float32)

    def _rarities(self, texts: Iterable[str]) -> Floats:
        count, frequency = 0, np.zeros(len(self.rows))
        for chunk in chunks_of(texts, _CHUNK):
            count += len(chunk)
            for ids in self.ids(chunk):
                frequency[np.unique(ids).astype(np.intp)] += 1
        rarity: Floats = (np.log((count + 1) / (frequency + 1)) + _COMMON).astype(np.float32)
        return rarity

    def _unknown(self) -> list[int]:
        model = self.tokenizer["model"]
        names = [model.get("unk_token"), *_PADDING]
        found = [self._tokenizer.token_to_id(name) for name in names if isinstance(name, str)]
        found.append(model.get("unk_id"))  # of unigram models
        return [i for i in found if i is not None and i < len(self.rows)]


def _token_table(checkpoint: Checkpoint) -> StoredTensor:
    """Return where the token vectors lie: the embeddings with a row per token."""
    found = checkpoint.layout.token_tables(checkpoint.vocab_size)
    if not found:
        raise CheckpointError(
            f"{checkpoint.path} has no table with a row for each of its {checkpoint.vocab_size} "
            "tokens, so it has no depth 0."
        )
    return next(iter(found.values()))
