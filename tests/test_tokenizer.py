"""Tokenizer: the ids of long texts in bounded memory, and what tokenizer.json may hold."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tiny_artifact import letter_tokenizer, relisted, tiny_artifact
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

import m2dexport
from m2dexport.data import calibration_texts
from m2dexport.errors import M2DError
from m2dexport.runtime import tokenizer as runtime
from m2dexport.runtime.loading import load
from m2dexport.runtime.tokenizer import load_tokenizer, tokenize
from m2dexport.runtime.tokenizer_guard import require_plain_tokenizer

CORPUS = calibration_texts()[:600]
SPECIALS = ["<s>", "</s>", "<unk>"]


@cache
def shipped() -> Tokenizer:
    folder = Path(m2dexport.__file__).parent / "data" / "checkpoint"
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@cache
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=800, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        ),
    )


@cache
def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return trained(
        tokenizer,
        trainers.UnigramTrainer(
            vocab_size=600, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
        ),
    )


@cache
def one_word() -> Tokenizer:
    """Like Llama's: the whole text is one word, in which the spaces are letters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # of the training only
    trained(
        tokenizer,
        trainers.BpeTrainer(vocab_size=800, special_tokens=SPECIALS, show_progress=False),
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    return tokenizer


def trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


KINDS = [shipped, byte_level, unigram, one_word]


def long_texts() -> list[str]:
    text = " ".join(CORPUS)
    return [
        *(text[start : start + 7000 + 900 * start % 20_000] for start in range(0, 40_000, 8000)),
        "\n".join(CORPUS),
        text.replace(" ", "   \t"),
        text.upper(),
        "今日は良い天気ですね。" * 900,
        "e\u0301\u0323" * 4000 + " " + text,
        "=" * 5000 + " " + text,
        " " * 9000 + text,
        "a" * 4000,
        "1234567890" * 600 + text[:3000],
        "a " * 3000,
    ]


@pytest.mark.parametrize("max_length", [12, 100])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_long_texts_get_the_tokens_that_they_have_as_a_whole(
    kind: Callable[[], Tokenizer], max_length: int
) -> None:
    tokenizer = kind()
    tokenizer.enable_truncation(max_length)
    texts = [*long_texts(), "a", "", *CORPUS[:50]]
    for prefix in ("", "query: "):
        whole = [tokenizer.encode(prefix + text) for text in texts]
        found = tokenize(tokenizer, texts, prefix)
        assert [each.ids for each in found] == [each.ids for each in whole]
        assert [each.truncated for each in found] == [bool(each.overflowing) for each in whole]


def test_a_text_of_one_huge_word_is_read_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_MOST", 5000)
    tokenizer = shipped()
    tokenizer.enable_truncation(16)
    (found,) = tokenize(tokenizer, ["a" * 100_000], "")
    assert found == runtime.Tokens(tokenizer.encode("a" * 5000).ids, truncated=True)


MEMORY = """
import re, sys
from pathlib import Path
from m2dexport.runtime.loading import load
from m2dexport.runtime.streams import encode_stream
summary = encode_stream(load(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
# Not by getrusage, which begins with the parent's.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(summary.texts, summary.truncated, peak // 1024)
"""


@pytest.mark.parametrize(
    "unit", ["the quick brown fox ", "a", " "], ids=["words", "word", "spaces"]
)
def test_a_line_of_50_mb_takes_bounded_memory(tmp_path: Path, unit: str) -> None:
    bundle = tiny_artifact(tmp_path / "artifact")
    (tmp_path / "texts.txt").write_text(f"first\n{unit * (50_000_000 // len(unit))}\nlast\n")
    paths = map(str, (bundle, tmp_path / "texts.txt", tmp_path / "v.npy"))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *paths], capture_output=True, text=True, check=True
    )
    texts, truncated, peak = map(int, done.stdout.split())
    assert (texts, truncated) == (3, 1)
    assert peak < 600  # MB


def sound() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(letter_tokenizer(16))
    return stored


def charsmap(replacement: bytes) -> dict[str, Any]:
    table = (8).to_bytes(4, "little") + bytes(8) + replacement + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


