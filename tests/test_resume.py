"""A sweep that was killed goes on where it was, and ends in the same profile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import killed
import pytest
from tiny import small_checkpoint

#: What depends on how long something took.
TIMED = {
    *("created", "seconds", "noise", "tokenization", "samples", "recommended", "latency"),
    *("p50_ms", "p95_ms", "p99_ms", "text_p50_ms", "ratio", "ratio_interval", "load_ms"),
    *("first_ms", "flags", "on_frontier"),
}


def untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: untimed(each) for key, each in value.items() if key not in TIMED}
    return [untimed(each) for each in value] if isinstance(value, list) else value


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are started by a fork")
def test_killed_twenty_times_a_sweep_ends_in_the_same_profile(tmp_path: Path) -> None:
    model = small_checkpoint(tmp_path / "model", "bert")
    finished = subprocess.run(
        [sys.executable, killed.__file__, str(model), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    found = json.loads(finished.stdout)
    assert found["kills"] == killed.KILLS
    assert found["said"][0].startswith("Going on: 2 of 2 passes and ")
    assert len(found["said"]) == 1
    ended, whole = (
        json.loads((tmp_path / name / "profile.json").read_text()) for name in ("killed", "whole")
    )
    assert len(ended["cells"]) == 2 * 2 * 2 * (1 + 1 + 1)
    assert untimed(ended) == untimed(whole)
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["profile.json"]
