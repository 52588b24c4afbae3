"""The machine: what it says of itself, and how a run is found to be noisy."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from m2dexport.cores import usable_cores
from m2dexport.measure.machine import read_machine, virtualisation
from m2dexport.measure.noise import Usage, moment, noise_of
from m2dexport.profile import schema

STEADY = tuple(np.linspace(1.0, 1.02, 50)) * 2


def root(folder: Path, **files: str) -> Path:
    """Return a root with these files; "__" stands for a slash."""
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        ({"proc__cpuinfo": "flags\t: fpu avx2\n"}, None),
        ({"proc__cpuinfo": "flags\t: fpu hypervisor avx2\n"}, "virtual machine"),
        (
            {
                "proc__cpuinfo": "flags : hypervisor\n",
                "sys__class__dmi__id__sys_vendor": "Amazon EC2\n",
                "sys__class__dmi__id__product_name": "m5.large\n",
            },
            "virtual machine (Amazon EC2 m5.large)",
        ),
        ({"sys__class__dmi__id__product_name": "KVM Virtual Machine"}, "virtual machine (KVM"),
        ({"sys__class__dmi__id__product_name": "PowerEdge R640"}, None),
        ({"run__systemd__container": "lxc\n"}, "lxc container"),
        ({"proc__self__cgroup": "0::/kubepods/burstable/pod1\n"}, "kubepods container"),
        ({"proc__sys__kernel__osrelease": "5.15-microsoft-standard-WSL2"}, "WSL"),
    ],
)
def test_a_container_and_a_virtual_machine_show(tmp_path: Path, files, found) -> None:
    stated = virtualisation(root(tmp_path, **files))
    assert stated == found if found is None else stated is not None and stated.startswith(found)


def test_a_container_in_a_virtual_machine_is_both(tmp_path: Path) -> None:
    (tmp_path / ".dockerenv").touch()
    folder = root(tmp_path, proc__cpuinfo="flags: hypervisor\n")
    assert virtualisation(folder) == "docker container in virtual machine"


def test_governor_and_gpu_are_read_where_the_system_tells(tmp_path: Path) -> None:
    assert (read_machine(tmp_path).governor, read_machine(tmp_path).gpu) == (None, None)
    folder = root(
        tmp_path,
        sys__devices__system__cpu__cpu0__cpufreq__scaling_governor="performance\n",
        **{"proc__driver__nvidia__gpus__0000:01:00.0__information": "Model: \t NVIDIA L4\nIRQ: 1"},
    )
    assert (read_machine(folder).governor, read_machine(folder).gpu) == ("performance", "NVIDIA L4")


def test_this_machine_is_described_as_a_profile_holds_it() -> None:
    machine = read_machine()
    assert machine.cores == usable_cores()
    assert machine.memory_bytes > 1 << 28
    assert schema.Machine(**asdict(machine)).cpu == machine.cpu


@pytest.mark.parametrize(
    ("times", "usage", "verdict", "reasons"),
    [
        (STEADY, Usage(10, 20, 0, 0.2), "quiet", 4),
        (STEADY, Usage(10, 0, 0, 0), "quiet", 2),  # a system that counts nothing
        (STEADY, Usage(10, 20, 0, 3), "noisy", 1),
        (STEADY, Usage(10, 20, 2, 0), "very noisy", 1),
        (STEADY, Usage(10, 20, 2, 9), "very noisy", 2),
        ((1.0,) * 50 + (1.1,) * 50, Usage(10, 20, 0, 0), "noisy", 1),
        ((1.0, 1.0, 1.0, 3.0) * 25, Usage(10, 20, 0, 0), "very noisy", 1),
    ],
)
def test_the_worst_sign_decides_the_verdict_and_is_the_reason(
    times, usage, verdict, reasons
) -> None:
    noise = noise_of(times, [usage])
    assert (noise.verdict, len(noise.reasons)) == (verdict, reasons)
    assert all(reason.endswith(".") and reason[0].isupper() for reason in noise.reasons)
    assert (noise.busy is None) == (noise.stolen is None) == (usage.total == 0)
    assert schema.Noise(**asdict(noise)).verdict == verdict


def test_too_few_times_have_no_drift() -> None:
    assert noise_of((1.0, 5.0, 9.0), []).drift == 1


def test_what_the_host_takes_is_counted_apart_from_what_others_run(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 10 50 800 20 5 5 10 30 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    found = moment(stat)
    assert found.busy / found.total == pytest.approx(170 / 1000)
    assert found.stolen / found.total == pytest.approx(10 / 1000)
    assert moment(tmp_path / "none").total == 0
