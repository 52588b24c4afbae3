"""Profiles made up for tests of what reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m2dexport.profile import schema
from m2dexport.profile.cells import Graph, GraphFacts, Measured
from m2dexport.profile.latency import Footprint, LatencyPoint
from m2dexport.profile.schema import Cell, MeasuredOn, Profile, cell_id


def cell(layers: int = 2, dim: int = 64, weights: str = "fp32", **values: Any) -> Cell:
    """Return a cell; what is not given is of no interest to the test."""
    vectors = values.pop("vectors", "float32")
    quality = values.pop("quality", 80.0)
    align = values.pop("align", "none")
    facts = {
        "id": cell_id(layers, dim, weights, vectors, align),
        "layers": layers,
        "dim": dim,
        "align": align,
        "weights": weights,
        "vectors": vectors,
        "engine": "onnx",
        "device": {"provider": "CPUExecutionProvider", "threads": 2, "spin_us": 0, "workers": 1},
        "isa": "portable",
        "quality": {"sts/spearman": quality, "sts/pearson": quality - 1},
        "as_query": {},
        "mean_quality": quality,
        "retention": quality / 100,
        "latency": [{"batch": 1, "sequence": 16, "p50_ms": 1.0, "p95_ms": 2.0, "runs": 30}],
        "p50_ms": 1.0,
        "p95_ms": 2.0,
        "load_ms": 10.0,
        "size_bytes": 10_000_000,
        "peak_memory_bytes": 100_000_000,
        "used_memory_bytes": 110_000_000,
        "bytes_per_vector": 256,
        "flags": (),
        "on_frontier": True,
    }
    return Cell.model_validate({**facts, **values})


def profile(*cells: Cell, **values: Any) -> Profile:
    """Return a profile of these cells."""
    return Profile.model_validate(
        {
            "format": schema.FORMAT,
            "created": "2026-01-01T00:00:00+00:00",
            "tools": {"m2dexport": "0.1.0"},
            "machine": {
                "cpu": "a processor",
                "flags": ["avx2"],
                "cores": 2,
                "memory_bytes": 8_000_000_000,
                "os": "Linux",
                "python": "3.12.0",
            },
            "checkpoint": {
                "model": None,
                "sha256": "0" * 64,
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
            "reference": cells[0].id,
            "latency_shape": {"batch": 1, "sequence": 16},
            "seconds": {"export": 1.0},
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
        points = (LatencyPoint(1, 8, p50_ms, p50_ms, 3),)
        graphs[graph] = GraphFacts(points, Footprint(10, 12, 1.0), 100, (), "onnx", device)
        added[graph, dim, vectors] = 0
    nothing: dict[str, Any] = {"as_query": {}, "cross_depth": (), "failures": {}, "unaligned": {}}
    return Measured(
        quality={name: {"sts/spearman": points} for name, (points, _) in figures.items()},
        graphs=graphs,
        added_bytes=added,
        seconds={},
        **{**nothing, **values},
    )
