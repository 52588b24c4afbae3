"""Measure a nested bundle against separate bundles: size, loading, switching, memory.

    python tools/bench_nested.py ARTIFACT ARTIFACT ... --rounds 15 --out nested.md

Takes artifact folders of one checkpoint, and writes Markdown. Every load and every figure of memory
is that of a process of its own, which has imported all packages before; rounds take turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from page import heading, say, table, write

from m2dexport.runtime.bundle import write_bundle
from m2dexport.runtime.packing import write_nested
from m2dexport.runtime.showing import ShownCell, show_bundle

#: Steps, each with the bundles and cells it takes; prints milliseconds and resident bytes after it.
_PROCESS = """
import json, os, sys, time
from m2dexport.engines import Device, engine_runner
from m2dexport.runtime.loading import load
from m2dexport.runtime.nested import Nested
for engine in json.loads(sys.argv[1]):
    engine_runner(engine)
device, kept, found = Device(threads=1), [], []

def step(work):
    start = time.perf_counter()
    kept.append(work())
    taken = (time.perf_counter() - start) * 1e3
    resident = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    found.append((taken, resident))
    return kept[-1]

step(lambda: None)
nested = None
for path, cell in json.loads(sys.argv[2]):
    if cell is None:
        encoder = step(lambda: load(path, device))
        encoder.encode(["A man is playing a guitar."])
        continue
    if nested is None:
        nested = step(lambda: Nested(path, device))
    encoder = step(lambda: nested.cell(cell))
    encoder.encode(["A man is playing a guitar."])
if nested is not None:
    step(lambda: nested.cell(cell))
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Bundles:
    """The same cells in a bundle each, and in one."""

    nested: Path
    cells: tuple[ShownCell, ...]  # the deepest first
    plain: tuple[Path, ...]  # in the same order


def main() -> None:
    """Write the bundles, measure them and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", type=Path, nargs="+", help="folders, of one checkpoint")
    parser.add_argument("--rounds", type=int, default=15, help="of which medians are taken")
    parser.add_argument("--out", type=Path, help="default: standard output")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bundles = written(options.artifacts, Path(temporary))
        lines = [*heading("1 thread", ("m2dexport", "onnxruntime", "numpy")), ""]
        write([*lines, *sizes(bundles), "", *costs(bundles, options.rounds)], options.out)


def written(artifacts: list[Path], folder: Path) -> Bundles:
    """Return the bundles of some artifacts."""
    nested = folder / "nested.m2d"
    write_nested(artifacts, nested)
    plain = {}
    for number, artifact in enumerate(artifacts):
        info = write_bundle(artifact, folder / f"{number}.m2d")
        plain[info.cells[0]] = info.path
    cells = show_bundle(nested).cells
    return Bundles(nested, cells, tuple(plain[cell.id] for cell in cells))


def sizes(bundles: Bundles) -> Iterator[str]:
    """Yield the table of sizes."""
    rows = []
    for cell, path in zip(bundles.cells, bundles.plain, strict=True):
        rows.append((cell.id, megabytes(path.stat().st_size), megabytes(cell.own_bytes)))
    apart = sum(path.stat().st_size for path in bundles.plain)
    together = bundles.nested.stat().st_size
    rows.append(("all", megabytes(apart), f"{megabytes(together)} ({together / apart:.1%})"))
    yield from table(
        ("cell", "bundle of its own, MB", "in the nested bundle, no other's, MB"), rows
    )


def costs(bundles: Bundles, rounds: int) -> Iterator[str]:
    """Yield the tables of loading, switching and memory."""
    ids = [cell.id for cell in bundles.cells]
    engines = sorted({cell.engine for cell in bundles.cells})
    apart = [(str(path), None) for path in bundles.plain]
    together = [(str(bundles.nested), cell) for cell in ids]
    found: dict[str, list[Any]] = {"apart": [], "together": []}
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        found["apart"].append(run(engines, apart))
        found["together"].append(run(engines, together))
    times = {name: columns(each, 0) for name, each in found.items()}
    memory = {name: columns(each, 1) for name, each in found.items()}
    rows = [("open the nested bundle", "", f"{times['together'][1]:.1f}")]
    rows += [
        (f"load {cell}", f"{times['apart'][1 + i]:.1f}", f"{times['together'][2 + i]:.1f}")
        for i, cell in enumerate(ids)
    ]
    rows.append(("switch to a cell that is loaded", "", f"{times['together'][-1]:.4f}"))
    yield from table(("step, ms (median)", "bundles of their own", "nested"), rows)
    yield ""
    rows = []
    for i, cell in enumerate(ids):
        held = [memory["apart"][1 + i] - memory["apart"][0]]
        held.append(memory["together"][2 + i] - memory["together"][0])
        rows.append((("and " if i else "") + cell, *map(megabytes, held)))
    yield from table(("resident, MB more than before (median)", "own", "nested"), rows)


def run(engines: list[str], steps: list[tuple[str, str | None]]) -> list[tuple[float, int]]:
    """Return milliseconds and resident bytes of every step, in a process of its own."""
    command = [sys.executable, "-c", _PROCESS, json.dumps(engines), json.dumps(steps)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return [tuple(each) for each in json.loads(finished.stdout)]


def columns(rounds: list[list[tuple[float, int]]], part: int) -> list[float]:
    """Return the median over rounds of every step."""
    return [median(step[part] for step in steps) for steps in zip(*rounds, strict=True)]


def megabytes(size: float) -> str:
    """Return a size in 10^6 bytes."""
    return f"{size / 1e6:.2f}"


if __name__ == "__main__":
    main()
