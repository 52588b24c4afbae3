"""Evaluation data: what ships, and what a path may be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from m2dexport.data import default_task_paths
from m2dexport.errors import UsageError
from m2dexport.vectors.pairs import StsTask
from m2dexport.vectors.retrieval import RetrievalTask
from m2dexport.vectors.tasks import default_tasks, load_task


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
