"""Which processor this is, and which of its instructions decide how fast a graph runs."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

#: Instruction sets that decide how fast (and, for int8, how exactly) a graph runs.
_FLAGS = (
    *("sse4_2", "f16c", "fma", "avx", "avx2", "avx_vnni"),
    *("avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "bf16", "sve"),
)


@dataclass(frozen=True)
class Processor:
    """A processor."""

    model: str
    flags: tuple[str, ...]  # of ``_FLAGS``, in that order; empty where they cannot be read


def read_processor() -> Processor:
    """Return the processor of this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return Processor(platform.processor() or platform.machine(), ())
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    facts = {key.strip(): value.strip() for key, value in pairs}
    has = (facts.get("flags") or facts.get("Features") or "").split()
    flags = tuple(flag for flag in _FLAGS if flag in has)
    return Processor(facts.get("model name") or platform.machine(), flags)
