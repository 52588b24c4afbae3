"""Checkpoints shaped like released 2D Matryoshka models, from slice to verified bundle.

Weights are random and vocabularies small; depth, width, heads, positions and pooling are those of
the models. Run with ``-s``, it prints how long each step took, and the peak memory of the process.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import edit_json, tiny_checkpoint

from m2dexport.align.texts import TextFile, align_texts
from m2dexport.build.aligned import build_aligned
from m2dexport.build.build import build_artifact
from m2dexport.build.recipe import Recipe
from m2dexport.checkpoint.open import Checkpoint, open_checkpoint
from m2dexport.data import align_texts_path, calibration_texts, default_task_paths, read_texts
from m2dexport.engines import Device
from m2dexport.errors import UsageError
from m2dexport.profile.deploy import Deployment, bundle_cell
from m2dexport.profile.plan import Plan
from m2dexport.profile.sweep import profile_checkpoint
from m2dexport.reference.pooler import Reference
from m2dexport.runtime.bundle import verify_bundle
from m2dexport.runtime.loading import load
from m2dexport.slice.slicing import slice_checkpoint
from m2dexport.vectors.codecs import normalize
from m2dexport.vectors.pairs import StsTask
from m2dexport.vectors.tasks import load_task

pytestmark = pytest.mark.slow

CALIBRATION = calibration_texts()[:100]
TEXTS = read_texts(align_texts_path())[:12]
FIT_ON = read_texts(align_texts_path())[::15]  # 126 of them, of the 100 at least that a map needs


@dataclass(frozen=True)
class Shape:
    """A released model's architecture."""

    model_type: str
    config: dict[str, Any]
    pooling: str
    cut: tuple[int, int]  # (layers, dim) that is sliced and built
    max_length: int = 24
    aligns: bool = True  # whether so few texts find anything of random layers in those below
    full_int8: bool = True  # whether the profile holds the full depth, too, which is quantized


def _bert(layers: int, hidden: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": 512,
    }


SHAPES = {
    "mxbai-embed-2d-large-v1": Shape("bert", _bert(24, 1024), "cls", (6, 512), full_int8=False),
    "Starbucks": Shape("bert", _bert(12, 768), "cls", (6, 128)),
    "mmbert-embed-32k-2d-matryoshka": Shape(
        "modernbert",
        {
            "num_hidden_layers": 22,
            "hidden_size": 768,
            "num_attention_heads": 12,
            "intermediate_size": 1152,
            "max_position_embeddings": 32768,
            "local_attention": 128,
            "global_attn_every_n_layers": 3,
        },
        "mean",
        (6, 256),
        max_length=144,  # more than local attention sees
        full_int8=False,
    ),
    "Tevatron-Elastic Qwen3-0.6B": Shape(
        "qwen3",
        {
            "num_hidden_layers": 28,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 3072,
            "max_position_embeddings": 32768,
        },
        "lasttoken",
        (7, 256),
        aligns=False,
        full_int8=False,
    ),
}


@contextmanager
def timed(step: str) -> Iterator[None]:
    start, cpu = time.perf_counter(), time.process_time()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    sys.stdout.write(f"  {step:<28}{wall:6.1f} s  {cpu:6.1f} s of CPU  peak {peak:.1f} GiB\n")
    sys.stdout.flush()


def few_pairs() -> StsTask:
    whole = load_task(default_task_paths()[0])
    assert isinstance(whole, StsTask)
    few = slice(0, 40)
    return StsTask(
        "sts", whole.sentences1[few], whole.sentences2[few], whole.scores[few], whole.sha256
    )


def made(folder: Path, shape: Shape) -> Checkpoint:
    tiny_checkpoint(folder, shape.model_type, config=shape.config, pooling=shape.pooling)
    edit_json(folder / "sentence_bert_config.json", max_seq_length=shape.max_length)
    return open_checkpoint(folder)


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_of_this_shape_goes_all_the_way(name: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    shape = SHAPES[name]
    layers, dim = shape.cut
    torch.set_num_threads(2)
    sys.stdout.write(f"\n{name}\n")
    with timed("make"):
        checkpoint = made(tmp_path / "model", shape)
    assert (checkpoint.layers, checkpoint.dim) == (
        shape.config["num_hidden_layers"],
        shape.config["hidden_size"],
    )
    with timed(f"slice {layers}x{dim}"):
        sub = slice_checkpoint(checkpoint, layers, dim, tmp_path / "sub")
    with timed("compare with the original"):
        expected = normalize(Reference(checkpoint, [layers]).encode(TEXTS)[layers][:, :dim])
        found = SentenceTransformer(str(sub.path), device="cpu").encode(list(TEXTS))
        np.testing.assert_allclose(found, expected, atol=1e-4)
    few = tmp_path / "few.txt"
    few.write_text("\n".join(FIT_ON), encoding="utf-8")
    fit_on = align_texts(few)
    with timed(f"build {layers}x{dim} --align"):
        recipe = Recipe(device=Device(threads=2), calibration=CALIBRATION, align_texts=fit_on)
        refused = pytest.raises(UsageError, match=f"do not align depth {layers}")
        with nullcontext() if shape.aligns else refused:
            aligned = build_aligned(checkpoint, layers, dim, tmp_path / "aligned", recipe)
            assert aligned.spec.speaks is not None
    with timed(f"build {layers}x{dim} in int8"):
        recipe = Recipe(weights="int8", device=Device(threads=2), calibration=CALIBRATION)
        int8 = build_artifact(sub, layers, dim, tmp_path / "int8", recipe)
    vectors = load(int8.path).encode(list(TEXTS))
    assert (vectors * expected).sum(axis=1).min() > 0.9
    _profile_and_bundle(checkpoint, shape, fit_on, tmp_path)


def _profile_and_bundle(
    checkpoint: Checkpoint, shape: Shape, fit_on: TextFile, tmp_path: Path
) -> None:
    layers, dim = shape.cut
    plan = Plan(
        layers=(layers, checkpoint.layers) if shape.full_int8 else (layers,),
        dims=(dim,),
        weights=("fp32", "int8"),
        vectors=("float32", "int8"),
        shapes=((1, 16),),
        device=Device(threads=2, spin_us=0),
        repeats=3,
        align_texts=fit_on,
    )
    with timed("profile"):
        profile = profile_checkpoint(checkpoint, [few_pairs()], CALIBRATION, plan)
    for failure in profile.failures:
        sys.stdout.write(f"  failed: {failure.reason}\n")
    measured = {cell.id for cell in profile.cells}
    plain = f"{layers}x{dim}-int8-int8"
    assert {f"{plan.layers[-1]}x{dim}-fp32-float32", plain} <= measured
    with timed(f"bundle {plain}"):
        deployment = Deployment(CALIBRATION, fit_on)
        bundle_cell(profile, plain, checkpoint, tmp_path / "x.m2d", deployment)
    with timed("verify"):
        report = verify_bundle(tmp_path / "x.m2d")
    sys.stdout.write(f"  {report.sentence()}\n")
