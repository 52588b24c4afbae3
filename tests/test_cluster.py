"""A sweep on a Ray cluster, here one of this machine alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import clustered
import pytest
from tiny import small_checkpoint

pytest.importorskip("ray")
PATIENCE = 120  # seconds


def test_a_cluster_measures_what_one_process_does_and_refuses_what_it_has_no_node_for(
    tmp_path: Path,
) -> None:
    model, out, err = small_checkpoint(tmp_path / "model", "bert"), tmp_path / "out", tmp_path / "e"
    # Into files: of a pipe, Ray's processes would hold the other end.
    with out.open("w") as stdout, err.open("w") as stderr:
        finished = subprocess.run(
            [sys.executable, clustered.__file__, str(model), str(tmp_path)],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            timeout=PATIENCE,
            check=False,
        )
    assert finished.returncode == 0, err.read_text()
    found = json.loads(out.read_text())
    there, again, own = (found[name] for name in ("cluster", "again", "own"))
    assert [cell["id"] for cell in there["cells"]] == [cell["id"] for cell in own["cells"]]
    for cell, expected in zip(there["cells"], own["cells"], strict=True):
        assert cell["quality"] == pytest.approx(expected["quality"])
        assert cell["size_bytes"] == expected["size_bytes"]
        assert cell["p50_ms"] > 0
    assert there["targets"][0]["machine"]["cpu"] == own["targets"][0]["machine"]["cpu"]
    assert again["cells"] == there["cells"]
    assert found["said"] == ["Going on: 2 of 2 passes and 1 other parts were measured before."]
    no_node = "UsageError: no node of the cluster has the resource m2dexport:pi"
    assert found["no_node"].startswith(no_node)
    assert found["no_cluster"].startswith("M2DError: there is no Ray cluster at 127.0.0.1:1: ")
