"""Writing: the finished output or nothing, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from m2dexport.errors import M2DError, UsageError
from m2dexport.files import atomic_file, atomic_folder, require_file, require_new, sha256_of

DEAD_PID = 2**22 + 1  # above the largest pid that Linux gives


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_file_and_folder_are_all_that_is_left(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "new" / "a.json") as temporary:
        temporary.write_text("{}")
        assert not (tmp_path / "new" / "a.json").exists()
    with atomic_folder(tmp_path / "new" / "b") as temporary:
        (temporary / "c").write_text("c")
    assert names(tmp_path / "new") == ["a.json", "b"]
    assert names(tmp_path / "new" / "b") == ["c"]


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "b") as temporary:
        (temporary / "half").write_text("half")
        1 / 0  # noqa: B018
    assert names(tmp_path) == []


def test_an_exception_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old"
    with atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a").read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    for atomic in (atomic_file, atomic_folder):
        with pytest.raises(M2DError, match=r"out.*No space left.*nothing was kept\.") as caught:  # noqa: SIM117
            with atomic(tmp_path / "out"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert caught.value.exit_code == 1
        assert names(tmp_path) == []


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(UsageError, match="already exists"), atomic_folder(tmp_path / "out"):
        pass
    assert names(tmp_path / "out") == ["old"]


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file, not a folder"):
        require_new(tmp_path / "file" / "deeper" / "out")
    with pytest.raises(UsageError, match="is a file, not a folder"):
        require_file(tmp_path / "file" / "out")
    with pytest.raises(UsageError, match="is a folder"):
        require_file(tmp_path)
    require_file(tmp_path / "file")
    with (
        pytest.raises(M2DError, match="could not be written"),
        atomic_file(tmp_path / "file" / "a"),
    ):
        pass


def test_an_output_where_the_user_may_not_write_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)  # tests run as root
    for require in (require_new, require_file):
        with pytest.raises(UsageError, match="is not open to this user"):
            require(tmp_path / "new" / "out")


@pytest.mark.parametrize("name", ["out", "with [brackets]*"])
def test_leftovers_of_a_dead_process_are_swept(tmp_path, name, monkeypatch) -> None:
    dead = tmp_path / f".{name}.{DEAD_PID}.abc"
    alive = tmp_path / f".{name}.{os.getpid()}.abc"
    monkeypatch.setitem(sys.modules, "psutil", None)  # a device need not have it
    unrelated = tmp_path / f".other.{DEAD_PID}.abc"
    for folder in (dead, alive, unrelated):
        folder.mkdir()
        (folder / "half").write_text("half")
    with atomic_file(tmp_path / name) as temporary:
        temporary.write_text("whole")
    assert names(tmp_path) == sorted([alive.name, unrelated.name, name])


SLOW_WRITER = """
import sys, time
from pathlib import Path
from m2dexport.files import atomic_file, atomic_folder

with atomic_folder(Path(sys.argv[1]) / "folder") as folder:
    with atomic_file(Path(sys.argv[1]) / "file") as file:
        (folder / "half").write_text("half")
        file.write_text("half")
        print("writing", flush=True)
        time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on Windows")
def test_a_killed_process_leaves_no_output_and_the_next_one_sweeps(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert not (tmp_path / "file").exists()
    assert not (tmp_path / "folder").exists()
    assert len(names(tmp_path)) == 2
    with atomic_file(tmp_path / "file") as file, atomic_folder(tmp_path / "folder"):
        file.write_text("whole")
    assert names(tmp_path) == ["file", "folder"]


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a").startswith("ba7816bf8f01cfea")
