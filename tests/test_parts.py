"""Parts: whole or not there, found again by what decides them, kept from other processes."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from m2dexport.errors import M2DError, UsageError
from m2dexport.profile import parts
from m2dexport.profile.parts import Parts, open_parts


class Counted:
    """A step that counts how often it is measured."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> list[float]:
        self.times += 1
        return [0.1, float(self.times)]


def test_a_part_is_measured_once_for_what_decides_it(tmp_path: Path) -> None:
    measure, kept = Counted(), Parts(tmp_path, "a checkpoint")
    assert kept.remember("latency", {"shape": (1, 16)}, measure) == [0.1, 1.0]
    assert kept.remember("latency", {"shape": [1, 16]}, measure) == [0.1, 1.0]
    assert measure.times == 1
    others = [
        kept.remember("latency", {"shape": (1, 32)}, measure),
        kept.remember("memory", {"shape": (1, 16)}, measure),
        kept.deciding("another").remember("latency", {"shape": (1, 16)}, measure),
    ]
    assert [each[1] for each in others] == [2.0, 3.0, 4.0]
    assert (kept.count(), kept.count("memory")) == (3, 1)


def test_half_a_part_is_none(tmp_path: Path) -> None:
    kept = Parts(tmp_path)

    def broken(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        kept.files("maps", [], broken)
    assert not kept.path("maps", []).exists()
    assert kept.count() == 0
    whole = kept.files("maps", [], lambda folder: (folder / "b").mkdir())
    assert [path.name for path in whole.iterdir()] == ["b"]
    assert kept.files("maps", [], broken) == whole


def test_parts_are_gone_once_all_is_well_and_stay_otherwise(tmp_path: Path) -> None:
    folder = tmp_path / "new" / ".sweep"
    with pytest.raises(RuntimeError), open_parts(folder):
        raise RuntimeError  # before anything was measured
    assert not list(tmp_path.iterdir())
    measure = Counted()
    with pytest.raises(RuntimeError), open_parts(folder) as kept:
        kept.remember("settings", [], measure)
        raise RuntimeError
    with open_parts(folder) as kept:
        assert kept.remember("settings", [], measure) == [0.1, 1.0]
    assert not list((tmp_path / "new").iterdir())


def test_fresh_drops_what_was_measured(tmp_path: Path) -> None:
    measure = Counted()
    for _ in range(2):
        with pytest.raises(RuntimeError), open_parts(tmp_path / "s", fresh=True) as kept:
            kept.remember("settings", [], measure)
            raise RuntimeError
    assert measure.times == 2


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_a_second_sweep_in_a_folder_is_refused_until_the_first_one_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "p" / ".sweep"
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from m2dexport.profile.parts import open_parts\n"
        "with open_parts(Path(sys.argv[1])) as kept:\n"
        "    kept.remember('memory', [], lambda: 7)\n"
        "    print('here', flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "here\n"
        with (
            pytest.raises(UsageError, match=f"another sweep is writing to {folder.parent}; wait"),
            open_parts(folder),
        ):
            pass
        other.kill()
    with open_parts(folder) as kept:
        assert kept.remember("memory", [], lambda: 8) == 7


@pytest.mark.parametrize(
    ("written", "kept", "sentence"),
    [
        (0, 0, "No space left on device; nothing was measured; make room"),
        (1, 1, "No space left on device; what was measured, 1 part, is kept; make room"),
    ],
)
def test_a_full_disk_is_one_sentence_and_what_was_measured_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int, kept: int, sentence: str
) -> None:
    flush: Callable[[Path], None] = parts._flush

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(M2DError, match=sentence), open_parts(tmp_path / "s") as found:
        for step in range(2):
            monkeypatch.setattr(parts, "_flush", flush if step < written else full)
            found.remember("memory", step, lambda: 1)
    assert Parts(tmp_path / "s").count() == kept
    assert not (tmp_path / "s" / "unfinished").exists()
