"""What figures were measured on: processor, memory, and what stands between it and the program."""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from m2dexport.cores import usable_cores
from m2dexport.processor import read_processor

_ROOT = Path("/")
#: What the product names of virtual machines hold, where the processor does not say that it is one.
_VIRTUAL = re.compile(r"kvm|qemu|virtual|vmware|hvm|xen|bochs|droplet|google compute|ec2", re.I)
_CONTAINERS = ("docker", "kubepods", "containerd", "libpod", "lxc")  # in the names of cgroups


@dataclass(frozen=True)
class Machine:
    """Where figures were measured."""

    cpu: str  # model name
    flags: tuple[str, ...]  # instruction sets that decide speed and exactness
    cores: int  # that this process may use
    memory_bytes: int  # 0: unknown
    os: str
    python: str
    governor: str | None  # of the clock's frequency; None: unknown
    virtualisation: str | None  # None: none that is known
    gpu: str | None


def read_machine(root: Path = _ROOT) -> Machine:
    """Describe this machine.

    Args:
        root: the folder with proc, sys and run.
    """
    processor = read_processor()
    return Machine(
        cpu=processor.model,
        flags=processor.flags,
        cores=usable_cores(),
        memory_bytes=_memory(),
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        governor=_line(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        virtualisation=virtualisation(root),
        gpu=_gpu(root),
    )


def virtualisation(root: Path = _ROOT) -> str | None:
    """Return the container and the virtual machine that this is, None where no sign is of either.

    Args:
        root: the folder with proc, sys and run.
    """
    found = [_container(root), _virtual_machine(root)]
    return " in ".join(each for each in found if each) or None


def _container(root: Path) -> str | None:
    for marker, name in ((".dockerenv", "docker"), ("run/.containerenv", "podman")):
        if (root / marker).exists():
            return f"{name} container"
    named = _line(root / "run/systemd/container")
    if named:
        return f"{named} container"
    groups = _text(root / "proc/self/cgroup")
    return next((f"{name} container" for name in _CONTAINERS if name in groups), None)


def _virtual_machine(root: Path) -> str | None:
    if "microsoft" in _text(root / "proc/sys/kernel/osrelease").lower():
        return "WSL"
    dmi = root / "sys/class/dmi/id"
    product = " ".join(filter(None, (_line(dmi / "sys_vendor"), _line(dmi / "product_name"))))
    flags = re.search(r"^flags\s*:.*\bhypervisor\b", _text(root / "proc/cpuinfo"), re.M)
    if not flags and not _VIRTUAL.search(product):
        return None
    name = product or _line(root / "sys/hypervisor/type")
    return f"virtual machine ({name})" if name else "virtual machine"


def _gpu(root: Path) -> str | None:
    """Return the first GPU that NVIDIA's driver knows; others are not looked for."""
    for card in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        model = re.search(r"^Model:\s*(.+)$", _text(card), re.M)
        if model:
            return model[1].strip()
    return None


def _memory() -> int:
    """Return the bytes of memory, 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux, or not ours to read
        return ""


def _line(path: Path) -> str | None:
    return _text(path).strip() or None
