"""Evaluation data: scored or labelled sentence pairs, retrieval sets, and texts with topics."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from m2dexport.data import default_task_paths
from m2dexport.errors import UsageError
from m2dexport.strict import is_name, require_name, shown
from m2dexport.vectors.classification import PairClassificationTask
from m2dexport.vectors.clustering import ClusteringTask, clustering_columns, load_clusters
from m2dexport.vectors.pairs import StsTask, load_pairs
from m2dexport.vectors.retrieval import RetrievalTask, folder_of_judgements, load_retrieval
from m2dexport.vectors.tables import SUFFIXES, read_table

Task = StsTask | RetrievalTask | PairClassificationTask | ClusteringTask

#: What makes a folder one in BEIR's layout.
_BEIR = ("corpus.jsonl", "queries.jsonl", "qrels.jsonl", "qrels")
_NAME = re.compile(r"[^/\\=\s]+")


def default_tasks() -> tuple[Task, ...]:
    """Return the tasks that ship: STS-B dev and LIMIT-small."""
    return tuple(load_task(path) for path in default_task_paths())


def load_task(path: str | Path) -> Task:
    """Read evaluation data.

    Args:
        path: a .tsv, .csv or .jsonl file. Columns that are named score, sentence1 and sentence2 (or
            have names of the same meaning) are scored pairs; a label of 0 or 1 in place of the
            score makes them pairs of two classes; text and label are texts with topics. Or a folder
            in BEIR's layout, for its test split; or the judgements of another split in that folder,
            such as ``folder/qrels/dev.tsv``.

    Raises:
        UsageError: when it is none of these, is empty, or a line of it is wrong.
    """
    path = Path(path)
    if path.is_dir():
        return load_retrieval(path)
    if not path.exists():
        raise UsageError(
            f"{path} does not exist; name a file of sentence pairs or texts, or a BEIR folder."
        )
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path} is neither .tsv, .csv nor .jsonl, nor a BEIR folder.")
    folder = folder_of_judgements(path)
    if folder is not None:
        return load_retrieval(folder, path)
    table = read_table(path)
    columns = clustering_columns(table)
    return load_pairs(table) if columns is None else load_clusters(table, columns)


def load_tasks(source: str | Path) -> tuple[Task, ...]:
    """Read what ``--eval`` names: one task, or those of a folder of splits.

    Args:
        source: what ``load_task`` reads, or a folder with .tsv, .csv and .jsonl files, each of
            which is a task of the name FOLDER-STEM. "name=path" gives another name than that of
            the file or folder.

    Raises:
        UsageError: as ``load_task``, and when the name cannot be one.
    """
    name, path = _name_and_path(str(source))
    if not path.is_dir() or any((path / part).exists() for part in _BEIR):
        task = load_task(path)
        return (replace(task, name=name) if name else task,)
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if not files:
        raise UsageError(
            f"{path} holds no evaluation data: neither BEIR's corpus.jsonl, queries.jsonl and "
            "qrels, nor .tsv, .csv or .jsonl files."
        )
    folder = name or path.resolve().name
    return tuple(replace(load_task(file), name=f"{folder}-{file.stem}") for file in files)


def main_of(task: Task) -> str:
    """Return a task's main metric as profiles name it: "task/metric"."""
    return f"{task.name}/{task.main_metric}"


def require_distinct(tasks: Sequence[Task]) -> None:
    """Refuse tasks that reports could not tell apart, or not name.

    Raises:
        UsageError: naming the name that two of them have, or that cannot be printed.
    """
    names = [task.name for task in tasks]
    for name in names:
        require_name(name, "an evaluation set")
        if names.count(name) > 1:
            raise UsageError(
                f"two evaluation sets are named {name!r}; give one another name, as in "
                f"--eval {name}-2=PATH."
            )


def _name_and_path(source: str) -> tuple[str | None, Path]:
    """Split "name=path"; a path that exists as it stands has no name."""
    name, sign, rest = source.partition("=")
    if not sign or Path(source).exists() or "/" in name or "\\" in name:
        return None, Path(source)
    if not _NAME.fullmatch(name) or not is_name(name):
        raise UsageError(
            f"{shown(source)}: {shown(name)} is no name; write NAME=PATH, the name printable, "
            "without spaces and slashes."
        )
    if not rest:
        raise UsageError(f"{shown(source)} names no path; write NAME=PATH.")
    return name, Path(rest)
