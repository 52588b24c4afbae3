"""Requests and answers of the embeddings API, in the shape that OpenAI's clients send and read."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from m2dexport.errors import UsageError
from m2dexport.runtime.artifact import ArtifactSpec
from m2dexport.runtime.encoder import Encoder
from m2dexport.serve.served import Served
from m2dexport.strict import (
    Name,
    Within,
    WrongValue,
    is_unicode,
    parse_json,
    read_value,
    shown,
)

_BODY = "the body"
_FLOATS = "float"


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may ask for."""

    body_bytes: int = 4_000_000
    texts: int = 2048  # of one request
    tokens: int = 300_000  # of one request, each text cut at the maximum length
    requests: int = 256  # at work at once, from their first byte to their answer


class Refusal(Exception):
    """A request that gets an error: one sentence for whoever sent it.

    Args:
        status: of HTTP.
        message: the sentence.
        code: for programs, such as "model_not_found".
        param: the field that is missing or wrong; None: none of this API's, or several.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    def body(self) -> dict[str, Any]:
        """Return the body that OpenAI's clients make an exception of."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class _Fields:
    """The fields of a body beside ``input``; null and left out are the same."""

    model: Name
    dimensions: Annotated[int, Within(1, 1 << 20)] | None
    encoding_format: Literal["float", "base64"] | None
    user: str | None  # of OpenAI, for its own records
    prompt: str | None  # from here on extensions
    input_type: Literal["query", "document"] | None
    output_dtype: Name | None


_NAMES = tuple(field.name for field in fields(_Fields))


@dataclass(frozen=True)
class Prepared:
    """A request that can be run."""

    served: Served
    ids: Sequence[Sequence[int]]  # of each text, specials included
    truncated: int  # texts that were longer than the maximum length
    dimensions: int | None  # leading dims to keep; None: all
    base64: bool
    codes: bool  # whether the vectors are wanted as they are stored, and not as floats

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, self.ids))


def prepare(body: bytes, served: Served, limits: Limits) -> Prepared:
    """Read the body of a request and tokenize its texts.

    Raises:
        Refusal: when anything in it is not as it must be.
    """
    try:
        found = parse_json(body, _BODY)
        if not isinstance(found, dict):
            raise UsageError(f"{_BODY} is {shown(found)}; send an object.")
        given = {**dict.fromkeys(name for name in _NAMES if name != "model"), **found}
        asked = given.pop("input", None)
        wanted = read_value(_Fields, given, _BODY)
    except UsageError as error:
        wrong = error.__cause__
        param = wrong.path if isinstance(wrong, WrongValue) else ""
        raise Refusal(400, str(error), param=param or None) from error
    if wanted.model not in (served.name, served.space_id):
        known = f"{served.name} and {served.space_id}"
        raise Refusal(
            404,
            f"there is no model {shown(wanted.model)}; this one goes by {known}.",
            "model_not_found",
            "model",
        )
    inputs = _input(asked, limits)
    codes = _wants_codes(wanted, served.encoder.spec)
    if wanted.dimensions is not None:
        try:
            served.require_dimensions(wanted.dimensions)
        except UsageError as error:
            raise Refusal(400, str(error), param="dimensions") from error
    ids, truncated = _tokens(inputs, wanted, served)
    as_base64 = wanted.encoding_format == "base64"
    prepared = Prepared(served, ids, truncated, wanted.dimensions, as_base64, codes)
    if prepared.tokens > limits.tokens:
        raise _wrong_input(
            f"the texts have {prepared.tokens:,} tokens, more than {limits.tokens:,}; send them in "
            "several requests"
        )
    return prepared


def render(prepared: Prepared, codes: NDArray[Any]) -> bytes:
    """Return the body of an answer.

    Args:
        prepared: the request.
        codes: (texts, width), as its encoder gives them.
    """
    served = prepared.served
    vectors = codes if prepared.codes else served.floats(codes, prepared.dimensions)
    rows = ",".join(
        f'{{"object":"embedding","index":{index},"embedding":{_embedding(row, prepared.base64)}}}'
        for index, row in enumerate(vectors)
    )
    rest = {
        "model": served.name,
        "usage": {"prompt_tokens": prepared.tokens, "total_tokens": prepared.tokens},
        **served.facts(),
        "dimensions": prepared.dimensions or served.encoder.spec.dim,
        "truncated": prepared.truncated,
    }
    return f'{{"object":"list","data":[{rows}],{json.dumps(rest)[1:]}'.encode()


