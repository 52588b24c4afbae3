"""Golden texts of an export: what its files give is compared with the artifact's own vectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.batches import padded
from m2dexport.consumers.source import Source
from m2dexport.errors import ParityError
from m2dexport.files import EXPORT
from m2dexport.graph.vector import OUTPUT
from m2dexport.runtime.golden import RUN_TOKENS
from m2dexport.runtime.golden_texts import TEXTS, overlong_text
from m2dexport.runtime.tokenizer import tokenize
from m2dexport.vectors.codecs import cosines, encode_vectors, normalize

FORMAT = 1
_PROMPTED = "A man is playing a guitar."
#: Below this cosine of one text, or with fewer equal codes, an export is not handed over.
MIN_COSINE = 0.999
MIN_EQUAL_CODES = 0.99

#: From int64 (batch, sequence) ids and mask to outputs by name.
Run = Callable[[NDArray[np.int64], NDArray[np.int64]], Mapping[str, NDArray[Any]]]


@dataclass(frozen=True)
class Text:
    """A golden text as other programs read it."""

    text: str
    prompt: str | None  # its name; None: the default one, or none
    input: str  # the text behind its prompt, for programs that apply none
    ids: list[int]  # specials included, cut at the maximum length
    truncated: bool  # whether it was cut
    vector: list[float]  # what "sentence_embedding" holds: floats of length 1, or codes


@dataclass(frozen=True)
class Agreement:
    """What was measured between the files of an export and the artifact."""

    texts: int
    min_cosine: float  # of one text's decoded vectors, of every output
    equal_codes: float | None  # share of the artifact's codes, 0..1; None for float32


def golden_texts(source: Source, run: Run) -> list[Text]:
    """Return the golden texts with the vectors that an export gives of each by itself.

    Args:
        source: the artifact.
        run: the export's graph.
    """
    spec, encoder = source.spec, source.encoder
    long = [overlong_text(spec.max_length)] * (spec.max_length <= RUN_TOKENS)
    asked: list[tuple[str, str | None]] = [(text, None) for text in (*TEXTS, *long)]
    asked += [(text, name) for name in sorted(spec.prompts) for text in (_PROMPTED, *long)]
    texts = []
    for text, name in asked:
        prompt = encoder.default_prompt if name is None else spec.prompts[name]
        (tokens,) = tokenize(encoder.tokenizer, [text], prompt)
        vector = run(*padded([tokens.ids], spec.pad_id))[OUTPUT][0]
        values = [round(value, 7) for value in vector.tolist()]
        texts.append(Text(text, name, prompt + text, tokens.ids, tokens.truncated, values))
    return texts


def agreement(source: Source, texts: list[Text], run: Run) -> Agreement:
    """Compare what an export gives of a mixed batch with the artifact's vectors.

    Token states are pooled by their mean, and float vectors coded as the artifact's.

    Raises:
        ParityError: when they are others.
    """
    spec, codec = source.spec, source.encoder.codec
    batch = padded([each.ids for each in texts], spec.pad_id)
    expected = source.encoder.run(*batch)
    found = [_coded(value, batch[1], source) for value in run(*batch).values()]
    cosine = min(float(cosines(codec.decode(expected), codec.decode(each)).min()) for each in found)
    equal = None
    if spec.vectors != "float32":
        equal = min(float(np.mean(each == expected)) for each in found)
    fits = cosine >= MIN_COSINE if equal is None else equal >= MIN_EQUAL_CODES
    if not fits:
        codes = "" if equal is None else f", {equal:.2%} of codes equal"
        raise ParityError(
            f"what would be exported of {source.path} gives other vectors than it (smallest cosine "
            f"{cosine:.6f}{codes}); nothing was written."
        )
    return Agreement(len(texts), cosine, equal)


def write_golden(folder: Path, consumer: str, source: Source, texts: list[Text]) -> None:
    """Write golden.json into the folder of an export."""
    content = {
        "format": FORMAT,
        "consumer": consumer,
        "space_id": source.spec.space_id,
        "dim": source.spec.dim,
        "texts": [asdict(each) for each in texts],
    }
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    (folder / EXPORT).write_text(text + "\n", encoding="utf-8")


def _coded(value: NDArray[Any], mask: NDArray[np.int64], source: Source) -> NDArray[Any]:
    """Return an output, (texts, width) or (texts, tokens, dim), as the artifact's vectors are."""
    if value.ndim == 3:
        weights = mask[:, :, None].astype(np.float32)
        value = normalize((value * weights).sum(axis=1) / weights.sum(axis=1))
    spec = source.spec
    if value.dtype != np.float32 or spec.vectors == "float32":
        return value
    return encode_vectors(value, spec.vectors, source.encoder.ranges, spec.bit_order)
