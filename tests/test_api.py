"""What `import m2dexport` offers: the names, where they come from, and that it costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import m2dexport

ROOT = Path(__file__).parent.parent
NAMES = {
    *(
        "Basis",
        "Budget",
        "Checkpoint",
        "Course",
        "Cut",
        "Device",
        "Encoder",
        "M2DError",
        "Plan",
        "Recipe",
    ),
    *("open_checkpoint", "slice_checkpoint", "build_artifact", "quantize_artifact"),
    *("load_task", "profile_checkpoint", "read_profile", "write_profile", "select_cell"),
    *("open_profiled", "bundle_cell", "write_bundle", "verify_bundle", "load"),
    *("build_aligned", "build_for_targets", "read_index", "read_vectors", "Deployment"),
    *("bundle_cells", "write_nested", "Nested"),
}


def test_the_public_names_are_these() -> None:
    assert set(m2dexport.__all__) == NAMES
    assert set(dir(m2dexport)) > NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_public_name_resolves_to_a_documented_object(name: str) -> None:
    value = getattr(m2dexport, name)
    assert value.__name__ == name
    assert value.__doc__


def test_type_checkers_find_the_same_objects() -> None:
    """The imports for type checkers name the module from which each name is really taken."""
    tree = ast.parse(Path(m2dexport.__file__).read_text(encoding="utf-8"))
    (checking,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert ast.unparse(checking.test) == "TYPE_CHECKING"
    declared = {alias.name: line.module for line in checking.body for alias in line.names}
    assert declared == {name: getattr(m2dexport, name).__module__ for name in NAMES}


def test_importing_it_imports_only_the_standard_library() -> None:
    code = "import sys, m2dexport; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-S", "-c", code], text=True, cwd=ROOT)
    known = {*sys.stdlib_module_names, "__main__"}
    others = [name for name in loaded.split() if name.partition(".")[0] not in known]
    assert others == ["m2dexport"]


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="module 'm2dexport' has no attribute 'slicer'"):
        _ = m2dexport.slicer
