"""What ``build --budget`` does: bundles for targets, chosen, built, packed and verified."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from m2dexport.cli.console import print_json, progress
from m2dexport.cli.options import open_model, tasks_of, texts_of, texts_to_align
from m2dexport.errors import M2DError, UsageError

if TYPE_CHECKING:
    from m2dexport.profile.release import Outcome
    from m2dexport.profile.schema import Cell

#: What may be said beside a budget; a target says the rest.
_BESIDE_BUDGET = {
    *("budget", "profile", "evaluation", "mteb", "calibration", "align_texts", "bit_order"),
    *("model", "pooling", "trained", "allow_pickle", "trust_remote_code"),
    *("out", "force", "as_json"),
}


#: What is measured on a device, and is null where that is another machine's.
_OF_THE_DEVICE = (
    *("device", "latency", "p50_ms", "p95_ms", "load_ms"),
    *("peak_memory_bytes", "used_memory_bytes", "on_frontier"),
)


def require_options_of_budget(context: click.Context) -> None:
    """Refuse options that say what a target says.

    Raises:
        UsageError: naming the first of them.
    """
    for option in context.command.params:
        name = option.name or ""
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and name not in _BESIDE_BUDGET:
            raise UsageError(
                f"{option.opts[0]} does not go with --budget, whose target says what is built; "
                "leave one of them out."
            )


def build_bundles(
    budget: tuple[str, ...], out: Path, options: dict[str, Any], *, force: bool
) -> tuple[Outcome, ...]:
    """Build a bundle for each target; ``options`` are the other ones of the command."""
    from m2dexport.profile.deploy import Deployment, open_profiled
    from m2dexport.profile.manifest import read_profile
    from m2dexport.profile.release import Basis, build_for_targets

    path, model = options["profile"], options["model"]
    profile = None if path is None else read_profile(path)
    trust = {name: options[name] for name in ("allow_pickle", "trust_remote_code")}
    declared = {name: options[name] for name in ("pooling", "trained")}
    if profile is None:
        checkpoint = open_model(model, {**trust, **declared})
    elif any(declared.values()):
        raise UsageError("--pooling and --trained are as in the --profile; leave them out.")
    else:
        checkpoint = open_profiled(profile, model, **trust)
    deployment = Deployment(
        texts_of(options["calibration"]),
        texts_to_align(True, options["align_texts"]),
        options["bit_order"],
    )
    basis = Basis(profile, tasks_of(options["evaluation"], options["mteb"]), deployment)
    with progress() as on_progress:
        return build_for_targets(checkpoint, budget, out, basis, on_progress, force=force)


def report_outcomes(outcomes: tuple[Outcome, ...], *, as_json: bool) -> None:
    """Print what became of each target.

    Raises:
        M2DError: with the reasons, when there is a target without a bundle.
    """
    from m2dexport.cli.tables import print_outcomes

    if as_json:
        print_json([_facts(outcome) for outcome in outcomes])
    else:
        print_outcomes(outcomes)
    failed = [f"{each.target}: {each.failure}" for each in outcomes if each.failure]
    if failed:
        raise M2DError(" ".join(failed))


def _cell_facts(cell: Cell, elsewhere: bool) -> dict[str, Any]:
    """Return a cell as JSON has it, without what says nothing of a device that is elsewhere."""
    facts: dict[str, Any] = cell.model_dump(mode="json")
    return {**facts, **dict.fromkeys(_OF_THE_DEVICE)} if elsewhere else facts


def _facts(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as JSON has it; what there is not is null."""
    found, report = outcome.selection, outcome.report
    return {
        "target": outcome.target,
        "failure": outcome.failure,
        "measured": outcome.measured,
        "lacks": outcome.lacks,
        "unchecked": outcome.unchecked,
        "metric": found and found.metric,
        "points": found and found.points,
        "binding": found and found.binding,
        "cell": found and _cell_facts(found.cell, outcome.lacks is not None),
        "bundle": report and {**asdict(report), "size_bytes": outcome.path.stat().st_size},
    }
