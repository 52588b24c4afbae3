"""The options of ``profile``: what is measured, how thoroughly, and where to go on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from m2dexport.cli.options import NUMBERS, SHAPES, together
from m2dexport.cores import granted_threads
from m2dexport.data import shipped_targets
from m2dexport.engines import DEFAULT_ENGINE, ENGINES
from m2dexport.errors import UsageError
from m2dexport.precisions import VECTOR_PRECISIONS, WEIGHT_PRECISIONS

if TYPE_CHECKING:
    from m2dexport.checkpoint.open import Checkpoint
    from m2dexport.profile.grid import Pass
    from m2dexport.profile.plan import Plan
    from m2dexport.profile.target import Target
    from m2dexport.vectors.resample import Score
    from m2dexport.vectors.tasks import Task

    _Scores = Mapping[str, Score]  # by "task/metric"

#: Timed rounds of every graph, fewer than 100 of which mean no p95; without a word, as many as the
#: time that they take allows.
_QUICK, _THOROUGH = 100, 500
_QUICK_WEIGHTS, _QUICK_VECTORS = ("fp32", "int8"), ("float32", "int8")


class _Names(click.ParamType):  # type: ignore[type-arg]
    """One name or several of those that there are: "fp32,int8"."""

    name = "NAME[,NAME...]"

    def __init__(self, known: tuple[str, ...]) -> None:
        self.known = known

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(name.strip() for name in str(value).split(",")))
        for name in names:
            if name not in self.known:
                self.fail(f"{name!r} is none of {', '.join(self.known)}.", param, ctx)
        return names


class _Shard(click.ParamType):  # type: ignore[type-arg]
    """One of several parts: "2/3"."""

    name = "I/K"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([1-9][0-9]{0,3})/([1-9][0-9]{0,3})", str(value))
        if match is None or int(match[1]) > int(match[2]):
            self.fail(f"{value!r} is not one of several parts, such as 2/3.", param, ctx)
        return int(match[1]), int(match[2])


#: The options that ``plans_of`` reads, besides ``quick``.
SWEEP = (
    *("targets", "engines", "layers", "dims", "weights", "vectors", "shapes", "align", "threads"),
    "thorough",
)
_ENGINES = tuple(name for name, engine in ENGINES.items() if engine.encodes)

#: The options that say what is measured where no target does, or otherwise than it says.
grid_options = together(
    click.option("--shapes", type=SHAPES, help="What to time; limits mean the first."),
    click.option(
        "--align",
        type=click.Choice(("none", "both")),
        help="Measure depths as they are, or also aligned with the full one.  [default: both]",
    ),
    click.option("--threads", type=click.IntRange(1), help="That run one batch."),
    click.option("--vectors", type=_Names(VECTOR_PRECISIONS), help="Vector precisions."),
    click.option("--weights", type=_Names(WEIGHT_PRECISIONS), help="Weight precisions."),
    click.option("--dim", "dims", type=NUMBERS, help="Dims.  [default: those of the training]"),
    click.option("--layers", type=NUMBERS, help="Depths, 0 being the static model."),
    click.option(
        "--engine",
        "engines",
        type=_Names(_ENGINES),
        help=f"Engines: {', '.join(_ENGINES)}.  [default: the target's, or {DEFAULT_ENGINE}]",
    ),
    click.option(
        "--target",
        "targets",
        metavar="NAME|FILE",
        multiple=True,
        help="Measure what a target asks for, as it does; may be given several times. Those that "
        f"ship are {', '.join(shipped_targets())}.",
    ),
)

#: The options that say how a sweep is carried out.
course_options = together(
    click.option(
        "--shard",
        type=_Shard(),
        help="Measure one part of several, such as 2/3; profile merge joins them.",
    ),
    click.option(
        "--ray",
        "cluster",
        metavar="ADDRESS",
        help='Measure on a Ray cluster, such as "auto"; what a target costs on nodes with its '
        "resource, such as m2dexport:edge-cpu.",
    ),
    click.option("--fresh", is_flag=True, help="Drop what an interrupted sweep measured before."),
    click.option(
        "--thorough",
        is_flag=True,
        help=f"Time every graph in {_THOROUGH} rounds, for narrow intervals.",
    ),
    click.option(
        "--quick",
        is_flag=True,
        help="Print the fp32 grid as soon as it is there. Then: "
        f"{' and '.join(_QUICK_WEIGHTS)} weights, {' and '.join(_QUICK_VECTORS)} vectors, the "
        f"first shape, {_QUICK} rounds.",
    ),
)


def plans_of(
    checkpoint: Checkpoint, options: dict[str, Any]
) -> tuple[tuple[Plan, ...], dict[str, Target]]:
    """Return a plan per target and engine, from the values of the options that ``SWEEP`` names.

    Raises:
        UsageError: when two targets have one name, or a target cannot be read.
    """
    from m2dexport.profile.plan import default_plan, plan_for
    from m2dexport.profile.target import MAX_TOKENS, load_target

    given = {name: options.pop(name) for name in ("layers", "dims", "weights", "vectors", "shapes")}
    given = {name: value for name, value in given.items() if value is not None}
    for batch, length in given.get("shapes", ()):
        if batch * length > MAX_TOKENS:
            raise UsageError(f"--shapes {batch}x{length} has more than {MAX_TOKENS:,} tokens.")
    engines, threads, align = (options.pop(name) for name in ("engines", "threads", "align"))
    quick, thorough = options.pop("quick"), options.pop("thorough")
    if quick and thorough:
        raise UsageError("--quick and --thorough exclude each other; name one of them.")
    targets: dict[str, Target] = {}
    for each in options.pop("targets"):
        name = Path(each).stem
        if name in targets:
            raise UsageError(f"two targets are named {name}; name each once, or rename a file.")
        targets[name] = load_target(each)
    plans = []
    bases = {name: plan_for(checkpoint, target) for name, target in targets.items()}
    for name, base in (
        bases or {default_plan(checkpoint).target: default_plan(checkpoint)}
    ).items():
        plan = replace(base, target=name, **(_quick(base) if quick else {}))
        plan = replace(plan, repeats=_QUICK if quick else _THOROUGH if thorough else plan.repeats)
        plan = replace(_aligned(plan, align, "layers" in given), **given)
        if threads is not None:
            plan = replace(plan, device=replace(plan.device, threads=granted_threads(threads)))
        plans += [_on(plan, engine) for engine in engines or (plan.engine,)]
    return tuple(plans), targets


def _quick(plan: Plan) -> dict[str, Any]:
    weights = tuple(each for each in plan.weights if each in _QUICK_WEIGHTS) or plan.weights
    vectors = tuple(each for each in plan.vectors if each in _QUICK_VECTORS) or plan.vectors
    return {"weights": weights, "vectors": vectors, "shapes": plan.shapes[:1]}


def _aligned(plan: Plan, align: str | None, layers_given: bool) -> Plan:
    if align is None:
        return plan
    if align == "both":
        return replace(plan, align=("none", "full"))
    layers = plan.layers if layers_given else plan.depths
    return replace(plan, align=("none",), layers=layers)


def _on(plan: Plan, engine: str) -> Plan:
    """Return a plan on an engine; another than the target's runs on its own CPU or GPU."""
    if engine == plan.engine:
        return plan
    device = replace(plan.device, provider=None)
    return replace(plan, engine=engine, device=device, isa="portable")


