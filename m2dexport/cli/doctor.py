"""The command on the environment: doctor."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from m2dexport.cli.console import print_json
from m2dexport.cli.group import cli
from m2dexport.cli.options import json_option
from m2dexport.engines import DEFAULT_ENGINE
from m2dexport.errors import M2DError

if TYPE_CHECKING:
    from m2dexport.runtime.doctor import Diagnosis, EngineState, Package

_WIDTH = 80
#: A command to be copied, which must stay on one line, and what holds it together there.
_COMMAND = re.compile(r'pip install "[^"]+"')
_GLUE = "\N{NO-BREAK SPACE}"


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine has and lacks: engines, packages.

    The exit code is 0 when the engine onnx works here.

    \b
    Examples:
      m2dexport doctor
      m2dexport doctor --json
    """
    from m2dexport.runtime.doctor import examine

    found = examine()
    if as_json:
        print_json({**asdict(found), "problem": found.problem})
    else:
        paragraphs = list(_paragraphs(found))
        indent = max(len(label) for label, _ in paragraphs) + 1
        for label, text in paragraphs:
            click.echo(_wrapped(label, text, indent))
    if found.problem is not None:
        raise M2DError(f"the engine {DEFAULT_ENGINE} does not work here: {found.problem}")


def _paragraphs(found: Diagnosis) -> Iterator[tuple[str, str]]:
    """Yield what each paragraph is about, and its text."""
    yield "m2dexport", f"{found.m2dexport}, Python {found.python}, {found.system}"
    flags = " ".join(found.processor.flags) or "no flags known"
    cores = f"{found.usable_cores} of {found.cores} cores"
    yield "processor", f"{found.processor.model}, {cores} usable ({flags})"
    for engine in found.engines:
        yield engine.name, _of_engine(engine)
    for extra in dict.fromkeys(each.extra for each in found.packages if each.needed):
        yield (
            "packages" if extra is None else f"[{extra}]",
            _of_packages([each for each in found.packages if each.extra == extra and each.needed]),
        )
    beside = [each for each in found.packages if not each.needed and each.installed]
    if beside:
        yield "beside", _of_packages(beside)
    for note in found.notes:
        yield "note", note


def _of_engine(engine: EngineState) -> str:
    needs = f" (needs {engine.needed} or newer)" if engine.needed else ""
    text = f"{engine.package} {engine.installed}{needs}" if engine.installed else ""
    if engine.problem is not None:
        return f"{text}: {engine.problem}" if text else engine.problem
    text += f": {', '.join(engine.devices)}"
    for weights, oldest in engine.too_old_for.items():
        text += f"; weights={weights} needs {engine.package} {oldest} or newer"
    if engine.broken_build is not None:
        text += f"; builds fail: {engine.broken_build}"
    return text


def _of_packages(packages: Sequence[Package]) -> str:
    there = [f"{each.name}{_GLUE}{each.installed}" for each in packages if each.installed]
    missing = [each for each in packages if not each.installed]
    text = ", ".join(there) or "not installed"
    if missing:
        lacks = f"; missing: {', '.join(each.name for each in missing)}" if there else ""
        extra = f"[{missing[0].extra}]" if missing[0].extra else ""
        text += f'{lacks}; run: pip install "m2dexport{extra}"'
    return text


def _wrapped(label: str, text: str, indent: int) -> str:
    glued = _COMMAND.sub(lambda found: found[0].replace(" ", _GLUE), text)
    return textwrap.fill(
        glued,
        _WIDTH,
        initial_indent=f"{label:<{indent}}",
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    ).replace(_GLUE, " ")
