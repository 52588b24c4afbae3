"""The documents are true: their commands and Python blocks run, in order, page by page."""

from __future__ import annotations

import contextlib
import io
import json
import pkgutil
import re
import shlex
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import click
import pytest
import transformers
from click.testing import CliRunner
from tiny import tiny_checkpoint

import m2dexport
from m2dexport.cli import cli
from m2dexport.data import align_texts_path, default_checkpoint, read_texts
from m2dexport.measure import latency
from m2dexport.measure.quantiles import Ratio
from m2dexport.profile import costs, plan

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*PAGES, ROOT / "CONTRIBUTING.md"]
#: Of the calibration texts that ship: enough for ``int8``, and a fifth of the time.
FEW = 200
#: A block that cannot run here says why, in a comment on the line above it.
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```(?P<language>sh|python)\n(?P<text>.*?)^```$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str  # "sh" or "python"
    text: str
    where: str  # README.md:38
    runs: bool

    def lines(self) -> list[str]:
        """Return the commands of a shell block, comments left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if shlex.split(line, comments=True)]


def blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    found = [
        Block(
            match["language"],
            match["text"],
            f"{document.name}:{text.count(chr(10), 0, match.start('text'))}",
            match["reason"] is None,
        )
        for match in BLOCK.finditer(text)
    ]
    assert len(found) == len(re.findall(r"^ *```(?:sh|python)", text, re.M)), document
    return found


def parts(line: str) -> list[list[str]]:
    """Split a line at its pipes, each part into words."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if word in ("|", "&&"):
            found.append([])
        else:
            found[-1].append(word)
    return found


def commands(document: Path) -> list[list[str]]:
    """Return the arguments of every m2dexport command in a document's shell blocks."""
    shell = [block for block in blocks(document) if block.language == "sh"]
    words = [part for block in shell for line in block.lines() for part in parts(line)]
    return [part[1:] for part in words if part[0] == "m2dexport"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_a_document_exists_with_its_options(document: Path) -> None:
    for name, *arguments in commands(document):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, name
        command.make_context(name, arguments)  # raises on an option that is not there


def test_the_readme_shows_the_whole_way() -> None:
    shown = {arguments[0] for arguments in commands(README)}
    assert shown == set(cli.commands)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the checkpoint that ships, with its tokenizer and its depth, and narrow."""
    folder = tiny_checkpoint(
        tmp_path_factory.mktemp("stand-in"),
        config=dict.fromkeys(("hidden_size", "intermediate_size"), 128) | {"num_hidden_layers": 6},
        tokenizer=transformers.AutoTokenizer.from_pretrained(default_checkpoint()),
    )
    grid = [[layers, dim] for layers in range(1, 7) for dim in (32, 64, 128)]
    (folder / "m2dexport.json").write_text(json.dumps({"format": 1, "trained_grid": grid}))
    return folder


@pytest.fixture
def user(stand_in, unmeasured_memory, tmp_path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages name, where the checkpoint that ships is tiny."""
    pairs, retrieval = evaluation_in(tmp_path)
    shipped = tmp_path / "shipped" / "stsb-dev.tsv"
    shipped.parent.mkdir()
    evaluation = (Path(copyfile(pairs, shipped)), retrieval)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("m2dexport.checkpoint.folder.default_checkpoint", lambda: stand_in)
    monkeypatch.setattr("m2dexport.vectors.tasks.default_task_paths", lambda: evaluation)
    monkeypatch.setattr("m2dexport.data.read_texts", lambda path: read_texts(path)[:FEW])
    few_texts = tmp_path / "align.txt"
    few_texts.write_text("\n".join(read_texts(align_texts_path())[:FEW]))
    monkeypatch.setattr("m2dexport.align.texts.align_texts_path", lambda: few_texts)
    monkeypatch.setattr(plan, "default_plan", plan_of_one_size)
    monkeypatch.setattr(costs, "time_shape", quick_latency)
    (tmp_path / "my-checkpoint").symlink_to(stand_in)
    return tmp_path


def plan_of_one_size(checkpoint: m2dexport.Checkpoint) -> plan.Plan:
    """The cells that the pages name: the default grid would take minutes."""
    return plan.Plan((0, 1, 6), (128,), weights=("fp32", "int8"), repeats=3)


def quick_latency(
    group: latency.Loaded[Any], shape: tuple[int, int], conditions: latency.Conditions, *rest: Any
) -> latency.Timed[Any]:
    """Measure, and say 1 ms: what fits a budget must not depend on who else computes here."""
    measured = latency.time_shape(group, shape, replace(conditions, repeats=3), *rest)
    same = {"p50_ms": 1.0, "p95_ms": 1.0, "ratio": Ratio(1.0, 1.0, 1.0)}
    points = {graph: replace(point, **same) for graph, point in measured.points.items()}
    return replace(measured, points=points)


def evaluation_in(folder: Path) -> tuple[Path, Path]:
    """Write pairs and a retrieval set that any model is good at: texts equal or not."""
    words = ("a cat", "two dogs ran", "the guitar", "42 houses", "on a mat", "the big red house")
    pairs, retrieval = folder / "pairs.tsv", folder / "beir-folder"
    lines = [f"5\t{w}\t{w}\n0\t{w}\t{words[i - 1]}\n" for i, w in enumerate(words)]
    pairs.write_text("".join(lines))
    (folder / "corpus.txt").write_text("\n".join(words))
    retrieval.mkdir()
    of = {"corpus": "d", "queries": "q"}
    for name, letter in of.items():
        items = [{"_id": f"{letter}{i}", "text": text} for i, text in enumerate(words)]
        (retrieval / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
    hits = [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(len(words))]
    (retrieval / "qrels.jsonl").write_text("\n".join(map(json.dumps, hits)))
    return pairs, retrieval


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_blocks_of_a_page_run_one_after_the_other(page: Path, user: Path) -> None:
    names: dict[str, object] = {}
    for block in blocks(page):
        if not block.runs:
            continue
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block.text, block.where, "exec"), names)
            continue
        for line in block.lines():
            run(line, block.where)


