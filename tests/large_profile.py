"""A profile as large as a whole surface, made up: two engines, two targets, seven tasks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from tiny_profile import cell, profile, target

from m2dexport.profile.schema import Cell, Profile
from m2dexport.runtime.cells import cell_id

DEPTHS, DIMS = range(7), (32, 64, 128, 256, 384)
WEIGHTS = {"fp32": 1.0, "fp16": 1.0, "int8": 0.99}
VECTORS = {"float32": (1.0, 4.0), "int8": (0.995, 1.0), "ubinary": (0.9, 0.125)}
BITS = {"fp32": 32, "fp16": 16, "int8": 8}
#: Names that would break a page, a label or a table that does not expect them.
HOSTILE = "</script><img src=x onerror=document.title='broken'>"
TASKS = (HOSTILE, *(f"a-task-with-a-long-name-{n}" for n in range(6)))
RETRIEVAL = TASKS[1]
#: On this task the deepest, half as wide cells collapse.
COLLAPSED_ON, COLLAPSED = TASKS[2], (6, 256)


def large_profile(
    targets: tuple[str, ...] = ("edge",), tasks: int = 7, dims: tuple[int, ...] = DIMS
) -> Profile:
    """Return a profile of 207 cells for each target and dim."""
    names = TASKS[:tasks]
    cells = [
        each for number, name in enumerate(targets) for each in _cells(name, number, names, dims)
    ]
    info = [
        {
            "name": task,
            "kind": "retrieval" if task == RETRIEVAL else "sts",
            "main_metric": "ndcg@10" if task == RETRIEVAL else "spearman",
            "texts": 1000,
            "sha256": "ab" * 32,
        }
        for task in names
    ]
    failure = {
        "engine": "openvino",
        "layers": 3,
        "align": "none",
        "weights": "int8",
        "reason": "3 layers in int8 do not reproduce the torch original.",
        "cells": ["3x64-int8-int8@openvino"],
    }
    return profile(
        *cells,
        tasks=info,
        targets=[_target(name, cells) for name in targets],
        failures=[failure],
    )


def _cells(name: str, number: int, tasks: tuple[str, ...], dims: tuple[int, ...]) -> list[Cell]:
    random = np.random.default_rng(number)
    found = []
    for engine, align, layers, dim, weights, vectors in itertools.product(
        ("onnx", "openvino"), ("none", "full"), DEPTHS, dims, WEIGHTS, VECTORS
    ):
        if (layers == 0) != (align == "full" and engine == "onnx" and layers == 0):
            continue
        if align == "full" and layers == 6:
            continue
        kept, width = VECTORS[vectors]
        share = (0.7 + 0.05 * layers + (0.02 if align == "full" else 0)) * (dim / 384) ** 0.08
        base = 80 * share * kept * WEIGHTS[weights]
        quality = {
            f"{task}/{'ndcg@10' if task == RETRIEVAL else 'spearman'}": base - 2 * index
            for index, task in enumerate(tasks)
        }
        flags: list[str] = []
        if (layers, dim) == COLLAPSED and f"{COLLAPSED_ON}/spearman" in quality:
            quality[f"{COLLAPSED_ON}/spearman"] = 9.0
            flags.append("collapsed")
        p50 = (0.03 + 0.45 * layers * (1.5 if weights != "int8" else 1)) * random.uniform(0.95, 1.1)
        found.append(
            _cell(
                name, engine, align, (layers, dim), (weights, vectors), quality, p50, width, flags
            )
        )
    return found


def _cell(
    name: str,
    engine: str,
    align: str,
    shape: tuple[int, int],
    precision: tuple[str, str],
    quality: dict[str, float],
    p50: float,
    width: float,
    flags: list[str],
) -> Cell:
    layers, dim = shape
    weights, vectors = precision
    mean = float(np.mean(list(quality.values())))
    share = BITS[weights] / 32
    parts = {
        "embeddings": int(13e6 * share),
        "layers": int(7e6 * layers * share),
        "tokenizer": 300_000,
        "other": 150_000,
    }
    ahead = (weights, vectors, engine) == ("int8", "int8", "onnx") and layers in (0, 2, 4, 6)
    timed = {
        "batch": 1,
        "sequence": 16,
        "p50_ms": p50,
        "p95_ms": p50 * 1.2,
        "p99_ms": p50 * 1.3,
        "p50_interval": {"low": p50 * 0.96, "high": p50 * 1.03},
        "p95_interval": {"low": p50 * 1.1, "high": p50 * 1.3},
        "runs": 200,
    }
    metric = f"{RETRIEVAL}/ndcg@10"
    index = cell_id(6, dim, "fp32", vectors)
    queried = align == "full" and metric in quality
    made = cell(
        layers,
        dim,
        weights,
        vectors=vectors,
        align=align,
        engine="static" if layers == 0 else engine,
        target=name,
        as_query={index: {metric: quality[metric] - 3}} if queried else {},
        mean_quality=mean,
        mean_interval={"low": mean - 1.2, "high": mean + 1.1},
        retention=mean / 78,
        loss=78 - mean,
        loss_interval={"low": 77 - mean, "high": 79.5 - mean},
        latency=[timed],
        p50_ms=p50,
        p95_ms=p50 * 1.2,
        p99_ms=p50 * 1.3,
        text_p50_ms=p50 + 0.1,
        ratio=p50 / 4,
        ratio_interval={"low": p50 / 4.2, "high": p50 / 3.9},
        size_bytes=sum(parts.values()),
        size_parts=parts,
        bytes_per_vector=int(dim * width),
        flags=flags,
        on_frontier=ahead and dim in (128, 384),
    )
    return made.model_copy(update={"quality": quality, "replicates": {}})


def _target(name: str, cells: list[Cell]) -> dict[str, Any]:
    own = [cell for cell in cells if cell.target == name]
    reference = next(cell for cell in own if cell.id == "6x384-fp32-float32")
    limited = name == "edge"
    return target(
        reference,
        name,
        description=f"What {name} has",
        engines=["onnx", "openvino"],
        budget={"p95_ms": 2.0, "p50_ms": 1.5, "min_quality": 55.0} if limited else {},
        noise={
            "verdict": "noisy",
            "reasons": ["The reference's p95 is 1.9 times its p50."],
            "spread": 1.9,
            "drift": 1.1,
            "stolen": 0.02,
            "busy": None,
        },
        recommended={
            "best": "6x384-int8-int8",
            "balanced": "2x384-int8-int8",
            "smallest": "0x384-aligned-int8-int8",
            "within_budget": "2x384-int8-int8" if limited else None,
        },
    )
