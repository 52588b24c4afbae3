"""Tiny tokenizers of every kind that checkpoints bring, built in code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

MAX_LENGTH = 24


def tiny_tokenizer(kind: str, padding_side: str | None = None) -> Any:
    """Return a tokenizer of one kind: wordpiece, roberta, unigram, t5 or decoder."""
    backend, specials, side = _KINDS[kind]()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side=padding_side or side,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        **specials,
    )


def _letters() -> list[str]:
    return [chr(c) for c in range(33, 127)]


def _wordpiece() -> tuple[Tokenizer, dict[str, str], str]:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["the", "cat", "dog", "##s", "house", "a", "on", "sat", "mat"]
    pieces = dict.fromkeys(specials + _letters() + ["##" + c for c in _letters()] + words)
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return backend, dict(zip(names, specials, strict=True)), "right"


def _bytes_bpe(specials: Sequence[str]) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = dict.fromkeys([*specials, *alphabet, "th", "the", "at", "Ġa", "Ġthe"])
    merges = [("t", "h"), ("th", "e"), ("a", "t"), ("Ġ", "a"), ("Ġ", "the")]
    backend = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(s, special=True) for s in specials])
    return backend


def _roberta() -> tuple[Tokenizer, dict[str, str], str]:
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend = _bytes_bpe(specials)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return backend, _roberta_names(), "right"


def _roberta_names() -> dict[str, str]:
    return {
        "bos_token": "<s>",
        "cls_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }


def _unigram_backend(specials: Sequence[str]) -> Tokenizer:
    pieces = [(s, 0.0) for s in specials]
    pieces += [("▁", -3.0), ("▁the", -2.0), ("at", -2.5)] + [(c, -4.0) for c in _letters()]
    backend = Tokenizer(models.Unigram(pieces, unk_id=list(specials).index("<unk>")))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def _unigram() -> tuple[Tokenizer, dict[str, str], str]:
    backend = _unigram_backend(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return backend, _roberta_names(), "right"


def _t5() -> tuple[Tokenizer, dict[str, str], str]:
    backend = _unigram_backend(["<pad>", "</s>", "<unk>"])
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return backend, {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}, "right"


def _decoder() -> tuple[Tokenizer, dict[str, str], str]:
    backend = _bytes_bpe(["<pad>", "<eos>"])
    backend.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return backend, {"pad_token": "<pad>", "eos_token": "<eos>"}, "left"


_KINDS = {
    "wordpiece": _wordpiece,
    "roberta": _roberta,
    "unigram": _unigram,
    "t5": _t5,
    "decoder": _decoder,
}
