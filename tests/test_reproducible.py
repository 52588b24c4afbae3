"""The same checkpoint and recipe make the same bytes, however many threads and cores there are."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from tiny import tiny_checkpoint

_BUILD = """
import os, sys
if sys.argv[2] == "1" and hasattr(os, "sched_setaffinity"):  # before a library counts the cores
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from pathlib import Path
from m2dexport.build.build import build_artifact, quantize_artifact
from m2dexport.build.recipe import Recipe
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.data import calibration_texts
from m2dexport.engines import Device
from m2dexport.runtime.bundle import write_bundle
from m2dexport.runtime.packing import write_nested
out = Path(sys.argv[1])
plain = build_artifact(open_checkpoint(), 1, 64, out / "plain", Recipe())
recipe = Recipe(weights="int8", vectors="int8", calibration=calibration_texts()[:120])
artifact = quantize_artifact(plain.path, out / "artifact", recipe)
write_bundle(artifact.path, out / "edge.m2d")
write_nested([artifact.path, plain.path], out / "nested.m2d")
"""


def _hashes(folder: Path, threads: int) -> dict[str, str]:
    """Build and bundle in a process with so many threads for sums; return file -> sha256.

    With one thread, it also has one core only, where the system can do that.
    """
    folder.mkdir()
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads))}
    environment["TZ"] = "UTC" if threads == 1 else "Asia/Kolkata"
    command = [sys.executable, "-c", _BUILD, str(folder), str(threads)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    files = [*(folder / "artifact").iterdir(), *folder.glob("*.m2d")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


_EXPORT = """
import hashlib, sys
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.graph.export import graph_from_checkpoint
from m2dexport.graph.vector import serialize_graph
graph = graph_from_checkpoint(open_checkpoint(sys.argv[1]))
print(hashlib.sha256(serialize_graph(graph)).hexdigest())
"""


def test_a_graph_does_not_depend_on_the_order_of_sets(tmp_path: Path) -> None:
    """ModernBERT iterates a set of the names of its two kinds of attention."""
    checkpoint = tiny_checkpoint(tmp_path / "model", "modernbert", config={"num_hidden_layers": 4})
    hashes = set()
    for seed in "0", "1", "2", "3":
        command = [sys.executable, "-c", _EXPORT, str(checkpoint)]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        hashes.add(found.stdout)
    assert len(hashes) == 1


def test_an_int8_artifact_and_its_bundles_do_not_depend_on_threads_and_cores(
    tmp_path: Path,
) -> None:
    one, two = (_hashes(tmp_path / str(threads), threads) for threads in (1, 2))
    assert one == two
    spec = json.loads((tmp_path / "1" / "artifact" / "artifact.json").read_text())
    assert spec["weights"] == "int8"
