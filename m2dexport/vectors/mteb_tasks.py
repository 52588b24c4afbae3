"""Tasks of the mteb package (Muennighoff et al., "MTEB: Massive Text Embedding Benchmark", 2023).

Only their data are taken: the texts go through the pass that all tasks share, and the scores are
ours. The main metrics are those that mteb computes from cosines: cosine_spearman, ndcg_at_10 and
cosine_ap. mteb's v_measure is a mean over ten mini-batch clusterings of samples; ours is that of
one clustering of all texts, so it agrees up to what the samples and their starts make of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from m2dexport.errors import M2DError, MissingExtra, UsageError, one_line
from m2dexport.strict import is_unicode, shown
from m2dexport.vectors.classification import PairClassificationTask
from m2dexport.vectors.clustering import ClusteringTask, require_topics
from m2dexport.vectors.pairs import StsTask
from m2dexport.vectors.ranking import NO_ROW
from m2dexport.vectors.retrieval import RetrievalTask
from m2dexport.vectors.tasks import Task
from m2dexport.vectors.texts import as_number, digest_of


def load_mteb(names: Sequence[str]) -> tuple[Task, ...]:
    """Return tasks of the mteb package by name, with the data that it downloads or has cached.

    Args:
        names: such as "STSBenchmark", or "STS22.v2:en" for one of a task's subsets. A task with
            several subsets or test splits becomes one of ours for each, as "STS22.v2-en".

    Raises:
        MissingExtra: when mteb is not installed.
        UsageError: when there is no such task or subset, or it is of another type.
        M2DError: when the data cannot be loaded.
    """
    try:
        import mteb
    except ModuleNotFoundError as error:
        if error.name != "mteb":
            raise
        raise MissingExtra("--mteb", "mteb", "mteb") from error
    found: list[Task] = []
    for name in names:
        known, _, subset = name.strip().partition(":")
        try:
            task = mteb.get_task(known)
        except KeyError as error:
            reason = str(error.args[0]).removeprefix("KeyError: ")
            raise UsageError(f"mteb has no task {shown(known)}: {reason}") from error
        if subset and subset not in task.hf_subsets:
            there = ", ".join(task.hf_subsets)
            raise UsageError(f"mteb's {known} has no subset {shown(subset)}; it has: {there}.")
        found += tasks_from_mteb(task, subset or None)
    return tuple(found)


def tasks_from_mteb(task: Any, subset: str | None = None) -> tuple[Task, ...]:
    """Return one of mteb's tasks as ours, one for each subset and split.

    Args:
        task: an ``mteb.AbsTask``; its data are loaded unless they are there.
        subset: the only one to take.

    Raises:
        UsageError: when it is of a type that is not measured here.
        M2DError: when the data cannot be loaded.
    """
    name, kind = task.metadata.name, task.metadata.type
    if kind not in _CONVERTED or list(task.metadata.modalities) != ["text"]:
        raise UsageError(
            f"mteb's {name} is of the type {kind} ({', '.join(task.metadata.modalities)}); text "
            f"tasks of these are measured: {', '.join(_CONVERTED)}."
        )
    _load(task)
    parts = list(_parts(task, subset))
    return tuple(
        _CONVERTED[kind](task, "-".join([name, *labels]) if len(parts) > 1 else name, data)
        for labels, data in parts
    )


def _load(task: Any) -> None:
    """Let mteb load a task's data.

    Raises:
        M2DError: in one sentence, whatever it was.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not task.data_loaded:
                task.load_data()
            if hasattr(task, "convert_v1_dataset_format_to_v2"):
                task.convert_v1_dataset_format_to_v2(num_proc=None)
    except Exception as error:  # of any of the libraries and formats behind it
        reason = one_line(f"{type(error).__name__}: {error}")
        raise M2DError(
            f"the data of mteb's {task.metadata.name} cannot be loaded ({reason}); load them once "
            "where the Hugging Face hub is reached, or name another task."
        ) from error


def _parts(task: Any, subset: str | None) -> Iterator[tuple[list[str], Any]]:
    """Yield the data of every subset and split, and what they are called among the others."""
    subsets = [subset] if subset else list(task.hf_subsets)
    splits = list(task.eval_splits)
    for each in subsets:
        there = task.dataset.get(each, task.dataset)
        for split in splits:
            if split not in there:
                raise M2DError(f"the data of mteb's {task.metadata.name} have no split {split}.")
            labels = [each] if len(subsets) > 1 else []
            yield [*labels, *([split] if len(splits) > 1 else [])], there[split]


def _sts(task: Any, name: str, data: Any) -> StsTask:
    first, second = (_texts(data[column], name) for column in task.column_names)
    _require_symmetric(task, name)
    scores = tuple(_number(value, name) for value in data["score"])
    if len(set(scores)) < 2:
        raise UsageError(f"mteb's {name} gives every pair the same score; name another task.")
    return StsTask(name, first, second, scores, digest_of(first, second, scores))


