"""Measure what pruning the vocabulary costs: MB, tokens per text and quality.

    python tools/bench_vocabulary.py --model FOLDER --eval PAIRS.tsv --eval BEIR-FOLDER

Prints a Markdown table with one row for each vocabulary and each (layers, dim): the whole
vocabulary, those of the given sizes, and that of a corpus. MB counts model.safetensors and
tokenizer.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from m2dexport.checkpoint.open import Checkpoint, open_checkpoint
from m2dexport.data import read_texts
from m2dexport.reference.pooler import Reference
from m2dexport.slice.pruning import PruningPlan, plan_pruning
from m2dexport.slice.slicing import Cut, slice_checkpoint
from m2dexport.slice.vocabulary import token_use
from m2dexport.vectors.quality import evaluate
from m2dexport.vectors.tasks import Task, load_task


def main() -> None:
    """Measure every vocabulary and print each row when it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: the checkpoint that ships")
    parser.add_argument("--eval", type=Path, action="append", required=True)
    parser.add_argument("--sizes", type=int, nargs="*", default=[16000, 8500, 4000])
    parser.add_argument("--corpus", type=Path, help="texts, one per line")
    parser.add_argument("--cells", nargs="*", default=["6x384", "2x64"], help="layers x dim")
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model)
    tasks = [load_task(path) for path in options.eval]
    columns = [f"{task.name} {name}" for task in tasks for name in ("tokens", task.main_metric)]
    print("| pieces | cell | MB | " + " | ".join(columns) + " |")
    print("| --- " * (len(columns) + 3) + "|")
    prunings = [None, *(plan_pruning(checkpoint, size=size) for size in options.sizes)]
    if options.corpus:
        prunings.append(plan_pruning(checkpoint, read_texts(options.corpus)))
    for pruning in prunings:
        for cell in options.cells:
            layers, dim = map(int, cell.split("x"))
            pieces, values = measured(checkpoint, tasks, pruning, layers, dim)
            shown = " | ".join(f"{value:.2f}" for value in values)
            print(f"| {pieces:,} | ({layers}, {dim}) | {shown} |", flush=True)


def measured(
    checkpoint: Checkpoint, tasks: list[Task], pruning: PruningPlan | None, layers: int, dim: int
) -> tuple[int, list[float]]:
    """Return a sub-model's number of pieces, MB, and tokens per text and quality by task."""
    with tempfile.TemporaryDirectory() as temporary:
        sub = slice_checkpoint(
            checkpoint, layers, dim, Path(temporary) / "sub", Cut(pruning=pruning)
        )
        files = [sub.path / "model.safetensors", sub.path / "tokenizer.json"]
        values = [sum(path.stat().st_size for path in files) / 1e6]
        tokenizer = json.loads(files[1].read_text(encoding="utf-8"))
        reference = Reference(sub, (layers,))
        for task in tasks:
            sets = task.texts()
            rows = [
                reference.encode(found.texts, prompt=sub.prompts.get(found.role or "", ""))[layers]
                for found in sets
            ]
            texts = [text for found in sets for text in found.texts]
            scores = evaluate(task, rows, dim, "float32")
            values += [token_use(tokenizer, texts).per_text, scores[task.main_metric]]
    return sub.vocab_size, values


if __name__ == "__main__":
    main()
