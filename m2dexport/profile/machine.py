"""What a figure was measured on: processor, the instructions that decide int8 speed, memory."""

from __future__ import annotations

import os
import platform

import psutil

from m2dexport.processor import read_processor
from m2dexport.profile.schema import Machine


def read_machine() -> Machine:
    """Describe this machine."""
    processor = read_processor()
    return Machine(
        cpu=processor.model,
        flags=processor.flags,
        cores=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        governor=None,
        virtualisation=None,
        gpu=None,
    )
