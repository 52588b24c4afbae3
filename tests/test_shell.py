"""The command line as a program on a machine: its streams, its environment, its help."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import tiny_checkpoint
from tiny_artifact import tiny_artifact

from m2dexport.cli import cli
from m2dexport.cli.group import _ORDER
from m2dexport.errors import one_line
from m2dexport.runtime.bundle import write_bundle

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX's streams and users")


def process(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "m2dexport", *map(str, arguments)]
    options.setdefault("stdout", subprocess.PIPE)
    return subprocess.run(
        command, stderr=subprocess.PIPE, text=True, check=False, timeout=120, **options
    )


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    write_bundle(tiny_artifact(folder / "artifact"), folder / "a.m2d")
    return folder / "a.m2d"


def test_the_help_lists_whole_summaries_in_the_order_of_work() -> None:
    shown = CliRunner().invoke(cli, ["--help"], terminal_width=80).output
    listed = shown[shown.index("Commands:") :].splitlines()[1:]
    assert [line.split()[0] for line in listed] == list(_ORDER)
    assert set(_ORDER) == set(cli.commands)
    for line in listed:
        assert re.fullmatch(r"  \w+ +[A-Z].*[a-z\"]\.", line), line


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        *(("convert", "build"), ("optimize", "quantize"), ("prune", "slice")),
        *(("run", "encode"), ("embed", "encode"), ("bundel", "bundle")),
    ],
)
def test_a_command_typed_by_habit_suggests_ours(typed: str, meant: str) -> None:
    result = CliRunner().invoke(cli, [typed, "--out", "x"])
    assert result.exit_code == 2
    assert f"Did you mean {meant!r}?" in result.stderr


def test_a_shell_completes_commands() -> None:
    environment = {**os.environ, "COMP_WORDS": "m2dexport b", "COMP_CWORD": "1"}
    code = "from m2dexport.cli import cli; cli(prog_name='m2dexport')"
    completed = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "_M2DEXPORT_COMPLETE": "bash_complete"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.stdout.split() == ["plain,build", "plain,bundle", "plain,bench"]


@posix
@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("verify", "--help")])
def test_help_on_a_full_device_is_one_sentence(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        ran = process(*arguments, stdout=full)
    assert (ran.returncode, ran.stderr) == (1, "Error: No space left on device.\n")


@posix
@pytest.mark.parametrize("command", ["verify", "encode"])
def test_output_on_a_full_device_is_one_sentence(command: str, packed: Path) -> None:
    with Path("/dev/full").open("w") as full:
        ran = process(command, packed, stdout=full, stdin=subprocess.DEVNULL)
        ran = process(command, packed, stdout=full, input="find a guitar\n")
    assert ran.returncode == 1
    assert "No space left on device" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


@posix
def test_a_reader_that_has_left_is_met_with_silence(packed: Path) -> None:
    for arguments in (("--help",), ("verify", packed), ("encode", packed)):
        read, write = os.pipe()
        os.close(read)
        with open(write, "w") as nobody:  # noqa: PTH123
            ran = process(*arguments, stdout=nobody, input="find a guitar\n")
        assert (ran.returncode, ran.stderr) == (1, "")


@posix
def test_a_process_without_stdout_works(packed: Path) -> None:
    shell = '"$0" -m m2dexport verify "$1" >&- && "$0" -m m2dexport --help >&-'
    ran = subprocess.run(
        ["sh", "-c", shell, sys.executable, packed], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_prompt_in_another_script_is_shown_in_any_encoding(tmp_path: Path) -> None:
    prompts = {"query": "查询: é 😀 "}
    code = (
        "import contextlib, sys\n"
        "from m2dexport.cli import main\n"
        "model = sys.argv[1]\n"
        "for last in ([], ['--json']):\n"
        "    sys.argv[1:] = ['inspect', '--model', model, *last]\n"
        "    with contextlib.suppress(SystemExit): main()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, tiny_checkpoint(tmp_path / "model", prompts=prompts)],
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        encoding="cp1252",
        check=False,
    )
    assert ran.stderr == ""
    table, brace, found = ran.stdout.partition("\n{\n")
    assert "prompts" in table
    assert json.loads(brace + found)["prompts"]["query"] == prompts["query"]


def require_usable(packed: Path, code: str, env: Mapping[str, str]) -> None:
    """Run both commands that use a bundle, in a process that code has prepared."""
    for command in ("verify", "encode"):
        ran = subprocess.run(
            [
                sys.executable,
                "-c",
                f"{code}from m2dexport.cli import main; main()",
                command,
                packed,
            ],
            input="find a guitar\n",
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr


@posix
def test_a_user_without_a_name_and_a_home_can_run_a_bundle(packed: Path) -> None:
    code = (
        "import pwd\n"
        "def nobody(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')\n"
        "pwd.getpwuid = nobody\n"
    )
    homeless = {key: value for key, value in os.environ.items() if key != "HOME"}
    require_usable(packed, code, homeless)


def test_a_missing_package_of_the_toolchain_is_named_with_the_install_line(tmp_path) -> None:
    hidden = (
        "import sys\n"
        "class Without:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'torch': raise ModuleNotFoundError('no torch', name=name)\n"
        "sys.meta_path.insert(0, Without)\n"
        "from m2dexport.cli import main; main()"
    )
    model = tiny_checkpoint(tmp_path / "model")
    ran = subprocess.run(
        [sys.executable, "-c", hidden, "build", "--model", model, "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (
        1,
        'Error: The command build needs the torch package; run: pip install "m2dexport[export]".\n',
    )


def test_another_missing_package_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken install, whose traceback says more than a guess at an extra."""
    monkeypatch.setitem(sys.modules, "m2dexport.runtime.loading", None)
    result = CliRunner().invoke(cli, ["encode", "a.m2d"])
    assert isinstance(result.exception, ModuleNotFoundError)


