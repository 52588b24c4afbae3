"""Parts: whole or not there, found again by what decides them, kept from other processes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import m2d

from m2dexport.errors import M2DError, UsageError
from m2dexport.files import LOCK
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
    assert sorted(path.name for path in whole.iterdir()) == ["b", "seal.json"]
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


@pytest.mark.parametrize("content", ["", "[0.1", '{"a": 1}', '{"outcome": [9], "sha256": "0"}'])
def test_a_part_that_is_not_as_it_was_written_is_refused_by_name(tmp_path, content: str) -> None:
    def parts_of(decides: str) -> Parts:
        return Parts(tmp_path).deciding(decides)

    kept = parts_of("a checkpoint")
    kept.remember("memory", [], Counted())
    folder = kept.files("maps", [], lambda folder: (folder / "maps.json").write_text("{}"))
    assert parts_of("a checkpoint").count() == 2
    (part,) = tmp_path.glob("memory-*")
    whole = part.read_text()
    for path in (part, folder / "maps.json"):
        path.write_text(content)
        named = folder if path.parent == folder else part
        with pytest.raises(M2DError, match=f"{named} is damaged; start over with --fresh"):
            parts_of("a checkpoint")
        assert parts_of("another").count() == 0
        part.write_text(whole)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(M2DError, match=f"{folder} is damaged; start over with --fresh"):
        parts_of("a checkpoint")


def of_a_file(store: Path) -> Path:
    store.write_text("mine")
    return store


def of_a_broken_link(store: Path) -> Path:
    store.symlink_to(store.parent / "nowhere")
    return store


def of_a_lock_that_is_a_folder(store: Path) -> Path:
    (store / LOCK / "sub").mkdir(parents=True)
    return store / LOCK


def of_a_lock_that_is_a_link(store: Path) -> Path:
    store.mkdir()
    (store / LOCK).symlink_to(store.parent.parent / "elsewhere")
    return store / LOCK


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
@pytest.mark.parametrize(
    "made", [of_a_file, of_a_broken_link, of_a_lock_that_is_a_folder, of_a_lock_that_is_a_link]
)
def test_a_folder_that_cannot_be_used_is_one_sentence_and_fresh_replaces_it(
    tmp_path: Path, made: Callable[[Path], Path]
) -> None:
    (tmp_path / "p").mkdir()
    named = made(tmp_path / "p" / ".sweep")
    refused = m2d("profile", "--out", tmp_path / "p", "--force")
    assert (refused.exit_code, refused.stdout) == (1, "")
    (sentence,) = refused.stderr.splitlines()
    assert sentence.startswith(f"Error: {named} cannot be used: ")
    assert sentence.endswith("; start over with --fresh, or name another folder with --out.")
    with open_parts(tmp_path / "p" / ".sweep", fresh=True) as kept:
        assert kept.remember("memory", [], lambda: 7) == 7


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="all is open to root")
def test_a_folder_that_is_not_open_to_this_user_is_one_sentence(tmp_path: Path) -> None:
    store = tmp_path / "p" / ".sweep"
    store.mkdir(parents=True)
    store.chmod(0)
    refused = m2d("profile", "--out", tmp_path / "p")
    store.chmod(0o700)
    assert (refused.exit_code, refused.stdout) == (1, "")
    (sentence,) = refused.stderr.splitlines()
    assert f"{store / LOCK} cannot be used: Permission denied; start over with --fre" in sentence


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
