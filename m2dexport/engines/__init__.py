"""Engines: one module each, with the same few functions.

* ``files_from_onnx``: an ONNX graph -> the content of the engine's own files, in the order of
  ``artifact.GRAPH_FILES``;
* ``load``: those files, by path or content -> a session;
* ``run``: a session, token ids and mask -> the graph's outputs.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

from m2dexport.errors import M2DError, MissingExtra, UsageError

_MODULES = {"onnx": "onnxruntime", "openvino": "openvino"}


def engine_module(name: str) -> ModuleType:
    """Return the module of an engine, as an artifact or a target names it.

    Raises:
        UsageError: when this version cannot run that engine.
        MissingExtra: when the engine's own package is not installed.
    """
    if name not in _MODULES:
        raise UsageError(f"the engine {name} cannot be run; choose from {', '.join(_MODULES)}.")
    package = _MODULES[name]
    try:
        return importlib.import_module(f"{__name__}.{package}.run")
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingExtra(f"The engine {name}", package, package) from error


def engine_version(name: str) -> tuple[str, str]:
    """Return the package of an engine and the version that is installed, such as "1.32.0"."""
    package = _MODULES[name]
    return package, str(importlib.import_module(package).__version__).partition("-")[0]


def require_version(name: str, oldest: str) -> None:
    """Refuse a graph that the installed engine is too old for.

    Args:
        name: the engine, as in ``engine_module``.
        oldest: the version that knows every operator of the graph, such as "1.22".

    Raises:
        M2DError: when the installed version is older.
    """
    package, installed = engine_version(name)
    needed = tuple(int(part) for part in oldest.split("."))
    found = tuple(int(part) for part in installed.split(".")[: len(needed)])
    if found < needed:
        raise M2DError(
            f"the graph needs {package} {oldest} or newer and {installed} is installed; "
            f"upgrade {package}, or build with other weights, such as int8."
        )


def threads_for(threads: int | None) -> int:
    """Return how many threads a session gets: as asked for, within what this process may use.

    Raises:
        UsageError: when fewer than one is asked for.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads cannot run anything; ask for 1 or more.")
    return min(threads or usable_cores(), usable_cores())


def usable_cores() -> int:
    """Return how many cores this process may use: its affinity mask within its cgroup's quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return cores
