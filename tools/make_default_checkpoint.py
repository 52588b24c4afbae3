"""Make the checkpoint that ships with m2dexport from a larger one of the same tokenizer.

The vocabulary is pruned to the pieces that the given texts use, plus the most frequent others up to
the given size. Weights are stored in fp16.

    python tools/make_default_checkpoint.py --source SOURCE --calibration TEXTS --sts-test TEST.tsv
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.data import read_texts
from m2dexport.reference.pooler import Reference
from m2dexport.slice.pruning import plan_pruning
from m2dexport.slice.slicing import Cut, slice_checkpoint
from m2dexport.slice.vocabulary import token_use
from m2dexport.vectors.quality import evaluate
from m2dexport.vectors.tasks import load_task

ROOT = Path(__file__).parent.parent
OUT = ROOT / "m2dexport" / "data" / "checkpoint"


def sts_points(folder: Path, sts: Path) -> dict[tuple[int, int], float]:
    """Return (layers, dim) -> Spearman's correlation of some cells on a file of STS pairs."""
    checkpoint = open_checkpoint(folder)
    task = load_task(sts)
    reference = Reference(checkpoint)
    encoded = [reference.encode(text_set.texts) for text_set in task.texts()]
    return {
        (depth, dim): evaluate(task, [rows[depth] for rows in encoded], dim, "float32")["spearman"]
        for depth in range(1, checkpoint.layers + 1)
        for dim in (32, 64, 128, 256, checkpoint.dim)
    }


def tokens_per_text(folder: Path, texts: list[str]) -> float:
    """Return the mean number of tokens per text, including special tokens."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return token_use(tokenizer, texts).per_text


CARD = """---
license: apache-2.0
language: en
library_name: sentence-transformers
---
# m2dexport default checkpoint

A 2D Matryoshka sentence-embedding model: BERT, {layers} layers, {dim} dims, mean pooling, where
every depth and the leading {dims} dims embed. It is all-MiniLM-L6-v2 (Apache-2.0), fine-tuned on
sentences of STS-B train, SICK train, MRPC train and TREC-QA train by matching the original's
similarities at every (layers, dim), with the vocabulary pruned from {old_size} to {size} pieces
(all characters kept) and the weights stored in fp16. `tools/make_default_checkpoint.py` made this
folder and measured:

- STS-B test Spearman at ({layers}, {dim}): {after:.2f} points, {before:.2f} before pruning;
- tokens per text on the STS-B test sentences: {tokens_after:.2f}, {tokens_before:.2f} before.

| layers | {columns} |
| --- | {rule} |
{rows}

STS-B test Spearman in points by layers and dim.
"""


NOTICE = """m2dexport default checkpoint

Derived from all-MiniLM-L6-v2 (https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2,
Apache-2.0; from nreimers/MiniLM-L6-H384-uncased): fine-tuned into a 2D Matryoshka checkpoint,
vocabulary pruned, weights stored in fp16. Distributed under Apache-2.0; see LICENSE.
"""


def write_card(out: Path, facts: dict[str, object], points: dict[tuple[int, int], float]) -> None:
    """Write the model card from the measurements, and the licence of the weights."""
    dims = sorted({dim for _, dim in points})
    depths = sorted({depth for depth, _ in points})
    rows = [f"| {n} | " + " | ".join(f"{points[n, d]:.2f}" for d in dims) + " |" for n in depths]
    card = CARD.format(
        dims=", ".join(map(str, dims)),
        columns=" | ".join(map(str, dims)),
        rule=" | ".join("---" for _ in dims),
        rows="\n".join(rows),
        **facts,
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    (out / "NOTICE").write_text(NOTICE, encoding="utf-8")
    shutil.copyfile(ROOT / "LICENSE", out / "LICENSE")


def main() -> None:
    """Make the checkpoint, measure it before and after, and write its card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="2D checkpoint folder")
    parser.add_argument("--calibration", type=Path, required=True, help="texts, one per line")
    parser.add_argument("--sts-test", type=Path, required=True, help="STS pairs to measure on")
    parser.add_argument("--size", type=int, default=8500, help="pieces to keep")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write; it must not exist")
    arguments = parser.parse_args()

    source = open_checkpoint(arguments.source)
    pruning = plan_pruning(source, read_texts(arguments.calibration), arguments.size)
    slice_checkpoint(
        source, source.layers, source.dim, arguments.out, Cut(dtype="fp16", pruning=pruning)
    )
    # The type to compute in: loaders would otherwise run fp16 on a CPU.
    config = json.loads((arguments.out / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    (arguments.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    provenance = json.loads((arguments.out / "m2dexport.json").read_text(encoding="utf-8"))
    grid = [(n, d) for n in range(1, source.layers + 1) for d in (32, 64, 128, 256, source.dim)]
    provenance |= {"trained": True, "trained_grid": grid}
    (arguments.out / "m2dexport.json").write_text(json.dumps(provenance) + "\n", encoding="utf-8")

    old_points = sts_points(arguments.source, arguments.sts_test)
    points = sts_points(arguments.out, arguments.sts_test)
    task = load_task(arguments.sts_test)
    sentences = [text for text_set in task.texts() for text in text_set.texts]
    full = (source.layers, source.dim)
    facts = {
        "layers": source.layers,
        "dim": source.dim,
        "old_size": source.vocab_size,
        "size": open_checkpoint(arguments.out).vocab_size,
        "before": old_points[full],
        "after": points[full],
        "tokens_before": tokens_per_text(arguments.source, sentences),
        "tokens_after": tokens_per_text(arguments.out, sentences),
    }
    write_card(arguments.out, facts, points)
    for name, value in facts.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
