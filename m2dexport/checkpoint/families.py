"""One table: where each model family keeps its layers, its final norm and its per-layer config.

A family is a ``model_type`` of transformers. Everything family-specific that slicing needs is a row
of ``FAMILIES``; the rest of the package asks ``family_of`` and ``locate`` and has no names of
models in it. A family without a row works when its structure can be found by looking.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from m2dexport.checkpoint.tensors import StoredTensor
from m2dexport.errors import CheckpointError

#: Of a layer: query heads, key-value heads, feed-forward channels.
Part = Literal["heads", "kv_heads", "ffn"]


@dataclass(frozen=True)
class Block:
    """What a nested width cuts of one layer: linear modules, by their names within the layer."""

    rows: Mapping[str, tuple[Part, ...]]  # module -> the parts of its outputs, fused ones in order
    columns: Mapping[Part, str]  # part -> the module that takes it in
    heads_key: str = "num_attention_heads"  # config keys
    kv_heads_key: str | None = None  # None: every head has keys and values of its own
    head_dim_key: str | None = None  # None: the config knows only hidden_size / heads
    ffn_key: str = "intermediate_size"


@dataclass(frozen=True)
class Family:
    """How one family stores its layers.

    Names are those of the bare model (``AutoModel``); a task model stores the same names behind a
    wrapper such as ``bert.`` or ``model.``.
    """

    layers: tuple[str, ...]  # prefix of the layer list in files; several where its name has changed
    final_norm: str | None = None  # the norm after the last layer, in pre-LN families
    depth_keys: tuple[str, ...] = ("num_hidden_layers",)  # config keys that hold the depth
    per_layer: tuple[str, ...] = ()  # config lists with one entry per layer
    groups_key: str | None = None  # config key of how many groups of layers share their weights
    drop: tuple[str, ...] = ()  # parts of the bare model that never touch the embedding
    replaces_code: bool = False  # transformers' class was made for files that bring their own code
    position_offset: bool = False  # positions start at pad_token_id + 1
    block: Block | None = None  # None: its heads and channels cannot be cut
    inferred: bool = False  # found by looking, not a row of the table


_BERT_BLOCK = Block(
    rows={
        "attention.self.query": ("heads",),
        "attention.self.key": ("heads",),
        "attention.self.value": ("heads",),
        "intermediate.dense": ("ffn",),
    },
    columns={"heads": "attention.output.dense", "ffn": "output.dense"},
)
_DISTILBERT_BLOCK = Block(
    rows={
        "attention.q_lin": ("heads",),
        "attention.k_lin": ("heads",),
        "attention.v_lin": ("heads",),
        "ffn.lin1": ("ffn",),
    },
    columns={"heads": "attention.out_lin", "ffn": "ffn.lin2"},
    heads_key="n_heads",
    ffn_key="hidden_dim",
)
_MODERNBERT_BLOCK = Block(
    rows={"attn.Wqkv": ("heads", "heads", "heads"), "mlp.Wi": ("ffn", "ffn")},
    columns={"heads": "attn.Wo", "ffn": "mlp.Wo"},
)
_LLAMA_BLOCK = Block(
    rows={
        "self_attn.q_proj": ("heads",),
        "self_attn.k_proj": ("kv_heads",),
        "self_attn.v_proj": ("kv_heads",),
        "mlp.gate_proj": ("ffn",),
        "mlp.up_proj": ("ffn",),
    },
    columns={"heads": "self_attn.o_proj", "ffn": "mlp.down_proj"},
    kv_heads_key="num_key_value_heads",
    head_dim_key="head_dim",
)
_PHI3_BLOCK = replace(
    _LLAMA_BLOCK,
    rows={
        "self_attn.qkv_proj": ("heads", "kv_heads", "kv_heads"),
        "mlp.gate_up_proj": ("ffn", "ffn"),
    },
)

_BERT = Family(("encoder.layer.",), block=_BERT_BLOCK)
_ROBERTA = Family(("encoder.layer.",), position_offset=True, block=_BERT_BLOCK)
_DECODER = Family(("layers.",), final_norm="norm", per_layer=("layer_types",), block=_LLAMA_BLOCK)
_T5 = Family(
    ("encoder.block.",),
    final_norm="encoder.final_layer_norm",
    depth_keys=("num_layers", "num_hidden_layers", "num_decoder_layers"),
    drop=("decoder.", "lm_head."),
)

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "electra": _BERT,
    "deberta-v2": Family(("encoder.layer.",)),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "mpnet": Family(("encoder.layer.",), position_offset=True),
    "distilbert": Family(
        ("transformer.layer.",),
        depth_keys=("n_layers", "num_hidden_layers"),
        block=_DISTILBERT_BLOCK,
    ),
    "albert": Family(("encoder.albert_layer_groups.",), groups_key="num_hidden_groups"),
    "modernbert": Family(
        ("layers.",), final_norm="final_norm", per_layer=("layer_types",), block=_MODERNBERT_BLOCK
    ),
    "nomic_bert": Family(
        ("encoder.layers.", "layers."),
        depth_keys=("num_hidden_layers", "n_layer"),
        replaces_code=True,
    ),
    "gte": Family(("encoder.layer.", "layers."), replaces_code=True),
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "mistral": _DECODER,
    "llama": _DECODER,
    "gemma3_text": _DECODER,
    "phi3": replace(_DECODER, block=_PHI3_BLOCK),
}

# Buffers that older transformers stored; newer ones compute them and report them as unexpected.
_BUFFERS = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq|masked_bias)$")


@dataclass(frozen=True)
class Layout:
    """The tensors of a bare model as found in its files, by the name that the bare model gives."""

    family: Family
    layers: int  # N
    outside: Mapping[str, StoredTensor]  # embeddings, norms, pooler: what every depth needs
    inside: tuple[Mapping[str, StoredTensor], ...]  # one entry per layer, or per group of layers

    def tensors(self, layers: int) -> dict[str, StoredTensor]:
        """Return the tensors that a sub-model of the first ``layers`` layers holds, by name."""
        found = dict(self.outside)
        if not self.inside:  # a token table alone
            return found
        per_group = self.layers // len(self.inside)  # 1 where layers have weights of their own
        for layer in self.inside[: -(-layers // per_group)]:
            found.update(layer)
        return dict(sorted(found.items()))

    def token_tables(self, rows: int) -> dict[str, StoredTensor]:
        """Return the embeddings that have a row for each of ``rows`` tokens, by name."""
        return {
            name: tensor
            for name, tensor in sorted(self.outside.items())
            if len(tensor.shape) == 2 and tensor.shape[0] == rows and "position" not in name
        }


def family_of(model_type: str, names: Iterable[str], layers: int) -> Family:
    """Return the row of a model type, or a family inferred from the tensor names.

    Raises:
        CheckpointError: when the type has no row and no single list of ``layers`` entries is found.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    model = bare_class(model_type)  # a task model puts this prefix before the bare model's names
    bare = [name.removeprefix(f"{model.base_model_prefix}.") if model else name for name in names]
    found: dict[str, set[int]] = {}
    for name in bare:
        for match in re.finditer(r"(?<=\.)(\d+)\.", name):
            found.setdefault(name[: match.start()], set()).add(int(match.group(1)))
    lists = [prefix for prefix, seen in found.items() if seen == set(range(layers))]
    # A list inside a layer ("layers.0.experts.") is not a candidate: the list that holds it is.
    outer = [p for p in lists if not any(q != p and p.startswith(q) for q in lists)]
    if len(outer) != 1:
        raise CheckpointError(
            f"model type {model_type!r} is not in the table of families, and its weights show "
            f"{len(outer)} lists of {layers} layers where one is needed."
        )
    keys = {"num_hidden_layers": None}
    if model:  # n_layer, in the families of GPT-2's time
        keys[model.config_class.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = None
    norm = _inferred_norm(bare, outer[0])
    return Family((outer[0],), final_norm=norm, depth_keys=tuple(keys), inferred=True)


def bare_class(model_type: str) -> Any:
    """Return transformers' class of the model without a task: T5's is only its encoder.

    None for a model type that transformers does not know, or knows no such class of.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING

    if model_type not in CONFIG_MAPPING:
        return None
    config = CONFIG_MAPPING[model_type]
    return MODEL_FOR_TEXT_ENCODING_MAPPING.get(config, None) or MODEL_MAPPING.get(config, None)


def _inferred_norm(names: Iterable[str], layers: str) -> str | None:
    """Return the norm that stands at the top of the model or beside its list of layers."""
    beside = layers.rstrip(".").rpartition(".")[0]
    beside = re.escape(f"{beside}.") if beside else ""
    closing = "norm|norm_f|final_norm|final_layer_norm|final_layernorm|ln_f|ln|LayerNorm"
    pattern = re.compile(rf"({beside})?({closing})\.weight")
    return next((n.removesuffix(".weight") for n in names if pattern.fullmatch(n)), None)


def locate(family: Family, tensors: Mapping[str, StoredTensor], layers: int, where: Path) -> Layout:
    """Return the tensors of the bare model, split into layers and the rest.

    Task heads (a language-model head, a classifier) and stored buffers are left out.

    Args:
        family: the family's row.
        tensors: every tensor of the checkpoint.
        layers: the number of layers that the config states.
        where: the checkpoint's folder, for messages.

    Raises:
        CheckpointError: when the files do not hold exactly the layers that the config states.
    """
    prefix = next((p for p in family.layers if any(_has_list(n, p) for n in tensors)), None)
    if prefix is None:
        raise CheckpointError(
            f"{where} holds no tensor named {family.layers[0]}0.*, so its weights are not those of "
            "the model that its config.json describes."
        )
    wrapper = min(n[: n.index(prefix + "0.")] for n in tensors if _has_list(n, prefix))
    outside: dict[str, StoredTensor] = {}
    inside: dict[int, dict[str, StoredTensor]] = {}
    for stored_name, tensor in tensors.items():
        name = stored_name.removeprefix(wrapper)
        if not stored_name.startswith(wrapper) or _BUFFERS.search(name):
            continue
        if name.startswith(prefix):
            index = name.removeprefix(prefix).partition(".")[0]
            inside.setdefault(int(index), {})[name] = tensor
        elif not name.startswith(family.drop):
            outside[name] = tensor
    whole = sorted(inside) == list(range(len(inside)))
    if not whole or (len(inside) != layers if family.groups_key is None else layers % len(inside)):
        raise CheckpointError(
            f"{where} says {layers} layers in config.json and holds {len(inside)} in its weights."
        )
    return Layout(family, layers, outside, tuple(inside[i] for i in sorted(inside)))


def _has_list(name: str, prefix: str) -> bool:
    return name.startswith(f"{prefix}0.") or f".{prefix}0." in name
