"""examples/docker: no engine builds the image here; what its Dockerfile says is tried without."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from shutil import copy2, copytree, ignore_patterns

from command_line import m2d
from hatchling.builders.wheel import WheelBuilder
from live_server import live
from tiny_artifact import tiny_artifact

from m2dexport.runtime.bundle import write_bundle

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "docker"
#: Made by the command in the README of the example.
BUNDLE = "edge.m2d"


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile, in order: name and the rest of the line."""
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def named(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def command_of(text: str) -> list[str]:
    found: list[str] = json.loads(text.partition("[")[1] + text.partition("[")[2])
    return found


def copied() -> list[str]:
    """Return what is copied from the folder that the image is built from."""
    return [source for rest in named("COPY") for source in rest.split()[:-1]]


def mounted() -> list[str]:
    """Return what is mounted from that folder."""
    mounts = re.findall(r"--mount=(\S+)", " ".join(named("RUN")))
    options = [dict(each.split("=") for each in mount.split(",")) for mount in mounts]
    return [each["source"] for each in options if "from" not in each]


def test_what_is_copied_exists() -> None:
    assert BUNDLE in copied()
    for name in {*copied(), *mounted()} - {BUNDLE}:
        assert (ROOT / name).exists(), name


def test_the_wheel_is_the_same_from_what_is_copied(tmp_path: Path) -> None:
    for name in set(copied()) - {BUNDLE}:
        if (ROOT / name).is_dir():  # of which the names count
            ignored = ignore_patterns("__pycache__")
            copytree(ROOT / name, tmp_path / name, ignore=ignored, copy_function=named_alike)
        else:
            copy2(ROOT / name, tmp_path / name)
    built, whole = (WheelBuilder(str(folder)) for folder in (tmp_path, ROOT))
    assert wheel_of(built) == wheel_of(whole)
    for builder in (built, whole):
        assert builder.metadata.core.readme
    assert built.metadata.core.license_files == whole.metadata.core.license_files


def named_alike(_: str, target: str) -> None:
    Path(target).touch()


def wheel_of(builder: WheelBuilder) -> set[str]:
    files = builder.recurse_included_files()
    forced = builder.config.get_force_include()
    return {file.distribution_path for file in files} | {*forced.values()}


def test_the_command_is_one_of_ours_and_finds_its_bundle() -> None:
    (command,) = named("CMD")
    program, *arguments = command_of(command)
    assert program == "m2dexport"
    assert m2d(*arguments, "--help").exit_code == 0
    (placed,) = [rest.split()[-1] for rest in named("COPY") if BUNDLE in rest]
    assert arguments[:2] == ["serve", f"{placed}{BUNDLE}"]
    assert named("EXPOSE") == [arguments[arguments.index("--port") + 1]]


def test_the_user_is_not_root_and_no_cache_is_kept() -> None:
    assert named("USER") == ["10001"]
    installs = [rest for rest in named("RUN") if "pip " in rest]
    assert len(installs) == 2
    assert all("--no-cache-dir" in rest for rest in installs)
    assert "[serve]" in installs[1]


def test_the_health_check_tells_a_server_that_is_ready_from_none(tmp_path: Path) -> None:
    write_bundle(tiny_artifact(tmp_path / "edge"), tmp_path / BUNDLE)
    (check,) = named("HEALTHCHECK")
    program, *arguments = command_of(check)
    assert program == "python"
    with live(tmp_path / BUNDLE, "--threads", 1) as server:
        port = server.url.rpartition(":")[2].removesuffix("/v1")
        here = [each.replace("8080", port) for each in arguments]
        assert subprocess.run([sys.executable, *here], check=False).returncode == 0
        server.signal("SIGTERM")
        assert server.process.wait(20) == 0
    gone = subprocess.run([sys.executable, *here], check=False, capture_output=True)
    assert gone.returncode == 1


def test_the_command_that_builds_names_the_dockerfile() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    build = next(line for line in text.splitlines() if line.startswith("docker build "))
    words = shlex.split(build)
    assert ROOT / words[words.index("-f") + 1] == FOLDER / "Dockerfile"
    assert words[-1] == "."
