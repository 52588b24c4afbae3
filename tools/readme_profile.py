"""Put a profile's table into README.md, between its two comments.

python tools/readme_profile.py profile/profile.json
"""

import argparse
import re
from pathlib import Path

from m2dexport.profile.manifest import read_profile
from m2dexport.profile.schema import Cell, Profile
from m2dexport.profile.select import select_cell
from m2dexport.profile.target import load_target
from m2dexport.report.facts import shape_words

README = Path(__file__).parent.parent / "README.md"
MARK = "<!-- profile -->"
END = "<!-- end of profile -->"


def rows(profile: Profile) -> list[Cell]:
    """Return the unquantized reference, what the page bundles, and the best int8 cells.

    What it bundles is the choice of the target edge-cpu; the best are those of each depth, with
    int8 and with one-bit vectors.
    """
    best: dict[tuple[int, str], Cell] = {}
    for cell in sorted(profile.of_target(), key=lambda cell: -cell.mean_quality):
        if cell.weights == "int8" and cell.vectors != "float32":
            best.setdefault((cell.layers, cell.vectors), cell)
    bundled = select_cell(
        profile, load_target("edge-cpu").budget, target=profile.target().name
    ).cell
    first = {cell.id: cell for cell in (profile.reference_cell(), bundled)}
    rest = [best[key] for key in sorted(best, reverse=True)]
    return [*first.values(), *(cell for cell in rest if cell.id not in first)]


def section(profile: Profile) -> str:
    """Return the table, and the machine that it was measured on."""
    mains = [f"{task.name}/{task.main_metric}" for task in profile.tasks]
    head = ["cell", *mains, "p50 ms", "p95 ms", "MB", "peak MB", "bytes/vector"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for cell in rows(profile):
        values = [
            cell.id,
            *(f"{cell.quality[name]:.2f}" for name in mains),
            f"{cell.p50_ms:.2f}",
            f"{cell.p95_ms:.2f}",
            f"{cell.size_bytes / 1e6:.1f}",
            f"{cell.peak_memory_bytes / 1e6:.0f}",
            str(cell.bytes_per_vector),
        ]
        lines.append(f"| {' | '.join(values)} |")
    target = profile.target()
    machine, shape = target.machine, target.shapes[0]
    seconds = sum(profile.seconds.values())
    return (
        "What `m2dexport profile` measured of the checkpoint that ships, "
        f"{len(profile.cells)} cells in {seconds:.0f} s: the\nunquantized reference, the choice "
        "of the target edge-cpu, and the best int8 cell of each depth\nwith int8 and with one-bit "
        "vectors.\n\n"
        + "\n".join(lines)
        + f"\n\n{machine.cpu}, up to {profile.threads()} threads ({' '.join(machine.flags)});\n"
        f"latency of {shape_words(shape)}, without tokenization."
    )


def main() -> None:
    """Replace the section in place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", type=Path, help="profile.json")
    parser.add_argument("--readme", type=Path, default=README, help="the file to change")
    options = parser.parse_args()
    profile = read_profile(options.profile)
    text = options.readme.read_text(encoding="utf-8")
    text = re.sub(f"{MARK}.*?{END}", MARK, text, flags=re.S)
    options.readme.write_text(
        text.replace(MARK, f"{MARK}\n{section(profile)}\n{END}"),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
