"""Profiles made up for tests of what reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from m2dexport.measure.footprint import Footprint
from m2dexport.measure.latency import LatencyPoint
from m2dexport.measure.size import SizeParts
from m2dexport.profile import schema
from m2dexport.profile.cells import Graph, GraphFacts, Measured
from m2dexport.profile.intervals import Replicates, interval_of, replicates_of, score_from
from m2dexport.profile.schema import Cell, MeasuredOn, Profile
from m2dexport.runtime.cells import cell_id
from m2dexport.vectors.codecs import bytes_per_vector
from m2dexport.vectors.resample import REPLICATES, Score

TIMED = {
    "batch": 1,
    "sequence": 16,
    "p50_ms": 1.0,
    "p95_ms": 2.0,
    "p99_ms": 2.5,
    "p50_interval": {"low": 0.9, "high": 1.1},
    "p95_interval": {"low": 1.9, "high": 2.1},
    "runs": 100,
}


def steady(points: float, spread: float = 0.0, seed: int = 0) -> Replicates:
    """Return replicates of a figure; cells of one seed have the same noise, and pairs none."""
    noise = np.random.default_rng(seed).normal(scale=spread, size=REPLICATES)
    return replicates_of(Score(points, points + noise))


def cell(layers: int = 2, dim: int = 64, weights: str = "fp32", **values: Any) -> Cell:
    """Return a cell; what is not given is of no interest to the test."""
    vectors = values.pop("vectors", "float32")
    quality = values.pop("quality", 80.0)
    align = values.pop("align", "none")
    replicates = values.pop("replicates", {"sts/spearman": steady(quality)})
    main = replicates.get("sts/spearman", steady(quality))
    facts = {
        "id": cell_id(layers, dim, weights, vectors, align, values.get("engine", "onnx")),
        "target": "local",
        "layers": layers,
        "dim": dim,
        "align": align,
        "weights": weights,
        "vectors": vectors,
        "engine": "onnx",
        "device": {"provider": "CPUExecutionProvider", "threads": 2, "spin_us": 0, "workers": 1},
        "isa": "portable",
        "quality": {"sts/spearman": quality, "sts/pearson": quality - 1},
        "intervals": {},
        "replicates": replicates,
        "as_query": {},
        "query_replicates": {},
        "mean_quality": quality,
        "mean_interval": interval_of(score_from(quality, main)),
        "retention": quality / 100,
        "loss": 100 - quality,
        "loss_interval": {"low": 100 - quality, "high": 100 - quality},
        "p50_ms": 1.0,
        "p95_ms": 2.0,
        "p99_ms": 2.5,
        "text_p50_ms": None,
        "ratio": 1.0,
        "ratio_interval": {"low": 1.0, "high": 1.0},
        "load_ms": 10.0,
        "first_ms": 2.0,
        "size_bytes": 10_000_000,
        "size_parts": {"embeddings": 0, "layers": 9_000_000, "tokenizer": 1_000_000, "other": 0},
        "peak_memory_bytes": 100_000_000,
        "used_memory_bytes": 110_000_000,
        "bytes_per_vector": bytes_per_vector(dim, vectors),
        "flags": (),
        "on_frontier": True,
    }
    p50, p95 = values.get("p50_ms", 1.0), values.get("p95_ms", 2.0)
    timed = {
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": values.get("p99_ms", 2.5),
        "p50_interval": {"low": p50, "high": p50},
    }
    return Cell.model_validate({**facts, "latency": [{**TIMED, **timed}], **values})


def target(reference: Cell, name: str, **values: Any) -> dict[str, Any]:
    """Return where cells were measured."""
    return {
        "name": name,
        "description": "",
        "engines": [reference.engine],
        "machine": {
            "cpu": "a processor",
            "flags": ["avx2"],
            "cores": 2,
            "memory_bytes": 8_000_000_000,
            "os": "Linux",
            "python": "3.12.0",
            "governor": None,
            "virtualisation": None,
            "gpu": None,
        },
        "noise": None,
        "shapes": [{"batch": 1, "sequence": 16}],
        "asked": [{"batch": 1, "sequence": 16}],
        "tokenization": [],
        "budget": {},
        "reference": reference.id,
        "recommended": {
            "best": reference.id,
            "balanced": reference.id,
            "smallest": reference.id,
            "within_budget": None,
        },
        "samples": [],
        **values,
    }


def profile(*cells: Cell, **values: Any) -> Profile:
    """Return a profile of these cells."""
    return Profile.model_validate(
        {
            "format": schema.FORMAT,
            "created": "2026-01-01T00:00:00+00:00",
            "tools": {"m2dexport": "0.1.0"},
            "checkpoint": {
                "model": None,
                "sha256": "0" * 64,
                "model_sha256": "0" * 64,
                "model_type": "bert",
                "layers": 6,
                "dim": 384,
                "trained": [[6, 384]],
                "pooling": None,
            },
            "tasks": [
                {
                    "name": "sts",
                    "kind": "sts",
                    "main_metric": "spearman",
                    "texts": 10,
                    "sha256": "0" * 64,
                }
            ],
            "calibration_sha256": "0" * 64,
            "aligned_with": None,
            "replicates": REPLICATES,
            "decided_by": "0" * 64,
            "shard": None,
            "seconds": {"export": 1.0},
            "targets": [target(cells[0], "local")],
            "cells": cells,
            "cross_depth": [],
            "failures": [],
            **values,
        }
    )


def made_up(figures: Mapping[str, tuple[float, float]], **values: Any) -> Measured:
    """Return what a sweep would have measured of cells: id -> points and p50 in ms."""
    graphs: dict[Any, GraphFacts] = {}
    added: dict[Any, int] = {}
    device = MeasuredOn(provider="CPUExecutionProvider", threads=1, spin_us=0, workers=1)
    for name, (_, p50_ms) in figures.items():
        size, *rest = name.split("-")
        layers, dim = map(int, size.split("x"))
        align = "full" if rest[0] == "aligned" else "none"
        weights, vectors = rest[-2:]
        graph = Graph(layers, weights, align, dim if layers == 0 else None)
        span = (p50_ms, p50_ms)
        points = (LatencyPoint(1, 8, p50_ms, p50_ms, p50_ms, span, span, 3),)
        footprint = Footprint(10, 12, 1.0, 2.0)
        parts = SizeParts(embeddings=0, layers=90, tokenizer=10, other=0)
        graphs[graph] = GraphFacts(points, footprint, 100, parts, (), "onnx", device)
        added[graph, dim, vectors] = 0
    nothing: dict[str, Any] = {"as_query": {}, "cross_depth": (), "failures": {}, "unaligned": {}}
    return Measured(
        quality={
            name: {"sts/spearman": Score(points, np.full(REPLICATES, points))}
            for name, (points, _) in figures.items()
        },
        graphs=graphs,
        added_bytes=added,
        seconds={},
        **{**nothing, **values},
    )
