"""profile.json, read and written, and its JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from m2dexport.data import read_utf8
from m2dexport.errors import UsageError
from m2dexport.files import atomic_file
from m2dexport.profile.schema import FORMAT, Profile
from m2dexport.strict import parse_json

_DIGITS = 6


def write_profile(profile: Profile, path: str | Path, *, force: bool = False) -> None:
    """Write profile.json: sorted keys and floats of six digits, whole or not at all.

    Raises:
        UsageError: when ``path`` exists and ``force`` does not say that it is to be replaced.
    """
    text = json.dumps(_rounded(profile.model_dump(mode="json")), indent=2, sort_keys=True)
    with atomic_file(Path(path), force=force) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_profile(path: str | Path) -> Profile:
    """Read profile.json.

    Raises:
        UsageError: when it is missing, no profile, or of a later format.
    """
    path = Path(path)
    stored = parse_json(read_utf8(path), path)
    number = stored.get("format") if isinstance(stored, dict) else None
    if number != FORMAT:
        raise UsageError(f"{path} has format {number}; this version reads format {FORMAT}.")
    try:
        profile = Profile.model_validate(stored)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path} is not a profile: {where}: {first['msg']}.") from error
    if not profile.cells:
        raise UsageError(f"{path} holds no cells.")
    return profile


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
