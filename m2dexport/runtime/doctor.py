"""What this machine and environment have for running and making bundles, and what ails them."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from m2dexport import __version__
from m2dexport.cores import usable_cores
from m2dexport.engines import (
    DEFAULT_ENGINE,
    ENGINES,
    Device,
    engine_maker,
    engine_of,
    engine_runner,
    engine_version,
    is_older,
)
from m2dexport.errors import M2DError, one_line
from m2dexport.processor import Processor, read_processor

_SELF = "m2dexport"
_DEVELOPERS = "dev"
#: What bundles are compared with, and m2dexport does not need.
_BESIDE = ("sentence-transformers",)
#: The first onnxruntime that loads beside numpy 2.
_ONNXRUNTIME_FOR_NUMPY_2 = "1.19"
#: Where drivers of NVIDIA show: on Linux, and in Windows' Linux.
_GPU_FILES = ("/dev/nvidiactl", "/dev/dxg")
_LONGEST = 500  # characters of what a loader says


@dataclass(frozen=True)
class EngineState:
    """An engine as this environment has it."""

    name: str  # in ``ENGINES``
    package: str
    installed: str | None  # its version
    needed: str | None  # the oldest version that runs; None: unknown
    devices: tuple[str, ...]  # providers that it offers here
    problem: str | None  # why it does not work, and what to do; None: it works
    #: Weights that the installed version is too old for -> the oldest one that runs them.
    too_old_for: Mapping[str, str]
    broken_build: str | None  # why building for it fails where the toolchain is installed


@dataclass(frozen=True)
class Package:
    """A package that m2dexport uses."""

    name: str
    installed: str | None  # its version
    needed: str | None  # the oldest version; None: any
    extra: str | None  # of m2dexport, that installs it; None: the base install does


@dataclass(frozen=True)
class Diagnosis:
    """A machine and an environment."""

    m2dexport: str
    python: str
    system: str
    processor: Processor
    cores: int  # of the machine
    usable_cores: int  # by this process
    engines: tuple[EngineState, ...]
    packages: tuple[Package, ...]
    notes: tuple[str, ...]  # what is wrong, or odd, beside the engines' problems

    @property
    def problem(self) -> str | None:
        """Why the default engine does not work; None: it does."""
        return next(each.problem for each in self.engines if each.name == DEFAULT_ENGINE)


def examine() -> Diagnosis:
    """Examine this machine and environment, whatever is missing or broken in it."""
    providers = metadata.packages_distributions()
    packages = _packages()
    return Diagnosis(
        m2dexport=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        processor=read_processor(),
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        engines=tuple(_engine(name, providers, packages) for name in ENGINES),
        packages=packages,
        notes=(
            *_conflicts(providers),
            *_outdated(packages),
            *_numpy_mismatch(packages),
            *_idle_cuda(),
        ),
    )


def _engine(
    name: str, providers: Mapping[str, Sequence[str]], packages: Sequence[Package]
) -> EngineState:
    package = engine_of(name).package
    wheels = providers.get(package, ())
    names = {_normal(each) for each in (package, *wheels)}
    installed = next((_version(each) for each in wheels), None)
    devices: tuple[str, ...] = ()
    problem = broken_build = None
    too_old_for: Mapping[str, str] = {}
    try:
        runner = engine_runner(name)
        _, installed = engine_version(name)
        devices = runner.devices()
        runner.require_device(Device())
    except Exception as error:  # whatever a broken install raises must not hide the other engines
        problem = _said(error)
    else:
        try:
            too_old_for = _too_old_for(name, installed)
        except Exception as error:  # likewise
            broken_build = _said(error)
    return EngineState(
        name=name,
        package=package,
        installed=installed,
        needed=next((each.needed for each in packages if each.name in names), None),
        devices=devices,
        problem=problem,
        too_old_for=too_old_for,
        broken_build=broken_build,
    )


def _said(error: Exception) -> str:
    text = one_line(error, _LONGEST)
    return text if isinstance(error, M2DError) else f"{type(error).__name__}: {text}"


def _too_old_for(name: str, installed: str) -> dict[str, str]:
    """Return the weights that an engine's installed version does not run -> what would."""
    try:
        precisions = engine_maker(name).PRECISIONS
    except ModuleNotFoundError:  # on a device, which makes nothing
        return {}
    return {
        weights: needed.oldest
        for weights, needed in precisions.items()
        if is_older(installed, needed.oldest)
    }


def _packages() -> tuple[Package, ...]:
    """Return the packages that m2dexport names, each once, under the first extra that has it."""
    try:
        lines = metadata.requires(_SELF) or []
    except metadata.PackageNotFoundError:  # run from a folder without an install
        lines = []
    found: dict[str, Package] = {}
    for line in lines:
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if name is None or "python_version" in line or (extra and extra[1] == _DEVELOPERS):
            continue
        oldest = re.search(r">=\s*(\d[\d.]*\d)", line)
        key = _normal(name[0])
        package = Package(key, _version(key), oldest and oldest[1], extra and extra[1])
        found.setdefault(key, package)
    for key in _BESIDE:
        found.setdefault(key, Package(key, _version(key), None, None))
    return tuple(found.values())


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _conflicts(providers: Mapping[str, Sequence[str]]) -> list[str]:
    """Name wheels that bring the same package: each overwrites files of the other."""
    notes = []
    for package in dict.fromkeys(engine.package for engine in ENGINES.values()):
        wheels = sorted({_normal(name) for name in providers.get(package, ())})
        if len(wheels) > 1:
            names = " ".join(wheels)
            notes.append(
                f"{' and '.join(wheels)} both bring the package {package} and overwrite each "
                f"other's files; run: pip uninstall -y {names}, then install the one that you need."
            )
    return notes


def _outdated(packages: Sequence[Package]) -> list[str]:
    return [
        f"{each.name} {each.installed} is installed and m2dexport needs {each.needed} or newer; "
        f'run: pip install --upgrade "{_SELF}{f"[{each.extra}]" if each.extra else ""}".'
        for each in packages
        if each.installed and each.needed and is_older(each.installed, each.needed)
    ]


def _numpy_mismatch(packages: Sequence[Package]) -> list[str]:
    installed = {each.name: each.installed for each in packages}
    numpy, runtime = installed.get("numpy"), installed.get("onnxruntime")
    if not numpy or not runtime or is_older(numpy, "2"):
        return []
    if not is_older(runtime, _ONNXRUNTIME_FOR_NUMPY_2):
        return []
    return [
        f"onnxruntime {runtime} was built for numpy 1 and numpy {numpy} is installed; run: "
        f'pip install "onnxruntime>={_ONNXRUNTIME_FOR_NUMPY_2}".'
    ]


def _idle_cuda() -> list[str]:
    """Say that torch brought CUDA to a machine that has no use for it; torch is not imported."""
    torch = importlib.util.find_spec("torch")
    folders = torch.submodule_search_locations if torch else None
    try:
        text = (Path(next(iter(folders or ()))) / "version.py").read_text(encoding="utf-8")
    except (OSError, StopIteration):
        return []
    cuda = re.search(r"^cuda\b.*= ['\"]([\d.]+)['\"]", text, re.M)
    if cuda is None or _has_nvidia_driver():
        return []
    return [
        f"torch was installed with the libraries of CUDA {cuda[1]}, some GB that nothing here "
        "uses, since no NVIDIA driver is found; the CPU build is at "
        "https://download.pytorch.org/whl/cpu."
    ]


def _has_nvidia_driver() -> bool:
    if sys.platform == "win32":
        return shutil.which("nvidia-smi") is not None
    return any(Path(name).exists() for name in _GPU_FILES)
