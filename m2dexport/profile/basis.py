"""What all passes of a sweep work on: made when the first of them is to be measured, if any is."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from m2dexport.align.static import TokenTable
from m2dexport.align.texts import prompted, prompts_of, sha256_of_texts
from m2dexport.build.source import Source, export_sources, tool_versions
from m2dexport.checkpoint.open import Checkpoint
from m2dexport.data import texts_sha256
from m2dexport.files import scratch_folder, sha256_of
from m2dexport.precisions import Align
from m2dexport.processor import read_processor
from m2dexport.profile.crossing import read_index
from m2dexport.profile.found import INDEX, RANKINGS, read_rankings
from m2dexport.profile.grid import Pass, index_pass
from m2dexport.profile.identity import model_sha256, plans_as_json
from m2dexport.profile.maps import NO_MAPS, Maps, fit_maps, read_maps, write_maps
from m2dexport.profile.parts import STORE, Parts, unpack
from m2dexport.profile.passes import Basis, Beside, measure_pass
from m2dexport.profile.plan import Plan
from m2dexport.profile.surface import corpus_of, in_batches, loaded_runner
from m2dexport.progress import OnProgress, one_step
from m2dexport.slice.slicing import slice_checkpoint
from m2dexport.slice.write import UntrainedWarning
from m2dexport.strict import sha256_of_json
from m2dexport.vectors.tasks import Task

#: What of a checkpoint's folder, besides its weights, decides a vector.
_DECIDING = (".json", ".txt", ".model", ".py")
#: Packages, besides an artifact's, whose version decides what is measured.
_ALSO_DECIDING = ("numpy", "onnx-ir", "scipy", "tokenizers")
_PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Sweep:
    """What is to be measured."""

    checkpoint: Checkpoint
    tasks: tuple[Task, ...]
    calibration: Sequence[str]  # texts that freeze ranges
    align_texts: Iterable[str]  # texts that maps are fitted on
    plans: tuple[Plan, ...]
    passes: tuple[Pass, ...]  # of one shard
    wanted: frozenset[str]  # ids of the cells of all shards
    on_progress: OnProgress

    @property
    def prompt(self) -> str:
        """The text that goes before every text when no prompt is named."""
        name = self.checkpoint.default_prompt
        return self.checkpoint.prompts[name] if name else ""

    @cached_property
    def aligned(self) -> tuple[int, ...]:
        """The depths that have a map."""
        full = self.checkpoint.layers
        return tuple(sorted({n for plan in self.plans for n in plan.aligned(full)}))

    @cached_property
    def dims(self) -> tuple[int, ...]:
        """The dims of all plans."""
        return tuple(sorted({dim for plan in self.plans for dim in plan.dims}))

    @cached_property
    def tools(self) -> dict[str, str]:
        """The versions of what measures, by name."""
        return {n: v for plan in self.plans for n, v in tool_versions(plan.engine).items()}

    @cached_property
    def align_sha256(self) -> str:
        """A hash of the texts that maps are fitted on, which are read once for it."""
        return sha256_of_texts(self.align_texts)

    @cached_property
    def model_sha256(self) -> str:
        """A hash of all of the checkpoint that decides a vector."""
        return model_sha256(self.checkpoint)

    def decides(self) -> dict[str, Any]:
        """Return what decides all that is measured, as JSON."""
        checkpoint = self.checkpoint
        files = sorted(_deciding_files(checkpoint.path))
        tools = {name: version(name) for name in _ALSO_DECIDING}
        return {
            "weights": checkpoint.weights_sha256,
            "files": [(p.relative_to(checkpoint.path).as_posix(), sha256_of(p)) for p in files],
            "checkpoint": repr((checkpoint.pooling, checkpoint.prompts, checkpoint.max_length)),
            **self._data,
            "also": tools,
            "code": [sha256_of(path) for path in sorted(_PACKAGE.rglob("*.py"))],
            "processor": astuple(read_processor()),
        }

    def decided_by(self) -> str:
        """Return a hash of what decides the figures of all shards, apart from the machine.

        The checkpoint counts by content: what else lies in its folder, such as the profile of
        another shard, does not.
        """
        decides = {
            "model": self.model_sha256,
            "trained": self.checkpoint.trained,  # which decides flags
            **self._data,
            "plans": plans_as_json(self.plans),
        }
        return sha256_of_json(decides)

    @cached_property
    def _data(self) -> dict[str, Any]:
        """The texts and tools, as JSON."""
        return {
            "tasks": [(task.name, task.sha256) for task in self.tasks],
            "calibration": texts_sha256(self.calibration),
            "align_texts": self.align_sha256 if self.aligned else None,
            "tools": self.tools,
        }


def _deciding_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a checkpoint that decide a vector, but not profiles that lie in it."""
    for path in folder.rglob("*"):
        beside = [each for each in path.parents if folder in each.parents]
        ours = any((each / STORE).exists() or (each / "profile.json").exists() for each in beside)
        if path.suffix in _DECIDING and not ours:
            yield path


