"""What a tokenizer.json may hold: examined before the tokenizers library sees it.

The library does whatever the file says: it pads to 10^9 tokens, replaces each letter by a megabyte,
or ends in a panic. So the settings must be those that ``build`` writes, the steps must be of kinds
that are known, and no text may grow beyond a fixed multiple of its length.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from typing import Any

from m2dexport.errors import M2DError
from m2dexport.runtime.artifact import TOKENIZER
from m2dexport.strict import parse_json, shown

_STEPS: Mapping[str, frozenset[str]] = {
    "normalizer": frozenset(
        {"BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt"}
        | {"Precompiled", "Prepend", "Replace", "Strip", "StripAccents"}
    ),
    "pre_tokenizer": frozenset(
        {"BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace"}
        | {"Punctuation", "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"}
    ),
    "post_processor": frozenset(
        {"BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"}
    ),
    "decoder": frozenset(
        {"BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace"}
        | {"Strip", "WordPiece"}
    ),
}
#: A step that holds others, by stage: the key of those.
_SEQUENCE = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}
_MODELS = frozenset({"BPE", "Unigram", "WordLevel", "WordPiece"})
_MOST_STEPS = 32  # of a stage
_MOST_GROWTH = 64  # times the length of a text
_MOST_PATTERN = 2000  # characters of a regular expression
_MOST_WORD = 400  # characters: what WordPiece takes for one word; time grows with its square
_MOST_REPLACED = 64  # bytes that a table puts in the place of a character; Unicode's NFKC: 33
_MOST_SPECIALS = 16  # tokens that are added to a text
#: A repeated group that holds a repetition, or alternatives, takes exponential time.
_REPETITION = re.compile(r"[*+}|]")
#: References and recursion are as bad.
_REFERENCE = re.compile(r"\\[1-9kg]|\(\?[PR&(]")


def require_plain_tokenizer(tokenizer_json: str, max_length: int) -> None:
    """Refuse a tokenizer that ``build`` does not write.

    Args:
        tokenizer_json: the content of tokenizer.json.
        max_length: of the artifact, tokens.

    Raises:
        M2DError: naming what the file holds.
    """
    stored = parse_json(tokenizer_json, TOKENIZER, M2DError)
    try:
        _require_settings(stored, max_length)
        growth = 1.0
        for stage in _STEPS:
            for step in _steps(stored.get(stage), stage):
                growth *= _growth(step) if stage == "normalizer" else 1
                _require_pattern(step)
        if growth > _MOST_GROWTH:
            raise _Refused("its normalizer can make a text many times longer")
        _require_model(stored.get("model"))
        _require_specials(stored.get("post_processor"))
    except _Refused as refused:
        raise M2DError(
            f"{TOKENIZER} cannot be used: {refused}; build the artifact again."
        ) from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise M2DError(f"{TOKENIZER} cannot be used: it is not a tokenizer.") from error


class _Refused(Exception):
    """The message is a part of a sentence."""


def _require_settings(stored: Any, max_length: int) -> None:
    if stored.get("padding") is not None:
        raise _Refused("it pads, and an artifact's tokenizer never does")
    cut = stored.get("truncation")
    needed = {
        "direction": "Right",
        "max_length": max_length,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    if cut != needed:
        raise _Refused(
            f"it must cut texts at {max_length} tokens, at their end and without stride, "
            f"not {shown(cut)}"
        )


def _steps(step: Any, stage: str, left: int = _MOST_STEPS) -> Iterator[Any]:
    """Yield the steps of a stage, those of sequences one by one."""
    if step is None:
        return
    if step["type"] != "Sequence":
        if step["type"] not in _STEPS[stage]:
            raise _Refused(f"its {stage} has the unknown type {shown(step['type'])}")
        yield step
        return
    parts = step[_SEQUENCE[stage]]
    if len(parts) >= left:
        raise _Refused(f"its {stage} has more than {_MOST_STEPS} steps")
    for part in parts:
        yield from _steps(part, stage, left - len(parts))


def _growth(step: Any) -> float:
    """Return how many times longer a normalizer can make a text, at most."""
    kind = step["type"]
    if kind == "Prepend":
        return 1.0 + len(step["prepend"])
    if kind == "Replace" and "String" in step["pattern"]:
        if not step["pattern"]["String"]:
            raise _Refused("its normalizer replaces nothing by something")
        return max(1.0, len(step["content"]) / len(step["pattern"]["String"]))
    if kind == "Replace":
        # A pattern that can match nothing does so between any two characters.
        length = len(step["content"])
        return max(1.0, length) if _takes_something(step["pattern"]["Regex"]) else 1.0 + length
    if kind == "Precompiled":
        _require_table(step["precompiled_charsmap"])
    return 1.0


def _takes_something(pattern: str) -> bool:
    """Say whether each match of a pattern surely has at least one character."""
    if re.search(r"\(\?(?!:)|\\[A-Zb]|[\^$|]", pattern):  # anchors, and what looks around
        return False
    try:
        return re.match(pattern, "") is None
    except re.error:  # of another dialect
        return False


def _require_table(stored: Any) -> None:
    """Refuse a character table that replaces a character by a long text.

    It is a trie behind its size in bytes, and then the replacements, each ended by a zero byte
    (sentencepiece, normalizer.cc, DecodePrecompiledCharsMap).
    """
    try:
        table = base64.b64decode(stored, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise _Refused("its character table is not base64") from error
    size = int.from_bytes(table[:4], "little")
    if len(table) < 4 or size > len(table) - 4 or size % 4:
        raise _Refused("its character table is damaged")
    if max(map(len, table[4 + size :].split(b"\0"))) > _MOST_REPLACED:
        raise _Refused("its character table replaces a character by a long text")


def _require_pattern(step: Any) -> None:
    pattern = step.get("pattern")
    if not isinstance(pattern, dict) or "Regex" not in pattern:
        return
    text = pattern["Regex"]
    if len(text) > _MOST_PATTERN or _REFERENCE.search(text) or _repeats_repetition(text):
        raise _Refused(f"its pattern {shown(text)} can take very long")


def _repeats_repetition(pattern: str) -> bool:
    """Say whether a group of repetitions or alternatives is repeated, as in ``(a+)*``."""
    # Escapes and classes hold no operators.
    plain = re.sub(r"\\[pP]\{[^}]*\}|\\.", "a", pattern, flags=re.DOTALL)
    plain = re.sub(r"\[(?:\[[^]]*\]|[^]])+\]", "a", plain)
    group = re.compile(r"\(([^()]*)\)([*+]|\{\d*,\d*\})?")
    while match := group.search(plain):
        repeats = bool(_REPETITION.search(match[1]))
        if repeats and match[2]:
            return True
        plain = plain[: match.start()] + ("a+" if repeats else "a") + plain[match.end() :]
    return False


def _require_model(model: Any) -> None:
    if model["type"] not in _MODELS:
        raise _Refused(f"its model has the unknown type {shown(model['type'])}")
    if not 0 <= model.get("max_input_chars_per_word", 0) <= _MOST_WORD:
        raise _Refused(f"its model takes more than {_MOST_WORD} characters for one word")
    if model.get("dropout"):
        raise _Refused("its model drops merges at random")


def _require_specials(processor: Any) -> None:
    for step in _steps(processor, "post_processor"):
        if step["type"] == "TemplateProcessing":
            ids = [len(each["ids"]) for each in step["special_tokens"].values()]
            if len(step["single"]) * max(ids, default=1) > _MOST_SPECIALS:
                raise _Refused(f"it adds more than {_MOST_SPECIALS} tokens to a text")
