"""The maps of a sweep: fitted in one pass of the fp32 graph over the fitting texts.

The same pass over the calibration texts gives the ranges of the full depth's vectors, which aligned
cells are coded with: their codes must be comparable with those of the full model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from m2dexport.align.fit import Fitting
from m2dexport.align.static import TokenTable
from m2dexport.align.texts import chunks_of, prompted, prompts_of
from m2dexport.batches import encode_tokens
from m2dexport.build.parity import Run
from m2dexport.build.source import Source
from m2dexport.checkpoint.alignment import LinearMap
from m2dexport.errors import UsageError
from m2dexport.graph.edit import SMALL
from m2dexport.precisions import WeightPrecision
from m2dexport.profile.plan import Plan
from m2dexport.progress import OnProgress
from m2dexport.quantize.recipes import HALF
from m2dexport.runtime.tokenizer import load_tokenizer, tokenize
from m2dexport.vectors import codecs
from m2dexport.vectors.codecs import Ranges

Floats = NDArray[np.float32]
_BATCH = 32
_CHUNK = 1024
_ARRAYS, _NAMED = "maps.npz", "maps.json"


@dataclass(frozen=True)
class Maps:
    """What aligned cells are computed with."""

    linear: Mapping[tuple[int, int], LinearMap]  # (layers, dim), depth 0 apart
    tables: Mapping[int, Floats]  # dim -> the table of depth 0, float32 (tokens, dim)
    tokenizer_json: str  # of depth 0
    ranges: Mapping[int, Ranges]  # dim -> those of the full depth in fp32
    failures: Mapping[tuple[int, int], str]  # (layers, dim) -> why there is no map

    def stored_in(self, weights: WeightPrecision) -> Maps:
        """Return the maps as graphs of these weights hold them: half precision rounds them."""
        if weights not in HALF:
            return self
        dtype = HALF[weights].numpy()
        rounded = {
            key: replace(linear, weight=linear.weight.astype(dtype).astype(np.float32))
            for key, linear in self.linear.items()
            if linear.weight.size >= SMALL
        }
        return replace(self, linear={**self.linear, **rounded})


NO_MAPS = Maps({}, {}, "", {}, {})


def fit_maps(
    source: Source,
    run: Run,
    table: TokenTable | None,
    texts: Iterable[str],
    calibration: Sequence[str],
    plan: Plan,
    on_progress: OnProgress,
) -> Maps:
    """Fit the maps of all aligned depths and dims.

    Args:
        source: the exported checkpoint, the full depth among its depths.
        run: its fp32 graph: float32 (batch, depths, width), in the order of ``source.probes``.
        table: the token table, where depth 0 is measured.
        texts: what to fit on; iterated once.
        calibration: what freezes the ranges.
        plan: the depths, dims and device.
        on_progress: called as texts are done.

    Raises:
        UsageError: when the texts are too few or cannot be read.
    """
    full = source.checkpoint.layers
    places = {depth: place for place, depth in enumerate(source.probes)}
    depths = [depth for depth in plan.aligned(full) if depth > 0]
    widths = dict.fromkeys(depths, source.checkpoint.dim)
    if table is not None:
        widths[0] = table.width
    fitting = Fitting(widths, plan.dims, without_intercept=(0,))
    prompts, done, workers = prompts_of(source.checkpoint), 0, plan.device.workers or 1
    for chunk in chunks_of(texts, _CHUNK):
        behind = list(prompted(chunk, prompts, done))
        vectors = _encoded(source, run, behind, workers)
        inputs = {depth: codecs.normalize(vectors[:, places[depth]]) for depth in depths}
        if table is not None:
            inputs[0] = table.inputs(behind)
        fitting.add(chunk, inputs, vectors[:, places[full]])
        done += len(chunk)
        on_progress("aligning", done, done)
    behind = [source.prompt + text for text in calibration]
    frozen = _encoded(source, run, behind, workers)[:, places[full]]
    ranges = {dim: codecs.calibrate_ranges(codecs.truncate(frozen, dim)) for dim in plan.dims}
    return _maps(fitting, table, plan.dims, ranges)


def _maps(
    fitting: Fitting, table: TokenTable | None, dims: Sequence[int], ranges: Mapping[int, Ranges]
) -> Maps:
    """Return the maps that a pass over the texts gives, and why others could not be fitted."""
    fitting.require_texts()
    linear: dict[tuple[int, int], LinearMap] = {}
    tables: dict[int, Floats] = {}
    failures: dict[tuple[int, int], str] = {}
    for depth, dim in product(fitting.depths, dims):
        try:
            found = fitting.fit(depth, dim).map
        except UsageError as error:
            failures[depth, dim] = str(error)
            continue
        if depth > 0:
            linear[depth, dim] = found
        elif table is not None:
            tables[dim] = table.folded(found)
    tokenizer_json = "" if table is None else table.tokenizer_json
    return Maps(linear, tables, tokenizer_json, ranges, failures)


def _encoded(source: Source, run: Run, texts: Sequence[str], workers: int) -> Floats:
    """Return float32 (texts, depths, width) of texts with their prompts."""
    tokens = tokenize(load_tokenizer(source.tokenizer_json), texts, "")
    vectors = encode_tokens(run, [each.ids for each in tokens], source.pad_id, _BATCH, workers)
    assert vectors is not None
    return vectors


def write_maps(maps: Maps, folder: Path) -> None:
    """Write maps into a folder, for sweeps that go on."""
    arrays: dict[str, NDArray[np.float32]] = {}
    for (layers, dim), linear in maps.linear.items():
        arrays |= {f"weight-{layers}-{dim}": linear.weight, f"bias-{layers}-{dim}": linear.bias}
    for dim, ranges in maps.ranges.items():
        arrays |= {f"low-{dim}": ranges.low, f"high-{dim}": ranges.high}
    arrays |= {f"table-{dim}": table for dim, table in maps.tables.items()}
    np.savez(folder / _ARRAYS, **arrays)  # type: ignore[arg-type]
    named = {
        "linear": list(maps.linear),
        "ranges": list(maps.ranges),
        "tables": list(maps.tables),
        "failures": list(maps.failures.items()),
        "tokenizer": maps.tokenizer_json,
    }
    (folder / _NAMED).write_text(json.dumps(named), encoding="utf-8")


def read_maps(folder: Path) -> Maps:
    """Return what ``write_maps`` wrote."""
    named = json.loads((folder / _NAMED).read_text(encoding="utf-8"))
    with np.load(folder / _ARRAYS) as arrays:
        return Maps(
            linear={
                (n, dim): LinearMap(arrays[f"weight-{n}-{dim}"], arrays[f"bias-{n}-{dim}"])
                for n, dim in named["linear"]
            },
            tables={dim: arrays[f"table-{dim}"] for dim in named["tables"]},
            tokenizer_json=named["tokenizer"],
            ranges={
                dim: Ranges(arrays[f"low-{dim}"], arrays[f"high-{dim}"]) for dim in named["ranges"]
            },
            failures={(n, dim): reason for (n, dim), reason in named["failures"]},
        )