@dataclass(frozen=True)
class Work:
    """A sweep and its parts: each step is measured unless it was before."""

    sweep: Sweep
    parts: Parts

    @cached_property
    def sources(self) -> dict[str, Source]:
        """The exported checkpoint, by engine."""
        sweep = self.sweep
        depths = {n for each in sweep.passes for n in each.plan.depths}
        depths |= {sweep.checkpoint.layers, *sweep.aligned} - {0}
        with one_step(sweep.on_progress, "export"), warnings.catch_warnings():
            # The profile flags every untrained cell; this one slice stands for all of them.
            warnings.simplefilter("ignore", UntrainedWarning)
            engines = tuple(dict.fromkeys(each.plan.engine for each in sweep.passes))
            return export_sources(sweep.checkpoint, sorted(depths), sweep.checkpoint.dim, engines)

    @cached_property
    def maps(self) -> Maps:
        """The maps of all depths and dims, fitted on the first engine."""
        return read_maps(self.maps_folder()) if self.sweep.aligned else NO_MAPS

    def maps_folder(self) -> Path:
        """Return the folder of the maps, which are fitted unless they were before."""
        return self.parts.files("maps", self._of_maps(), self._fit)

    def keep_maps(self, fit: Callable[[], Mapping[str, bytes]]) -> None:
        """Keep the files of the maps that were fitted elsewhere, unless they are there."""
        self.parts.files("maps", self._of_maps(), lambda folder: unpack(fit(), folder))

    def _of_maps(self) -> list[Any]:
        """Return what decides the maps."""
        return [self.sweep.aligned, self.sweep.dims, _settings(self.sweep.plans[0])]

    @cached_property
    def basis(self) -> Basis:
        """What a pass is measured with."""
        source = next(iter(self.sources.values()))
        corpus = corpus_of(source, self.sweep.tasks, self.sweep.calibration)
        return Basis(self.sources, corpus, self.maps)

    def folder_of(self, one: Pass) -> Path:
        """Return the folder of a pass; whether it was measured is whether that exists."""
        return self.parts.path("quality", self._inputs(one))

    def measured(self, one: Pass) -> Path:
        """Return the folder of a pass, which is measured unless it was before."""
        return self.parts.files("quality", self._inputs(one), lambda path: self._measure(one, path))

    def keep(self, one: Pass, measure: Callable[[], Mapping[str, bytes]]) -> None:
        """Keep the files of a pass that was measured elsewhere, unless they are there."""
        inputs = self._inputs(one)
        self.parts.files("quality", inputs, lambda folder: unpack(measure(), folder))

    def needed_by(self, one: Pass) -> list[Path]:
        """Return the folders that a pass needs, of those that are there."""
        others = (self._first(one), index_pass(one, self.sweep.passes))
        found = {self.folder_of(each) for each in others if each is not None}
        if self.sweep.aligned:
            found.add(self.parts.path("maps", self._of_maps()))
        return sorted(found)

    def _measure(self, one: Pass, folder: Path) -> None:
        sweep, leading, first = self.sweep, index_pass(one, self.sweep.passes), self._first(one)
        kept = None if leading is None else self.measured(leading) / INDEX
        index = read_index(kept) if kept is not None and kept.is_dir() else None
        rankings = None if first is None else read_rankings(self.measured(first) / RANKINGS)
        basis, beside = self.basis, Beside(sweep.wanted, index, rankings)
        with _few_to_collect():
            measure_pass(basis, one, beside, folder, sweep.on_progress)

    def _first(self, one: Pass) -> Pass | None:
        """Return the pass of the reference; None: it is this one."""
        first = self.sweep.passes[0]
        return None if one == first else first

    def _inputs(self, one: Pass) -> list[Any]:
        """Return what decides a pass."""
        plan = one.plan
        others = [each for each in (self._first(one), index_pass(one, self.sweep.passes)) if each]
        grid = [plan.layers, plan.dims, plan.vectors, plan.align, plan.compared_with]
        own = [one.weights, *grid, sorted(one.wanted), one.leads, one.crosses, _settings(plan)]
        return [
            own,
            self._of_maps(),
            sorted(self.sweep.wanted),
            [self._inputs(each) for each in others],
        ]

    def _fit(self, folder: Path) -> None:
        """Fit the maps, and count how rare each token is, where depth 0 is measured."""
        sweep = self.sweep
        checkpoint, plan = sweep.checkpoint, sweep.plans[0]
        table = None
        with scratch_folder() as scratch:
            if 0 in sweep.aligned:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UntrainedWarning)
                    shallow = slice_checkpoint(checkpoint, 1, checkpoint.dim, scratch / "tokens")
                texts = prompted(sweep.align_texts, prompts_of(checkpoint))
                table = TokenTable(shallow, texts)
            source = self.sources[plan.engine]
            grid = replace(plan, layers=sweep.aligned, dims=sweep.dims, align=_BOTH)
            grid = in_batches(grid, source, checkpoint.max_length)
            run = loaded_runner(source.graph, grid)
            maps = fit_maps(
                source, run, table, sweep.align_texts, sweep.calibration, grid, sweep.on_progress
            )
        write_maps(maps, folder)


@contextmanager
def _few_to_collect() -> Iterator[None]:
    """Keep the garbage collector from what is there: half a second each time, and never garbage.

    What torch and the exported graphs consist of outlives a pass.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


_BOTH: tuple[Align, ...] = ("none", "full")


def _settings(plan: Plan) -> list[Any]:
    """Return what of a plan decides a vector, apart from the grid."""
    device = plan.device
    return [plan.engine, device.provider, device.threads, plan.isa, repr(plan.compilation)]
