"""Writing: the finished output or nothing, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from m2dexport.errors import M2DError, UsageError
from m2dexport.files import (
    PROVENANCE,
    SPEC,
    atomic_file,
    atomic_folder,
    require_file,
    require_folder,
    scratch_folder,
    sha256_of,
)
from m2dexport.runtime.artifact import GRAPH_FILES, RANGES, TOKENIZER

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock and no SIGKILL")


ARTIFACT_JSON = '{"format": 4, "space_id": "m2d1-0"}'
PROVENANCE_JSON = '{"format": 1, "sliced_from": "0"}'


def folder_of(folder: Path, files: Mapping[str, str]) -> Path:
    """Write files by their names within a folder."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    return folder


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
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a", force=True) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old"
    with atomic_file(tmp_path / "a", force=True) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a").read_text() == "new"
    assert names(tmp_path) == ["a"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    for atomic in (atomic_file, atomic_folder):
        said = r"out.*No space left.*nothing of it was kept\."
        with pytest.raises(M2DError, match=said) as caught, atomic(tmp_path / "out"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert caught.value.exit_code == 1
        assert names(tmp_path) == []
        said = "set TMPDIR to a folder with more room"
        with (
            scratch_folder() as scratch,
            pytest.raises(M2DError, match=said),
            atomic(scratch / "out"),
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with (
            scratch_folder() as scratch,
            pytest.raises(M2DError, match=r"nothing of it was kept\.$"),
            atomic(scratch / "out"),
        ):
            raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_what_exists_is_refused_with_the_ways_out(tmp_path: Path, atomic) -> None:
    if atomic is atomic_file:
        (tmp_path / "out").write_text("old")
    else:
        (tmp_path / "out").mkdir()
    with (
        pytest.raises(UsageError, match=r"already exists.*--out.*--force"),
        atomic(tmp_path / "out"),
    ):
        raise AssertionError("refused before any work")


def test_a_link_to_nowhere_exists(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    for require in (require_file, require_folder):
        with pytest.raises(UsageError, match="already exists"):
            require(tmp_path / "out")


def test_of_two_runs_into_one_file_the_second_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="already exists"), atomic_file(out) as late:
        late.write_text("late")
        with atomic_file(out) as early:
            early.write_text("early")
    assert out.read_text() == "early"
    assert names(tmp_path) == ["out"]


def test_of_two_runs_into_one_folder_the_second_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="already exists"), atomic_folder(out) as late:
        (late / "late").write_text("late")
        with atomic_folder(out) as early:
            (early / "early").write_text("early")
    assert names(out) == ["early"]
    assert names(tmp_path) == ["out"]


def test_creation_is_exclusive_on_a_file_system_without_links(tmp_path, monkeypatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)  # as FAT answers
    test_of_two_runs_into_one_file_the_second_is_refused(tmp_path)


def test_force_replaces_an_artifact_a_sub_model_a_grid_and_an_empty_folder(tmp_path: Path) -> None:
    artifact = dict.fromkeys((*GRAPH_FILES, RANGES, TOKENIZER, "LICENSE"), "")
    outputs = (
        {SPEC: ARTIFACT_JSON, **artifact},
        {PROVENANCE: PROVENANCE_JSON, "config.json": "{}"},
        {f"1x8/{PROVENANCE}": PROVENANCE_JSON, f"2x8/{PROVENANCE}": PROVENANCE_JSON},
        {},
    )
    for number, files in enumerate(outputs):
        out = folder_of(tmp_path / str(number), files)
        with atomic_folder(out, force=True) as folder:
            (folder / "new").write_text("new")
        assert names(out) == ["new"]
    assert names(tmp_path) == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    "files",
    [
        {PROVENANCE: "{}"},
        {PROVENANCE: "[]"},
        {PROVENANCE: "not JSON", "thesis.txt": "mine"},
        {PROVENANCE: "[" * 100_000},
        {SPEC: '"space_id"'},
        {SPEC: ARTIFACT_JSON, "thesis.txt": "mine"},
        {SPEC: ARTIFACT_JSON, "model.onnx": "", "photos/1.png": ""},
        {f"1x8/{PROVENANCE}": PROVENANCE_JSON, "thesis.txt": "mine"},
        {f"1x8/{PROVENANCE}": PROVENANCE_JSON, f"2x8/{PROVENANCE}": "{}"},
    ],
)
def test_force_keeps_a_folder_that_only_looks_like_an_output(
    files: Mapping[str, str], tmp_path: Path
) -> None:
    out = folder_of(tmp_path / "out", files)
    with pytest.raises(UsageError, match="holds what is not an output of m2dexport"):
        require_folder(out, force=True)


def test_force_keeps_what_m2dexport_did_not_make(tmp_path: Path) -> None:
    mine, file, link = tmp_path / "mine", tmp_path / "file", tmp_path / "link"
    mine.mkdir()
    (mine / "artifact.json").write_text("{}")  # of another tool
    file.write_text("mine")
    link.symlink_to(file)
    for require, paths in ((require_folder, (mine, file, link)), (require_file, (mine, link))):
        for path in paths:
            with pytest.raises(UsageError, match="name a"):
                require(path, force=True)
    require_file(file, force=True)
    with pytest.raises(UsageError, match="not a regular file"):
        require_file(Path(os.devnull), force=True)


def test_a_replacement_that_fails_keeps_the_old_folder(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        (folder / PROVENANCE).write_text(PROVENANCE_JSON)
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out", force=True) as folder:
        1 / 0  # noqa: B018
    with (
        pytest.raises(M2DError, match="could not be written"),
        atomic_folder(tmp_path / "out", force=True) as folder,
    ):
        folder.rmdir()  # so that it cannot be moved into its place
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == [PROVENANCE]


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file, not a folder"):
        require_folder(tmp_path / "file" / "deeper" / "out")
    with pytest.raises(UsageError, match="is a file, not a folder"):
        require_file(tmp_path / "file" / "out")
    with pytest.raises(UsageError, match="is a folder"):
        require_file(tmp_path)


def test_an_output_where_the_user_may_not_write_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)  # tests run as root
    for require in (require_folder, require_file):
        with pytest.raises(UsageError, match="is not open to this user"):
            require(tmp_path / "new" / "out")


SLOW_WRITER = """
import sys, time
from pathlib import Path
from m2dexport.files import atomic_file, atomic_folder, scratch_folder

with atomic_folder(Path(sys.argv[1]) / "folder") as folder, scratch_folder() as scratch:
    with atomic_file(Path(sys.argv[1]) / "file") as file:
        (folder / "half").write_text("half")
        (scratch / "half").write_text("half")
        file.write_text("half")
        print("writing", flush=True)
        time.sleep(60)
"""


@contextmanager
def slow_writer(folder: Path, *wrapper: str) -> Iterator[None]:
    """Start a process that is in the middle of writing folder/file and folder/folder."""
    writer = subprocess.Popen(
        [*wrapper, sys.executable, "-c", SLOW_WRITER, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    with writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "writing\n"
            yield
        finally:
            writer.kill()


@pytest.fixture
def tmpdir_is_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@posix
@pytest.mark.usefixtures("tmpdir_is_tmp_path")
def test_a_killed_process_leaves_no_output_and_the_next_one_sweeps(tmp_path: Path) -> None:
    with slow_writer(tmp_path):
        pass
    assert not (tmp_path / "file").exists()
    assert not (tmp_path / "folder").exists()
    assert len(list(tmp_path.rglob("half"))) == 2  # and the file
    assert len(names(tmp_path)) == 3
    with atomic_file(tmp_path / "file") as file, scratch_folder():
        file.write_text("whole")
    assert names(tmp_path) == ["file"]


@posix
@pytest.mark.usefixtures("tmpdir_is_tmp_path")
@pytest.mark.parametrize(
    "wrapper",
    [(), ("unshare", "--pid", "--fork", "--kill-child")],
    ids=["here", "in another PID namespace"],
)
def test_the_folders_of_a_live_process_are_left_alone(tmp_path: Path, wrapper) -> None:
    if wrapper and (
        shutil.which(wrapper[0]) is None
        or subprocess.run([*wrapper, "true"], check=False).returncode
    ):
        pytest.skip("this user may not make PID namespaces")
    with slow_writer(tmp_path, *wrapper):
        before = names(tmp_path)
        with atomic_file(tmp_path / "file") as file, scratch_folder():
            file.write_text("whole")
        assert names(tmp_path) == sorted([*before, "file"])


@pytest.mark.usefixtures("tmpdir_is_tmp_path")
def test_hidden_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    """Neither a name that looks like ours proves that a folder is, nor a lock file, nor a link."""
    for name in (".file.99999999.notes", ".m2dexport-notes", "m2dexport-notes", ".m2dexport-lock"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "files").mkdir()
    (tmp_path / ".m2dexport-lock" / "m2dexport.lock").write_text("mine\n")
    with scratch_folder() as scratch:
        shutil.copytree(scratch.parent, tmp_path / "elsewhere")
        (tmp_path / "m2dexport-link").symlink_to(tmp_path / "elsewhere")
    before = names(tmp_path)
    with atomic_file(tmp_path / "file") as file, scratch_folder():
        file.write_text("whole")
    assert names(tmp_path) == sorted([*before, "file"])
    assert names(tmp_path / "elsewhere") == ["files", "m2dexport.lock"]


@pytest.mark.usefixtures("tmpdir_is_tmp_path")
def test_a_scratch_folder_is_empty_and_goes_with_its_block(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), scratch_folder() as folder:
        assert names(folder) == []
        (folder / "a").write_text("a")
        1 / 0  # noqa: B018
    assert names(tmp_path) == []


@pytest.mark.usefixtures("tmpdir_is_tmp_path")
def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    with atomic_file(tmp_path / ("a" * 255)) as file:
        file.write_text("whole")
    assert names(tmp_path) == ["a" * 255]


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a").startswith("ba7816bf8f01cfea")
