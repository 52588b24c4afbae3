"""The shape of the code: which package may import which, and how large its parts may be."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import m2dexport

PACKAGE = Path(m2dexport.__file__).parent
#: Bottom up. A package, or a module of the top level, imports only from those before it.
ORDER = (
    "errors",
    "lines",
    "files",
    "progress",
    "precisions",
    "cores",
    "processor",
    "batches",
    "strict",
    "data",
    "checkpoint",
    "vectors",
    "latent",
    "reference",
    "align",
    "slice",
    "graph",
    "quantize",
    "engines",
    "runtime",
    "measure",
    "serve",
    "build",
    "consumers",
    "profile",
    "report",
    "cli",
    "__main__",
)
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 50
MOST_PARAMETERS = 7
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def modules() -> dict[str, ast.Module]:
    """Return the syntax tree of every module, by its dotted name; packages by their own."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = [PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts]
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def is_package(module: str) -> bool:
    return (PACKAGE.parent / Path(*module.split(".")) / "__init__.py").exists()


def imports_of(module: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and target of every import of m2dexport's own, wherever in the module it stands.

    The target is a module where the imported name is one, else the module that the name is in.
    """
    package = module if is_package(module) else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            source = importlib.util.resolve_name(relative, package) if node.level else relative
            names = [f"{source}.{alias.name}" for alias in node.names]
            targets = [name if name in modules() else source for name in names]
        else:
            continue
        yield from ((node.lineno, target) for target in targets if target in modules())


def layer(module: str) -> str:
    """Return the package, or the module of the top level, that a module belongs to."""
    return [*module.split("."), ""][1]


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Yield every function and method, also those inside others, by qualified name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function | ast.ClassDef):
            name = f"{prefix}{node.name}"
            if isinstance(node, Function):
                yield name, node
            yield from functions(node, f"{name}.")
        else:
            yield from functions(node, prefix)


def test_the_declared_order_names_every_package_and_module_of_the_top_level() -> None:
    assert set(ORDER) == {layer(module) for module in modules()} - {""}


@pytest.mark.parametrize(
    ("module", "source", "targets"),
    [
        ("vectors.codecs", "import m2dexport.errors as e", ["errors"]),
        ("vectors.codecs", "from m2dexport import errors, __version__", ["errors", ""]),
        ("vectors.codecs", "from m2dexport.cli import group", ["cli.group"]),
        ("vectors.codecs", "from m2dexport.cli.group import cli", ["cli.group"]),
        ("vectors.codecs", "from ..checkpoint.open import Checkpoint", ["checkpoint.open"]),
        ("vectors.codecs", "from . import ranking", ["vectors.ranking"]),
        ("vectors", "from .ranking import rank", ["vectors.ranking"]),
        ("vectors", "def f():\n    if TYPE_CHECKING:\n        from m2dexport import cli", ["cli"]),
        ("vectors.codecs", "import numpy, m2dexportable", []),
    ],
)
def test_an_import_is_read_in_every_form(module: str, source: str, targets: list[str]) -> None:
    found = imports_of(f"m2dexport.{module}", ast.parse(source))
    assert [name.removeprefix("m2dexport").lstrip(".") for _, name in found] == targets


def test_a_module_imports_only_from_packages_before_its_own() -> None:
    wrong = []
    for module, tree in modules().items():
        here = layer(module)
        for line, target in imports_of(module, tree) if here else ():
            there = layer(target)
            if there and there != here and ORDER.index(there) > ORDER.index(here):
                wrong.append(f"{module}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_module_uses_the_public_interface_of_the_package_itself() -> None:
    """`from m2dexport import build`, of a function that is offered there, is for programs."""
    wrong = [
        f"{module}:{node.lineno}"
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == PACKAGE.name
        for alias in node.names
        if alias.name != "__version__" and f"{PACKAGE.name}.{alias.name}" not in modules()
    ]
    assert not wrong, "\n".join(wrong)


def test_the_modules_of_a_package_do_not_import_each_other_in_a_circle() -> None:
    graph = {
        module: {target for _, target in imports_of(module, tree) if target != module}
        for module, tree in modules().items()
        if module != PACKAGE.name
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_file_is_longer_than_400_lines() -> None:
    sizes = {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    long = [f"{name}: {size}" for name, size in sizes.items() if size > MOST_LINES_OF_A_FILE]
    assert not long, "\n".join(long)


def test_no_function_is_longer_than_50_lines_with_its_docstring() -> None:
    long = [
        f"{module}: {name}: {size}"
        for module, tree in modules().items()
        for name, node in functions(tree)
        if (size := node.end_lineno - node.lineno + 1) > MOST_LINES_OF_A_FUNCTION  # type: ignore[operator]
    ]
    assert not long, "\n".join(long)


def test_no_public_function_has_more_than_7_parameters() -> None:
    """What has a name counts; ``**options``, by which commands hand a recipe on, does not."""
    many = [
        f"{module}: {name}: {count}"
        for module, tree in modules().items()
        for name, node in functions(tree)
        if not any(part.startswith("_") for part in name.split("."))
        if (count := parameters(node)) > MOST_PARAMETERS
    ]
    assert not many, "\n".join(many)


def parameters(function: Function) -> int:
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])
