"""Vocabulary pruning: texts of the corpus stay as they were, and none becomes unknown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from tiny import TEXTS, tiny_checkpoint
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.checkpoint.tensors import stored_tensors
from m2dexport.checkpoint.tokenizer import replace_tokenizer, write_tokenizer
from m2dexport.data import calibration_texts
from m2dexport.errors import CheckpointError, UsageError
from m2dexport.slice.pruning import plan_pruning
from m2dexport.slice.slicing import Cut, slice_checkpoint, slice_grid
from m2dexport.slice.vocabulary import prune_vocabulary, token_use

SIZE = 900
BYTES = [f"<0x{i:02X}>" for i in range(256)]
OTHER = ["Ünïcödé straße naïve", "東京 と 大阪", "1999 (a-b) 3.14% x_y #tag", "ааа ббб Россия"]
TRAINING = [*calibration_texts()[:400], *OTHER]


def _trained(backend: Tokenizer, trainer: Any) -> Tokenizer:
    backend.train_from_iterator(TRAINING, trainer)
    return backend


def _wordpiece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    _trained(backend, trainers.WordPieceTrainer(vocab_size=SIZE, special_tokens=specials))
    backend.post_processor = processors.BertProcessing(("[SEP]", 4), ("[CLS]", 3))
    return backend


def _byte_bpe(*, ignore_merges: bool = False) -> Tokenizer:
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    _trained(backend, trainer)
    backend.add_special_tokens([AddedToken("<mask>", lstrip=True), "<|end|>"])
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return backend


def _lookup_bpe() -> Tokenizer:
    """Whole words are looked up before any merge, some of which no merge makes."""
    stored = json.loads(_byte_bpe(ignore_merges=True).to_str())
    merges = stored["model"]["merges"]
    del merges[5::7]
    made = {a + b for a, b in merges}
    single = {p for p in stored["model"]["vocab"] if len(p) == 1}
    stored["model"]["merges"] = [m for m in merges if {*m} <= made | single]
    backend = Tokenizer.from_str(json.dumps(stored))
    ends = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    backend.post_processor = processors.Sequence([processors.ByteLevel(), ends])
    return backend


def _sentencepiece_bpe() -> Tokenizer:
    """As Llama's: one word a text, merges of every split of every piece, bytes to fall back to."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    specials = ["<unk>", "<s>", "</s>", *BYTES]
    _trained(backend, trainers.BpeTrainer(vocab_size=SIZE + 256, special_tokens=specials))
    stored = json.loads(backend.to_str())
    vocab = stored["model"]["vocab"]
    del vocab["é"]  # one more character that only bytes can write
    stored["model"]["vocab"] = {piece: i for i, piece in enumerate(vocab)}
    stored["pre_tokenizer"] = None
    stored["model"]["merges"] = [
        [piece[:i], piece[i:]]
        for piece in vocab
        if piece not in specials
        for i in range(1, len(piece))
        if piece[:i] in vocab and piece[i:] in vocab
    ]
    stored["added_tokens"] = [t for t in stored["added_tokens"] if t["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(stored))


def _unigram(*, byte_fallback: bool = False) -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<s>", "<pad>", "</s>", "<unk>"] + (BYTES if byte_fallback else [])
    trainer = trainers.UnigramTrainer(
        vocab_size=SIZE + 256 * byte_fallback, special_tokens=specials, unk_token="<unk>"
    )
    _trained(backend, trainer)
    backend.add_special_tokens(["<mask>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    stored = json.loads(backend.to_str())
    stored["model"]["byte_fallback"] = byte_fallback
    stored["added_tokens"] = [t for t in stored["added_tokens"] if t["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(stored))


_KINDS: dict[str, Callable[[], Tokenizer]] = {
    "wordpiece": _wordpiece,
    "byte-bpe": _byte_bpe,
    "lookup-bpe": _lookup_bpe,
    "sentencepiece-bpe": _sentencepiece_bpe,
    "unigram": _unigram,
    "byte-unigram": lambda: _unigram(byte_fallback=True),
}
kinds = pytest.mark.parametrize("kind", _KINDS)


@cache
def trained(kind: str) -> tuple[dict[str, Any], Tokenizer]:
    text = _KINDS[kind]().to_str()
    return json.loads(text), Tokenizer.from_str(text)


def unknown_id(tokenizer: dict[str, Any]) -> int | None:
    found = Tokenizer.from_str(json.dumps(tokenizer))
    ids = (found.token_to_id(token) for token in ("[UNK]", "<unk>"))
    return next((i for i in ids if i is not None), None)


def written(kind: str) -> st.SearchStrategy[str]:
    """Words of the training texts, pieces glued together, and any text at all."""
    words = sorted({word for text in TRAINING for word in text.split()})
    pieces = [p.removeprefix("##").replace("Ġ", " ") for p in trained(kind)[1].get_vocab()]
    spaced = st.lists(st.sampled_from(words), max_size=6).map(" ".join)
    glued = st.lists(st.sampled_from(sorted(pieces)), max_size=5).map("".join)
    return st.one_of(spaced, glued, st.text(max_size=12))


@kinds
def test_a_corpus_tokenizes_into_the_same_pieces(kind: str) -> None:
    tokenizer, old = trained(kind)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(written(kind), min_size=1, max_size=8))
    def check(corpus: list[str]) -> None:
        pruned = prune_vocabulary(tokenizer, token_use(tokenizer, corpus).counts)
        new = Tokenizer.from_str(json.dumps(pruned.tokenizer))
        for a, b in zip(old.encode_batch(corpus), new.encode_batch(corpus), strict=True):
            assert a.tokens == b.tokens
            assert a.ids == [pruned.rows[i] for i in b.ids]

    check()


@kinds
def test_no_text_becomes_unknown(kind: str) -> None:
    tokenizer, old = trained(kind)
    pruned = prune_vocabulary(tokenizer, token_use(tokenizer, TRAINING[:5]).counts)
    assert len(pruned.rows) < 0.9 * old.get_vocab_size()
    new = Tokenizer.from_str(json.dumps(pruned.tokenizer))
    before, after = unknown_id(tokenizer), unknown_id(pruned.tokenizer)

    @settings(max_examples=150, deadline=None)
    @given(written(kind))
    def check(text: str) -> None:
        assert before in old.encode(text).ids or after not in new.encode(text).ids

    check()
    for piece in old.get_vocab():
        bare = piece.removeprefix("##")
        for text in (bare, f"a{bare}"):
            assert before in old.encode(text).ids or after not in new.encode(text).ids, text


@kinds
def test_pruning_twice_is_pruning_once(kind: str) -> None:
    tokenizer, _ = trained(kind)
    corpus = TRAINING[:20]
    once = prune_vocabulary(tokenizer, token_use(tokenizer, corpus).counts)
    twice = prune_vocabulary(once.tokenizer, token_use(once.tokenizer, corpus).counts)
    assert twice.tokenizer == once.tokenizer
    assert twice.rows == tuple(range(len(once.rows)))


@kinds
def test_a_size_is_an_upper_bound_filled_by_use_and_then_by_rank(kind: str) -> None:
    tokenizer, old = trained(kind)
    use = token_use(tokenizer, TRAINING[:20])
    least = len(prune_vocabulary(tokenizer, Counter()).rows)
    with pytest.raises(UsageError, match=f"--prune-vocab {least - 1} is below the {least} "):
        prune_vocabulary(tokenizer, use.counts, least - 1)
    assert len(prune_vocabulary(tokenizer, use.counts, least).rows) == least
    per_text = []
    for size in (least, least + 30, least + 60, old.get_vocab_size()):
        pruned = prune_vocabulary(tokenizer, use.counts, size)
        assert min(size, least + 60) <= len(pruned.rows) <= size
        per_text.append(token_use(pruned.tokenizer, TRAINING[:20]).per_text)
    assert per_text == sorted(per_text, reverse=True)
    assert per_text[0] > per_text[-1] == use.per_text


def test_a_bpe_piece_stays_with_the_merges_that_make_it_and_no_others() -> None:
    vocab = {p: i for i, p in enumerate(["a", "b", "c", "d", "bc", "ab", "abc", "cd"])}
    merges = [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c"), ("c", "d")]
    tokenizer = json.loads(Tokenizer(models.BPE(vocab, merges)).to_str())
    pruned = prune_vocabulary(tokenizer, token_use(tokenizer, ["abc"]).counts)
    assert list(pruned.tokenizer["model"]["vocab"]) == ["a", "b", "c", "d", "bc", "abc"]
    assert pruned.tokenizer["model"]["merges"] == [["b", "c"], ["a", "bc"]]


def test_a_word_that_is_looked_up_whole_stays_where_its_characters_could_not_spell_it() -> None:
    tokenizer = json.loads(Tokenizer(models.BPE({"a": 0, "xa": 1}, [])).to_str())
    assert prune_vocabulary(tokenizer, {}).rows == (0,)
    tokenizer["model"]["ignore_merges"] = True
    assert prune_vocabulary(tokenizer, {}).rows == (0, 1)


def test_scores_and_the_price_of_an_unknown_character_stay() -> None:
    pieces = [("<unk>", 0.0), ("a", -3.0), ("b", -3.0), ("ab", -2.0), ("bb", -40.0), ("ba", -2.5)]
    tokenizer = json.loads(Tokenizer(models.Unigram(pieces, unk_id=0)).to_str())
    pruned = prune_vocabulary(tokenizer, token_use(tokenizer, ["ab"]).counts)
    assert pruned.tokenizer["model"]["vocab"] == [list(p) for p in pieces if p[0] != "ba"]
    assert pruned.rows == (0, 1, 2, 3, 4)


def test_a_character_that_bert_splits_off_never_continues_a_word() -> None:
    words = ["[UNK]", "a", "##a", "東", "##東", "!", "##!", "aa", "##s", "as"]
    vocab = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pruned = prune_vocabulary(json.loads(backend.to_str()), {})
    assert list(pruned.tokenizer["model"]["vocab"]) == ["[UNK]", "a", "##a", "東", "!", "##s"]
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pruned = prune_vocabulary(json.loads(backend.to_str()), {})
    assert {"##東", "##!"} <= pruned.tokenizer["model"]["vocab"].keys()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.WordLevel({"a": 0, "?": 1}, unk_token="?"), "of the kind WordLevel cannot"),
        (models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"), "marks the inside or the end"),
        (
            models.WordPiece({"a": 0, "ab": 1, "?": 2}, unk_token="?"),
            "its piece 'ab' is not a piece",
        ),
        (
            models.Unigram([("?", 0.0), ("a", -1.0), ("ab", -1.0)], 0),
            "its piece 'ab' is not a piece",
        ),
    ],
)
def test_what_cannot_be_pruned_is_refused_with_the_reason(model: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        prune_vocabulary(json.loads(Tokenizer(model).to_str()), {})


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("BertTokenizer", "wordpiece"),
        ("MPNetTokenizer", "wordpiece"),
        ("RobertaTokenizer", "byte-bpe"),
        ("Qwen2Tokenizer", "byte-bpe"),
        ("LlamaTokenizer", "sentencepiece-bpe"),
        ("GemmaTokenizer", "sentencepiece-bpe"),
        ("XLMRobertaTokenizer", "unigram"),
        ("CamembertTokenizer", "unigram"),
        ("AlbertTokenizer", "unigram"),
        ("DebertaV2Tokenizer", "unigram"),
        ("T5Tokenizer", "unigram"),
        ("PreTrainedTokenizerFast", "byte-unigram"),
        ("PreTrainedTokenizerFast", "lookup-bpe"),
    ],
)
def test_transformers_loads_a_pruned_tokenizer_as_it_is_written(
    name: str, kind: str, tmp_path: Path
) -> None:
    (tmp_path / "stored").mkdir()
    config: dict[str, Any] = {"tokenizer_class": name, "model_max_length": 64}
    if kind == "unigram":
        config |= {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
    (tmp_path / "stored" / "tokenizer_config.json").write_text(json.dumps(config))
    trained(kind)[1].save(str(tmp_path / "stored" / "tokenizer.json"))
    folder = tmp_path / "written"
    folder.mkdir()
    write_tokenizer(tmp_path / "stored", folder, lowercase=False)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    pruned = prune_vocabulary(tokenizer, token_use(tokenizer, TRAINING[:20]).counts)
    for copy in ("vocab.txt", "merges.txt", "spiece.model"):
        (folder / copy).write_text("stale")
    ids = {old: new for new, old in enumerate(pruned.rows)}
    replace_tokenizer(folder, pruned.tokenizer, ids)
    assert {p.name for p in folder.iterdir()} <= {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    old = Tokenizer.from_str(json.dumps(tokenizer))
    for text in TRAINING[:20]:
        assert loaded(text)["input_ids"] == backend.encode(text).ids
        assert [pruned.rows[i] for i in loaded(text)["input_ids"]] == old.encode(text).ids
    assert loaded.all_special_ids == [backend.token_to_id(t) for t in loaded.all_special_tokens]


def encode(folder: Path, texts: list[str]) -> Any:
    return SentenceTransformer(str(folder), device="cpu").encode(texts)


@pytest.mark.parametrize(
    "model_type",
    ["bert", "mpnet", "roberta", "modernbert", "xlm-roberta", "albert", "t5", "qwen3"],
)
def test_a_pruned_model_gives_the_vectors_of_the_whole_one(model_type: str, tmp_path: Path) -> None:
    parent = open_checkpoint(
        tiny_checkpoint(tmp_path / "parent", model_type, prompts={"query": "find: "})
    )
    corpus = ["a dog ran", "naive 42!"]
    pruning = plan_pruning(parent, corpus)
    sub = slice_checkpoint(parent, 2, 16, tmp_path / "sub", Cut(pruning=pruning))
    whole = slice_checkpoint(parent, 2, 16, tmp_path / "whole")
    assert sub.vocab_size == len(pruning.rows) < parent.vocab_size
    asked = [*corpus, *("find: " + text for text in corpus)]
    np.testing.assert_allclose(encode(sub.path, asked), encode(whole.path, asked), atol=2e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(sub.path)
    config = json.loads((sub.path / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer)
    assert config["pad_token_id"] == tokenizer.pad_token_id
    provenance = json.loads((sub.path / "m2dexport.json").read_text())
    saved = (whole.path / "model.safetensors").stat().st_size
    saved -= (sub.path / "model.safetensors").stat().st_size
    assert abs(provenance["vocabulary"]["bytes_saved"] - saved) < 100
    assert provenance["vocabulary"]["pieces"] == [parent.vocab_size, sub.vocab_size]


def test_the_padding_of_a_model_with_counted_positions_keeps_its_id(tmp_path: Path) -> None:
    """RoBERTa counts positions from the padding's id, so an id below it may not go."""
    parent = open_checkpoint(tiny_checkpoint(tmp_path / "parent", "roberta"))
    config = json.loads((parent.path / "config.json").read_text())
    config |= {"pad_token_id": 9}
    (parent.path / "config.json").write_text(json.dumps(config))
    pruning = plan_pruning(parent, [TEXTS[0]])
    assert pruning.rows[:10] == tuple(range(10))
    assert pruning.config["pad_token_id"] == 9


def test_a_row_that_config_names_and_the_tokenizer_does_not_stays(tmp_path: Path) -> None:
    parent = tiny_checkpoint(tmp_path / "parent", "qwen3", pooling="lasttoken")
    model = transformers.AutoModel.from_pretrained(parent)
    last = model.config.vocab_size + 7
    model.resize_token_embeddings(last + 1, mean_resizing=False)
    model.config.pad_token_id = last
    model.config.eos_token_id = [1, last]
    model.save_pretrained(parent)
    checkpoint = open_checkpoint(parent)
    pruning = plan_pruning(checkpoint, [TEXTS[0]])
    sub = slice_checkpoint(checkpoint, 2, 16, tmp_path / "sub", Cut(pruning=pruning))
    assert pruning.rows[-1] == last
    assert pruning.config["eos_token_id"] == [1, len(pruning.rows) - 1]
    whole = slice_checkpoint(checkpoint, 2, 16, tmp_path / "whole")
    expected = encode(whole.path, [TEXTS[0]])
    np.testing.assert_allclose(encode(sub.path, [TEXTS[0]]), expected, atol=2e-5)


def test_a_grid_is_pruned_alike(bert: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(bert)
    pruning = plan_pruning(checkpoint, [TEXTS[0]])
    subs = slice_grid(
        checkpoint, [1, 2], [8], tmp_path / "grid", Cut(dtype="fp16", pruning=pruning)
    )
    assert {sub.vocab_size for sub in subs} == {len(pruning.rows)}
    table = stored_tensors(subs[0].path)["embeddings.word_embeddings.weight"]
    assert (table.dtype, table.shape[0]) == ("F16", len(pruning.rows))


def test_a_tokenizer_with_more_tokens_than_the_table_has_rows_is_refused(tmp_path: Path) -> None:
    parent = tiny_checkpoint(tmp_path / "parent")
    tokenizer = transformers.AutoTokenizer.from_pretrained(parent)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(parent)
    with pytest.raises(CheckpointError, match="remove the added tokens that the model lacks"):
        plan_pruning(open_checkpoint(parent), [TEXTS[0]])
