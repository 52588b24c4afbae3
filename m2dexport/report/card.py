"""The section of a model card that says what a profile found."""

from __future__ import annotations

from m2dexport.profile.recommend import ROLES
from m2dexport.profile.schema import Profile, TargetInfo
from m2dexport.report import facts


def card_section(profile: Profile, picture: str, target: str | None = None) -> str:
    """Return the section in Markdown, as model cards on Hugging Face have it, without front matter.

    Args:
        profile: the profile.
        picture: the path of the picture of latency and quality, as the card refers to it.
        target: the target that the figures are of; None: the first.

    Raises:
        UsageError: when the profile has no such target.
    """
    info = profile.target(target)
    names = ", ".join(
        f"{task.name} ({task.main_metric}, {task.texts:,} texts)" for task in profile.tasks
    )
    tools = ", ".join(f"{name} {version}" for name, version in profile.tools.items())
    lines = [
        "## Smaller and faster cuts",
        "",
        "This is a 2D Matryoshka model: its leading layers and leading dims are embedding models "
        "of their own. Cells are named layers x dim - weights - vectors; the first row is the "
        "reference that the others are held against.",
        "",
        *_table(profile, info),
        "",
        f"![Latency and quality of every cell]({_escaped_path(picture)})",
        "",
        *(f"- `{pick.cell.id}`: {pick.why}" for pick in facts.picks(profile, info)),
        "",
        "### How this was measured",
        "",
        f"- Quality, in points of 100: {_escaped(names)}; the mean is unweighted. Intervals are of "
        f"95%, from {profile.replicates} bootstrap resamples.",
        f"- Latency: p50 of {_escaped(facts.latency_words(profile, info))}, without tokenization. "
        f"{_escaped(facts.noise_sentence(info))}",
        "- MB are 10^6 bytes of graph, tokenizer and ranges; B/vector is what one stored vector "
        "takes.",
        f"- By {_escaped(tools)}, {profile.created[:10]}; weights sha256 "
        f"`{profile.checkpoint.sha256[:16]}`.",
        "",
        "To build one of them, with the profile at hand:",
        "",
        "```sh",
        *(facts.bundle_command(profile, pick.cell) for pick in facts.picks(profile, info)[:1]),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _table(profile: Profile, target: TargetInfo) -> list[str]:
    mains = profile.mains
    quality = [*(["mean"] if len(mains) > 1 else []), *map(_escaped, mains)]
    head = ["cell", "", *quality, "of the reference", "p50 ms", "MB", "B/vector"]
    rows = [(profile.reference_cell(target.name), "reference")]
    rows += [
        (pick.cell, ", ".join(ROLES[role] for role in pick.roles))
        for pick in facts.picks(profile, target)
        if pick.cell.id != target.reference
    ]
    lines = [f"| {' | '.join(head)} |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    for cell, role in rows:
        low, high = cell.mean_interval.low, cell.mean_interval.high
        mean = [f"{cell.mean_quality:.1f} ({low:.1f} to {high:.1f})"] if len(mains) > 1 else []
        values = [
            f"`{cell.id}`",
            role,
            *mean,
            *(f"{cell.quality[name]:.1f}" for name in mains),
            "" if cell.retention is None else f"{cell.retention:.1%}",
            f"{cell.p50_ms:.2f}",
            f"{cell.size_bytes / 1e6:.1f}",
            str(cell.bytes_per_vector),
        ]
        lines.append(f"| {' | '.join(values)} |")
    return lines


def _escaped(text: str) -> str:
    """Return a text as Markdown shows it as it is, also in a table."""
    return "".join(f"\\{sign}" if sign in r"\`*_[]<>|" else sign for sign in text)


def _escaped_path(path: str) -> str:
    return f"<{path}>" if any(sign in path for sign in " ()") else path
