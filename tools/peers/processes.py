"""The processes of tools/bench_peers.py: environments that it makes, workers that it asks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import page

from m2dexport.errors import one_line

HERE = Path(__file__).parent
#: What each environment holds beside torch. sentence-transformers 6 wants a newer transformers than
#: optimum-onnx allows.
ENVIRONMENTS = {
    "onnx": ("sentence-transformers[onnx]==5.7.0", "optimum-onnx==0.1.0", "fastembed==0.9.1"),
    "openvino": (
        "sentence-transformers[openvino]==6.2.0",
        "optimum-intel==2.2.0",
        "datasets==4.8.5",
    ),
}
#: Required by optimum-intel; its wheels want the very build of torch that they were made for, and
#: a text model runs without it.
UNWANTED = "torchvision"


class PeerError(Exception):
    """A peer, an export or an environment failed; the message is the last line that it wrote."""


@dataclass(frozen=True)
class Candidate:
    """How to start a worker."""

    python: Path
    asked: Mapping[str, Any]  # what worker.py loads; "threads" among it


def environment(folder: Path, name: str) -> Path:
    """Return the Python of an environment, which is made unless it is there as it should be.

    Args:
        folder: where all environments are.
        name: a key of ``ENVIRONMENTS``.

    Raises:
        PeerError: when a package cannot be installed.
    """
    python = folder / name / "bin" / "python"
    wanted = (f"torch=={version('torch').partition('+')[0]}", *ENVIRONMENTS[name])
    made = folder / name / "made-of.txt"
    if not made.exists() or made.read_text(encoding="utf-8").split() != [*wanted]:
        page.say(f"installing {', '.join(wanted)} into {folder / name}")
        venv.create(folder / name, with_pip=True, clear=True)
        pip = (python, "-m", "pip", "-q", "--disable-pip-version-check")
        _run([*pip, "install", *wanted], os.environ)
        _run([*pip, "uninstall", "-y", UNWANTED], os.environ)
        made.write_text("\n".join(wanted), encoding="utf-8")
    return python


def export(python: Path, arguments: Sequence[object], threads: int) -> None:
    """Run export.py in an environment.

    Raises:
        PeerError: when it fails.
    """
    _run([python, HERE / "export.py", *map(str, arguments)], _variables(python, threads))


def _run(command: Sequence[str | Path], variables: Mapping[str, str]) -> None:
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerError(_last_line(done.stderr))


def _variables(python: Path, threads: int) -> dict[str, str]:
    """Return the environment variables of a process: offline, so many threads in every pool."""
    kept = dict(os.environ)
    if python != Path(sys.executable):
        kept.pop("PYTHONPATH", None)  # what is ours stays out of a peer's environment
    pools = ("OMP", "MKL", "OPENBLAS", "RAYON")
    fixed = {f"{pool}_NUM_THREADS": str(threads) for pool in pools}
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**kept, **fixed, **quiet}


def _last_line(text: str) -> str:
    return one_line((text.strip().splitlines() or ["it ended without a message"])[-1])


class Worker:
    """A process that has loaded a candidate and encoded one text.

    Raises:
        PeerError: when it cannot.
    """

    def __init__(self, candidate: Candidate, log: Path) -> None:
        self.candidate, self._log = candidate, log
        start = time.perf_counter()
        with log.open("w", encoding="utf-8") as stream:
            self._process = subprocess.Popen(
                [candidate.python, HERE / "worker.py", json.dumps(candidate.asked)],
                env=_variables(candidate.python, candidate.asked["threads"]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
            )
        self._answer()
        self.start_seconds = time.perf_counter() - start  # from nothing to the first vector

    def ask(self, work: str, **facts: Any) -> Any:
        """Return the answer to a request, as worker.py describes them.

        Raises:
            PeerError: when the process fails.
        """
        request = json.dumps({"work": work, **facts})
        print(request, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise PeerError(_last_line(self._log.read_text(encoding="utf-8")))
        return json.loads(line)

    def close(self) -> None:
        """Let the process end."""
        self._process.communicate()
