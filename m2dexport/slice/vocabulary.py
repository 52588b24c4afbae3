"""Prune a tokenizer's vocabulary: a tokenizer.json and its use in, a smaller tokenizer.json out.

Special tokens, added tokens and characters (WordPiece's at the start of a word and inside one)
always stay, so a text that had no unknown token has none afterwards. What else a text needs to
tokenize into the same pieces as before depends on the kind of model:

- WordPiece takes the longest matching piece, again and again. The longest of all pieces is the
  longest of any part of them.
- Unigram takes the path of the highest score. The best of all paths is the best of any part of
  them, provided that an unknown character keeps its score: the lowest of the vocabulary less a
  constant. So the piece of the lowest score stays.
- BPE applies the merge of the lowest rank, again and again. No merge is undone and none crosses the
  border of a final piece, so the merges inside a piece are those that make it when it stands alone,
  wherever it occurs. Their results stay with it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Any

from tokenizers import Tokenizer

from m2dexport.errors import CheckpointError, UsageError

Ranks = Mapping[tuple[str, str], int]

_CHUNK = 1000  # texts tokenized at a time
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # what byte_fallback writes for a byte
_NEVER_USED = "[unused"  # rows that BERT keeps free


@dataclass(frozen=True)
class PrunedTokenizer:
    """A tokenizer with fewer pieces, and the rows of the token table that they have."""

    tokenizer: dict[str, Any]  # tokenizer.json
    rows: tuple[int, ...]  # the old id of each new one


@dataclass(frozen=True)
class TokenUse:
    """How often some texts use each token, special ones included."""

    counts: Counter[int]  # by id
    per_text: float  # tokens of a text, the mean


def token_use(tokenizer: Mapping[str, Any], texts: Iterable[str]) -> TokenUse:
    """Return how often texts, at their full length, use the tokens of a tokenizer.json."""
    backend = Tokenizer.from_str(json.dumps(tokenizer))
    backend.no_padding()
    backend.no_truncation()
    counts: Counter[int] = Counter()
    total, rest = 0, iter(texts)
    while chunk := list(islice(rest, _CHUNK)):
        total += len(chunk)
        for encoding in backend.encode_batch(chunk):
            counts.update(encoding.ids)
    return TokenUse(counts, sum(counts.values()) / max(total, 1))


def prune_vocabulary(
    tokenizer: Mapping[str, Any],
    used: Mapping[int, int],
    size: int | None = None,
    keep: Iterable[int] = (),
) -> PrunedTokenizer:
    """Return a tokenizer with the pieces that are used, or with the most useful ``size`` ones.

    Texts that use no other pieces tokenize as before. Pieces keep their order. A size is filled
    with the pieces used most, then in the vocabulary's own order: by id, or by Unigram's score. A
    BPE piece that does not fit in together with the pieces it is merged from is passed over.

    Args:
        tokenizer: a tokenizer.json of the kind WordPiece, BPE or Unigram.
        used: how often each id is used.
        size: how many pieces to keep at most; None keeps those that are used.
        keep: ids to keep whatever their use.

    Raises:
        UsageError: when ``size`` is below what always stays.
        CheckpointError: when the tokenizer is of another kind, or has a piece whose characters are
            not pieces, so that a text could become unknown.
    """
    model = tokenizer["model"]
    ids = _ids(model)
    pieces = {index: piece for piece, index in ids.items()}
    backend = Tokenizer.from_str(json.dumps(tokenizer))
    added = {token["content"] for token in tokenizer["added_tokens"]}
    outside = {p: i for p, i in backend.get_vocab().items() if p not in ids}
    kept = (added | _special_pieces(model, ids)) & ids.keys()
    kept |= _characters(model, ids, kept, backend)
    ranks = _merge_ranks(model)
    for index in {*keep, *_processor_ids(tokenizer.get("post_processor"))} & pieces.keys():
        kept |= _merged_from(pieces[index], ranks) or {pieces[index]}
    limit = len(ids) if size is None else size - len(outside)
    if limit < len(kept):
        raise UsageError(
            f"--prune-vocab {size} is below the {len(kept) + len(outside)} special tokens and "
            "characters that always stay."
        )
    by_use = sorted((pieces[i] for i in used if i in pieces), key=lambda p: (-used[ids[p]], p))
    for piece in chain(by_use, _by_rank(model, ids, ranks) if size is not None else ()):
        if len(kept) == limit:
            break
        new = (_merged_from(piece, ranks) or {piece}) - kept
        if len(kept) + len(new) <= limit:
            kept |= new
    return _rewritten(tokenizer, kept, outside)


def _ids(model: Mapping[str, Any]) -> dict[str, int]:
    """Return the ids of the model's own pieces; added tokens can lie outside of them."""
    kind, vocab = model.get("type"), model.get("vocab")
    if kind not in ("WordPiece", "BPE", "Unigram"):
        raise CheckpointError(
            f"a tokenizer of the kind {kind} cannot be pruned; WordPiece, BPE and Unigram can."
        )
    if kind == "BPE" and (model["continuing_subword_prefix"] or model["end_of_word_suffix"]):
        raise CheckpointError(
            "a BPE tokenizer that marks the inside or the end of words cannot be pruned."
        )
    if isinstance(vocab, list):
        return {piece: index for index, (piece, _) in enumerate(vocab)}
    return dict(vocab or {})


def _special_pieces(model: Mapping[str, Any], ids: Mapping[str, int]) -> set[str]:
    found = {p for p in ids if _BYTE.fullmatch(p)} if model.get("byte_fallback") else set()
    if model["type"] != "Unigram":
        return found | {str(model.get("unk_token"))}
    if model.get("unk_id") is not None:
        found.add(model["vocab"][model["unk_id"]][0])
    return found | {min(model["vocab"], key=lambda entry: entry[1])[0]}