def run(line: str, where: str) -> None:
    """Run a line; m2dexport's commands in this process, which has torch loaded."""
    said = ""
    for program, *arguments in parts(line):
        if program == "m2dexport":
            result = CliRunner().invoke(cli, arguments, input=said)
            assert result.exit_code == 0, f"{where}: {line}\n{result.output}"
            said = result.stdout
        else:
            assert program in ("echo", "mkdir", "cp"), (
                f"{where}: run {program} or mark the block as not run"
            )
            ran = subprocess.run([program, *arguments], stdout=subprocess.PIPE, check=True)
            said = ran.stdout.decode()


def test_the_python_page_names_all_that_the_package_offers() -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert [name for name in m2dexport.__all__ if f"`{name}`" not in text] == []


def test_the_architecture_page_names_every_module_under_its_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    chapter = text.partition("\n## The packages\n")[2].partition("\n## ")[0]
    paragraphs = re.findall(r"^\*\*(.+?)\*\*(.*?)(?=^\*\*|\Z)", chapter, re.M | re.S)
    named = {title: set(re.findall(r"`([a-z_0-9]+)`", body)) for title, body in paragraphs}
    package = Path(m2dexport.__file__).parent
    there: dict[str, set[str]] = {"Top level.": set(), "data/": set()}
    for path in package.rglob("*.py"):
        first, *others = path.relative_to(package).with_suffix("").parts
        if others:
            there.setdefault(f"{first}/", set()).update({*others} - {"__init__"})
        elif not first.startswith("__"):
            there["Top level."].add(first)
    assert named == there


def test_the_picture_of_the_architecture_names_no_node_by_a_word_of_mermaid() -> None:
    """Such a word is a syntax error, and the page then shows one instead of the picture."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = re.search(r"```mermaid\n(.*?)```", text, re.S)[1]
    arrows = [line for line in picture.splitlines() if "-->" in line]
    assert arrows
    names = re.sub(r"\[.*?\]|\(.*?\)|--[^->]+-->|-->", " ", " ".join(arrows)).split()
    assert not {"graph", "subgraph", "end", "class", "click", "style", "default"} & {*names}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_module_and_function_that_a_document_names_exists(document: Path) -> None:
    packages = "|".join(module.name for module in pkgutil.iter_modules(m2dexport.__path__))
    name = rf"`(?:m2dexport\.)?((?:{packages})\.(?!json|html)[\w.]+)`"
    for found in re.findall(name, document.read_text(encoding="utf-8")):
        pkgutil.resolve_name(f"m2dexport.{found}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_a_document_names_exists(document: Path) -> None:
    files = list((ROOT / "tests").glob("test_*.py"))
    there = {path.name for path in files}
    there.update(*(re.findall(r"^def (test_\w+)", path.read_text(), re.M) for path in files))
    named = re.findall(r"\btest_\w+(?:\.py)?\b(?!\.sh)", document.read_text(encoding="utf-8"))
    assert [name for name in named if name not in there] == []


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (document.parent / target).exists(), target


def test_the_changelog_begins_with_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.M)[1] == m2dexport.__version__


def test_ci_runs_the_tests_as_the_readme_does() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    under_heading = re.compile(r"## Test it\n\n(?:<!--.*?-->\n)?```sh\n(.*?) && (.*?)\n```")
    install, test = under_heading.search(README.read_text(encoding="utf-8")).groups()
    assert test in script
    assert install.replace("pip install", "pip install --quiet") in script
