"""profile.json, read and written, and its JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from m2dexport import __version__
from m2dexport.data import read_utf8
from m2dexport.errors import UsageError, one_line
from m2dexport.files import atomic_file
from m2dexport.profile.consistency import contradictions
from m2dexport.profile.schema import FORMAT, Profile
from m2dexport.strict import parse_json, shown

_DIGITS = 6


def write_profile(profile: Profile, path: str | Path, *, force: bool = False) -> None:
    """Write profile.json: sorted keys and floats of six digits, whole or not at all.

    Raises:
        UsageError: when ``path`` exists and ``force`` does not say that it is to be replaced.
    """
    with atomic_file(Path(path), force=force) as temporary:
        temporary.write_text(profile_text(profile), encoding="utf-8")


def profile_text(profile: Profile) -> str:
    """Return profile.json: what it holds does not depend on the order in which it was measured."""
    stored = _rounded(profile.model_dump(mode="json"))
    return json.dumps(stored, indent=2, sort_keys=True) + "\n"


def read_profile(path: str | Path) -> Profile:
    """Read profile.json.

    Args:
        path: the file, or the folder that ``profile`` wrote it into.

    Raises:
        UsageError: when it is missing, cut short, no profile, or of another format.
    """
    path = Path(path)
    if path.is_dir():
        path /= "profile.json"
    return profile_from(read_stored(path), path)


def read_stored(path: Path) -> Any:
    """Return what a JSON file holds, whatever that is.

    Raises:
        UsageError: when it is missing, cut short or no JSON.
    """
    text = read_utf8(path)
    try:
        return parse_json(text, path)
    except UsageError as error:
        begun, ended = text.lstrip()[:1] in ("", "{"), text.rstrip().endswith("}")
        if begun and not ended:
            raise UsageError(
                f"{path} ends in the middle; copy it again, or profile again."
            ) from error
        raise


def profile_from(stored: Any, path: Path) -> Profile:
    """Return the profile that a JSON value is.

    Args:
        stored: the value.
        path: its file, for messages.

    Raises:
        UsageError: when it is no profile, contradicts itself, or is of another format.
    """
    if (
        not isinstance(stored, dict)
        or type(stored.get("format")) is not int
        or "cells" not in stored
    ):
        raise UsageError(f"{path} is not a profile; name the profile.json that profile wrote.")
    number = stored["format"]
    if number != FORMAT:
        raise UsageError(f"{path} has format {number}; {_remedy(stored)}.")
    try:
        profile = Profile.model_validate(stored)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = one_line(".".join(str(part) for part in first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        if first["type"] == "string_pattern_mismatch":
            said = "should be base64"
        raise UsageError(f"{path} is not a profile: {where}: {said}.") from error
    if not profile.cells:
        raise UsageError(f"{path} holds no cells.")
    wrong = next(contradictions(profile), None)
    if wrong is not None:
        raise UsageError(f"{path} is not a profile: {wrong}.")
    return profile


def _remedy(stored: dict[str, Any]) -> str:
    """Say what to do about a profile of another format, and by which version it was written."""
    tools = stored.get("tools")
    version = tools.get("m2dexport") if isinstance(tools, dict) else None
    writer = f" by m2dexport {shown(version).strip(chr(39))}" if isinstance(version, str) else ""
    if stored["format"] > FORMAT:
        return (
            f"it was written{writer}, and this one, {__version__}, reads format {FORMAT}: upgrade "
            "m2dexport"
        )
    return f"this version reads format {FORMAT}: profile again"


def profile_schema() -> dict[str, Any]:
    """Return the JSON Schema of profile.json, which ships as data/profile.schema.json."""
    schema = Profile.model_json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _rounded(value: Any) -> Any:
    """Round floats to six significant digits: more would be noise, and diffs would show it."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
