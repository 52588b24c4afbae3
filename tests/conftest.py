"""Tests run offline, quietly, and write to temporary folders only."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

# Before transformers is imported: it reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Before onnxruntime is: it would write to the home folder and look a name up.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# Before numpy is: the suite runs as many processes as there are cores.
os.environ["OMP_NUM_THREADS"] = "1"

import onnx_ir as ir
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))

from export_once import exporting_once
from nested_bundle import folders, packed  # noqa: F401 - fixtures of the tests of nested bundles
from tiny import small_checkpoint, tiny_checkpoint

from m2dexport.build.build import Artifact, make_artifact
from m2dexport.build.recipe import Recipe
from m2dexport.build.source import Original, export_source, original_of
from m2dexport.checkpoint.open import Checkpoint, open_checkpoint
from m2dexport.data import align_texts_path
from m2dexport.graph import export
from m2dexport.measure.footprint import Footprint
from m2dexport.profile import costs
from m2dexport.slice.slicing import slice_checkpoint

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny models: threads cost more than they give

#: Files that take longest. Begun last, one of them would keep a worker while another has no work.
LONG = (
    *("documents", "families", "sweep", "openvino", "static", "index", "precisions", "resume"),
    *("cluster", "deploy", "mixed", "align", "cli", "install", "reproducible", "tools", "widths"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest; skip what needs a GPU where there is none."""
    first = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: first.get(item.path.name, len(LONG)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available() and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def _has_gpu() -> bool:
    """Say whether CUDA finds a GPU; the CPU build of torch does not look."""
    try:
        from cuda.bindings import runtime
    except ModuleNotFoundError:
        return False
    status, count = runtime.cudaGetDeviceCount()
    return int(status) == 0 and count > 0


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep converted and merged checkpoints out of the user's cache."""
    monkeypatch.setenv("M2DEXPORT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session", autouse=True)
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Export each graph once for the tests of all workers, which share a folder for it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    exports = folder / "exports"
    exports.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m2dexport.graph.export.graph_from_checkpoint", exporting_once(exports))
        yield


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with mean pooling, normalised, with prompts; read only."""
    folder = tmp_path_factory.mktemp("bert")
    return tiny_checkpoint(folder, prompts={"query": "find: ", "document": ""})


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal decoder with last-token pooling and left padding; read only."""
    return tiny_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3", pooling="lasttoken")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """From a family to a checkpoint of 2 layers wide enough to be quantized, made once."""
    return cache(lambda family: small_checkpoint(tmp_path_factory.mktemp(family) / "m", family))


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The first two layers of the checkpoint that ships: quick, and its vectors are real."""
    return slice_checkpoint(open_checkpoint(), 2, 384, tmp_path_factory.mktemp("shallow") / "m")


@pytest.fixture(scope="module")
def unmeasured_memory() -> Iterator[None]:
    """Profile without the memory of graphs, for which each runs in a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            costs, "measure_footprint", lambda *_: Footprint(20_000_000, 30_000_000, 3.0, 4.0)
        )
        yield


@pytest.fixture(scope="session")
def few_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 315 texts to align tiny checkpoints on, which is quick; read only."""
    path = tmp_path_factory.mktemp("texts") / "few.txt"
    lines = align_texts_path().read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[::6]) + "\n", encoding="utf-8")
    return path


# What is made of an export is made once for all tests of a process. All of it is read only: clone a
# graph before you change it.


@pytest.fixture(scope="session")
def all_depths() -> Callable[[Path], ir.Model]:
    """From a checkpoint's folder to its graph of all depths, in standard operators."""
    return cache(lambda folder: export.graph_from_checkpoint(open_checkpoint(folder)))


@pytest.fixture(scope="session")
def original() -> Callable[..., Original]:
    """From folder (None: the checkpoint that ships), layers, dim and engine to what is exported."""

    @cache
    def exported(folder: Path | None, layers: int, dim: int, engine: str) -> Original:
        checkpoint = open_checkpoint(folder)
        trained = None if checkpoint.trained is None else (layers, dim) in checkpoint.trained
        source = export_source(checkpoint, (layers,), dim, engine)
        return original_of(source, checkpoint.licenses, trained)

    return lambda folder, layers, dim, engine="onnx": exported(folder, layers, dim, engine)


@pytest.fixture(scope="session")
def artifact(
    original: Callable[..., Original], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Artifact]:
    """From folder (None: the checkpoint that ships), layers, dim and recipe to an artifact."""

    @cache
    def made(folder: Path | None, layers: int, dim: int, recipe: Recipe = Recipe()) -> Artifact:
        exported = original(folder, layers, dim, recipe.engine)
        return make_artifact(exported, tmp_path_factory.mktemp("artifact") / "a", recipe)

    return made