def _characters(
    model: Mapping[str, Any], ids: Mapping[str, int], special: set[str], backend: Tokenizer
) -> set[str]:
    """Return the pieces that any text can fall back to."""
    single = {piece for piece in ids if len(piece) == 1}
    if model["type"] == "BPE":
        # Other pieces start from characters, too, unless a whole word is looked up first.
        lookup = model.get("ignore_merges")
        return single | {piece for piece in ids if lookup and not single.issuperset(piece)}
    prefix = model.get("continuing_subword_prefix", "")
    if model["type"] == "WordPiece":
        inside = (p for p in ids if p.startswith(prefix) and len(p) == len(prefix) + 1)
        single |= {p for p in inside if _reaches_model(p, prefix, backend)}
    for piece in ids.keys() - special - single:
        if piece.startswith(_NEVER_USED):
            continue
        first = prefix if piece.startswith(prefix) else ""
        body = piece.removeprefix(prefix)
        forms = {first + body[:1], *(prefix + character for character in body[1:])}
        if not forms <= single and _reaches_model(piece, prefix, backend):
            raise CheckpointError(
                f"the vocabulary cannot be pruned: a character of its piece {piece!r} is not a "
                "piece of its own, so texts could become unknown that were not."
            )
    return single


def _reaches_model(piece: str, prefix: str, backend: Tokenizer) -> bool:
    """Say whether a text can hold a piece; BERT splits off some characters, and drops others.

    What BERT does to a character does not depend on its neighbours. Of other tokenizers nothing is
    known, and any piece may be held.
    """
    if type(backend.pre_tokenizer).__name__ != "BertPreTokenizer":
        return True
    word = f"a{piece.removeprefix(prefix)}" if piece.startswith(prefix) else piece
    text = backend.normalizer.normalize_str(word) if backend.normalizer else word
    return [found for found, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == [word]


def _merge_ranks(model: Mapping[str, Any]) -> Ranks:
    return {pair: rank for rank, pair in enumerate(map(_pair, model.get("merges", ())))}


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _merged_from(piece: str, ranks: Ranks) -> set[str] | None:
    """Return a BPE piece and those it is merged from, or None when no merges make it."""
    symbols, made = list(piece), set(piece)
    while len(symbols) > 1:
        pairs = list(pairwise(symbols))
        first = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], math.inf))
        if pairs[first] not in ranks:
            return None
        symbols[first : first + 2] = ["".join(pairs[first])]
        made.add(symbols[first])
    return made


def _by_rank(model: Mapping[str, Any], ids: Mapping[str, int], ranks: Ranks) -> Iterator[str]:
    """Yield the pieces that a text can have, the most useful ones first."""
    in_order = sorted(ids, key=ids.__getitem__)
    if model["type"] == "Unigram":
        in_order.sort(key=lambda piece: -model["vocab"][ids[piece]][1])
    merged_only = model["type"] == "BPE" and not model.get("ignore_merges")
    for piece in in_order:
        if not piece.startswith(_NEVER_USED) and (not merged_only or _merged_from(piece, ranks)):
            yield piece


def _rewritten(
    tokenizer: Mapping[str, Any], kept: set[str], outside: Mapping[str, int]
) -> PrunedTokenizer:
    model = dict(tokenizer["model"])
    if isinstance(model["vocab"], list):
        rows = [i for i, (piece, _) in enumerate(model["vocab"]) if piece in kept]
        model["vocab"] = [model["vocab"][i] for i in rows]
        if model.get("unk_id") is not None:
            model["unk_id"] = rows.index(model["unk_id"])
    else:
        old = model["vocab"]
        in_order = sorted(kept, key=old.__getitem__)
        rows = [old[piece] for piece in in_order]
        model["vocab"] = {piece: index for index, piece in enumerate(in_order)}
    if "merges" in model:
        parts = ((merge, *_pair(merge)) for merge in model["merges"])
        model["merges"] = [merge for merge, a, b in parts if {a, b, a + b} <= kept]
    last = sorted(outside, key=outside.__getitem__)
    ids = _ids(model) | {piece: len(rows) + i for i, piece in enumerate(last)}
    rows += [outside[piece] for piece in last]
    new = {old_id: new_id for new_id, old_id in enumerate(rows)}
    changed = {
        **tokenizer,
        "model": model,
        "added_tokens": [{**t, "id": ids[t["content"]]} for t in tokenizer["added_tokens"]],
        "post_processor": _renumbered(tokenizer.get("post_processor"), new),
    }
    if Tokenizer.from_str(json.dumps(changed)).get_vocab() != ids:
        raise CheckpointError(
            "the vocabulary cannot be pruned: its added tokens are not numbered after its pieces."
        )
    return PrunedTokenizer(changed, tuple(rows))


def _processor_ids(processor: Mapping[str, Any] | None) -> Iterator[int]:
    """Yield the ids of the special tokens that a post-processor adds."""
    if processor is None:
        return
    for step in processor.get("processors", ()):
        yield from _processor_ids(step)
    for token in processor.get("special_tokens", {}).values():
        yield from token["ids"]
    for name in {"sep", "cls"} & processor.keys():
        yield processor[name][1]


def _renumbered(
    processor: Mapping[str, Any] | None, new: Mapping[int, int]
) -> dict[str, Any] | None:
    if processor is None:
        return None
    changed = dict(processor)
    if "processors" in processor:
        changed["processors"] = [_renumbered(step, new) for step in processor["processors"]]
    if "special_tokens" in processor:
        changed["special_tokens"] = {
            name: {**token, "ids": [new[i] for i in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
    for name in {"sep", "cls"} & processor.keys():
        changed[name] = [processor[name][0], new[processor[name][1]]]
    return changed
