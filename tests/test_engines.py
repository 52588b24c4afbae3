"""The contract of an engine: what every row of the table must do, tested on all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tiny import TEXTS, tiny_checkpoint
from tiny_artifact import relisted, tiny_graph

from m2dexport.align.texts import align_texts
from m2dexport.build.aligned import build_aligned
from m2dexport.build.build import Artifact, build_artifact
from m2dexport.build.parity import PROBES
from m2dexport.build.recipe import Recipe
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.engines import (
    ENGINES,
    Device,
    engine_maker,
    engine_runner,
    engine_version,
    here,
    require_version,
)
from m2dexport.errors import M2DError, MissingExtra, UsageError
from m2dexport.graph.static import static_graph
from m2dexport.graph.vector import vector_graph
from m2dexport.precisions import ISAS, WEIGHT_PRECISIONS
from m2dexport.profile.plan import Plan, require_plan
from m2dexport.profile.target import load_target
from m2dexport.runtime import load
from m2dexport.runtime.bundle import verify_bundle, write_bundle

ROOT = Path(__file__).parent.parent
IDS = np.array([[2, 7, 9, 3], [2, 8, 3, 0]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])

#: Those whose package is here; that of the data-centre TensorRT comes from no registry.
INSTALLED = [name for name, engine in ENGINES.items() if find_spec(engine.package)]

pytestmark = pytest.mark.parametrize("engine", INSTALLED)


def device(engine: str, threads: int = 1) -> Device:
    """Return what the engine's graphs are checked on here: the oracle, where there is no GPU."""
    return here(engine, Device(threads=threads)).device


def graph(engine: str) -> ir.Model:
    if ENGINES[engine].format == "table":
        rows = np.random.default_rng(0).standard_normal((10, 12)).astype(np.float32)
        return vector_graph(static_graph(rows), 12)
    return ir.from_proto(onnx.load_from_string(tiny_graph(12, "float32", None)))


@pytest.fixture(scope="module")
def artifacts(
    tmp_path_factory: pytest.TempPathFactory, few_texts: Path
) -> Callable[[str], Artifact]:
    """From an engine to an artifact of 20 dims, at depth 0 where it runs no other; read only."""
    folder = tmp_path_factory.mktemp("engines")
    checkpoint = open_checkpoint(tiny_checkpoint(folder / "bert"))

    @cache
    def made(name: str) -> Artifact:
        recipe = Recipe(name, Device(threads=1), align_texts=align_texts(few_texts))
        if ENGINES[name].format == "table":
            return build_aligned(checkpoint, 0, 20, folder / name, recipe)
        return build_artifact(checkpoint, 2, 20, folder / name, recipe)

    return made


def test_both_modules_have_the_functions_of_the_seam(engine: str) -> None:
    runner, maker = engine_runner(engine), engine_maker(engine)
    for module, names in (
        (runner, ("devices", "require_device", "load", "run", "describe")),
        (maker, ("fuse", "quantize", "files")),
    ):
        for name in names:
            assert callable(getattr(module, name))
            assert getattr(module, name).__doc__


def test_every_precision_states_what_it_requires(engine: str) -> None:
    precisions = engine_maker(engine).PRECISIONS
    assert precisions.keys() <= set(WEIGHT_PRECISIONS)
    assert [name for name, needed in precisions.items() if needed.floor is None] == ["fp32"]
    for needed in precisions.values():
        require_version(engine, needed.oldest)
        assert set(needed.isas) <= set(ISAS)


def test_files_are_those_of_the_table_and_the_same_every_time(engine: str) -> None:
    first, second = (engine_maker(engine).files(graph(engine)) for _ in range(2))
    assert tuple(first) == ENGINES[engine].files
    assert first == second


def test_an_engine_takes_the_providers_that_it_offers_and_no_other(engine: str) -> None:
    runner = engine_runner(engine)
    assert runner.devices()
    for provider in runner.devices():
        assert runner.require_device(Device(provider)) == provider
    with pytest.raises(UsageError, match="ABACUS"):
        runner.require_device(Device("ABACUS"))


def test_a_graph_runs_from_files_as_from_their_content(engine: str, tmp_path: Path) -> None:
    runner, contents = engine_runner(engine), engine_maker(engine).files(graph(engine))
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    loaded = [
        runner.load(given, device(engine), "portable")
        for given in (contents, {name: tmp_path / name for name in contents})
    ]
    (first,), (second,) = (runner.run(session, IDS, MASK) for session in loaded)
    np.testing.assert_array_equal(first, second)
    assert first.shape == (2, 12) and first.dtype == np.float32
    facts = runner.describe(loaded[0])
    if device(engine).provider == ENGINES[engine].oracle and ENGINES[engine].oracle:
        assert facts == {"engine": f"onnxruntime {engine_version('onnx')[1]}", "provider": "CPU"}
    elif not ENGINES[engine].on_gpu:
        assert facts["provider"] == ENGINES[engine].provider
        assert facts["engine"].split() == list(engine_version(engine))