def _pair_classification(task: Any, name: str, data: Any) -> PairClassificationTask:
    columns = task.input1_column_name, task.input2_column_name, task.label_column_name
    _require_symmetric(task, name)
    whole = data[0] if len(data) == 1 else data  # older ones hold their lists in one row
    first, second = (_texts(whole[column], name) for column in columns[:2])
    labels = tuple(_number(value, name) for value in whole[columns[2]])
    if set(labels) != {0.0, 1.0}:
        raise UsageError(f"mteb's {name} has other labels than 0 and 1; name another task.")
    classes = tuple(label == 1 for label in labels)
    return PairClassificationTask(name, first, second, classes, digest_of(first, second, classes))


def _clustering(task: Any, name: str, data: Any) -> ClusteringTask:
    texts, labels = data[task.input_column_name], data[task.label_column_name]
    if not hasattr(task, "max_document_to_embed"):  # an older one: a clustering in each row
        if len(texts) > 1:
            successor = task.superseded_by or f"{task.metadata.name}.v2"
            raise UsageError(
                f"mteb's {name} is {len(texts)} clusterings in one; name one that is a single "
                f"clustering, such as {successor}, if there is."
            )
        texts, labels = texts[0], labels[0]
    else:
        rows = _sampled(task, len(texts))
        texts, labels = [texts[row] for row in rows], [labels[row] for row in rows]
    topics = []
    for label in labels:
        levels = label if isinstance(label, list) else [label]
        if len(levels) != 1:
            raise UsageError(f"mteb's {name} has topics of several levels; name another task.")
        topics.append(str(levels[0]))
    require_topics(f"mteb's {name}", topics)
    sentences = _texts(texts, name)
    return ClusteringTask(name, sentences, tuple(topics), digest_of(sentences, topics))


def _sampled(task: Any, count: int) -> Sequence[int]:
    """Return the rows that mteb embeds: its own draw, from its own seed."""
    most = count
    if task.max_fraction_of_documents_to_embed is not None:
        most = int(task.max_fraction_of_documents_to_embed * count)
    elif task.max_document_to_embed is not None:
        most = task.max_document_to_embed
    else:
        return range(count)
    rows: list[int] = task.rng_state.sample(range(count), k=min(count, most))
    return rows


def _retrieval(task: Any, name: str, data: Mapping[str, Any]) -> RetrievalTask:
    queries, corpus, judged = data["queries"], data["corpus"], data["relevant_docs"]
    if data.get("top_ranked") or task.skip_first_result or "instruction" in queries.column_names:
        raise UsageError(
            f"mteb's {name} ranks given candidates, or follows instructions, which is not measured "
            "here; name another task."
        )
    ids = [str(each) for each in corpus["id"]]
    titles = corpus["title"] if "title" in corpus.column_names else [""] * len(ids)
    documents = _texts(
        (
            f"{title or ''} {text}".strip()
            for title, text in zip(titles, corpus["text"], strict=True)
        ),
        name,
    )
    rows = {each: row for row, each in enumerate(ids)}
    asked, relevance, own = [], [], []
    for query, text in zip(queries["id"], queries["text"], strict=True):
        if not judged.get(query):
            continue
        # With none above 0, the query still counts in mteb's means.
        gains = {str(each): float(gain) for each, gain in judged[query].items() if gain > 0}
        asked.append(text)
        relevance.append({rows.setdefault(each, len(rows)): gain for each, gain in gains.items()})
        itself = rows.get(query, NO_ROW) if task.ignore_identical_ids else NO_ROW
        own.append(itself if itself < len(ids) else NO_ROW)
    if not any(row < len(ids) for gains in relevance for row in gains):
        raise UsageError(f"mteb's {name} judges no document of its corpus as relevant.")
    texts = _texts(asked, name)
    known = tuple(own) if any(row != NO_ROW for row in own) else ()
    digest = digest_of(texts, documents, relevance, known)
    return RetrievalTask(name, texts, documents, tuple(relevance), digest, known)


def _require_symmetric(task: Any, name: str) -> None:
    if task.input1_prompt_type or task.input2_prompt_type:
        raise UsageError(
            f"mteb's {name} pairs queries with documents, which is not measured as pairs here; "
            "name another task."
        )


def _texts(values: Any, name: str) -> tuple[str, ...]:
    texts = tuple(values)
    for text in texts:
        if not isinstance(text, str) or not is_unicode(text):
            raise UsageError(f"mteb's {name} holds {shown(text)} where a text is needed.")
    if not texts:
        raise UsageError(f"mteb's {name} is empty.")
    return texts


def _number(value: object, name: str) -> float:
    number = as_number(value) if not isinstance(value, bool) else float(value)
    if number is None:
        raise UsageError(f"mteb's {name} holds the score {shown(value)}, which is not a number.")
    return number


#: mteb's type -> what makes a task of ours from one subset's split.
_CONVERTED: Mapping[str, Callable[[Any, str, Any], Task]] = {
    "STS": _sts,
    "Retrieval": _retrieval,
    "PairClassification": _pair_classification,
    "Clustering": _clustering,
}
