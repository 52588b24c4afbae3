"""The base install, in an environment that has nothing else: what a device can do, and its size."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_artifact import tiny_artifact

import m2dexport
from m2dexport.cli import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
#: Their packages are imported by a device; nothing else that is installed may be.
DISTRIBUTIONS = {"click", "m2dexport", "numpy", "onnxruntime", "tokenizers"}
#: What a device needs, in m2dexport/.
MODULES = (
    *("*.py", "data/*.py", "vectors/codecs.py", "vectors/ranking.py", "engines/__init__.py"),
    *("engines/onnxruntime/run.py", "runtime/*.py", "measure/*.py"),
    "cli/*.py",
)
#: Torch's, rich's, and the command line, which would run.
PRINT = {"cell_tables.py", "choices.py", "columns.py", "inspection.py", "tables.py", "verdicts.py"}
NOT_NEEDED = {"latent.py", *PRINT, "__main__.py"}
NEED_THE_TOOLCHAIN = {
    "inspect": (),
    "slice": ("--layers", "1"),
    "build": ("--out", "artifact-2"),
    "quantize": ("artifact", "--out", "artifact-2"),
    "profile": (),
    "select": ("profile.json", "--p95-ms", "5"),
    "check": ("profile.json", "--baseline", "profile.json"),
    "bundle": ("profile.json", "--cell", "2x64-fp32-float32", "--out", "cell.m2d"),
    "export": ("artifact", "--for", "onnx", "--out", "exported"),
}


@dataclass(frozen=True)
class Device:
    """An environment with the base install, and a folder to work in."""

    scripts: Path
    packages: Path
    folder: Path

    def m2dexport(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return self._run(str(self.scripts / "m2dexport"), *arguments, stdin=stdin)

    def python(self, code: str) -> str:
        ran = self._run(str(self.scripts / "python"), "-c", code)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def _run(self, *command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self.folder,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    """A new environment with the wheel, installed as a user does; an artifact and its bundle."""
    folder = tmp_path_factory.mktemp("device")
    python = [sys.executable, "-m"]
    build = [*python, "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    install = [*python, "pip", "--python", str(folder / "env"), "install", "--quiet"]
    subprocess.run([*install, "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True)
    (packages,) = (folder / "env").rglob("site-packages")
    (scripts,) = {path.parent for path in (folder / "env").rglob("m2dexport") if path.is_file()}
    tiny_artifact(folder / "artifact")
    device = Device(scripts, packages, folder)
    packed = device.m2dexport("bundle", "artifact", "--out", "edge.m2d")
    assert packed.returncode == 0, packed.stderr
    return device


def test_a_device_verifies_and_encodes(device) -> None:
    verified = device.m2dexport("verify", "edge.m2d")
    assert (verified.returncode, verified.stderr) == (0, "")
    encoded = device.m2dexport("encode", "edge.m2d", stdin="find a guitar\nanother\n")
    assert encoded.returncode == 0
    assert [len(json.loads(line)["vector"]) for line in encoded.stdout.splitlines()] == [12, 12]


def test_doctor_says_what_a_device_has_and_the_install_lines_of_what_it_lacks(device) -> None:
    ran = device.m2dexport("doctor")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.search(r"^onnx +onnxruntime [\d.]+ \(needs 1\.17 or newer\): ", ran.stdout, re.M)
    assert 'needs the openvino package; run: pip install "m2dexport[openvino]".' in " ".join(
        ran.stdout.split()
    )
    assert re.search(r"^\[export\] .* missing: .*torch", ran.stdout, re.M | re.S)
    for extra in ("export", "serve"):
        assert f'pip install "m2dexport[{extra}]"' in ran.stdout
    assert max(map(len, ran.stdout.splitlines())) <= 80


def test_a_device_imports_only_what_the_base_install_names(device) -> None:
    named = {re.split(r"[^\w-]", text)[0] for text in PROJECT["dependencies"]}
    assert named | {"m2dexport"} == DISTRIBUTIONS
    used = device.python(
        "import sys, pathlib, m2dexport, m2dexport.cli\n"
        "from importlib.metadata import packages_distributions\n"
        "m2dexport.load('edge.m2d').encode(['a guitar'])\n"
        "m2dexport.verify_bundle(pathlib.Path('edge.m2d'))\n"
        "installed = packages_distributions()\n"
        "tops = {name.partition('.')[0] for name in sys.modules}\n"
        "print(*{dist for top in tops for dist in installed.get(top, ())})"
    )
    assert set(used.split()) == DISTRIBUTIONS


def test_every_module_that_a_device_needs_imports(device) -> None:
    package = Path(m2dexport.__file__).parent
    found = [path for pattern in MODULES for path in package.glob(pattern)]
    files = [path for path in found if path.name not in NOT_NEEDED]
    parts = [path.relative_to(package.parent).with_suffix("").parts for path in files]
    names = [".".join(part).removesuffix(".__init__") for part in parts]
    assert {"m2dexport.errors", "m2dexport.vectors.ranking", "m2dexport.cli.bundles"} < {*names}
    device.python(f"import importlib\nfor name in {names}: importlib.import_module(name)")


def test_every_command_explains_itself_on_a_device(device) -> None:
    assert device.m2dexport("--version").stdout == f"m2dexport, version {m2dexport.__version__}\n"
    for command in ([], *([name] for name in cli.commands)):
        shown = device.m2dexport(*command, "--help")
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.startswith(f"Usage: {' '.join(['m2dexport', *command])} ")


@pytest.mark.parametrize("command", NEED_THE_TOOLCHAIN)
def test_a_command_that_needs_the_toolchain_names_its_install_line(device, command) -> None:
    (device.folder / "profile.json").write_text("{}")
    ran = device.m2dexport(command, *NEED_THE_TOOLCHAIN[command])
    assert (ran.returncode, ran.stdout) == (1, "")
    assert re.fullmatch(
        r'Error: [^\n]+ needs the [\w.-]+ package; run: pip install "m2dexport\[export\]"\.\n',
        ran.stderr,
    )


def test_a_name_that_needs_the_toolchain_says_its_install_line(device) -> None:
    code = "import m2dexport as m\ntry: m.open_checkpoint\nexcept m.M2DError as e: print(e)"
    sentence = device.python(code)
    assert sentence.startswith("m2dexport.open_checkpoint needs the ")
    assert sentence.endswith(' package; run: pip install "m2dexport[export]".\n')


def test_every_command_works_on_a_device_or_is_known_to_need_the_toolchain() -> None:
    needs_nothing = {"verify", "encode", "bench", "doctor"}
    assert set(cli.commands) == {*NEED_THE_TOOLCHAIN, *needs_nothing, "serve"}


def test_serve_names_the_install_line_of_its_extra(device) -> None:
    ran = device.m2dexport("serve", "edge.m2d")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert re.fullmatch(r'Error: [^\n]+ run: pip install "m2dexport\[serve\]"\.\n', ran.stderr)


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_base_install_weighs_what_a_page_says(device, page) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    (stated,) = re.findall(r"base install takes (\d+) MB", text)
    size = sum(path.stat().st_size for path in device.packages.rglob("*") if path.is_file()) / 1e6
    assert size == pytest.approx(float(stated), rel=0.25)


def test_every_extra_that_a_message_can_name_exists() -> None:
    """``MissingExtra(purpose, package, extra)``, wherever it is raised with a literal extra."""
    extras = PROJECT["optional-dependencies"]
    named = set()
    for path in Path(m2dexport.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "MissingExtra":
                named |= {arg.value for arg in node.args[2:] if isinstance(arg, ast.Constant)}
    assert named
    assert named <= set(extras)


def test_the_extra_of_developers_has_every_other_one() -> None:
    extras = PROJECT["optional-dependencies"]
    (every,) = [text for text in extras["dev"] if text.startswith("m2dexport[")]
    named = set(re.findall(r"[a-z-]+", every.removeprefix("m2dexport")))
    assert named == set(extras) - {"dev", "tensorrt"}  # which comes from no registry


def test_one_file_runs_where_nothing_is_installed(device, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    from make_pyz import pack

    pack(device.packages, tmp_path / "run.pyz")
    ran = subprocess.run(
        [sys._base_executable, "-I", tmp_path / "run.pyz", "verify", device.folder / "edge.m2d"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "SHIV_ROOT": str(tmp_path)},
    )
    assert ran.returncode == 0, ran.stderr
    assert "golden texts reproduced" in ran.stdout
