"""What a figure was measured on: processor, the instructions that decide int8 speed, memory."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil

from m2dexport.profile.schema import Machine

#: Instruction sets that decide how fast (and, for int8, how exactly) a graph runs.
_FLAGS = (
    *("sse4_2", "f16c", "fma", "avx", "avx2", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "bf16", "sve"),
)


def read_machine() -> Machine:
    """Describe this machine."""
    model, flags = _processor()
    return Machine(
        cpu=model,
        flags=tuple(flag for flag in _FLAGS if flag in flags),
        cores=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def _processor() -> tuple[str, frozenset[str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine(), frozenset()
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    facts = {key.strip(): value.strip() for key, value in pairs}
    flags = facts.get("flags") or facts.get("Features") or ""
    return facts.get("model name") or platform.machine(), frozenset(flags.split())