def test_an_artifact_gives_the_vectors_of_the_torch_original(artifacts, engine: str) -> None:
    spec = artifacts(engine).spec
    assert spec.engine == engine
    assert spec.parity["max_difference"] <= 1e-4


def test_a_text_has_one_vector_alone_in_a_batch_and_in_any_settings(artifacts, engine: str) -> None:
    here = device(engine)
    settings = (
        replace(here, threads=1),
        replace(here, threads=2, spin_us=0),
        replace(here, threads=2, spin_us=500),
        replace(here, threads=1, workers=2),
    )
    encoders = [load(artifacts(engine).path, device) for device in settings]
    expected = np.concatenate([encoders[0].encode([text]) for text in (*TEXTS, *PROBES)])
    for encoder in encoders:
        for size in (4, 32):
            found = encoder.encode([*TEXTS, *PROBES], batch_size=size)
            np.testing.assert_allclose(found, expected, atol=2e-6)


def test_workers_below_one_are_refused(artifacts, engine: str) -> None:
    with pytest.raises(UsageError, match="0 workers cannot run anything; ask for 1 or more"):
        load(artifacts(engine).path, replace(device(engine), workers=0))


def test_the_device_travels_from_the_recipe_to_the_bundle(artifacts, engine: str, tmp_path) -> None:
    bundle = write_bundle(artifacts(engine).path, tmp_path / "edge.m2d").path
    for path in (artifacts(engine).path, bundle):
        assert load(path, device(engine)).spec.device == Device(threads=1)
    verify_bundle(bundle, device(engine, 2))
    with pytest.raises(UsageError, match="ABACUS"):
        load(bundle, Device("ABACUS"))
    with pytest.raises(UsageError, match="ABACUS"):
        verify_bundle(bundle, Device("ABACUS"))


def test_an_artifact_made_for_another_device_does_not_run_on_the_cpu_unasked(
    artifacts, engine: str, tmp_path: Path
) -> None:
    folder = copytree(artifacts(engine).path, tmp_path / "artifact")
    spec = replace(artifacts(engine).spec, device=Device("ABACUS"))
    (folder / "artifact.json").write_text(spec.to_json())
    relisted(folder)
    with pytest.raises(UsageError, match="ABACUS"):
        load(folder)
    here = device(engine).provider or ENGINES[engine].provider
    assert load(folder, Device(here)).encode(["a"]).shape == (1, 20)


def test_a_provider_that_is_not_there_is_refused_before_a_build(engine: str, tmp_path) -> None:
    recipe = Recipe(engine, Device("ABACUS"))
    with pytest.raises(UsageError, match="ABACUS"):
        build_artifact(open_checkpoint(), 1, 32, tmp_path / "a", recipe)
    with pytest.raises(UsageError, match="ABACUS"):
        require_plan(open_checkpoint(), Plan((1,), (32,), engine=engine, device=recipe.device), ())
    with pytest.raises(UsageError, match="ABACUS"):
        engine_runner(engine).load(
            engine_maker(engine).files(graph(engine)), Device("ABACUS"), "portable"
        )


def test_a_missing_package_is_one_sentence_with_the_install_line(engine: str, monkeypatch) -> None:
    package, folder = ENGINES[engine].package, ENGINES[engine].folder
    for part in ("run", "make"):
        monkeypatch.delitem(sys.modules, f"m2dexport.engines.{folder}.{part}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"needs the {package} package; run: pip install"):
        engine_runner(engine)


def test_a_damaged_graph_is_one_sentence(engine: str) -> None:
    files = dict.fromkeys(ENGINES[engine].files, b"no graph")
    with pytest.raises(M2DError) as caught:
        engine_runner(engine).load(files, device(engine), "portable")
    assert "\n" not in str(caught.value)


def test_a_version_that_is_too_old_is_named_with_the_one_that_is_needed(engine: str) -> None:
    package = ENGINES[engine].package
    with pytest.raises(M2DError, match=rf"needs {package} 9999\.1 or newer"):
        require_version(engine, "9999.1")


def test_every_target_that_ships_names_an_engine_of_the_table(engine: str) -> None:
    names = sorted(path.stem for path in (ROOT / "profiles").glob("*.toml"))
    targets = {name: load_target(name).engine for name in names}
    assert set(targets.values()) <= set(ENGINES)
    assert engine in targets.values() or ENGINES[engine].format == "table"  # of depth 0, on any
