"""Requests made of real texts: as many tokens each as a timed shape has."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
from numpy.typing import NDArray

from m2dexport.batches import padded
from m2dexport.runtime.tokenizer import tokenize

#: Requests that take turns, so that none stays in a cache by itself.
_REQUESTS = 8
_SHIFTS = 16  # words by which the beginning of a text moves until its length fits
_SECONDS, _LEAST, _MOST = 0.3, 30, 1000  # of timing at each shape, and its runs


@dataclass(frozen=True)
class Tokenization:
    """How long it takes to make the token ids of one shape from texts."""

    batch: int
    sequence: int
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True)
class Requests:
    """Requests of one shape, for one tokenizer."""

    tokenizer: tokenizers.Tokenizer
    prompt: str  # before each text
    shape: tuple[int, int]  # (texts, tokens)
    texts: tuple[tuple[str, ...], ...]  # of each request

    def ids(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokenize a request, in turn; return its int64 (texts, tokens) ids and mask."""
        texts = self.texts[number % len(self.texts)]
        return padded([each.ids for each in tokenize(self.tokenizer, texts, self.prompt)], 0)


def requests_of(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[str], prompt: str, shape: tuple[int, int]
) -> Requests:
    """Join and cut texts, between words, into requests of a shape.

    Args:
        tokenizer: as ``load_tokenizer`` returns it.
        texts: real ones, of which there is at least one word.
        prompt: goes in front of each.
        shape: (texts, tokens), specials and prompt included. A text has fewer tokens where its
            words do not fit exactly, and more where a prompt and one word are longer.
    """
    batch, sequence = shape
    words = " ".join(texts).split()
    words *= 1 + (sequence + _SHIFTS) // len(words)  # enough for one text
    at, made = 0, []
    for _ in range(_REQUESTS * batch):
        if at + sequence + _SHIFTS > len(words):
            at = 0
        text, at = _text_of(tokenizer, words, at, prompt, sequence)
        made.append(text)
    groups = (tuple(made[start : start + batch]) for start in range(0, len(made), batch))
    return Requests(tokenizer, prompt, shape, tuple(groups))


def _text_of(
    tokenizer: tokenizers.Tokenizer, words: Sequence[str], at: int, prompt: str, sequence: int
) -> tuple[str, int]:
    """Return a text of so many tokens from words around a place, and where it ends."""
    best, best_tokens, end = words[at], 0, at + 1
    for start in range(at, at + _SHIFTS):
        low, high = 1, sequence  # words: the most that fit; a word has a token or more
        while low < high:
            middle = (low + high + 1) // 2
            found = _count(tokenizer, words[start : start + middle], prompt, sequence)
            low, high = (middle, high) if found <= sequence else (low, middle - 1)
        count = _count(tokenizer, words[start : start + low], prompt, sequence)
        if best_tokens < count <= sequence:
            best, best_tokens, end = " ".join(words[start : start + low]), count, start + low
        if count == sequence:
            break
    return best, end


def _count(
    tokenizer: tokenizers.Tokenizer, words: Sequence[str], prompt: str, sequence: int
) -> int:
    """Return the tokens of a text; one that is cut at the maximum length counts as too long."""
    (found,) = tokenize(tokenizer, [" ".join(words)], prompt)
    return sequence + 1 if found.truncated else len(found.ids)


def time_tokenization(requests: Requests) -> Tokenization:
    """Time how texts become padded token ids: 0.3 s, and 30 to 1,000 requests."""
    times: list[float] = []
    requests.ids(0)
    end = time.perf_counter() + _SECONDS
    while len(times) < _LEAST or (time.perf_counter() < end and len(times) < _MOST):
        start = time.perf_counter()
        requests.ids(len(times))
        times.append((time.perf_counter() - start) * 1e3)
    p50, p95 = (float(each) for each in np.percentile(times, (50, 95)))
    return Tokenization(*requests.shape, p50, p95)
