"""Make the checkpoint that ships with m2dexport from a larger one of the same tokenizer.

The vocabulary is pruned to the special tokens, every character, the pieces that a corpus uses and,
up to the size asked for, the most frequent other pieces (WordPiece vocabularies are ordered by
frequency); weights are stored in fp16.

    python tools/make_default_checkpoint.py --source SOURCE --calibration TEXTS --sts-test TEST.tsv
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from m2dexport.checkpoint import open_checkpoint
from m2dexport.quality import evaluate, load_task
from m2dexport.reference import Reference
from m2dexport.slicing import slice_checkpoint
from m2dexport.tensors import (
    WEIGHTS,
    copied,
    new_tensor,
    read_tensor,
    stored_tensors,
    write_tensors,
)

TABLE = "embeddings.word_embeddings.weight"
ROOT = Path(__file__).parent.parent
OUT = ROOT / "m2dexport" / "data" / "checkpoint"


def kept_pieces(tokenizer: dict[str, Any], texts: list[str], size: int) -> list[str]:
    """Return the pieces to keep, in their old order."""
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    prefix = tokenizer["model"]["continuing_subword_prefix"]
    whole = Tokenizer.from_str(json.dumps(tokenizer))
    kept = {token["content"] for token in tokenizer["added_tokens"]}
    for piece in vocab:
        inside = piece.removeprefix(prefix)
        # A character that the normaliser isolates (Chinese ones) never continues a word.
        if len(inside) == 1 and (piece == inside or piece in whole.encode(f"a{inside}").tokens):
            kept.add(piece)
    used = Counter(token for encoding in whole.encode_batch(texts) for token in encoding.tokens)
    by_use = [piece for piece, _ in sorted(used.items(), key=lambda item: (-item[1], item[0]))]
    by_rank = sorted((p for p in vocab if not p.startswith("[unused")), key=vocab.__getitem__)
    for piece in (*by_use, *by_rank):
        if len(kept) >= size:
            break
        kept.add(piece)
    return sorted(kept, key=vocab.__getitem__)


def prune(folder: Path, texts: list[str], size: int) -> None:
    """Prune the vocabulary of a sub-model folder in place: tokenizer, table and config."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    old = tokenizer["model"]["vocab"]
    pieces = kept_pieces(tokenizer, texts, size)
    new = {piece: index for index, piece in enumerate(pieces)}
    tokenizer["model"]["vocab"] = new
    for token in tokenizer["added_tokens"]:
        token["id"] = new[token["content"]]
    for token in tokenizer["post_processor"]["special_tokens"].values():
        token["ids"] = [new[piece] for piece in token["tokens"]]
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")

    stored = stored_tensors(folder)
    rows = read_tensor(stored[TABLE])[[old[piece] for piece in pieces]]
    tensors = [
        new_tensor(name, rows, "F16") if name == TABLE else copied(tensor, name, dtype="F16")
        for name, tensor in stored.items()
    ]
    write_tensors(folder / "pruned", tensors)
    (folder / "pruned").replace(folder / WEIGHTS)

    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"vocab_size": len(pieces), "pad_token_id": new["[PAD]"]}
    config["dtype"] = "float32"  # what to compute in: loaders would otherwise run fp16 on a CPU
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def require_lossless(before: str, after: str) -> None:
    """Fail when a text that tokenized without an unknown token before no longer does.

    Every piece of the old vocabulary is tried, at the start of a word and inside one.
    """
    old, new = Tokenizer.from_str(before), Tokenizer.from_str(after)
    words = []
    for piece in old.get_vocab():
        bare = piece.removeprefix("##")
        words += [bare, f"a{bare}"]
    unknown = old.token_to_id("[UNK]"), new.token_to_id("[UNK]")
    for word, a, b in zip(words, old.encode_batch(words), new.encode_batch(words), strict=True):
        if unknown[1] in b.ids and unknown[0] not in a.ids:
            raise SystemExit(f"{word!r} no longer tokenizes")


def sts_points(folder: Path, sts: Path) -> dict[tuple[int, int], float]:
    """Return (layers, dim) -> Spearman of some cells on a file of STS pairs."""
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
    """Return the mean number of tokens of the texts, specials included."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    return float(np.mean([len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]))


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
    """Write the model card from what was measured, and the licence that goes with the weights."""
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
    parser.add_argument("--calibration", type=Path, required=True, help="texts, one a line")
    parser.add_argument("--sts-test", type=Path, required=True, help="STS pairs to measure on")
    parser.add_argument("--size", type=int, default=8500, help="pieces to keep")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write; must not exist")
    arguments = parser.parse_args()

    source = open_checkpoint(arguments.source)
    slice_checkpoint(source, source.layers, source.dim, arguments.out, dtype="fp16")
    before = (arguments.out / "tokenizer.json").read_text(encoding="utf-8")
    texts = arguments.calibration.read_text(encoding="utf-8").splitlines()
    prune(arguments.out, texts, arguments.size)
    require_lossless(before, (arguments.out / "tokenizer.json").read_text(encoding="utf-8"))

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
