"""Text models inside larger ones: vision-language checkpoints, and NV-Embed's transformer.

``checkpoint.convert`` writes what is found here out as an ordinary text checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2dexport.checkpoint.families import FAMILIES
from m2dexport.checkpoint.jsonfile import read_object
from m2dexport.errors import CheckpointError, one_line

_TABLE = "embed_tokens.weight"  # the token table stands at the top of every text tower
_LATENT = "latent_attention_model."
_OTHER_TOWERS = ("vision_config", "visual_config", "audio_config")

# Model types whose text tower computes, for text only, what its plain family does; tested one by
# one. The three position axes of Qwen's towers are equal where there is no image.
_TEXT_TOWERS = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "llava_next", "mistral3"),
)
_PLAIN = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
_AXES = ("mrope_section", "mrope_interleaved")
_REASONS = {
    "phi3_v": "its code is not in transformers, so nothing could be compared with it",
    "mllama": "its text layers attend to the image",
    "paligemma": "it attends in both directions to a part of the text that an image comes with",
}


@dataclass(frozen=True)
class Tower:
    """A text model within a larger one."""

    config: Mapping[str, Any]  # config.json of the text model only
    prefix: str  # what its tensors' names start with in the larger model
    note: str  # a sentence: what was left behind
    latent_heads: int | None = None  # attention heads of NV-Embed's latent attention

    def names(self, stored: Iterable[str]) -> dict[str, str]:
        """Return stored name -> name in the text model, of the text model's tensors."""
        parts = ("layers.", "norm.", _TABLE)
        bare = {name: name.removeprefix(self.prefix) for name in stored}
        return {n: b for n, b in bare.items() if n.startswith(self.prefix) and b.startswith(parts)}

    def latent_names(self, stored: Iterable[str]) -> dict[str, str]:
        """Return stored name -> name within NV-Embed's latent attention, empty without one."""
        if self.latent_heads is None:
            return {}
        return {n: n.removeprefix(_LATENT) for n in stored if n.startswith(_LATENT)}


def find_tower(folder: Path, stored: Iterable[str]) -> Tower | None:
    """Return the text tower of a checkpoint folder, or None when it is a text model already.

    Args:
        folder: holds config.json.
        stored: the names of the checkpoint's tensors.

    Raises:
        CheckpointError: when the folder's model has other towers and its text tower cannot be
            taken out of it, with the reason.
    """
    config = read_object(folder / "config.json")
    model_type = config.get("model_type")
    if model_type == "nvembed":
        return _nv_embed(folder, config, stored)
    if not any(key in config for key in _OTHER_TOWERS) and model_type not in _REASONS:
        return None
    if model_type not in _TEXT_TOWERS:
        reason = _REASONS.get(str(model_type), "it is none of " + ", ".join(_TEXT_TOWERS))
        raise CheckpointError(
            f"{folder} is a {model_type} model of more than text, whose text tower cannot be "
            f"taken out of it: {reason}."
        )
    note = (
        f"the text tower of this {model_type} model was taken, as plain text without a chat "
        "template; its vision tower stays behind"
    )
    return Tower(_text_config(folder, str(model_type)), _prefix(folder, stored), note)


def _text_config(folder: Path, model_type: str) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        text: dict[str, Any] = AutoConfig.from_pretrained(folder).get_text_config().to_dict()
    except Exception as error:  # a config class may raise anything about a value it dislikes
        raise CheckpointError(
            f"transformers cannot read {folder}/config.json: {one_line(error)}"
        ) from error
    plain = _PLAIN.get(text["model_type"], text["model_type"])
    if plain not in FAMILIES:
        raise CheckpointError(
            f"the text tower of {folder}, a {model_type} model, is a {text['model_type']} model, "
            "which is not in the table of families; it cannot be taken out."
        )
    for key in ("rope_parameters", "rope_scaling"):
        rope = text.get(key)
        if isinstance(rope, dict) and any(axis in rope for axis in _AXES):
            kept = {k: v for k, v in rope.items() if k not in _AXES}
            text[key] = {k: "default" if v == "mrope" else v for k, v in kept.items()}
    return {**text, "model_type": plain}


def _nv_embed(folder: Path, config: Mapping[str, Any], stored: Iterable[str]) -> Tower:
    text, latent = config.get("text_config"), config.get("latent_attention_config")
    if not isinstance(text, dict) or not isinstance(latent, dict):
        raise CheckpointError(f"{folder}/config.json lacks NV-Embed's parts, so it cannot be read.")
    mistral = {
        **text,
        "model_type": "mistral",
        "is_causal": False,
        "sliding_window": None,  # its code attends to all tokens, whatever is stored
    }
    for key in ("_name_or_path", "auto_map", "architectures"):
        mistral.pop(key, None)
    note = (
        "NV-Embed's transformer runs as a bidirectional mistral, and its latent attention as a "
        "module of m2dexport, which SentenceTransformer loads with trust_remote_code=True where "
        "m2dexport is installed; its code leaves an instruction out of pooling, which a graph "
        "cannot, so only texts without an instruction are embedded as it does"
    )
    heads = int(latent.get("num_cross_heads", 8))
    return Tower(mistral, _prefix(folder, stored), note, latent_heads=heads)


def _prefix(folder: Path, stored: Iterable[str]) -> str:
    found = [name.removesuffix(_TABLE) for name in stored if name.endswith(_TABLE)]
    if len(found) != 1:
        raise CheckpointError(
            f"{folder} holds {len(found)} tensors named {_TABLE} where one is needed to find its "
            "text tower."
        )
    return found[0]
