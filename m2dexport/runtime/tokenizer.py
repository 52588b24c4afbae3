"""Text to token ids, by tokenizer.json: exactly as the library gives them, in bounded memory.

The library tokenizes a text to its end before it cuts it, and keeps every window that it cut off:
5 MB of text take gigabytes for 256 tokens. So only as much of a text is handed over as decides the
tokens that are kept. A part is cut between a word and the space beside it, where no tokenizer joins
tokens, and it must reach a full window of tokens, and 1,024 characters, beyond the last token that
is kept: what happens at its end does not reach back that far.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import tokenizers

from m2dexport.errors import M2DError, UnsafeContent, UsageError, one_line
from m2dexport.strict import shown

_MARGIN = 1024  # characters between the last token that is kept and the end of a part
_PER_TOKEN = 12  # characters handed over for each token, to begin with
_GROWTH = 4
#: At most so many characters of a text are read; only texts of a few huge words have more.
_MOST, _MOST_PER_TOKEN = 1 << 18, 64
_AT_ONCE = 1 << 21  # characters tokenized together
_SEARCHED = 512  # characters in which the end of a word is looked for

T = TypeVar("T")


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text."""

    ids: list[int]  # specials included
    truncated: bool  # whether the text was longer than the maximum length


def load_tokenizer(tokenizer_json: str) -> tokenizers.Tokenizer:
    """Return the tokenizer of an artifact, which truncates and does not pad.

    Raises:
        UnsafeContent: when the tokenizers library refuses it.
    """
    try:
        return _guarded(
            lambda: tokenizers.Tokenizer.from_str(tokenizer_json), "cannot read tokenizer.json"
        )
    except M2DError as error:
        raise UnsafeContent(str(error)) from error


def require_room(tokenizer: tokenizers.Tokenizer) -> None:
    """Refuse a tokenizer whose special tokens leave no room for the text.

    Raises:
        UnsafeContent: naming both numbers.
    """
    added, most = tokenizer.num_special_tokens_to_add(False), _limit(tokenizer)
    if added >= most:
        raise UnsafeContent(
            f"tokenizer.json adds {added} special tokens and cuts at {most}; choose a larger "
            "maximum length."
        )


def tokenize(tokenizer: tokenizers.Tokenizer, texts: Sequence[str], prefix: str) -> list[Tokens]:
    """Return the tokens of each text, cut at the maximum length.

    Args:
        tokenizer: as ``load_tokenizer`` returns it.
        texts: any number of texts of any length.
        prefix: goes in front of each.

    Raises:
        UsageError: when ``texts`` holds something else than strings.
        M2DError: when the tokenizers library fails.
    """
    longest = _limit(tokenizer)
    size = _PER_TOKEN * longest + _MARGIN
    found: list[Tokens] = []
    for group in _groups(texts, size + len(prefix)):
        parts = [_part(prefix, text, size) for text in group]
        encodings = _encoded(tokenizer, parts)
        for text, part, encoding in zip(group, parts, encodings, strict=True):
            whole = len(part) == len(prefix) + len(text)
            if whole or _decided(encoding, part):
                found.append(Tokens(encoding.ids, not whole or bool(encoding.overflowing)))
            else:
                found.append(_tokens_of_long(tokenizer, prefix, text, size * _GROWTH))
    return found


def _tokens_of_long(tokenizer: tokenizers.Tokenizer, prefix: str, text: str, size: int) -> Tokens:
    """Return the tokens of a text from ever longer parts, until they are decided."""
    longest = _limit(tokenizer)
    most = max(_MOST, _MOST_PER_TOKEN * longest)
    while True:
        part = _part(prefix, text, min(size, most))
        (encoding,) = _encoded(tokenizer, [part])
        whole = len(part) == len(prefix) + len(text)
        if whole or size >= most or _decided(encoding, part):
            return Tokens(encoding.ids, not whole or bool(encoding.overflowing))
        size *= _GROWTH


def _limit(tokenizer: tokenizers.Tokenizer) -> int:
    """Return the maximum length in tokens."""
    settings = tokenizer.truncation or {}
    return int(settings["max_length"])


def _groups(texts: Sequence[str], most: int) -> Iterator[list[str]]:
    """Yield the texts in groups of a bounded number of characters, none counting over ``most``."""
    group: list[str] = []
    held = 0
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise UsageError(f"text {number} is {shown(text)}; pass strings.")
        size = min(len(text), most)
        if group and held + size > _AT_ONCE:
            yield group
            group, held = [], 0
        group.append(text)
        held += size
    if group:
        yield group


def _part(prefix: str, text: str, size: int) -> str:
    """Return a text behind its prefix, or the beginning of it, cut between words."""
    if len(text) <= size:
        return prefix + text
    ends = [match.start() for match in re.finditer(r"(?<=\S)(?=\s)", text[size - _SEARCHED : size])]
    return prefix + text[: size - _SEARCHED + ends[-1] if ends else size]


def _decided(encoding: tokenizers.Encoding, part: str) -> bool:
    """Say whether the tokens that are kept lie far enough from where the part was cut."""
    spans = [
        span
        for span, special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
        if not special
    ]
    if len(encoding.overflowing) < 2 or not spans:
        return False
    return bool(len(part) - spans[-1][1] >= _MARGIN)


def _encoded(tokenizer: tokenizers.Tokenizer, parts: list[str]) -> list[tokenizers.Encoding]:
    return _guarded(lambda: tokenizer.encode_batch(parts), "cannot tokenize a text")


def _guarded(work: Callable[[], T], failed: str) -> T:
    """Return what the library gives; its bare exceptions and its panics become sentences."""
    try:
        return work()
    except BaseException as error:
        # A panic is a BaseException of a class that cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise M2DError(f"the tokenizers library {failed}: {one_line(error)}.") from error
