"""What a tokenizer.json may hold: examined before the tokenizers library sees it.

The library does whatever the file says: it pads to 10^9 tokens, replaces each letter by a megabyte,
or ends in a panic. So the settings must be those that ``build`` writes, the steps must be of kinds
that are known, and no text may grow beyond a fixed multiple of its length.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m2dexport.errors import UnsafeContent
from m2dexport.runtime.artifact import TOKENIZER
from m2dexport.strict import parse_json, sha256_of_json, shown

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
_MOST_WORD = 400  # characters: what WordPiece takes for one word; time grows with its square
_MOST_PIECE = 256  # characters of what Unigram looks for at each place of a text; XLM-R's: 16
_MOST_AFFIX = 16  # characters that mark each part of a word, such as ##
_MOST_ADDED, _MOST_CONTENT = 10_000, 1000  # added tokens, and characters of one; Gemma's: 6,415
_MOST_SPECIALS = 16  # tokens that are added to a text
#: What a step makes of one character at most. Normal forms do so once: they leave what they made.
_FORMS = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18}
_ALWAYS = {"BertNormalizer": 3, "ByteLevel": 4}

_CONTRACTED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACED = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: The regular expressions of known tokenizers, beside plain ones. Which others end in time cannot
#: be seen from them.
_PATTERNS = frozenset(
    {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
        rf"{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SPACED}",  # Qwen2 and 3
        rf"{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SPACED}",  # Llama 3
        rf"{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # Qwen3.5
        _CASED % ("", "", r"\p{N}"),  # Mistral's Tekken
        _CASED % (f"{_CONTRACTED}?", f"{_CONTRACTED}?", r"\p{N}{1,3}"),  # GPT-4o and gpt-oss
        r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",  # CLIP
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]"
        r"|[^\s\p{L}\p{N}]+",
        r" ?[^(\s|[.,!?…。，、।۔،])]+",  # BLOOM
        # SentencePiece's spaces, as XLM-R, T5, DeBERTa and others have them
        *(r"\s{2,}|[\n\r\t]", r" +▁", r"\A▁", r"^▁+$", r"\A +| +\z"),
    }
)
_ONE = r"(?:\[(?:[^\[\]\\]|\\.)+\]|\\[pP]\{\^?\w+\}|\\[dDsSwWnrt]|[^\\\[\](){}|^$.*+?])"
#: A few characters or classes, the last of which may be repeated: nothing is tried in two ways.
_PLAIN_PATTERN = re.compile(rf"{_ONE}{{1,8}}(?:\+|\{{[1-9]\d?(?:,\d{{0,2}})?\}})?")


def require_plain_tokenizer(tokenizer_json: str, max_length: int) -> str:
    """Refuse a tokenizer that ``build`` does not write.

    Args:
        tokenizer_json: the content of tokenizer.json.
        max_length: of the artifact, tokens.

    Returns:
        The hash of what it holds, whatever the order of its keys: a space_id depends on it.

    Raises:
        UnsafeContent: naming what the file holds.
    """
    stored = parse_json(tokenizer_json, TOKENIZER, UnsafeContent)
    try:
        _require_settings(stored, max_length)
        steps = {stage: list(_steps(stored.get(stage), stage)) for stage in _STEPS}
        for step in itertools.chain(*steps.values()):
            _require_pattern(step)
        _require_growth([*steps["normalizer"], *steps["pre_tokenizer"]])
        _require_model(stored.get("model"))
        _require_added(stored.get("added_tokens"))
        _require_specials(stored.get("post_processor"))
    except _Refused as refused:
        raise UnsafeContent(
            f"{TOKENIZER} cannot be used: {refused}; build the artifact again."
        ) from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UnsafeContent(f"{TOKENIZER} cannot be used: it is not a tokenizer.") from error
    return sha256_of_json(stored)


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


def _require_growth(steps: Sequence[Any]) -> None:
    """Refuse steps that can make a text many times longer.

    A text holds few characters that a normal form makes longer, but a step before it can put them
    in the place of all others.
    """
    growth, replaced = 1.0, False
    for step in steps:
        kind = step["type"]
        growth *= _ALWAYS.get(kind, 1) * (_FORMS.get(kind, 1) if replaced else 1)
        growth *= _replacement(step)
        put = step.get("content", step.get("prepend", ""))
        replaced |= kind in ("ByteLevel", "Precompiled") or not put.isascii()
    if growth > _MOST_GROWTH:
        raise _Refused("its normalizer can make a text many times longer")


def _replacement(step: Any) -> float:
    """Return how many times longer a step's own table or text can make a text, at most."""
    kind = step["type"]
    if kind == "Prepend":
        return 1.0 + len(step["prepend"])
    if kind == "Replace":
        # Each known pattern takes at least one character.
        taken = len(step["pattern"].get("String", "a"))
        if not taken:
            raise _Refused("its normalizer replaces nothing by something")
        return max(1.0, len(step["content"]) / taken)
    if kind == "Precompiled":
        return float(max(1, _longest_replacement(step["precompiled_charsmap"])))
    return 1.0


