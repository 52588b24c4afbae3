"""How many cores a process counts on: never more than its cgroups grant, of either version."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from m2dexport.cli import cli
from m2dexport.cores import (
    granted_threads,
    side_by_side,
    threads_for,
    usable_cores,
    workers_for,
)
from m2dexport.errors import UsageError

HERE = usable_cores(Path("/nowhere"))  # the affinity mask only


def machine(root: Path, own: str, files: dict[str, str]) -> Path:
    """Write what Linux says about cgroups into a folder."""
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in {"proc/self/cgroup": own, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/", {"cpu.max": "100000 100000"}),
        ("0::/a/b", {"a/b/cpu.max": "100000 100000"}),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}),
        ("0::/a", {"cpu.max": "50000 100000", "a/cpu.max": "9900000 100000"}),
        ("4:cpu,cpuacct:/a", {"cpu,cpuacct/a/cpu.cfs_quota_us": "100000"}),
        ("4:cpu:/docker/0f", {"cpu/cpu.cfs_quota_us": "100000"}),  # the mount begins at its group
        ("4:cpu:/a\n0::/a", {"cpu/a/cpu.cfs_quota_us": "50000"}),
    ],
    ids=["v2", "v2 below", "v2 parent", "v2 above", "v1", "v1 container", "both versions"],
)
def test_the_smallest_quota_up_the_tree_binds(tmp_path: Path, own: str, files) -> None:
    periods = {name.replace("quota", "period"): "100000" for name in files if "quota" in name}
    assert usable_cores(machine(tmp_path, own, {**files, **periods})) == 1


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/", {}),
        ("0::/a", {"a/cpu.max": "max 100000"}),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}),
        ("4:memory:/", {"memory/cpu.max": "100000 100000"}),
        ("0::/../..", {"cpu.max": "nonsense"}),
        ("nonsense", {}),
    ],
)
def test_without_a_quota_the_affinity_mask_binds(tmp_path: Path, own: str, files) -> None:
    assert usable_cores(machine(tmp_path, own, files)) == HERE


def test_threads_that_the_machine_lacks_are_not_started_and_said_aloud() -> None:
    assert threads_for(10_000) == usable_cores()
    with pytest.warns(UserWarning, match=r"10000 threads were asked for .* may use \d+ cores"):
        assert granted_threads(10_000) == usable_cores()
    assert granted_threads(None) is None
    with pytest.raises(UsageError, match="0 threads"):
        granted_threads(0)


def test_encode_says_when_it_gets_fewer_threads_than_asked_for(tmp_path: Path) -> None:
    from tiny_artifact import tiny_artifact

    from m2dexport.runtime.bundle import write_bundle

    write_bundle(tiny_artifact(tmp_path / "artifact"), tmp_path / "a.m2d")
    arguments = ["encode", str(tmp_path / "a.m2d"), "--threads", "10000"]
    result = CliRunner().invoke(cli, arguments, input="find a guitar\n")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("Warning: 10000 threads were asked for") == 1
    assert len(result.stdout.splitlines()) == 1


def test_workers_share_the_cores_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2dexport.cores.usable_cores", lambda: 4)
    asked = ((None, None), (None, 1), (3, 1), (8, 1), (8, 2), (8, 3), (8, None))
    assert [workers_for(*each) for each in asked] == [1, 1, 3, 4, 2, 1, 1]


@pytest.mark.parametrize("workers", [1, 2])
def test_work_that_is_given_up_leaves_out_what_has_not_begun(workers: int) -> None:
    """As on Ctrl-C: nobody waits for all of it."""
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        time.sleep(0.01)
        return item

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        for done in side_by_side(work, range(1000), workers):
            assert done == 0
            raise KeyboardInterrupt
    assert len(begun) < 1000
    assert threading.active_count() == before


def test_work_side_by_side_is_done_at_once_and_comes_in_order() -> None:
    together = threading.Barrier(3, timeout=20)

    def work(item: int) -> int:
        together.wait()  # broken unless three are here at a time
        return -item

    assert list(side_by_side(work, range(6), 3)) == [0, -1, -2, -3, -4, -5]
