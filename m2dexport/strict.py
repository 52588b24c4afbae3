"""A strict reader of JSON that others wrote: annotated dataclasses say what it must hold.

::

    @dataclass(frozen=True)
    class Entry:
        sha256: Annotated[str, Matching("[0-9a-f]{64}", "a sha256")]
        size: Annotated[int, Within(0, 1 << 32)]

    read_json(Entry, content, "manifest.json")

Every key must be there and no other; types are not converted (a bool is not a number); numbers are
finite; text is text in UTF-8, without half surrogate pairs. Whatever the content, an error is one
sentence of bounded length.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
import types
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from m2dexport.errors import FormatError, M2DError, UsageError, one_line

_VALUE = 60  # characters of a foreign value
_MOST_INT = 1 << 63
_MOST_NAME = 300  # characters of a name
_MOST_TEXT = 1 << 22  # characters

T = TypeVar("T")

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = _VALUE
_repr.maxlevel = 2


@dataclass(frozen=True)
class Within:
    """Bounds of a number, or of the length of a text, list or object; both are included."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.15g} to {self.high:.15g}"


@dataclass(frozen=True)
class Matching:
    """A pattern that a whole text must match."""

    pattern: str
    words: str  # what the pattern describes, in a message: "a sha256"

    def __str__(self) -> str:
        return self.words


#: What moves a terminal's cursor, or turns the order of what stands beside it.
_CONTROLS = r"\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069"
#: A line that can be printed: a name, a version, a hash.
Name = Annotated[str, Matching(f"[^{_CONTROLS}]{{1,300}}", "a line of text")]
Sha256 = Annotated[str, Matching("[0-9a-f]{64}", "a sha256")]
Share = Annotated[float, Within(0, 1)]


def read_json(
    kind: type[T], content: bytes | str, where: object, error: type[M2DError] = UsageError
) -> T:
    """Return the dataclass that a JSON text holds.

    Args:
        kind: a dataclass, whose annotations say what the keys must hold.
        content: the JSON text.
        where: its file, for messages.
        error: the class of error to raise.

    Raises:
        M2DError: of the class ``error``, when the text is not JSON or a value is not as annotated.
    """
    return read_value(kind, parse_json(content, where, error), where, error)


