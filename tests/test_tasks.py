"""Evaluation data: what ships, and what a path may be."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from m2dexport.cli import cli
from m2dexport.data import default_task_paths
from m2dexport.errors import UsageError
from m2dexport.vectors.pairs import StsTask
from m2dexport.vectors.retrieval import RetrievalTask
from m2dexport.vectors.tasks import default_tasks, load_task, load_tasks, require_distinct

PAIRS = "score,sentence1,sentence2\n1,a,b\n0,c,d\n"


def test_the_shipped_tasks_are_stsb_dev_and_limit_small() -> None:
    first, second = default_tasks()
    assert isinstance(first, StsTask)
    assert isinstance(second, RetrievalTask)
    assert (first.name, len(first.scores)) == ("stsb-dev", 1500)
    assert (second.name, len(second.queries), len(second.documents)) == ("limit-small", 1000, 46)
    assert all(len(relevant) == 2 for relevant in second.relevance)


def test_paths_that_are_no_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_task(tmp_path / "missing.tsv")
    with pytest.raises(UsageError, match=r"corpus\.jsonl does not exist"):
        load_task(tmp_path)


def test_a_folder_of_splits_is_a_task_for_each_file(tmp_path: Path) -> None:
    folder = tmp_path / "sick"
    folder.mkdir()
    (folder / "test.csv").write_text(PAIRS)
    (folder / "dev.tsv").write_text("cluster\ttext\nx\ta\ny\tb\nx\tc\n")
    (folder / "README.md").write_text("# SICK")
    found = load_tasks(folder)
    assert [(task.name, task.kind) for task in found] == [
        ("sick-dev", "clustering"),
        ("sick-test", "sts"),
    ]
    assert [task.name for task in load_tasks(f"s={folder}")] == ["s-dev", "s-test"]


def test_a_folder_without_evaluation_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(UsageError, match="holds no evaluation data: neither BEIR's corpus"):
        load_tasks(tmp_path)


def test_a_task_is_what_its_file_says_however_it_is_written(tmp_path: Path) -> None:
    rows = [("1", "a cat", "a dog"), ("4.0", "x", "y"), ("5", "one", "two")]
    written = {
        "a.tsv": "".join("\t".join(row) + "\r\n" for row in rows),
        "a.csv": "sentence2,score,sentence1\n"
        + "".join(f'"{two}",{score},{one}\n' for score, one, two in rows),
        "a.jsonl": "".join(
            json.dumps({"score": float(score), "sentence1": one, "sentence2": two}) + "\n"
            for score, one, two in rows
        ),
    }
    hashes = set()
    for name, text in written.items():
        (tmp_path / name).write_text(text, newline="")
        hashes |= {task.sha256 for task in load_tasks(tmp_path / name)}
    assert len(hashes) == 1
    (tmp_path / "a.tsv").write_text(written["a.tsv"].replace("a cat", "a hat"), newline="")
    (changed,) = load_tasks(tmp_path / "a.tsv")
    assert changed.sha256 not in hashes


def test_a_task_is_named_by_what_stands_before_its_path(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(PAIRS)
    (plain,) = load_tasks(tmp_path / "pairs.csv")
    (named,) = load_tasks(f"dev={tmp_path / 'pairs.csv'}")
    assert (plain.name, named.name) == ("pairs", "dev")
    assert plain.sha256 == named.sha256  # and so its resamples
    (tmp_path / "a=b.csv").write_text(PAIRS)
    (file,) = load_tasks(tmp_path / "a=b.csv")
    assert file.name == "a=b"
    for source in ("two words=pairs.csv", "=pairs.csv", "dev="):
        with pytest.raises(UsageError, match="write NAME=PATH"):
            load_tasks(source)


def test_two_tasks_of_one_name_are_refused_with_how_to_name_one(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "dev.csv").write_text(PAIRS)
    first, second = (load_task(tmp_path / folder / "dev.csv") for folder in ("a", "b"))
    with pytest.raises(UsageError, match=r"two evaluation sets are named 'dev'.*--eval dev-2=PATH"):
        require_distinct((first, second))
    arguments = [f"--eval={tmp_path / folder / 'dev.csv'}" for folder in ("a", "b")]
    result = CliRunner().invoke(cli, ["profile", *arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "two evaluation sets are named 'dev'" in result.stderr


def test_a_name_that_cannot_be_printed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dev.csv").write_text(PAIRS)
    (tmp_path / "a\x1b[31m.csv").write_text(PAIRS)
    with pytest.raises(UsageError, match="is no name; write NAME=PATH, the name printable"):
        load_tasks(f"a\x1b[31m={tmp_path / 'dev.csv'}")
    with pytest.raises(
        UsageError, match=r"an evaluation set is named 'a\\x1b\[31m'; give it a name"
    ):
        require_distinct(load_tasks(tmp_path / "a\x1b[31m.csv"))


def test_default_task_paths_are_in_the_package() -> None:
    assert all(path.exists() for path in default_task_paths())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_devices_are_refused_rather_than_waited_for(tmp_path: Path) -> None:
    for name in ("pairs.tsv", "pairs.jsonl", "corpus.jsonl"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "endless.csv").symlink_to("/dev/zero")
    for name in ("pairs.tsv", "pairs.jsonl", "endless.csv", ""):
        with pytest.raises(UsageError, match="is not a regular file"):
            load_task(tmp_path / name)


def test_profile_refuses_evaluation_data_in_a_sentence(tmp_path: Path) -> None:
    broken = tmp_path / "pairs.jsonl"
    broken.write_text('{"score": 1, "sentence1": "half \\ud83d", "sentence2": "x"}\n')
    folder = tmp_path / "set"
    (folder / "qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        (folder / f"{name}.jsonl").write_text('{"_id": "1", "text": "x"}\n')
    (folder / "qrels" / "dev.tsv").write_text("1\t1\t1\n")
    for path, message in ((broken, "half of a surrogate pair"), (folder, "name the file instead")):
        arguments = ["profile", "--eval", str(path), "--out", str(tmp_path / "out")]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"Error: {path}")
        assert message in result.stderr
