"""The checkpoint's tokenizer as transformers runs it, and its tokenizer.json."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from m2dexport.checkpoint.jsonfile import read_json, read_object, write_json
from m2dexport.data import calibration_texts
from m2dexport.errors import CheckpointError, M2DError, one_line

_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"
# What transformers stores of how a tokenizer cut texts; all of them are cut on their right.
_OF_A_CALL = ("max_length", "stride", "truncation_side", "truncation_strategy")
_COPIES = ("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "tekken.json", "*.model")
_VERBATIM = "PreTrainedTokenizerFast"  # the class that takes tokenizer.json as it is
_COMPARED = 64  # of the calibration texts
# Cases, accents, spaces, digits, other scripts: what tokenizers of different kinds disagree on.
_PROBES = (
    "a cat sat on the mat",
    " Two  spaces,\ttab\nand line. ",
    "Ünïcode CAFÉ naïve Straße İstanbul",
    "3.14 != 42, e-mail@example.org (x_1)",
    "日本語のテキスト 한국어 русский язык العربية हिन्दी",
    "☃ 👩‍👩‍👧 ½ ﬁ",
)
_VOCABULARIES = (_FILE, "vocab.txt", "vocab.json", "tekken.json", "*.model")


def open_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a checkpoint folder, with transformers' interface.

    It gives the ids of the stored tokenizer.json, and ends every text in the end token where
    tokenizer_config.json asks for that, whether or not transformers would do so.

    Raises:
        CheckpointError: when there is none, or only one that has no fast form.
    """
    return read_tokenizer(folder)[0]


def read_tokenizer(folder: Path) -> tuple[Any, list[str]]:
    """Return ``open_tokenizer``'s, and a sentence on each way in which transformers' differs.

    Raises:
        CheckpointError: when there is none, or only one that has no fast form, or one that cuts
            long texts on their left.
    """
    loaded, notes = _loaded(folder), []
    if loaded.truncation_side != "right":
        raise CheckpointError(
            f"{folder} keeps the end of a long text and drops its beginning (truncation_side is "
            f"{loaded.truncation_side}), which artifacts cannot do; remove truncation_side from "
            "its tokenizer_config.json to keep the beginning."
        )
    tokenizer = _as_stored(folder, loaded)
    if tokenizer.pad_token is None:  # padding is masked: any token serves
        first = tokenizer.convert_ids_to_tokens(0)
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or first
    if tokenizer is not loaded:
        notes.append(
            f"token ids are those of {_FILE}; transformers and sentence-transformers "
            f"build a {type(loaded).__name__} instead, whose ids differ: name "
            "PreTrainedTokenizerFast as tokenizer_class in tokenizer_config.json to make them read "
            "the file."
        )
    asked = read_object(folder / "tokenizer_config.json").get("add_eos_token") is True
    if asked and _end_every_text(tokenizer):
        notes.append(
            "every text ends in the end token, as add_eos_token in tokenizer_config.json says; "
            "transformers and sentence-transformers leave it out, since tokenizer.json does."
        )
    return tokenizer, notes