def _longest_replacement(stored: Any) -> int:
    """Return the most characters that a character table puts in the place of one.

    It is a trie behind its size in bytes, and then the replacements, each ended by a zero byte
    (sentencepiece, normalizer.cc, DecodePrecompiledCharsMap). Unicode's NFKC has one of 18.
    """
    try:
        table = base64.b64decode(stored, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise _Refused("its character table is not base64") from error
    size = int.from_bytes(table[:4], "little")
    if len(table) < 4 or size > len(table) - 4 or size % 4:
        raise _Refused("its character table is damaged")
    return max(len(text.decode("utf-8", "replace")) for text in table[4 + size :].split(b"\0"))


def _require_pattern(step: Any) -> None:
    pattern = step.get("pattern")
    if not isinstance(pattern, dict) or "Regex" not in pattern:
        return
    if pattern["Regex"] not in _PATTERNS and not _PLAIN_PATTERN.fullmatch(pattern["Regex"]):
        raise _Refused(
            f"its pattern {shown(pattern['Regex'])} is not one of a known tokenizer, and could "
            "take very long"
        )


def _require_model(model: Any) -> None:
    if model["type"] not in _MODELS:
        raise _Refused(f"its model has the unknown type {shown(model['type'])}")
    if not 0 <= model.get("max_input_chars_per_word", 0) <= _MOST_WORD:
        raise _Refused(f"its model takes more than {_MOST_WORD} characters for one word")
    if model.get("dropout"):
        raise _Refused("its model drops merges at random")
    affixes = (model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"))
    if any(len(affix or "") > _MOST_AFFIX for affix in affixes):
        raise _Refused(f"its model marks parts of words by more than {_MOST_AFFIX} characters")
    if model["type"] == "Unigram":
        longest = max((len(piece) for piece, _ in model["vocab"]), default=0)
        if longest > _MOST_PIECE:
            raise _Refused(f"its vocabulary has a piece of more than {_MOST_PIECE} characters")


def _require_added(tokens: Any) -> None:
    if tokens is None:
        return
    if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
        raise _Refused("its added tokens are not a list of objects")
    if len(tokens) > _MOST_ADDED:
        raise _Refused(f"it has more than {_MOST_ADDED:,} added tokens")
    if any(len(token["content"]) > _MOST_CONTENT for token in tokens):
        raise _Refused(f"it has an added token of more than {_MOST_CONTENT:,} characters")


def _require_specials(processor: Any) -> None:
    for step in _steps(processor, "post_processor"):
        if step["type"] == "TemplateProcessing":
            ids = [len(each["ids"]) for each in step["special_tokens"].values()]
            if len(step["single"]) * max(ids, default=1) > _MOST_SPECIALS:
                raise _Refused(f"it adds more than {_MOST_SPECIALS} tokens to a text")
