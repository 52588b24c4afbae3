"""numpy: look token vectors up, add and normalise them; what a device needs.

numpy has no threads to set here: a text's vector takes microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.engines import ENGINES, Device, file_view
from m2dexport.engines.numpy.table import Table, read_table, rows_of, width_of
from m2dexport.errors import M2DError, UsageError
from m2dexport.precisions import Isa
from m2dexport.vectors.codecs import normalize

_ENGINE = ENGINES["static"]
_TOKENS = 1024  # that are looked up at once, padding included, as many as a cache holds


def devices() -> tuple[str, ...]:
    """Return "CPU", which is all that numpy runs on."""
    return (_ENGINE.provider,)


def require_device(device: Device) -> str:
    """Return "CPU".

    Raises:
        UsageError: when another device is asked for, or one with a cache.
    """
    provider = device.provider or _ENGINE.provider
    if provider != _ENGINE.provider:
        raise UsageError(f"static models run on {_ENGINE.provider}, not on {provider}.")
    if device.cache is not None:
        raise UsageError("static models are not compiled, so a cache keeps nothing; leave it out.")
    return provider


def load(files: Mapping[str, Path | bytes], device: Device, isa: Isa) -> Table:
    """Load the table of a static model.

    Args:
        files: "table.safetensors" -> a path, which is mapped into memory, or the content.
        device: the CPU.
        isa: plays no part.

    Raises:
        UsageError: when another device is asked for.
        M2DError: when the file is not a table.
    """
    require_device(device)
    (name,) = _ENGINE.files
    return read_table(file_view(files[name]), name)


def run(
    session: Table, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]
) -> list[NDArray[Any]]:
    """Return the normalised vectors of int64 (batch, sequence) inputs, float32 (batch, dim).

    A text's tokens are added by themselves: its vector does not depend on the others.

    Raises:
        M2DError: when an id lies beyond the table.
    """
    rows = len(next(iter(session.values())))
    if input_ids.size and not 0 <= input_ids.min() <= input_ids.max() < rows:
        raise M2DError(f"a token id lies beyond the {rows} rows of the table.")
    found: NDArray[np.float32] = np.empty((len(input_ids), width_of(session)), np.float32)
    size = max(1, _TOKENS // max(1, input_ids.shape[1]))
    with np.errstate(over="ignore", invalid="ignore"):  # the encoder refuses what comes of it
        for start in range(0, len(input_ids), size):
            some = slice(start, start + size)
            _add_tokens(session, input_ids[some], attention_mask[some] != 0, found[some])
        return [normalize(found)]


def _add_tokens(
    table: Table, ids: NDArray[np.int64], there: NDArray[np.bool_], sums: NDArray[np.float32]
) -> None:
    """Write the sum of each text's token vectors into float32 (texts, dim)."""
    tokens = rows_of(table, ids[there])
    start = 0
    for text, count in enumerate(np.count_nonzero(there, axis=1).tolist()):
        np.add.reduce(tokens[start : start + count], axis=0, out=sums[text])
        start += count


def describe(session: Table) -> dict[str, str]:
    """Return what runs a table."""
    return {"engine": f"numpy {np.__version__}", "provider": _ENGINE.provider}