def replaced(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def added(content: str) -> dict[str, Any]:
    return {"id": 1, "content": content, "special": False}


def split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def truncation(**change: Any) -> dict[str, Any]:
    return {"truncation": sound()["truncation"] | change}


def model(**change: Any) -> dict[str, Any]:
    return {"model": sound()["model"] | change}


PADDING = {
    "strategy": {"Fixed": 10**9},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "[PAD]",
}
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"padding": PADDING}, "it pads"),
        ({"truncation": None}, "must cut texts at 16 tokens"),
        (truncation(max_length=17), "must cut texts at 16 tokens"),
        (truncation(stride=20), "without stride"),
        (truncation(strategy="OnlyFirst"), "must cut"),
        (truncation(direction="Left"), "at their end .*'direction': 'Left'"),
        ({"normalizer": replaced({"String": "a"}, "a" * 10**6)}, "many times longer"),
        ({"normalizer": replaced({"String": ""}, "a")}, "replaces nothing"),
        ({"normalizer": replaced({"Regex": ""}, "a" * 10**6)}, "take very long"),
        ({"normalizer": replaced({"Regex": " "}, "a" * 10**6)}, "many times longer"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}}, "many times longer"),
        (
            {"normalizer": sequence(*[replaced({"String": "a"}, "aa")] * 30)},
            "many times longer",
        ),
        ({"normalizer": charsmap(b"a" * 10**6)}, "many times longer"),
        ({"normalizer": sequence(charsmap(b"a" * 60), charsmap(b"a" * 60))}, "many times longer"),
        ({"normalizer": sequence(*[{"type": "ByteLevel"}] * 4)}, "many times longer"),
        (
            {
                "normalizer": sequence(
                    *[replaced({"String": "a"}, "ﷺ"), {"type": "NFKC"}] * 2,
                )
            },
            "many times longer",
        ),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 20}},
            "many times longer",
        ),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "!"}}, "is not base64"),
        ({"normalizer": {"type": "Evil"}}, "normalizer has the unknown type 'Evil'"),
        ({"normalizer": ["x" * 10**6]}, "is not a tokenizer"),
        ({"pre_tokenizer": split("(a+)+b")}, r"pattern '\(a\+\)\+b' is not one .* take very long"),
        ({"pre_tokenizer": split("(a|aa){40}!")}, "take very long"),
        ({"pre_tokenizer": split("a?" * 40 + "a" * 40)}, "take very long"),
        ({"pre_tokenizer": split("a*a*a*b")}, "take very long"),
        ({"pre_tokenizer": split("a+b")}, "take very long"),
        ({"pre_tokenizer": split("a{1,999}")}, "take very long"),
        ({"pre_tokenizer": split("[a]++")}, "take very long"),
        ({"pre_tokenizer": split("a" * 10**6)}, "take very long"),
        ({"normalizer": replaced({"Regex": "x?"}, "")}, "take very long"),
        (model(type="Evil"), "model has the unknown type 'Evil'"),
        (model(max_input_chars_per_word=10**9), "for one word"),
        ({"model": {"type": "BPE", "dropout": 0.5, "vocab": {}, "merges": []}}, "at random"),
        (model(continuing_subword_prefix="#" * 10**6), "marks parts of words by more than 16"),
        (
            {"model": {"type": "Unigram", "vocab": [["a" * k, -1.0] for k in range(1, 4000)]}},
            "a piece of more than 256 characters",
        ),
        ({"model": {"type": "Unigram", "vocab": 5}}, "is not a tokenizer"),
        ({"added_tokens": [added("a")] * 10_001}, "more than 10,000 added tokens"),
        ({"added_tokens": [added("a" * 1001)]}, "added token of more than 1,000 characters"),
        ({"added_tokens": {"a": 1}}, "added tokens are not a list of objects"),
        ({"added_tokens": ["a"]}, "added tokens are not a list of objects"),
        ({"added_tokens": [{}]}, "is not a tokenizer"),
        ({"model": {"type": "WordPiece", "vocab": 5}}, "library cannot read tokenizer.json"),
        ({"post_processor": {"type": "Evil"}}, "post_processor has the unknown type"),
        ({"decoder": {"type": "Evil"}}, "decoder has the unknown type"),
        ({"model": None}, "is not a tokenizer"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_build_does_not_write_is_refused(
    tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    folder = tiny_artifact(tmp_path / "artifact")
    (folder / "tokenizer.json").write_text(json.dumps(sound() | change))
    with pytest.raises(M2DError, match=told) as refused:
        load(relisted(folder))
    assert len(str(refused.value)) < 350
    assert "\n" not in str(refused.value)


def test_special_tokens_that_leave_no_room_are_refused(tmp_path: Path) -> None:
    stored = sound()
    ids = {"id": "[CLS]", "ids": [2] * 100, "tokens": ["[CLS]"] * 100}
    stored["post_processor"]["special_tokens"]["[CLS]"] = ids
    with pytest.raises(M2DError, match="adds more than 16 tokens"):
        require_plain_tokenizer(json.dumps(stored), 16)
    tokenizer = load_tokenizer(letter_tokenizer(2))
    with pytest.raises(M2DError, match="adds 2 special tokens and cuts at 2"):
        runtime.require_room(tokenizer)


def test_a_panic_of_the_library_is_one_sentence() -> None:
    """A stride beyond the maximum, which the guard refuses, makes the library panic."""
    stored = sound()
    stored["truncation"]["stride"] = 20
    with pytest.raises(M2DError, match="the tokenizers library cannot tokenize a text: `stride`"):
        tokenize(Tokenizer.from_str(json.dumps(stored)), ["a " * 100], "")


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": replaced({"String": " "}, "▁")},
        {"normalizer": replaced({"Regex": " {2,}"}, "▁")},
        {"normalizer": replaced({"String": "``"}, '"')},
        {"normalizer": {"type": "Prepend", "prepend": "▁"}},
        {
            "normalizer": sequence(
                *[replaced({"Regex": r"\s+"}, " "), replaced({"String": "x"}, "")] * 12
            )
        },
        {
            "normalizer": sequence(  # ALBERT's
                replaced({"String": "``"}, '"'),
                {"type": "NFKD"},
                {"type": "StripAccents"},
                charsmap("صلى الله عليه وسلم".encode()),
                replaced({"Regex": " {2,}"}, " "),
            )
        },
        {"added_tokens": [added(f"<unused{number}>") for number in range(6500)]},
        {"normalizer": charsmap("صلى الله عليه وسلم".encode())},
        {"pre_tokenizer": split(GPT2)},
        {"pre_tokenizer": split(QWEN)},
        *[
            {"pre_tokenizer": split(pattern)}
            for pattern in (
                "[0-9][0-9][0-9]",
                r"\p{N}{1,3}",
                "[一-龥぀-ゟ]+",
                r"[\]\s]",
                r"\p{^Han}+",
            )
        ],
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_models_use_is_accepted(change: dict[str, Any]) -> None:
    require_plain_tokenizer(json.dumps(sound() | change), 16)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_tokenizers_of_every_kind_are_accepted(kind: Callable[[], Tokenizer]) -> None:
    tokenizer = kind()
    tokenizer.enable_truncation(64)
    require_plain_tokenizer(tokenizer.to_str(), 64)
