"""What the parts of a profile say of each other, checked: whoever reads it need not ask again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from m2dexport.errors import UsageError
from m2dexport.profile.intervals import Replicates
from m2dexport.profile.schema import Cell, Profile, TargetInfo
from m2dexport.profile.target import budget_of
from m2dexport.runtime.cells import cell_id
from m2dexport.strict import is_name, shown


def contradictions(profile: Profile) -> Iterator[str]:
    """Yield what in a profile contradicts the rest of it, as the end of a sentence each.

    Names are there once; every target has its reference and recommended cells, and timed them at
    its first shape; every cell has the main metric of every task; replicates are as many as the
    profile says, of figures that are there.
    """
    yield from _repeated("task", (task.name for task in profile.tasks))
    yield from _repeated("target", (target.name for target in profile.targets))
    cells: dict[str, dict[str, Cell]] = {target.name: {} for target in profile.targets}
    mains = profile.mains
    for cell in profile.cells:
        if cell.target not in cells:
            yield f"the cell {shown(cell.id)} is of the target {cell.target}, which is not there"
            continue
        if cell.id in cells[cell.target]:
            yield f"the cell {shown(cell.id)} of {cell.target} is there twice"
        cells[cell.target][cell.id] = cell
        yield from _of_cell(cell, mains, profile.replicates)
    for target in profile.targets:
        yield from _of_target(target, cells[target.name])
    metrics = {name for cell in profile.cells for name in cell.quality}
    yield from (f"{shown(name)} is no metric" for name in sorted(metrics) if not is_name(name))
    yield from _of_cross_depth(profile)


def _repeated(what: str, names: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield f"the {what} {name} is there twice"
        seen.add(name)


def _of_cell(cell: Cell, mains: Iterable[str], count: int) -> Iterator[str]:
    name = cell_id(
        *(cell.layers, cell.dim, cell.weights, cell.vectors), align=cell.align, engine=cell.engine
    )
    if cell.id != name:
        yield f"the cell {name} has the id {shown(cell.id)}"
    for metric in mains:
        if metric not in cell.quality:
            yield f"the cell {cell.id} of {cell.target} has no {metric}"
    yield from _of_replicates(cell, cell.replicates, cell.quality, count)
    for index, found in cell.query_replicates.items():
        yield from _of_replicates(cell, found, cell.as_query.get(index, {}), count)


def _of_replicates(
    cell: Cell, replicates: Mapping[str, Replicates], points: Mapping[str, float], count: int
) -> Iterator[str]:
    for metric, found in replicates.items():
        if metric not in points:
            yield f"the cell {cell.id} has replicates of {shown(metric)} without the figure"
        elif found.count != count:
            yield f"the cell {cell.id} has {found.count} replicates of {metric}, not {count}"


def _of_target(target: TargetInfo, cells: Mapping[str, Cell]) -> Iterator[str]:
    told, first = target.recommended, target.shapes[0]
    named = (target.reference, told.best, told.balanced, told.smallest, told.within_budget)
    for name in named:
        if name is not None and name not in cells:
            yield f"the target {target.name} names the cell {shown(name)}, which is not there"
    if not any(cell.engine == target.engines[0] for cell in cells.values()):
        yield f"the target {target.name} has no cell of its engine {target.engines[0]}"
    for cell in cells.values():
        timed = cell.latency[0]
        if (timed.batch, timed.sequence) != (first.batch, first.sequence):
            yield (
                f"the cell {cell.id} was first timed at {timed.batch}x{timed.sequence} tokens, and "
                f"its target {target.name} at {first.batch}x{first.sequence}"
            )
    try:
        budget_of(target.budget)
    except (UsageError, ValueError) as error:
        yield f"the budget of the target {target.name} is none: {str(error).rstrip('.')}"


def _of_cross_depth(profile: Profile) -> Iterator[str]:
    mains = profile.query_mains
    if profile.cross_depth and not mains:
        yield "it has queries of depths, and no retrieval"
    for each in profile.cross_depth:
        for metric in mains:
            if metric not in each.quality:
                yield f"queries of depth {each.queries} have no {metric}"
