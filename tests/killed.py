"""Sweeps that are killed, by a process that starts each of them by a fork: importing is slow.

``python killed.py MODEL FOLDER`` kills sweeps in FOLDER/killed, lets the last one end, and runs
another one undisturbed in FOLDER/whole. It prints how often it killed one, and what the last said.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What a sweep needs: here, once, and not in every process.
import onnxruntime  # noqa: F401
import torch
import transformers.models.bert.modeling_bert  # noqa: F401

from m2dexport.build.source import export_sources
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.data import align_texts_path, calibration_texts, read_texts
from m2dexport.engines import Device, engine_maker, engine_runner
from m2dexport.measure.footprint import Footprint
from m2dexport.profile import basis, costs
from m2dexport.profile.manifest import write_profile
from m2dexport.profile.parts import STORE, open_parts
from m2dexport.profile.plan import Plan
from m2dexport.profile.sweep import Course, profile_checkpoint
from m2dexport.vectors.pairs import StsTask
from m2dexport.vectors.retrieval import RetrievalTask

TEXTS = read_texts(align_texts_path())
TASKS = (
    StsTask("sts", TEXTS[:12], TEXTS[12:24], tuple(range(12)), "a" * 64),
    RetrievalTask("few", TEXTS[30:36], TEXTS[40:60], tuple({n: 1.0} for n in range(6)), "b" * 64),
)
PLAN = Plan(
    layers=(1, 2),
    dims=(32, 64),
    weights=("fp32", "fp16"),
    vectors=("float32", "ubinary"),
    shapes=((1, 8),),
    device=Device(threads=1),
    repeats=3,
    align_texts=TEXTS[::6],
)
KILLS = 20


def sweep(model: Path, out: Path, say: Callable[[str], None], *, die: bool = False) -> None:
    """Measure a profile, or go on with one; ``die`` once it is written, before all is over."""
    with open_parts(out / STORE) as parts:
        calibration = calibration_texts()[:120]
        course = Course(parts=parts, say=say)
        found = profile_checkpoint(open_checkpoint(model), TASKS, calibration, PLAN, course)
        write_profile(found, out / "profile.json", force=True)
        if die:
            os.kill(os.getpid(), signal.SIGKILL)


def dying_at(write: int, *, before: bool) -> None:
    """Let this process die at one of its writes, before or after the part has its name."""
    rename, done = Path.rename, 0

    def renamed(path: Path, target: Path) -> Any:
        nonlocal done
        if path.name != "unfinished":
            return rename(path, target)
        done += 1
        if done == write and before:
            os.kill(os.getpid(), signal.SIGKILL)
        found = rename(path, target)
        if done == write:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    Path.rename = renamed  # type: ignore[method-assign]


def forked(run: Callable[[], None], delay: float | None = None) -> bool:
    """Run in a process of its own, killed after a delay; return whether it was killed."""
    process = os.fork()
    if process == 0:
        try:
            run()
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def killed(model: Path, out: Path, number: int, chance: random.Random) -> bool:
    """Start a sweep and kill it: in turn at a write, before and after it counts, and at random."""

    def run() -> None:
        if number % 3 < 2:
            dying_at(1 + (number > 9) * 2, before=number % 3 == 0)
        sweep(model, out, lambda _: None, die=True)

    return forked(run, chance.uniform(0.02, 1) if number % 3 == 2 else None)


def main(model: Path, folder: Path) -> None:
    """Kill sweeps until they were killed often enough, then let one end."""
    torch.set_num_threads(1)
    engine_maker("onnx"), engine_runner("onnx")
    # A process for every graph's memory is slow, and no part of what is tested.
    costs.measure_footprint = lambda *_: Footprint(1, 2, 3.0, 4.0)  # type: ignore[assignment]
    # Nor is the export, which is done again until all passes are there.
    sources = export_sources(open_checkpoint(model), PLAN.layers, PLAN.dims[-1], ("onnx",))
    basis.export_sources = lambda *_: sources
    chance, out = random.Random(0), folder / "killed"
    kills = sum(killed(model, out, number, chance) for number in range(KILLS))
    said = folder / "said.txt"
    forked(lambda: sweep(model, out, lambda text: _append(said, text)))
    forked(lambda: sweep(model, folder / "whole", lambda _: None))
    sys.stdout.write(json.dumps({"kills": kills, "said": said.read_text().splitlines()}))


def _append(path: Path, text: str) -> None:
    with path.open("a") as stream:
        stream.write(f"{text}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