@dataclass(frozen=True)
class _Input:
    """What is to become vectors: texts or token ids, never both."""

    texts: list[str]
    ids: list[list[int]]


def _input(asked: Any, limits: Limits) -> _Input:
    if isinstance(asked, str):
        asked = [asked]
    if not isinstance(asked, list) or not asked:
        raise _wrong_input(f"input is {shown(asked)}; send a text, texts, or token ids")
    if all(type(each) is int for each in asked):
        asked = [asked]
    if len(asked) > limits.texts:
        raise _wrong_input(
            f"input has {len(asked):,} texts, more than {limits.texts:,}; send them in several "
            "requests"
        )
    if all(isinstance(each, list) and all(type(i) is int for i in each) for each in asked):
        return _Input([], asked)
    for number, text in enumerate(asked):
        if not isinstance(text, str):
            raise _wrong_input(
                f"item {number} of input is {shown(text)}; send a text, texts, the token ids of a "
                "text, or a list of those"
            )
        if not is_unicode(text):
            raise _wrong_input(f"text {number} holds half of a surrogate pair; mend it")
    return _Input(asked, [])


def _wants_codes(wanted: _Fields, spec: ArtifactSpec) -> bool:
    dtype = wanted.output_dtype or _FLOATS
    if dtype not in (_FLOATS, spec.vectors):
        raise Refusal(
            400,
            f"output_dtype is {shown(dtype)}, and this model gives {_FLOATS} and {spec.vectors}.",
            param="output_dtype",
        )
    codes = dtype != _FLOATS and spec.vectors != "float32"
    if codes and wanted.dimensions not in (None, spec.dim):
        raise Refusal(
            400,
            f"{spec.vectors} codes cannot be cut to {wanted.dimensions} dimensions; ask for "
            f"{_FLOATS}, or leave dimensions out.",
            param="dimensions",
        )
    return codes


def _tokens(given: _Input, wanted: _Fields, served: Served) -> tuple[list[list[int]], int]:
    """Return the token ids of each text, and how many texts were cut."""
    encoder = served.encoder
    if given.ids:
        if wanted.prompt is not None or wanted.input_type is not None:
            raise Refusal(
                400,
                "prompt and input_type go with texts; token ids hold their prompt already.",
                param="prompt" if wanted.prompt is not None else "input_type",
            )
        for number, ids in enumerate(given.ids):
            _require_ids(number, ids, encoder)
        return given.ids, 0
    try:
        found = encoder.tokens(given.texts, prompt=_prompt(wanted, encoder.spec))
    except UsageError as error:
        raise Refusal(400, str(error), param="prompt") from error
    for number, each in enumerate(found):
        reason = encoder.lacks(each.ids)
        if reason is not None:
            raise _wrong_input(f"text {number} {reason}")
    return [each.ids for each in found], sum(each.truncated for each in found)


def _prompt(wanted: _Fields, spec: ArtifactSpec) -> str | None:
    """Return the name of the prompt; a model without one for this type of input has none."""
    if wanted.input_type is None:
        return wanted.prompt
    if wanted.prompt is not None:
        raise Refusal(400, "prompt and input_type both name a prompt; send one of them.")
    return wanted.input_type if wanted.input_type in spec.prompts else ""


def _require_ids(number: int, ids: list[int], encoder: Encoder) -> None:
    longest = encoder.spec.max_length
    if not 0 < len(ids) <= longest:
        raise _wrong_input(f"text {number} has {len(ids)} token ids; send 1 to {longest:,}")
    if not 0 <= min(ids) <= max(ids) < encoder.vocab_size:
        wrong = next(each for each in ids if not 0 <= each < encoder.vocab_size)
        raise _wrong_input(
            f"text {number} has the token {shown(wrong)}, and the model knows 0 to "
            f"{encoder.vocab_size - 1:,}"
        )


def _wrong_input(message: str) -> Refusal:
    return Refusal(400, f"{message}.", param="input")


def _embedding(row: NDArray[Any], as_base64: bool) -> str:
    """Return a vector as JSON: numbers, or the base64 of its values, lowest byte first."""
    if as_base64:
        values = row.astype(row.dtype.newbyteorder("<"), copy=False)
        return f'"{base64.b64encode(values.tobytes()).decode()}"'
    number = "{:.9g}".format if row.dtype == np.float32 else str  # nine digits tell all apart
    return f"[{','.join(map(number, row.tolist()))}]"
