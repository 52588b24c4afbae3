"""The reader of examples/, run where m2dexport cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

READER = Path(__file__).parent.parent / "examples" / "read_bundle.py"


def read_independently(path: Path, *texts: str) -> subprocess.CompletedProcess[str]:
    blocked = "import sys, runpy; sys.modules['m2dexport'] = None; sys.argv = sys.argv[1:]; "
    command = [sys.executable, "-c", f"{blocked}runpy.run_path(sys.argv[0], run_name='__main__')"]
    return subprocess.run(
        [*command, str(READER), str(path), *texts], capture_output=True, text=True, check=False
    )
