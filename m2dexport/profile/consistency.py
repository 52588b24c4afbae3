"""What the parts of a profile say of each other, checked: whoever reads it need not ask again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean

from m2dexport.errors import UsageError
from m2dexport.profile.intervals import Replicates, score_from
from m2dexport.profile.schema import Cell, Profile, TargetInfo
from m2dexport.profile.target import budget_of
from m2dexport.runtime.cells import cell_id
from m2dexport.strict import is_name, shown
from m2dexport.vectors.codecs import bytes_per_vector
from m2dexport.vectors.resample import intervals, mean_of

_ROUNDED = 1e-5  # of a figure: twice what is lost where six digits are kept


def contradictions(profile: Profile) -> Iterator[str]:
    """Yield what in a profile contradicts the rest of it, as the end of a sentence each.

    Names are there once; every target has its reference and recommended cells, and timed them at
    its first shape; every cell has the main metric of every task, and their mean; replicates are as
    many as the profile says, of figures that are there; intervals hold their figures, and are what
    the replicates say; latency and bytes per vector are those of the first shape and of the codec.
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
        yield from _of_costs(cell)
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


def _of_cell(cell: Cell, mains: Sequence[str], count: int) -> Iterator[str]:
    name = cell_id(
        *(cell.layers, cell.dim, cell.weights, cell.vectors), align=cell.align, engine=cell.engine
    )
    if cell.id != name:
        yield f"the cell {name} has the id {shown(cell.id)}"
    for metric in mains:
        if metric not in cell.quality:
            yield f"the cell {cell.id} of {cell.target} has no {metric}"
            return
    yield from _of_replicates(cell, cell.replicates, cell.quality, count)
    for index, found in cell.query_replicates.items():
        yield from _of_replicates(cell, found, cell.as_query.get(index, {}), count)
    mean = fmean(cell.quality[metric] for metric in mains)
    if abs(cell.mean_quality - mean) > _rounding(cell.quality[metric] for metric in mains):
        yield (
            f"the cell {cell.id} has a mean of {cell.mean_quality:g} points, where that of its "
            f"tasks is {mean:g}"
        )
    yield from _of_intervals(cell, mains)


def _of_costs(cell: Cell) -> Iterator[str]:
    first = cell.latency[0]
    if (cell.p50_ms, cell.p95_ms, cell.p99_ms) != (first.p50_ms, first.p95_ms, first.p99_ms):
        yield f"the latency of the cell {cell.id} is not that of its first shape"
    size = bytes_per_vector(cell.dim, cell.vectors)
    if cell.bytes_per_vector != size:
        yield f"the cell {cell.id} has {cell.bytes_per_vector} bytes per vector, not {size}"


def _of_intervals(cell: Cell, mains: Sequence[str]) -> Iterator[str]:
    intervals = {
        "mean": (cell.mean_quality, cell.mean_interval),
        "loss": (cell.loss, cell.loss_interval),
        "ratio": (cell.ratio, cell.ratio_interval),
        **{name: (cell.quality.get(name), each) for name, each in cell.intervals.items()},
    }
    for name, (value, found) in intervals.items():
        if value is None or not found.low <= value <= found.high:
            yield f"the cell {cell.id} has an interval of {shown(name)} without the figure in it"
    if all(name in cell.replicates for name in mains):
        yield from _of_quantiles(cell, mains)


def _of_quantiles(cell: Cell, mains: Sequence[str]) -> Iterator[str]:
    """Yield the intervals of a cell's main metrics, and of their mean, that replicates belie."""
    scores = {name: score_from(cell.quality[name], cell.replicates[name]) for name in mains}
    scales = {name: cell.replicates[name].scale for name in mains}
    told = {name: (scores[name], scales[name], cell.intervals.get(name)) for name in mains}
    told["mean"] = mean_of(list(scores.values())), fmean(scales.values()), cell.mean_interval
    found = intervals([score for score, _, _ in told.values()])
    for (name, (_, scale, stated)), (low, high) in zip(told.items(), found, strict=True):
        # Replicates are stored to the nearest multiple of a scale, which has six digits, too.
        off = 0.51 * scale + _rounding((low, high, *(each.points for each in scores.values())))
        if stated is not None and max(abs(stated.low - low), abs(stated.high - high)) > off:
            yield (
                f"the cell {cell.id} has an interval of {name} from {stated.low:g} to "
                f"{stated.high:g}, where its replicates have {low:g} to {high:g}"
            )


def _rounding(values: Iterable[float]) -> float:
    """Return what figures that were stored in six digits, and one that follows, may be apart."""
    return _ROUNDED * max(1.0, *map(abs, values))


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
    for each in target.samples:
        ratio, between = each.p50_ms / each.shared_p50_ms, each.ratio_interval
        off = 2 * _ROUNDED * ratio  # three figures were rounded
        if not between.low - off <= ratio <= between.high + off:
            yield f"the sample {shown(each.cell)} has an interval without its ratio, {ratio:g}"
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