def _loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not any(path for pattern in _VOCABULARIES for path in folder.glob(pattern)):
        # transformers 5 would make up an empty vocabulary and raise nothing.
        raise CheckpointError(f"{folder} has no tokenizer; copy tokenizer.json beside its weights.")
    _require_sentencepiece(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare exceptions
        raise CheckpointError(
            f"{folder} has no tokenizer that transformers can load: {one_line(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{folder} has only a slow tokenizer, which cannot be written as tokenizer.json."
        )
    return tokenizer


def _require_sentencepiece(folder: Path) -> None:
    """Refuse a vocabulary that only packages which are not installed can read, by their names."""
    models = sorted(path.name for path in folder.glob("*.model"))
    if not models or any((folder / name).exists() for name in _VOCABULARIES):
        return
    packages = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
    missing = [package for module, package in packages.items() if not _installed(module)]
    if missing:
        raise CheckpointError(
            f"{folder} keeps its vocabulary in {models[0]} only, and reading it needs the "
            f"{' and '.join(missing)} package; run: pip install {' '.join(missing)}."
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that the module lies in
        return False


def _as_stored(folder: Path, loaded: Any) -> Any:
    """Return the tokenizer that transformers loaded, or one of tokenizer.json where they differ."""
    from transformers import PreTrainedTokenizerFast

    path = folder / _FILE
    if not path.is_file():
        return loaded
    try:
        stored = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare exceptions
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    backend = loaded.backend_tokenizer
    for each in (stored, backend):
        each.no_truncation()
        each.no_padding()
    texts = (*_PROBES, *calibration_texts()[:_COMPARED])
    pairs = zip(stored.encode_batch(texts), backend.encode_batch(texts), strict=True)
    if all(one.ids == other.ids for one, other in pairs):
        return loaded
    known = loaded.special_tokens_map.items()
    return PreTrainedTokenizerFast(
        tokenizer_object=stored,
        padding_side=loaded.padding_side,
        model_max_length=loaded.model_max_length,
        model_input_names=loaded.model_input_names,
        **{name: token for name, token in known if _holds(stored, token)},
    )


def _holds(tokenizer: Tokenizer, token: object) -> bool:
    return isinstance(token, str) and tokenizer.token_to_id(token) is not None


def token_beyond(folder: Path, rows: int) -> tuple[str, int] | None:
    """Return the first token of tokenizer.json, and its id, that a table of ``rows`` rows lacks."""
    path = folder / _FILE
    known = Tokenizer.from_file(str(path)).get_vocab() if path.is_file() else {}
    beyond = [(index, token) for token, index in known.items() if index >= rows]
    index, token = min(beyond, default=(0, None))
    return None if token is None else (token, index)


def write_tokenizer(source: Path, folder: Path, *, lowercase: bool) -> None:
    """Write a checkpoint's tokenizer, tokenizer.json included, into another folder.

    What is written is what ``open_tokenizer`` returns, and transformers reads the same from it.
    Stored truncation and padding are left out; whoever tokenizes chooses them.

    Args:
        source: the checkpoint's folder.
        folder: the folder to write to.
        lowercase: put a lowercasing step in front, as sentence-transformers' ``do_lower_case``
            does.

    Raises:
        M2DError: when the disk is full.
    """
    path = folder / _FILE
    tokenizer, notes = read_tokenizer(source)
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # tokenizers raises bare exceptions, of a full disk, too
        raise M2DError(f"{path.name} could not be written: {error}; nothing was kept.") from error
    stored = read_json(path)
    stored["truncation"] = stored["padding"] = None
    if lowercase:
        stored["normalizer"] = _lowercased(stored.get("normalizer"))
    path.write_text(json.dumps(stored, ensure_ascii=False), encoding="utf-8")
    if notes:  # transformers would make something else of the file once more
        settings = read_object(folder / "tokenizer_config.json")
        write_json(folder / "tokenizer_config.json", {**settings, "tokenizer_class": _VERBATIM})


def truncation_at(max_length: int) -> dict[str, Any]:
    """Return what a tokenizer.json says that cuts at the maximum length, specials included."""
    return {
        "direction": "Right",
        "max_length": max_length,
        "strategy": "LongestFirst",
        "stride": 0,
    }


def state_length(folder: Path, max_length: int) -> None:
    """State one maximum length wherever readers of a sub-model look for it.

    That is in tokenizer.json, and as model_max_length in tokenizer_config.json. What a tokenizer
    was once called with is left out there: some readers take its max_length for the model's.

    Args:
        folder: the sub-model's, with both files.
        max_length: tokens, specials included.
    """
    stored = read_json(folder / _FILE)
    stored["truncation"] = truncation_at(max_length)
    (folder / _FILE).write_text(json.dumps(stored, ensure_ascii=False), encoding="utf-8")
    settings = read_object(folder / _CONFIG)
    kept = {name: value for name, value in settings.items() if name not in _OF_A_CALL}
    write_json(folder / _CONFIG, {**kept, "model_max_length": max_length})


def sealed_tokenizer_json(folder: Path, max_length: int) -> str:
    """Return a sub-model's tokenizer.json, set to cut at the maximum length and never to pad."""
    tokenizer = Tokenizer.from_file(str(folder / _FILE))
    tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()
    return str(tokenizer.to_str())


def replace_tokenizer(folder: Path, tokenizer: Mapping[str, Any], ids: Mapping[int, int]) -> None:
    """Put another tokenizer.json in the place of the one that ``write_tokenizer`` wrote.

    Other files that hold the old vocabulary are removed.

    Args:
        folder: the folder.
        tokenizer: the new tokenizer.json.
        ids: the new id of each old one that is left.

    Raises:
        CheckpointError: when transformers makes something else of it.
    """
    for path in [path for pattern in _COPIES for path in folder.glob(pattern)]:
        path.unlink()
    (folder / _FILE).write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = read_object(path)
    if "added_tokens_decoder" in config:  # transformers < 5
        added = config["added_tokens_decoder"]
        config["added_tokens_decoder"] = {str(ids[int(i)]): token for i, token in added.items()}
        write_json(path, config)
    written = Tokenizer.from_file(str(folder / _FILE))
    loaded = open_tokenizer(folder).backend_tokenizer
    if loaded.get_vocab() != written.get_vocab() or _model(loaded) != _model(written):
        raise CheckpointError(
            f"transformers builds its {config.get('tokenizer_class')} otherwise than the pruned "
            "tokenizer.json says; name PreTrainedTokenizerFast as tokenizer_class in the "
            "checkpoint's tokenizer_config.json."
        )


def _model(tokenizer: Tokenizer) -> Any:
    return json.loads(tokenizer.to_str())["model"]


def _lowercased(normalizer: dict[str, Any] | None) -> dict[str, Any]:
    if normalizer is None:
        return {"type": "Lowercase"}
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    if not any(step["type"] == "Lowercase" for step in steps):
        steps = [{"type": "Lowercase"}, *steps]
    return {"type": "Sequence", "normalizers": steps}


def append_eos(folder: Path) -> None:
    """Make a checkpoint's tokenizer end every text in its end token, where it does not.

    A text beyond the maximum length keeps the token, as it is added after cutting.
    """
    tokenizer = open_tokenizer(folder)
    if _end_every_text(tokenizer):
        tokenizer.save_pretrained(folder)
        settings = read_object(folder / "tokenizer_config.json")
        # A family's own class would set up its usual beginning and end again.
        settings["tokenizer_class"] = _VERBATIM
        write_json(folder / "tokenizer_config.json", settings)


def _end_every_text(tokenizer: Any) -> bool:
    """Add the end token to what a tokenizer makes of a text; say whether it was missing."""
    from tokenizers import processors

    ids, end = tokenizer("a")["input_ids"], tokenizer.eos_token_id
    if end is None or ids[-1:] == [end]:
        return False
    begin = tokenizer.bos_token if ids[:1] == [tokenizer.bos_token_id] else None
    tokens = [token for token in (begin, tokenizer.eos_token) if token]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin or ''} $A {tokenizer.eos_token}".strip(),
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in tokens],
    )
    return True
