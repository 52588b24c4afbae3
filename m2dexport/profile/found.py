"""What a pass found, in a folder: scores, graphs and their flags, failures, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m2dexport.engines import Device
from m2dexport.measure.latency import Candidate
from m2dexport.precisions import Isa
from m2dexport.profile.costs import Sample
from m2dexport.profile.grid import Graph
from m2dexport.profile.schema import CrossDepth, Flag
from m2dexport.vectors.ranking import Rows
from m2dexport.vectors.resample import Score

_Scores = Mapping[str, Score]  # by "task/metric"
#: Files of a pass's folder, which also holds the graphs', and what its full depth wrote.
TOKENIZER, INDEX, RANKINGS = "tokenizer.json", "index", "rankings.npz"
#: Task -> the ten documents that the reference cell finds for each query, (queries, 10).
Rankings = Mapping[str, Rows]
_FOUND, _NAMES, _SCORES = "found.json", "scores.json", "scores.npy"


@dataclass(frozen=True)
class Found:
    """What a pass found."""

    quality: Mapping[str, _Scores]  # by cell id
    as_query: Mapping[str, Mapping[str, _Scores]]  # cell id -> index cell
    cross_depth: tuple[CrossDepth, ...]
    graphs: Mapping[Graph, Candidate]  # on a device that leaves all open
    flags: Mapping[Graph, tuple[Flag, ...]]
    samples: Mapping[str, Sample]  # cell id -> the cell as it is built
    failures: Mapping[Graph, str]
    tokenizer: Path  # of the transformer


def write_found(found: Found, folder: Path) -> None:
    """Write what a pass found into the folder that its graphs are in."""
    _write_scores(folder, found.quality, found.as_query)
    stored = {
        "graphs": [
            (*_stored(graph, each, folder), found.flags[graph])
            for graph, each in found.graphs.items()
        ],
        "samples": [
            (name, *_stored(each.graph, each.candidate, folder))
            for name, each in found.samples.items()
        ],
        "failures": [(astuple(graph), reason) for graph, reason in found.failures.items()],
        "cross_depth": [each.model_dump(mode="json") for each in found.cross_depth],
    }
    (folder / _FOUND).write_text(json.dumps(stored), encoding="utf-8")


def read_found(folder: Path) -> Found:
    """Return what was written into a folder."""
    stored = json.loads((folder / _FOUND).read_text(encoding="utf-8"))
    quality: dict[str, dict[str, Score]] = {}
    as_query: dict[str, dict[str, dict[str, Score]]] = {}
    names = json.loads((folder / _NAMES).read_text(encoding="utf-8"))
    for (cell, index, metric), row in zip(names, np.load(folder / _SCORES), strict=True):
        of_cell = quality if index is None else as_query.setdefault(cell, {})
        of_cell.setdefault(index or cell, {})[metric] = Score(float(row[0]), row[1:])
    graphs, flags, samples = {}, {}, {}
    for *each, flagged in stored["graphs"]:
        graph, graphs[graph] = _read(folder, *each)
        flags[graph] = tuple(flagged)
    for name, *each in stored["samples"]:
        samples[name] = Sample(*_read(folder, *each))
    return Found(
        quality=quality,
        as_query=as_query,
        cross_depth=tuple(CrossDepth.model_validate(each) for each in stored["cross_depth"]),
        graphs=graphs,
        flags=flags,
        samples=samples,
        failures={Graph(*key): reason for key, reason in stored["failures"]},
        tokenizer=folder / TOKENIZER,
    )


def write_rankings(rankings: Rankings, path: Path) -> None:
    """Write what the reference cell finds, for passes to come."""
    names, rows = list(rankings), [rankings[name] for name in rankings]
    arrays = {str(number): each for number, each in enumerate(rows)}
    np.savez(path, names=np.array(names, dtype=np.str_), **arrays)  # type: ignore[arg-type]


def read_rankings(path: Path) -> Rankings:
    """Return what ``write_rankings`` wrote."""
    with np.load(path) as arrays:
        return {str(name): arrays[str(at)] for at, name in enumerate(arrays["names"])}


def _write_scores(
    folder: Path,
    quality: Mapping[str, _Scores],
    as_query: Mapping[str, Mapping[str, _Scores]],
) -> None:
    found: list[tuple[str, str | None, _Scores]] = [(cell, None, quality[cell]) for cell in quality]
    found += [(cell, index, each) for cell, of in as_query.items() for index, each in of.items()]
    scores = [
        ((cell, index, metric), [score.points, *score.replicates])
        for cell, index, by_metric in found
        for metric, score in by_metric.items()
    ]
    np.save(folder / _SCORES, np.array([values for _, values in scores], dtype=np.float64))
    (folder / _NAMES).write_text(json.dumps([name for name, _ in scores]), encoding="utf-8")


def _stored(graph: Graph, candidate: Candidate, folder: Path) -> tuple[Any, ...]:
    """Return a graph and where its files are, as JSON."""
    files = [path.relative_to(folder).as_posix() for path in candidate.files.values()]
    return astuple(graph), files, candidate.isa, candidate.engine


def _read(
    folder: Path, graph: Sequence[Any], files: Sequence[str], isa: Isa, engine: str
) -> tuple[Graph, Candidate]:
    paths = {Path(name).name: folder / name for name in files}
    return Graph(*graph), Candidate(paths, isa, engine, Device())
