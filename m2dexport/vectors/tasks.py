"""Evaluation data: scored sentence pairs and retrieval sets."""

from __future__ import annotations

from pathlib import Path

from m2dexport.data import default_task_paths
from m2dexport.errors import UsageError
from m2dexport.vectors.pairs import StsTask, load_pairs
from m2dexport.vectors.retrieval import RetrievalTask, folder_of_judgements, load_retrieval

Task = StsTask | RetrievalTask


def default_tasks() -> tuple[Task, ...]:
    """Return the tasks that ship: STS-B dev and LIMIT-small."""
    return tuple(load_task(path) for path in default_task_paths())


def load_task(path: str | Path) -> Task:
    """Read evaluation data.

    Args:
        path: a .tsv, .csv or .jsonl file of sentence pairs, whose columns are named score,
            sentence1 and sentence2 (or have names of the same meaning); a folder in BEIR's layout,
            for its test split; or the judgements of another split in that folder, such as
            ``folder/qrels/dev.tsv``.

    Raises:
        UsageError: when it is none of these, is empty, or a line of it is wrong.
    """
    path = Path(path)
    if path.is_dir():
        return load_retrieval(path)
    if not path.exists():
        raise UsageError(f"{path} does not exist; name a file of STS pairs or a BEIR folder.")
    if path.suffix not in (".tsv", ".csv", ".jsonl"):
        raise UsageError(f"{path} is neither .tsv, .csv nor .jsonl, nor a BEIR folder.")
    folder = folder_of_judgements(path)
    return load_pairs(path) if folder is None else load_retrieval(folder, path)
