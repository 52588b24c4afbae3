"""Mixed precision: which layers stay in float32 so that quality drops by so many points at most."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from command_line import m2d
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_checkpoint

from m2dexport import cores as cores_of_process
from m2dexport.build import mixed as mixed_precision
from m2dexport.build.build import make_artifact, quantize_artifact
from m2dexport.build.mixed import Fidelity, QualityLimit, fewest
from m2dexport.build.recipe import Recipe
from m2dexport.checkpoint.open import Checkpoint
from m2dexport.data import calibration_texts
from m2dexport.engines import Device
from m2dexport.engines.onnxruntime.make import PRECISIONS, quantize, runner
from m2dexport.errors import M2DError
from m2dexport.profile.plan import Plan
from m2dexport.profile.schema import Cell
from m2dexport.profile.sweep import profile_checkpoint
from m2dexport.quantize.activations import CalibrationTokens
from m2dexport.quantize.coverage import coverage
from m2dexport.quantize.tables import quantize_tables
from m2dexport.quantize.units import restore, units_of
from m2dexport.runtime import loading as runtime
from m2dexport.runtime.artifact import read_spec
from m2dexport.vectors.pairs import StsTask
from m2dexport.vectors.tasks import load_task

TEXTS = calibration_texts()[:120]
TOKENS = CalibrationTokens([list(range(5, 5 + n)) for n in range(4, 30)], 0)
IDS = np.array([[5, 9, 20, 31, 7], [8, 6, 11, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
DEPTH = ("--layers", 1, "--dim", 64)
MIXED = ("--vectors", "float32", "--allow-batch-dependent")


@pytest.fixture(scope="module")
def mixed(fp32: Path, own_pairs: Path, tmp_path_factory) -> Callable[[str, float], dict]:  # type: ignore[type-arg, no-untyped-def]
    """From weights and limit to what the command line made of the artifact, as JSON, made once."""

    @cache
    def made(weights: str, max_drop: float) -> dict:  # type: ignore[type-arg]
        limit = ("--weights", weights, "--max-drop", max_drop, "--eval", own_pairs)
        out = tmp_path_factory.mktemp("mixed") / "artifact"
        result = m2d("quantize", fp32, *limit, *MIXED, "--out", out, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)  # type: ignore[no-any-return]

    return made


def kept_units(artifact: dict) -> list[str]:  # type: ignore[type-arg]
    return [unit["name"] for unit in artifact["mixture"]["units"] if unit["kept"]]


def profiled_int8(checkpoint: Checkpoint) -> Cell:
    """Return the one cell that a profile was asked for: one layer, 64 dims, int8."""
    pairs = ("a cat", "a dog", "rain"), ("the cat", "a car", "it rains")
    task = StsTask("sts", *pairs, scores=(4.0, 1.0, 5.0), sha256="")
    plan = Plan(
        (1,),
        (64,),
        ("int8",),
        ("float32",),
        ((1, 8),),
        device=Device(threads=1),
        repeats=3,
        align=("none",),
    )
    return profile_checkpoint(checkpoint, [task], TEXTS, plan).cell("1x64-int8-float32")


@pytest.fixture(scope="module")
def fp32(artifact) -> Path:
    """The first layer of the shipped checkpoint in fp32; its vectors are what the pairs score."""
    return artifact(None, 1, 64).path  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def own_pairs(fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs scored by the fp32 model itself: it has 100 points, and any change costs some."""
    vectors = runtime.load(fp32).encode(TEXTS)
    path = tmp_path_factory.mktemp("eval") / "pairs.tsv"
    path.write_text(
        "".join(
            f"{float(vectors[i] @ vectors[i + 1])}\t{TEXTS[i]}\t{TEXTS[i + 1]}\n"
            for i in range(len(TEXTS) - 1)
        ),
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def shipped(original) -> ir.Model:
    """The graph of that artifact; read only."""
    return original(None, 1, 64).graph  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def quantized(shipped: ir.Model) -> Callable[[str], ir.Model]:
    """From weights to that graph in them, quantized once; read only."""
    return cache(lambda weights: quantize(shipped, weights, TOKENS))


def vectors_of(model: ir.Model) -> np.ndarray:  # type: ignore[type-arg]
    return runner(model)(IDS, MASK)[0]


@pytest.mark.parametrize("weights", [w for w, needed in PRECISIONS.items() if needed.mixable])
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_exactly_the_kept_weights_stay_in_float32(shipped, quantized, weights, data) -> None:
    units = units_of(shipped.graph)
    kept = data.draw(st.sets(st.sampled_from([name for unit in units.values() for name in unit])))
    model = restore(quantized(weights), shipped, kept)
    left = coverage(model, weights).left
    assert {name for name in left if not name.endswith(".spikes")} == kept


@pytest.mark.parametrize("model_type", ["albert", "qwen3", "t5"])
def test_keeping_all_units_leaves_nothing_but_tables_quantized(small, original, model_type) -> None:
    exported = original(small(model_type), 2, 64).graph
    tables_alone = exported.clone()
    quantize_tables(tables_alone.graph)
    every = [name for unit in units_of(exported.graph).values() for name in unit]
    assert every
    found = vectors_of(restore(quantize(exported, "int8", TOKENS), exported, every))
    np.testing.assert_allclose(found, vectors_of(tables_alone), atol=1e-6)


def test_the_weights_that_share_an_input_are_one_unit(shipped) -> None:
    sizes = [len(weights) for weights in units_of(shipped.graph).values()]
    assert sizes == [3, 1, 1, 1]  # query, key and value; attention's output; feed-forward


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_limit_never_keeps_more(drops, one, other) -> None:
    """However unevenly quality falls; and what is returned was measured to fit."""
    asked: set[int] = set()

    def fewest_within(limit: float) -> float:
        def fits(count: int) -> bool:
            asked.add(count)
            return drops[count] <= limit

        found = fewest(fits, len(drops) - 1)
        assert found is None or (found in asked and drops[found] <= limit)
        return float("inf") if found is None else found

    assert fewest_within(max(one, other)) <= fewest_within(min(one, other))


def test_the_layers_that_stay_are_told_and_bundled(tmp_path, mixed) -> None:
    found = mixed("int8-dynamic", 0.1)
    units, spec = found["mixture"]["units"], found["spec"]
    kept = [name for unit in units if unit["kept"] for name in unit["weights"]]
    assert 0 < len(kept_units(found)) < len(units)
    assert sorted(spec["left_in_float32"]) == sorted(kept)
    assert spec["coverage"] < 0.9  # and yet not refused: these were decided
    turns = [unit["sensitivity"] for unit in units]
    assert turns == sorted(turns, reverse=True)
    assert [unit["kept"] for unit in units] == sorted((u["kept"] for u in units), reverse=True)
    assert found["mixture"]["result"]["fp32"] == pytest.approx(100)
    assert found["mixture"]["result"]["mixed"] >= 100 - 0.1
    assert m2d("bundle", found["path"], "--out", tmp_path / "a.m2d").exit_code == 0
    verified = m2d("verify", tmp_path / "a.m2d")
    assert verified.exit_code == 0, verified.output


def test_int8_that_misses_its_floor_is_mixed_until_it_does_not(
    tmp_path, monkeypatch, original, artifact, fp32, shallow
) -> None:
    """Alike wherever int8 is made: from the checkpoint, from an artifact, and in a profile."""
    int8 = Recipe(weights="int8", calibration=TEXTS)
    plain = artifact(None, 1, 64, int8)
    assert plain.mixture is None
    # No test checkpoint that int8 is hard for: a floor between it and its embedding tables.
    monkeypatch.setattr(mixed_precision, "FLOOR", Fidelity(0.9998, 0.99))
    built = make_artifact(original(None, 1, 64), tmp_path / "built", int8)
    assert built.mixture is not None
    gap = built.mixture.result
    assert gap.quantized.mean < 0.9998 <= gap.mixed.mean
    assert 0 < len(built.mixture.kept) < len(units_of(original(None, 1, 64).graph.graph))
    assert built.spec.space_id != plain.spec.space_id
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    options = "--vectors", "float32", "--calibration", tmp_path / "texts.txt"
    result = m2d("quantize", fp32, *options, "--out", tmp_path / "quantized")
    assert result.exit_code == 0, result.output
    assert "mixed; at least 0.99980 / 0.99000 is required" in " ".join(result.output.split())
    made = [(folder / "model.onnx").read_bytes() for folder in (built.path, tmp_path / "quantized")]
    assert made[0] == made[1]
    cell = profiled_int8(shallow)
    assert "mixed_precision" in cell.flags
    size = built.path / "model.onnx", built.path / "tokenizer.json"
    assert cell.size_bytes == pytest.approx(sum(path.stat().st_size for path in size), rel=1e-3)


def test_units_that_are_tried_side_by_side_are_those_that_stay(
    tmp_path, monkeypatch, original, own_pairs
) -> None:
    """One after the other or many at once: the same vectors decide, and the bytes are the same."""
    monkeypatch.setattr(mixed_precision, "FLOOR", Fidelity(0.9998, 0.99))
    limit = QualityLimit(0.1, (load_task(own_pairs),))
    int8 = Recipe(weights="int8", calibration=TEXTS)
    dynamic = replace(int8, weights="int8-dynamic", limit=limit, allow_batch_dependent=True)
    for recipe in (int8, dynamic):
        made = []
        for cores in (1, 3):
            for module in (mixed_precision, cores_of_process):
                monkeypatch.setattr(module, "usable_cores", lambda cores=cores: cores)
            out = tmp_path / f"{recipe.weights}-{cores}"
            made.append(make_artifact(original(None, 1, 64), out, recipe))
        one, many = made
        assert one.mixture is not None
        assert one.mixture == many.mixture
        assert one.mixture.kept
        for file in one.path.iterdir():
            assert file.read_bytes() == (many.path / file.name).read_bytes()


def test_a_floor_that_the_embedding_tables_miss_is_an_error(tmp_path, monkeypatch, fp32) -> None:
    monkeypatch.setattr(mixed_precision, "FLOOR", Fidelity(1.0, 1.0))
    result = m2d("quantize", fp32, "--weights", "int8", "--out", tmp_path / "a")
    assert result.exit_code == 1
    assert "when nothing but the embedding tables is quantized" in " ".join(result.output.split())
    assert not (tmp_path / "a").exists()


def test_a_floor_that_a_model_without_large_matrices_misses_is_an_error(
    tmp_path, monkeypatch, original
) -> None:
    monkeypatch.setattr(mixed_precision, "FLOOR", Fidelity(1.0, 1.0))
    tiny = original(tiny_checkpoint(tmp_path / "tiny"), 1, 32)
    with pytest.raises(M2DError, match="when nothing but the embedding tables is quantized"):
        make_artifact(tiny, tmp_path / "a", Recipe(weights="int8"))


def test_a_limit_that_int8_keeps_gives_plain_int8(tmp_path, mixed, fp32) -> None:
    found = mixed("int8-weight-only", 50)
    assert kept_units(found) == []
    plain = quantize_artifact(fp32, tmp_path / "b", Recipe(weights="int8-weight-only"))
    assert plain.spec.space_id == found["spec"]["space_id"]
    for name in ("model.onnx", "artifact.json"):
        assert (Path(found["path"]) / name).read_bytes() == (plain.path / name).read_bytes()


def test_what_stays_decides_the_space_however_it_was_made(tmp_path, own_pairs, mixed) -> None:
    strict, loose = (mixed("int8-dynamic", limit) for limit in (0.1, 50))
    assert set(kept_units(loose)) < set(kept_units(strict))
    assert strict["spec"]["space_id"] != loose["spec"]["space_id"]
    limit = ("--weights", "int8-dynamic", "--max-drop", 0.1, "--eval", own_pairs)
    result = m2d("build", *DEPTH, *limit, *MIXED, "--out", tmp_path / "b")
    assert result.exit_code == 0, result.output
    assert strict["spec"]["space_id"] == read_spec(tmp_path / "b").space_id
    table = [line.split() for line in result.stdout.splitlines()]
    assert [row[-1] for row in table[3:-2]] == [
        "float32" if unit["kept"] else "int8-dynamic" for unit in strict["mixture"]["units"]
    ]
    assert "--max-drop 0.1 allows 99.90" in result.stdout


def test_tables_that_cost_too_much_are_an_error_that_says_how_much(
    tmp_path, own_pairs, fp32
) -> None:
    limit = ("--weights", "int4-weight-only", "--max-drop", 0, "--eval", own_pairs)
    result = m2d("quantize", fp32, *limit, "--out", tmp_path / "a")
    assert result.exit_code == 1
    assert "points when nothing but the embedding tables is quantized" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--weights", "int8", "--max-drop", "-1"), "--max-drop -1 is not a number of points"),
        (("--weights", "int8", "--max-drop", "nan"), "--max-drop nan is not a number of points"),
        (("--weights", "fp16", "--max-drop", "1"), "--max-drop goes with --weights int8, "),
        (("--weights", "int8", "--eval", "pairs.tsv"), "--eval goes with --max-drop"),
    ],
)
def test_a_limit_that_means_nothing_is_a_usage_error(tmp_path, fp32, options, told) -> None:
    for command in (("build", *DEPTH), ("quantize", fp32)):
        result = m2d(*command, *options, "--out", tmp_path / "a")
        assert result.exit_code == 2, result.output
        assert told in result.stderr