def test_a_message_quotes_foreign_text_as_one_short_line() -> None:
    assert one_line("two\n\n  lines\t") == "two lines"
    assert one_line("\x1b[31mred \ud800") == "\\x1b[31mred \\ud800"
    assert one_line("a" * 10**6) == "a" * 197 + "..."
    assert one_line(ValueError("a" * 200)) == "a" * 200


def test_an_error_stays_one_line_whatever_a_path_is_called() -> None:
    result = CliRunner().invoke(cli, ["verify", "new\nline \x1b[31m" + "a/" * 1900])
    assert result.exit_code == 2
    assert len(result.stderr) < 2100
    assert len(result.stderr.splitlines()) == 1
    assert "\x1b" not in result.stderr


def test_bundles_are_used_without_a_trace_outside(tmp_path: Path, packed: Path) -> None:
    """onnxruntime's telemetry would write a device id and a database while it is imported."""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "ORT_"))}
    folders = {name: str(temporary) for name in ("TMPDIR", "TEMP", "TMP")}
    environment = {**kept, **folders, "HOME": str(home), "USERPROFILE": str(home)}
    for command in ("verify", "encode"):
        ran = process(command, packed, input="find a guitar\n", env=environment)
        assert ran.returncode == 0, ran.stderr
    assert [*home.rglob("*"), *temporary.rglob("*")] == []


def test_bundles_are_used_without_a_socket(packed: Path) -> None:
    blocked = (
        "import socket, sys\n"
        "def refuse(*_, **__): raise OSError('a socket was asked for')\n"
        "socket.socket = socket.create_connection = socket.getaddrinfo = refuse\n"
    )
    require_usable(packed, blocked, os.environ)


def test_onnxruntime_is_imported_by_its_engine_only() -> None:
    """Which switches its telemetry off before; importing m2dexport sets nothing."""
    root = Path(__file__).parent.parent / "m2dexport"
    importing = re.compile(r"^\s*(import|from) onnxruntime\b", re.M)
    found = [path for path in root.rglob("*.py") if importing.search(path.read_text("utf-8"))]
    assert {path.parent for path in found} == {root / "engines" / "onnxruntime"}
    code = (
        "import os; before = dict(os.environ)\n"
        "import m2dexport, m2dexport.cli, m2dexport.engines; print(os.environ == before)\n"
        "from m2dexport.engines import engine_version\n"
        "engine_version('onnx'); print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ORT_")}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == ["True", "1"]
