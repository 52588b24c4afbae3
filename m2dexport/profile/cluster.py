"""A sweep on a Ray cluster: passes on any node, what graphs cost on nodes of the target's kind.

A task gets what it needs as bytes, but for the checkpoint, whose folder must be readable on every
node, and gives back the files of one part, which the driver keeps. So a sweep goes on here, too.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from m2dexport.errors import M2DError, MissingExtra, UsageError, one_line
from m2dexport.files import scratch_folder, sha256_of
from m2dexport.measure.latency import Candidate
from m2dexport.measure.machine import Machine, read_machine
from m2dexport.profile.basis import Sweep, Work
from m2dexport.profile.costs import Costs, Sample, Texts, measure_costs
from m2dexport.profile.found import INDEX, RANKINGS
from m2dexport.profile.grid import Graph, Pass
from m2dexport.profile.parts import Parts, Remember, passing_parts, unpack
from m2dexport.profile.plan import Plan
from m2dexport.progress import OnProgress
from m2dexport.strict import sha256_of_json

_Files = dict[str, bytes]  # by their path in a folder
#: The custom resource of nodes where the latency of a target may be measured.
RESOURCE = "m2dexport:{}"
_PATIENCE = 10  # seconds that a head node may take to accept a connection


@dataclass(frozen=True)
class Graphs:
    """What is to be measured of a target."""

    graphs: Mapping[Graph, Candidate]
    samples: Mapping[str, Sample]
    texts: Texts
    plan: Plan  # the target's first
    vocab_size: int

    def cost(self, remember: Remember, on_progress: OnProgress) -> Costs:
        """Measure what they cost on this machine, or take it from what is remembered."""
        what = self.graphs, self.samples, self.texts, self.plan, self.vocab_size
        return measure_costs(*what, remember, on_progress)


@contextmanager
def connected(address: str, targets: Sequence[str]) -> Iterator[None]:
    """Connect to an existing cluster that has a node for every target.

    Args:
        address: of its head, such as "auto" or "10.0.0.1:6379".
        targets: whose latency is to be measured.

    Raises:
        MissingExtra: when ray is not installed.
        M2DError: when there is no cluster.
        UsageError: when no node is of a target's kind.
    """
    ray = _ray()
    try:
        _require_listener(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        raise M2DError(
            f"there is no Ray cluster at {address}: {one_line(error).rstrip('.')}; start one, or "
            "name the address of its head."
        ) from error
    try:
        there = ray.cluster_resources()
        for target in targets:
            name = RESOURCE.format(target)
            if not there.get(name):
                raise UsageError(
                    f"no node of the cluster has the resource {name}, which says where the latency "
                    f"of {target} may be measured; start one by ray start --resources="
                    f"'{{\"{name}\": 1}}'."
                )
        yield
    finally:
        ray.shutdown()


def measure_passes(work: Work) -> None:
    """Measure the maps and the passes that are missing, those at once that wait for no other."""
    sweep = replace(work.sweep, on_progress=_silent)
    if sweep.aligned:
        work.keep_maps(lambda: _result(_remote(_maps, {}).remote(sweep, work.parts.decides)))
    first, *others = sweep.passes
    waves = [[first], [one for one in others if one.leads], [o for o in others if not o.leads]]
    for wave in waves:
        missing = [one for one in wave if not work.folder_of(one).exists()]
        tasks = {}
        for one in missing:
            options = {"num_cpus": one.plan.device.threads or 1}
            kept = {path.name: _needed(path) for path in work.needed_by(one)}
            tasks[one] = _remote(_pass, options).remote(sweep, work.parts.decides, kept, one)
        for one, task in tasks.items():
            work.keep(one, partial(_result, task))
            count = sum(work.folder_of(each).exists() for each in sweep.passes)
            work.sweep.on_progress("passes", count, len(sweep.passes))


def measure_graphs(asked: Graphs, parts: Parts) -> tuple[Costs, Machine]:
    """Measure what the graphs of a target cost, on a node of its kind.

    Returns:
        What they cost, and the machine that it was measured on.
    """
    plan = asked.plan
    files = [_hashes(each) for each in asked.graphs.values()]
    inputs = [plan.target, plan.shapes, plan.repeats, plan.optimize, repr(plan.device), files]

    def measure() -> Any:
        contents = {str(at): _contents(each) for at, each in enumerate(_candidates(asked))}
        task = _remote(_graphs, {"resources": {RESOURCE.format(plan.target): 1}})
        return _result(task.remote(asked, contents))

    stored = parts.remember("cluster", inputs, measure)
    known: Mapping[str, Any] = stored["parts"]
    costs = asked.cost(lambda step, inputs, _: known[_key(step, inputs)], _silent)
    machine = {**stored["machine"], "flags": tuple(stored["machine"]["flags"])}
    return costs, Machine(**machine)


def _maps(sweep: Sweep, decides: str) -> _Files:
    _require_checkpoint(sweep)
    with passing_parts() as parts:
        return _packed(Work(sweep, Parts(parts.folder, decides)).maps_folder())


def _pass(sweep: Sweep, decides: str, kept: Mapping[str, _Files], one: Pass) -> _Files:
    _require_checkpoint(sweep)
    with passing_parts() as parts:
        for name, files in kept.items():
            unpack(files, parts.folder / name)
        return _packed(Work(sweep, Parts(parts.folder, decides)).measured(one))


def _graphs(asked: Graphs, contents: Mapping[str, _Files]) -> dict[str, Any]:
    """Return the machine, and every part that was measured on it."""
    record: dict[str, Any] = {}

    def remember(step: str, inputs: Any, measure: Callable[[], Any]) -> Any:
        return record.setdefault(_key(step, inputs), measure())

    with scratch_folder() as scratch:
        here = []
        for at, candidate in enumerate(_candidates(asked)):
            unpack(contents[str(at)], scratch / str(at))
            paths = {name: scratch / str(at) / name for name in candidate.files}
            here.append(replace(candidate, files=paths))
        moved = dict(zip(asked.graphs, here, strict=False))
        samples = zip(asked.samples.items(), here[len(moved) :], strict=True)
        own = {name: replace(each, candidate=there) for (name, each), there in samples}
        replace(asked, graphs=moved, samples=own).cost(remember, _silent)
    return {"machine": asdict(read_machine()), "parts": record}


def _candidates(asked: Graphs) -> list[Candidate]:
    return [*asked.graphs.values(), *(each.candidate for each in asked.samples.values())]


def _contents(candidate: Candidate) -> _Files:
    return {name: path.read_bytes() for name, path in candidate.files.items()}


def _hashes(candidate: Candidate) -> dict[str, str]:
    return {name: sha256_of(path) for name, path in candidate.files.items()}


def _key(step: str, inputs: Any) -> str:
    """Return what a part is found by, whatever machine it was measured on."""
    return sha256_of_json([step, {name: inputs[name] for name in inputs if name != "machine"}])


def _needed(folder: Path) -> _Files:
    """Return what other passes need of a part: maps whole, of a pass its index and rankings."""
    files = _packed(folder)
    needed = {name: each for name, each in files.items() if name.startswith((INDEX, RANKINGS))}
    return needed or files


def _packed(folder: Path) -> _Files:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _require_listener(address: str) -> None:
    """Refuse an address that nothing listens at; ray would try again for minutes.

    Raises:
        OSError: with the reason.
    """
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), _PATIENCE).close()


def _require_checkpoint(sweep: Sweep) -> None:
    if not sweep.checkpoint.path.is_dir():
        raise UsageError(
            f"{sweep.checkpoint.path} is not there on a node of the cluster; put the checkpoint "
            "into a folder that every node reads under this name."
        )


def _remote(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    return _ray().remote(**options)(function) if options else _ray().remote(function)


def _result(task: Any) -> Any:
    """Return what a task returned, or raise what it raised."""
    ray = _ray()
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, M2DError):
            raise error.cause from error
        raise


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise MissingExtra("The option --ray", "ray", "ray") from error
    return ray


def _silent(_step: str, _done: int, _total: int) -> None:
    pass
