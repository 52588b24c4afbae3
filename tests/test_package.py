"""The package as a whole: what it ships, what it imports, and whether its documents are true."""

from __future__ import annotations

import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

import m2dexport
from m2dexport.cli import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNTIME = ("runtime.encoder", "runtime.streams", "runtime.bundle", "engines.onnxruntime.run")
HEAVY = ("torch", "transformers", "pydantic", "scipy", "matplotlib", "onnx", "onnx_ir", "psutil")


def commands(document: Path) -> list[list[str]]:
    """Return the arguments of every m2dexport command in a document's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", document.read_text(encoding="utf-8"), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        shlex.split(match[1], comments=True)
        for line in lines
        for match in re.finditer(r"(?:^|[|&] ?)\s*m2dexport ([^|&]+)", line)
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_a_document_exists_with_its_options(document: Path) -> None:
    for name, *arguments in commands(document):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, name
        command.make_context(name, arguments)  # raises on an option that is not there


def test_the_readme_shows_the_whole_way() -> None:
    shown = {arguments[0] for arguments in commands(ROOT / "README.md")}
    assert shown == set(cli.commands)


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (document.parent / target).exists(), target


def test_ci_runs_the_tests_as_the_readme_does() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    install, test = re.search(r"## Test it\n\n```sh\n(.*?) && (.*?)\n```", README).groups()
    assert test in script
    assert install.replace("pip install", "pip install --quiet") in script


def test_the_changelog_begins_with_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.M)[1] == m2dexport.__version__


def test_the_version_is_that_of_the_project_file() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{m2dexport.__version__}"' in project


def test_the_runtime_imports_nothing_heavy() -> None:
    modules = ", ".join(f"m2dexport.{name}" for name in RUNTIME)
    code = f"import sys, {modules}; print(*(n for n in {HEAVY} if n in sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == []


def test_a_bundle_is_used_without_torch_transformers_and_pydantic(tmp_path: Path) -> None:
    """As on a device that has none of them: importing one is an error."""
    from tiny_artifact import tiny_artifact

    artifact = tiny_artifact(tmp_path / "artifact")
    code = (
        "import sys\n"
        f"for name in {HEAVY}: sys.modules[name] = None\n"
        "from m2dexport.cli import main\n"
        "main()\n"
    )
    bundle = str(tmp_path / "a.m2d")
    for arguments in (["bundle", str(artifact), "--out", bundle], ["verify", bundle]):
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
    ran = subprocess.run(
        [sys.executable, "-c", code, "encode", bundle],
        input="find a guitar\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(ran.stdout.splitlines()) == 1


def test_every_module_is_imported() -> None:
    """All of them in one process, which sets no variable and opens no logger for the program."""
    names = [info.name for info in pkgutil.walk_packages(m2dexport.__path__, "m2dexport.")]
    assert len(names) > 60
    code = (
        "import importlib, logging, os, sys\n"
        "before = dict(os.environ)\n"
        f"for name in {[n for n in names if not n.endswith('__main__')]}:\n"
        "    importlib.import_module(name)\n"
        "assert os.environ == before, set(os.environ.items()) ^ set(before.items())\n"
        "assert not logging.getLogger('m2dexport').handlers\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr


def test_the_wheel_carries_checkpoint_data_targets_and_licences(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder

    names = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    for name in (
        "m2dexport/py.typed",
        "m2dexport/data/calibration.txt",
        "m2dexport/data/profile.schema.json",
        "m2dexport/data/checkpoint/model.safetensors",
        "m2dexport/data/checkpoint/LICENSE",
        "m2dexport/data/checkpoint/NOTICE",
        "m2dexport/data/eval/stsb-dev.tsv",
        "m2dexport/data/eval/limit-small/qrels.jsonl",
    ):
        assert name in names
    forced = WheelBuilder(str(ROOT)).config.get_force_include()
    assert "m2dexport/profiles" in forced.values()
