"""Slice, quantize, profile and bundle 2D Matryoshka sentence-embedding models.

What a program needs is here, by name; ``docs/python.md`` shows it at work. Each name is imported
when it is first used: on a device, which has the base install only, ``load``, ``Encoder``,
``Nested``, ``Device``, ``write_bundle``, ``write_nested``, ``verify_bundle``, ``read_index`` and
``read_vectors`` work; the others need ``m2dexport[export]``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m2dexport.build.aligned import build_aligned
    from m2dexport.build.build import build_artifact, quantize_artifact
    from m2dexport.build.recipe import Recipe
    from m2dexport.checkpoint.open import Checkpoint, open_checkpoint
    from m2dexport.engines import Device
    from m2dexport.errors import M2DError
    from m2dexport.profile.deploy import Deployment, bundle_cell, bundle_cells, open_profiled
    from m2dexport.profile.manifest import read_profile, write_profile
    from m2dexport.profile.plan import Plan
    from m2dexport.profile.release import Basis, build_for_targets
    from m2dexport.profile.select import select_cell
    from m2dexport.profile.sweep import Course, profile_checkpoint
    from m2dexport.profile.target import Budget
    from m2dexport.runtime.bundle import verify_bundle, write_bundle
    from m2dexport.runtime.encoder import Encoder
    from m2dexport.runtime.index import read_index
    from m2dexport.runtime.loading import load
    from m2dexport.runtime.nested import Nested
    from m2dexport.runtime.packing import write_nested
    from m2dexport.runtime.vector_files import read_vectors
    from m2dexport.slice.slicing import Cut, slice_checkpoint
    from m2dexport.vectors.tasks import load_task

__version__ = "0.1.0"

__all__ = [
    "Basis",
    "Budget",
    "Checkpoint",
    "Course",
    "Cut",
    "Deployment",
    "Device",
    "Encoder",
    "M2DError",
    "Nested",
    "Plan",
    "Recipe",
    "build_aligned",
    "build_artifact",
    "build_for_targets",
    "bundle_cell",
    "bundle_cells",
    "load",
    "load_task",
    "open_checkpoint",
    "open_profiled",
    "profile_checkpoint",
    "quantize_artifact",
    "read_index",
    "read_profile",
    "read_vectors",
    "select_cell",
    "slice_checkpoint",
    "verify_bundle",
    "write_bundle",
    "write_nested",
    "write_profile",
]

_MODULES = {
    "build.aligned": ("build_aligned",),
    "build.build": ("build_artifact", "quantize_artifact"),
    "build.recipe": ("Recipe",),
    "checkpoint.open": ("Checkpoint", "open_checkpoint"),
    "engines": ("Device",),
    "errors": ("M2DError",),
    "profile.deploy": ("Deployment", "bundle_cell", "bundle_cells", "open_profiled"),
    "profile.manifest": ("read_profile", "write_profile"),
    "profile.plan": ("Plan",),
    "profile.release": ("Basis", "build_for_targets"),
    "profile.select": ("select_cell",),
    "profile.sweep": ("Course", "profile_checkpoint"),
    "profile.target": ("Budget",),
    "runtime.bundle": ("verify_bundle", "write_bundle"),
    "runtime.encoder": ("Encoder",),
    "runtime.loading": ("load",),
    "runtime.nested": ("Nested",),
    "runtime.packing": ("write_nested",),
    "runtime.index": ("read_index",),
    "runtime.vector_files": ("read_vectors",),
    "slice.slicing": ("Cut", "slice_checkpoint"),
    "vectors.tasks": ("load_task",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_MODULE_OF[name]}")
    except ModuleNotFoundError as error:
        from m2dexport.errors import missing_toolchain

        missing = missing_toolchain(f"m2dexport.{name}", error)
        if missing is None:
            raise
        raise missing from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
