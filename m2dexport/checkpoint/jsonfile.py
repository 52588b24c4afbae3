"""JSON files of a checkpoint folder: read with an error that names the file, written for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from m2dexport.errors import CheckpointError, one_line


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        CheckpointError: when it is missing or not JSON.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {one_line(error)}.") from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one when there is no such file.

    Raises:
        CheckpointError: when it is not a JSON object.
    """
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON with an indent of two and a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