def parse_json(content: bytes | str, where: object, error: type[M2DError] = UsageError) -> Any:
    """Return the value of a JSON text, in UTF-8, without duplicate keys, NaN or Infinity.

    Raises:
        M2DError: of the class ``error``, when the text is not that.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    except UnicodeDecodeError as cause:
        raise error(f"{where} cannot be read: it is not UTF-8.") from cause
    except RecursionError as cause:
        raise error(f"{where} cannot be read: it is nested too deeply.") from cause
    except ValueError as cause:
        raise error(f"{where} cannot be read: {one_line(cause)}.") from cause


def read_value(kind: type[T], value: Any, where: object, error: type[M2DError] = UsageError) -> T:
    """Return the dataclass that a parsed JSON value holds, as ``read_json`` does.

    Raises:
        M2DError: of the class ``error``, caused by the ``WrongValue`` that says where it is.
    """
    try:
        result: T = _read(kind, value, "")
    except WrongValue as wrong:
        raise error(f"{where} cannot be read: {wrong}.") from wrong
    return result


def require_format(
    stored: Any, known: int, where: object, error: type[M2DError] = UsageError
) -> None:
    """Refuse a file of another format before the rest of it is read.

    Raises:
        FormatError: naming both formats.
        M2DError: of the class ``error``, when the format is not a whole number from 1 on.
    """
    found = stored.get("format", known) if isinstance(stored, dict) else known
    if type(found) is not int or found != known:
        older = type(found) is not int or found < known
        raise (FormatError if type(found) is int and found > 0 else error)(
            f"{where} has format {shown(found)} and this version reads format {known}; "
            + ("make it again." if older else "upgrade m2dexport.")
        )


def shown(value: object) -> str:
    """Return a foreign value as Python writes it, shortened to about 60 characters."""
    return one_line(_repr.repr(value))


class WrongValue(Exception):
    """A value that is not as annotated.

    Args:
        message: a part of a sentence.
        path: of the value, such as ``files['a'].size``; empty: of the whole, or of no known key.
    """

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


def _read(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        result = _read(arguments[0], value, path)
        for rule in arguments[1:]:
            if isinstance(value, list | dict) and not _keeps(rule, result):
                raise WrongValue(f"{path} has {len(value)} entries where {rule} are needed", path)
            _require(_keeps(rule, result), value, rule, path)
        return result
    if origin in (Union, types.UnionType):
        # Only "or null" is ever annotated.
        (other,) = (option for option in arguments if option is not type(None))
        return None if value is None else _read(other, value, path)
    if origin is Literal:
        names = ", ".join(map(str, arguments))
        _require(isinstance(value, str) and value in arguments, value, f"one of {names}", path)
        return value
    if origin in (list, dict):
        return _read_many(origin, arguments, value, path)
    return _read_fields(kind, value, path) if is_dataclass(kind) else _read_plain(kind, value, path)


def _read_many(origin: Any, arguments: tuple[Any, ...], value: Any, path: str) -> Any:
    if origin is list:
        _require(isinstance(value, list), value, "a list", path)
        return [_read(arguments[0], each, f"{path}[{i}]") for i, each in enumerate(value)]
    _require(isinstance(value, dict), value, "an object", path)
    keys, values = arguments
    return {
        _read(keys, key, f"a key of {path}"): _read(values, each, f"{path}[{shown(key)}]")
        for key, each in value.items()
    }


def _read_fields(kind: Any, value: Any, path: str) -> Any:
    _require(isinstance(value, dict), value, "an object", path)
    hints = _hints(kind)
    names = [field.name for field in fields(kind)]
    inside, prefix = (f" in {path}", f"{path}.") if path else ("", "")
    for name in names:
        if name not in value:
            raise WrongValue(f"{name} is missing{inside}", prefix + name)
    for name in sorted(value.keys() - set(names)):
        raise WrongValue(f"{shown(name)} is unknown{inside}", path)
    return kind(**{name: _read(hints[name], value[name], prefix + name) for name in names})


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """Return the annotations of a dataclass, whose texts take most of the time to evaluate."""
    return get_type_hints(kind, include_extras=True)


def _read_plain(kind: Any, value: Any, path: str) -> Any:
    if kind is bool:
        _require(isinstance(value, bool), value, "true or false", path)
    elif kind is int:
        whole = type(value) is int and -_MOST_INT <= value < _MOST_INT
        _require(whole, value, "a whole number", path)
    elif kind is float:
        number = type(value) in (int, float) and abs(value) <= _MOST_INT
        _require(number and math.isfinite(value), value, "a number", path)
    elif kind is str:
        text = isinstance(value, str) and len(value) <= _MOST_TEXT and is_unicode(value)
        _require(text, value, "text", path)
    else:  # of what JSON lacks, such as a Path or null, there is only null
        _require(False, value, "null", path)
    return value


def _keeps(rule: Within | Matching, value: Any) -> bool:
    if isinstance(rule, Matching):
        return re.fullmatch(rule.pattern, value) is not None
    size = value if isinstance(value, int | float) else len(value)
    return rule.low <= size <= rule.high


def _require(holds: bool, value: Any, wanted: object, path: str) -> None:
    if not holds:
        what = path or "the content"
        raise WrongValue(f"{what} is {shown(value)} where {wanted} is needed", path)


def is_name(text: str) -> bool:
    """Say whether a text can stand in a table, a report and a message: printable, not blank."""
    return 0 < len(text) <= _MOST_NAME and text.isprintable() and not text.isspace()


def require_name(text: str, what: str) -> str:
    """Return a name that a user gave to something.

    Args:
        text: the name.
        what: has it, in a message ("the target").

    Raises:
        UsageError: when it cannot be printed or is blank.
    """
    if not is_name(text):
        raise UsageError(
            f"{what} is named {shown(text)}; give it a name of 1 to {_MOST_NAME} printable "
            "characters."
        )
    return text


def is_unicode(text: str) -> bool:
    """Say whether a text can be encoded: whether it is free of half surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} is there twice")
        found[key] = value
    return found


def sha256_of_json(value: Any) -> str:
    """Return a hash of a JSON value, whatever the order of its keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
