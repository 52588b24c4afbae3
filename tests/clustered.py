"""Sweeps on a Ray cluster of this machine alone, by a process of its own.

Ray changes the process that starts it, its process group above all, which a worker of pytest-xdist
does not survive. ``python clustered.py MODEL FOLDER`` prints what it found as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from killed import PLAN, TASKS

from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.data import calibration_texts
from m2dexport.errors import M2DError
from m2dexport.profile.parts import Parts
from m2dexport.profile.sweep import Course, profile_checkpoint

SMALL = replace(PLAN, layers=(1,), dims=(32,), weights=("fp16",), align=("none",), target="edge")


@contextmanager
def cluster() -> Iterator[str]:
    """Yield the address of a cluster with one node, which stands for the target edge."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # it would write a token to the home folder
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "resources": {"m2dexport:edge": 1}, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args=node)
    try:
        yield started.address
    finally:
        started.shutdown()


def refused(run: Callable[[], Any]) -> str:
    """Return the kind of error that something ends in, and its sentence."""
    try:
        run()
    except M2DError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def main(model: Path, folder: Path) -> None:
    """Measure on the cluster, go on from that, measure in this process, and what is refused."""
    checkpoint, texts = open_checkpoint(model), calibration_texts()[:120]
    said: list[str] = []
    parts = Parts(folder / "parts")
    parts.folder.mkdir()

    def measured(course: Course, target: str = "edge") -> Any:
        plan = replace(SMALL, target=target)
        return profile_checkpoint(checkpoint, TASKS, texts, plan, course).model_dump(mode="json")

    with cluster() as address:
        course = Course(cluster=address, parts=parts, say=said.append)
        found = {
            "cluster": measured(course),
            "again": measured(course),
            "own": measured(Course()),
            "said": said,
            "no_node": refused(lambda: measured(Course(cluster=address), "pi")),
        }
    found["no_cluster"] = refused(lambda: measured(Course(cluster="127.0.0.1:1")))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
