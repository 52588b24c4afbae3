"""report.html: one file with all of a profile, which opens offline."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

from m2dexport.profile.schema import Cell, Profile, TargetInfo
from m2dexport.report import facts
from m2dexport.report.data import page_data

_WEB = Path(__file__).parent / "web"

#: A flag -> what it means.
FLAGS = {
    "reference": "measured for comparison; the grid does not ask for it",
    "untrained": "training did not visit this (layers, dim), as far as the checkpoint says",
    "collapsed": "on one task it has less than half the points of a smaller cell",
    "below_shallower": "a shallower depth is better",
    "below_static": "depth 0, a table of token vectors, is better and cheaper",
    "slower_than_fp32": "the fp32 cell of the same depth is faster",
    "not_significant": "a cheaper cell is as good within noise",
    "batch_dependent": "a text's vector depends on the texts beside it",
    "mixed_precision": "some weights stayed in float32",
}


def page_of(profile: Profile) -> str:
    """Return the HTML of a profile's report.

    It needs nothing beside it and asks for nothing: plotly is within, compressed, and the page's
    own policy forbids requests. Without JavaScript it has the choice, the frontier as a table, and
    how all was measured.
    """
    from jinja2 import Environment
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string(_text("page.html"))
    return template.render(
        profile=profile,
        title=facts.title(profile),
        css=Markup(_text("page.css")),
        script=Markup(_text("page.js")),
        plotly=get_plotlyjs(),
        data=json.dumps(page_data(profile), separators=(",", ":"), allow_nan=False),
        packed=_packed,
        targets=[_target(profile, target) for target in profile.targets],
        mean=_mean(profile),
        command=facts.bundle_command,
        flags=_flags(profile),
        columns=_columns(profile),
        rows=[row for target in profile.targets for row in _rows(profile, target)],
        provenance=_provenance(profile),
    )


def _text(name: str) -> str:
    return (_WEB / name).read_text(encoding="utf-8")


def _packed(text: str) -> str:
    """Return a text as the page unpacks it: gzipped, in base64, which no markup can end.

    Of plotly, 4.8 MB, that makes 2.0.
    """
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode("ascii")


def _mean(profile: Profile) -> str:
    return "mean" if len(profile.tasks) > 1 else profile.mains[0]


def _target(profile: Profile, target: TargetInfo) -> dict[str, Any]:
    return {
        "name": target.name,
        "description": target.description,
        "budget": facts.budget_sentence(target),
        "noise": facts.noise_sentence(target),
        "samples": facts.samples_comment(target.samples),
        "picks": facts.picks(profile, target),
        "facts": _target_facts(profile, target),
    }


def _target_facts(profile: Profile, target: TargetInfo) -> list[tuple[str, str]]:
    machine, noise = target.machine, target.noise
    # Shapes that the maximum length made the same are one; what each was is then not known.
    known = target.asked if len(target.asked) == len(target.shapes) else ()
    pairs = itertools.zip_longest(target.shapes, known)
    shapes = "; ".join(facts.shape_words(shape, asked) for shape, asked in pairs)
    found = [
        ("processor", f"{machine.cpu}, {machine.cores} cores ({' '.join(machine.flags)})"),
        ("memory", f"{machine.memory_bytes / 1e9:.1f} GB"),
        ("system", f"{machine.os}, Python {machine.python}"),
        ("GPU", machine.gpu or "none"),
        ("clock's governor", machine.governor or "unknown"),
        ("virtualisation", machine.virtualisation or "none that is known"),
        ("engines", ", ".join(target.engines)),
        ("threads", f"up to {profile.threads(target.name)}"),
        ("shapes", f"{shapes}; latency means the first"),
        ("reference", target.reference),
        ("budget", ", ".join(facts.limits(target)) or "none"),
        ("noise", facts.noise_sentence(target)),
    ]
    if noise is not None:
        found.append(("spread and drift", f"{noise.spread:.2f}, {noise.drift:.2f}"))
    found += [
        (
            f"tokenizing {facts.shape_words(each)}",
            f"p50 {each.p50_ms:.3g} ms, p95 {each.p95_ms:.3g} ms",
        )
        for each in target.tokenization
    ]
    found += [
        (
            f"{each.cell}, timed by itself",
            f"p50 {each.p50_ms:.3g} ms, {facts.ratio_words(each)} that of what it shares its "
            f"latency with, timed beside it ({each.shared_p50_ms:.3g} ms): "
            + ("the same within noise" if facts.agrees(each) else "they differ beyond noise"),
        )
        for each in target.samples
    ]
    return found


def _flags(profile: Profile) -> list[tuple[str, int, str]]:
    counts: Counter[str] = Counter(flag for cell in profile.cells for flag in cell.flags)
    return [(name, counts[name], words) for name, words in FLAGS.items() if counts[name]]


def _columns(profile: Profile) -> list[str]:
    several = ["target"] if len(profile.targets) > 1 else []
    quality = ["mean", *profile.mains]
    return [
        *("cell", *several, *quality, "retention %", "loss", "p50 ms", "p95 ms", "MB"),
        *("peak MB", "B/vector", "flags"),
    ]


def _rows(profile: Profile, target: TargetInfo) -> list[list[str]]:
    """Return the rows of the table: the reference, and the frontier from the best on."""
    reference = profile.reference_cell(target.name)
    ahead = facts.frontier_cells(profile.of_target(target.name))
    cells = [reference, *(cell for cell in ahead if cell.id != reference.id)]
    several = [target.name] if len(profile.targets) > 1 else []
    mains = profile.mains
    return [
        [
            cell.id,
            *several,
            f"{cell.mean_quality:.2f} ({span(cell.mean_interval.low, cell.mean_interval.high)})",
            *(_points(cell, name) for name in mains),
            "–" if cell.retention is None else f"{100 * cell.retention:.1f}",
            f"{cell.loss:.2f} ({span(cell.loss_interval.low, cell.loss_interval.high)})",
            f"{cell.p50_ms:.2f}",
            f"{cell.p95_ms:.2f}",
            f"{cell.size_bytes / 1e6:.1f}",
            f"{cell.peak_memory_bytes / 1e6:.0f}",
            str(cell.bytes_per_vector),
            ", ".join(cell.flags),
        ]
        for cell in cells
    ]


def span(low: float, high: float) -> str:
    """Return the bounds of an interval: "59.4 to 62.0"."""
    return f"{low:.1f} to {high:.1f}"


def _points(cell: Cell, name: str) -> str:
    interval = cell.intervals.get(name)
    bounds = f" ({span(interval.low, interval.high)})" if interval else ""
    return f"{cell.quality[name]:.2f}{bounds}"


def _provenance(profile: Profile) -> list[tuple[str, str]]:
    trained = profile.checkpoint.trained
    grid = "unknown" if trained is None else " ".join(f"{n}:{d}" for n, d in trained)
    aligned = profile.aligned_with
    return [
        ("measured", profile.created),
        ("checkpoint, sha256", profile.checkpoint.sha256),
        ("pooling", profile.checkpoint.pooling or "as stored"),
        ("trained grid", grid),
        ("intervals", f"95%, from {profile.replicates} bootstrap resamples of each task"),
        ("calibration texts, sha256", profile.calibration_sha256),
        *([("aligned on", f"{aligned.texts:,} texts, sha256 {aligned.sha256}")] if aligned else []),
        ("tools", ", ".join(f"{name} {version}" for name, version in profile.tools.items())),
        (
            "seconds of the last run",
            ", ".join(f"{name} {took:.0f}" for name, took in profile.seconds.items()),
        ),
    ]
