"""A sweep on a Ray cluster, here one of this machine alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from killed import PLAN, TASKS
from tiny import small_checkpoint

from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.data import calibration_texts
from m2dexport.errors import M2DError, UsageError
from m2dexport.profile.parts import Parts
from m2dexport.profile.sweep import Course, profile_checkpoint

ray = pytest.importorskip("ray")
SMALL = replace(PLAN, layers=(1,), dims=(32,), weights=("fp16",), align=("none",), target="edge")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster with one node, which stands for the target edge."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")  # it would write a token to the home folder
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 2, "resources": {"m2dexport:edge": 1}, "include_dashboard": False}
        started = Cluster(initialize_head=True, head_node_args=node)
        yield started.address
        ray.shutdown()
        started.shutdown()


def test_a_cluster_measures_what_one_process_does(cluster: str, tmp_path: Path) -> None:
    model = open_checkpoint(small_checkpoint(tmp_path / "model", "bert"))
    texts, said = calibration_texts()[:120], []
    parts = Parts(tmp_path / "parts")
    parts.folder.mkdir()
    course = Course(cluster=cluster, parts=parts, say=said.append)
    found, again, own = (
        profile_checkpoint(model, TASKS, texts, SMALL, each) for each in (course, course, Course())
    )
    assert [cell.id for cell in found.cells] == [cell.id for cell in own.cells]
    for cell, expected in zip(found.cells, own.cells, strict=True):
        assert cell.quality == pytest.approx(expected.quality)
        assert cell.size_bytes == expected.size_bytes
        assert cell.p50_ms > 0
    assert found.targets[0].machine.cpu == own.targets[0].machine.cpu
    assert again.cells == found.cells
    assert said == ["Going on: 2 of 2 passes and 1 other parts were measured before."]


def test_latency_is_measured_on_nodes_of_the_targets_kind_alone(cluster: str, bert: Path) -> None:
    with pytest.raises(UsageError, match="no node of the cluster has the resource m2dexport:pi"):
        plan = replace(SMALL, target="pi")
        profile_checkpoint(
            open_checkpoint(bert), TASKS, calibration_texts(), plan, Course(cluster=cluster)
        )


def test_a_cluster_that_is_not_there_is_one_sentence(bert: Path) -> None:
    with pytest.raises(M2DError, match=r"there is no Ray cluster at 127\.0\.0\.1:1: "):
        course = Course(cluster="127.0.0.1:1")
        profile_checkpoint(open_checkpoint(bert), TASKS, calibration_texts(), SMALL, course)