def print_grid(
    tasks: tuple[Task, ...],
) -> Callable[[Pass, Mapping[str, Mapping[str, Score]]], None]:
    """Return what prints the quality of the first pass: depths in rows, dims in columns."""
    from rich.console import Console
    from rich.table import Table

    from m2dexport.profile.grid import graph_of
    from m2dexport.vectors.tasks import main_of

    def show(one: Pass, quality: Mapping[str, _Scores]) -> None:
        if not one.crosses:
            return
        plan, mains = one.plan, [main_of(task) for task in tasks]
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("depth", *(f"d={dim}" for dim in plan.dims)):
            table.add_column(column, justify="left" if column == "depth" else "right")
        for layers in plan.layers:
            for align in plan.alignments(layers, plan.compared_with[0]):
                names = [
                    graph_of(plan, layers, one.weights, align, dim).cell(dim, "float32")
                    for dim in plan.dims
                ]
                means = [
                    f"{sum(quality[name][main].points for main in mains) / len(mains):.2f}"
                    if name in quality
                    else "-"
                    for name in names
                ]
                if set(means) != {"-"}:
                    table.add_row(f"{layers}-aligned" if align == "full" else str(layers), *means)
        console = Console(highlight=False)
        console.print(f"Quality in {one.weights}, float32 vectors, mean of {', '.join(mains)}:")
        console.print(table)

    return show
