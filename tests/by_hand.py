"""Vectors computed the long way: one text at a time, no padding, layer outputs taken by hooks.

Nothing of m2dexport and no pooling code of another library is used here, so an agreement with it
means something.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

# Where the live model of each type keeps its layers and its final norm.
_LAYERS = {
    "distilbert": "transformer.layer",
    "albert": "encoder.albert_layer_groups",
    **dict.fromkeys(["t5", "mt5", "umt5"], "encoder.block"),
    **dict.fromkeys(
        ["modernbert", "nomic_bert", "gte", "qwen2", "qwen3", "mistral", "llama"], "layers"
    ),
    **dict.fromkeys(["gemma3_text", "phi3"], "layers"),
}
_NORMS = {
    **dict.fromkeys(["t5", "mt5", "umt5"], "encoder.final_layer_norm"),
    "modernbert": "final_norm",
    **dict.fromkeys(["qwen2", "qwen3", "mistral", "llama", "gemma3_text", "phi3"], "norm"),
}
PRE_NORM = tuple(_NORMS)
_WHOLE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "llava_next", "mistral3"]
_LAYERS |= dict.fromkeys(_WHOLE, "language_model.layers")
_NORMS |= dict.fromkeys(_WHOLE, "language_model.norm")


def load_model(folder: Path) -> Any:
    """Return the transformer alone, float32, with eager attention."""
    config = transformers.AutoConfig.from_pretrained(folder)
    encoder_only = config.model_type in ("t5", "mt5", "umt5")
    auto = transformers.AutoModelForTextEncoding if encoder_only else transformers.AutoModel
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def states(
    folder: Path, texts: Sequence[str], depth: int, *, norm: bool = True, prompt: str = ""
) -> list[NDArray[np.float32]]:
    """Return per text the (tokens, hidden) output of layer ``depth``, through the final norm."""
    model = load_model(folder)
    model_type = model.config.model_type
    layers = model.get_submodule(_LAYERS.get(model_type, "encoder.layer"))
    outputs: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    for layer in layers.children():
        layer.register_forward_hook(keep)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        ids = tokenizer(prompt + text, truncation=True, return_tensors="pt")["input_ids"]
        outputs.clear()
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
            state = outputs[depth - 1]
            if norm and model_type in _NORMS:
                state = model.get_submodule(_NORMS[model_type])(state)
        found.append(state[0].numpy())
    return found


def pool(state: NDArray[np.float32], mode: str) -> NDArray[np.float32]:
    """Pool one text's (tokens, hidden) into (hidden,)."""
    positions = np.arange(1, len(state) + 1, dtype=np.float32)[:, None]
    pooled = {
        "cls": lambda: state[0],
        "max": lambda: state.max(0),
        "mean": lambda: state.mean(0),
        "mean_sqrt_len_tokens": lambda: state.sum(0) / np.sqrt(len(state)),
        "weightedmean": lambda: (state * positions).sum(0) / positions.sum(),
        "lasttoken": lambda: state[-1],
    }
    return pooled[mode]()


def vectors(
    folder: Path,
    texts: Sequence[str],
    depth: int,
    dim: int,
    modes: Sequence[str],
    *,
    norm: bool = True,
    prompt: str = "",
) -> NDArray[np.float32]:
    """Return normalised (texts, dim) vectors of a checkpoint without a head."""
    rows = [
        np.concatenate([pool(state, mode) for mode in modes])[:dim]
        for state in states(folder, texts, depth, norm=norm, prompt=prompt)
    ]
    return normalized(np.stack(rows))


def normalized(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Return rows of unit length."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
