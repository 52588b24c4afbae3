"""Tiny random checkpoints of every family, built in code: no file and no network needed.

``tiny_checkpoint`` writes a folder as sentence-transformers would: config, weights, tokenizer,
modules. Weights are large and norms uneven, so that a missing layer, a skipped norm or a wrong row
moves a vector by far more than any tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from numpy.typing import NDArray
from tiny_tokenizers import MAX_LENGTH, tiny_tokenizer

LAYERS = 4
RANK = 4  # of the adapters that ``lora`` writes
HIDDEN = 32
TEXTS = (
    "a cat sat on the mat",
    "the",
    "",
    "two dogs ran far away from the big red house and never came back home",
    "naive cafe 42!",
)

_BASE = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_DECODER = {**_BASE, "num_key_value_heads": 2, "head_dim": 8}
_T5 = {"d_model": HIDDEN, "num_layers": LAYERS, "num_heads": 4, "d_kv": 8, "d_ff": 48}

# Per model type: config, kind of tokenizer.
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "bert": (_BASE, "wordpiece"),
    "electra": ({**_BASE, "embedding_size": 16}, "wordpiece"),
    "distilbert": (
        {
            "dim": HIDDEN,
            "n_layers": LAYERS,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 64,
        },
        "wordpiece",
    ),
    "nomic_bert": (_BASE, "wordpiece"),
    "gte": (_BASE, "wordpiece"),
    "mpnet": (_BASE, "roberta"),
    "roberta": (_BASE, "roberta"),
    "xlm-roberta": (_BASE, "unigram"),
    "camembert": (_BASE, "unigram"),
    "deberta-v2": (
        {
            **_BASE,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
        },
        "unigram",
    ),
    "albert": ({**_BASE, "embedding_size": 16}, "unigram"),
    "modernbert": ({**_BASE, "global_attn_every_n_layers": 3, "local_attention": 8}, "roberta"),
    "t5": (_T5, "t5"),
    "mt5": (_T5, "t5"),
    "umt5": (_T5, "t5"),
    "qwen2": (_DECODER, "decoder"),
    "qwen3": (_DECODER, "decoder"),
    "mistral": ({**_DECODER, "sliding_window": 8}, "decoder"),
    "llama": (_DECODER, "decoder"),
    "gemma3_text": (
        {
            **_DECODER,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        },
        "decoder",
    ),
    "phi3": (_DECODER, "decoder"),
}


def tiny_checkpoint(
    folder: Path,
    model_type: str = "bert",
    *,
    config: Mapping[str, Any] | None = None,
    pooling: str | Sequence[str] | None = "mean",
    head: Sequence[torch.nn.Module] = (),
    normalize: bool = True,
    prompts: Mapping[str, str] | None = None,
    tokenizer: Any = None,
    padding_side: str | None = None,
    dtype: torch.dtype = torch.float32,
    shard_size: str | None = None,
    seed: int = 0,
) -> Path:
    """Write a tiny random checkpoint and return its folder.

    ``pooling=None`` leaves the sentence-transformers files out; ``shard_size`` such as "20KB"
    splits the weights; ``head`` takes ``torch.nn.Linear``, with tanh after it, and
    ``torch.nn.LayerNorm``; ``tokenizer`` replaces the family's own.
    """
    settings, kind = FAMILIES[model_type]
    tokenizer = tokenizer or tiny_tokenizer(kind, padding_side)
    model = tiny_model(model_type, {**settings, **(config or {})}, tokenizer, seed).to(dtype)
    options = {"max_shard_size": shard_size} if shard_size else {}
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    if pooling is not None:
        _write_modules(
            folder,
            model.config.hidden_size,
            pooling=pooling,
            head=head,
            normalize=normalize,
            prompts=prompts,
        )
    return folder


def tiny_model(
    model_type: str, settings: Mapping[str, Any], tokenizer: Any, seed: int
) -> transformers.PreTrainedModel:
    """Return a random model whose layers, norms and biases all matter."""
    special = {
        name: getattr(tokenizer, name) or 0
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    }
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=len(tokenizer), **special, **settings
    )
    torch.manual_seed(seed)
    auto = (
        transformers.AutoModelForTextEncoding
        if config.is_encoder_decoder
        else transformers.AutoModel
    )
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.add_(torch.randn_like(parameter) * spread)
    return model.eval()  # type: ignore[no-any-return]


def _write_modules(
    folder: Path,
    hidden: int,
    *,
    pooling: str | Sequence[str],
    head: Sequence[torch.nn.Module],
    normalize: bool,
    prompts: Mapping[str, str] | None,
) -> None:
    from sentence_transformers.sentence_transformer import modules as st

    modes = (pooling,) if isinstance(pooling, str) else tuple(pooling)
    modules: list[Any] = [st.Pooling(hidden, pooling_mode=modes)]
    for layer in head:
        if isinstance(layer, torch.nn.Linear):
            dense = st.Dense(layer.in_features, layer.out_features, bias=layer.bias is not None)
            dense.linear = layer
            modules.append(dense)
        else:
            norm = st.LayerNorm(layer.normalized_shape[0])
            norm.norm = layer
            modules.append(norm)
    if normalize:
        modules.append(st.Normalize())
    listed = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    ]
    for i, module in enumerate(modules, start=1):
        path = f"{i}_{type(module).__name__}"
        (folder / path).mkdir()
        module.save(str(folder / path))
        kind = f"sentence_transformers.models.{type(module).__name__}"
        listed.append({"idx": i, "name": str(i), "path": path, "type": kind})
    (folder / "modules.json").write_text(json.dumps(listed))
    settings = {"prompts": dict(prompts or {}), "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": MAX_LENGTH}))


def small_checkpoint(folder: Path, model_type: str) -> Path:
    """Wide enough that its matrices are worth quantizing: 64 x 64 is 4,096 values."""
    if model_type == "t5":
        config = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2}
    else:
        config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    if model_type in ("qwen3", "gemma3_text"):
        config |= {"head_dim": 16}
    if model_type == "gemma3_text":
        config |= {"layer_types": ["sliding_attention", "full_attention"]}
    pooling = "lasttoken" if model_type == "qwen3" else "mean"
    # Of 960 codes of the probes, one on the border of two values alone and in a batch is too many.
    seed = 1 if model_type == "roberta" else 0
    return tiny_checkpoint(folder, model_type, config=config, pooling=pooling, seed=seed)


def edit_json(path: Path, **changes: Any) -> None:
    """Replace settings of a JSON file, which need not exist."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**stored, **changes}))


def lora(
    folder: Path,
    base: Path,
    modules: Mapping[str, tuple[int, int]],
    *,
    config: Mapping[str, Any] | None = None,
    replaced: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Write an adapter as PEFT would and return what it adds per module, before scaling."""
    torch.manual_seed(3)
    tensors, added = {}, {}
    for module, (rows, columns) in modules.items():
        up, down = torch.randn(rows, RANK), torch.randn(RANK, columns)
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
        added[module] = up @ down
    tensors.update({f"base_model.model.{n}": t for n, t in (replaced or {}).items()})
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "lora_alpha": 2,
        "r": RANK,
        **(config or {}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return added


def encode(folder: Path, **options: Any) -> NDArray[np.float32]:
    """Return the vectors that sentence-transformers, loaded with ``options``, gives ``TEXTS``."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", **options)
    return model.encode(list(TEXTS))  # type: ignore[no-any-return]
