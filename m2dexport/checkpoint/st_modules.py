"""What sentence-transformers runs after the transformer: modules.json and what it names, read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from m2dexport.checkpoint.jsonfile import read_json, read_object
from m2dexport.errors import CheckpointError, UsageError
from m2dexport.precisions import Similarity

PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]

# sentence-transformers' flags of before 5.x, in the order in which it concatenates them.
LEGACY_MODES: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

TORCH_ACTIVATIONS = {
    "identity": "torch.nn.modules.linear.Identity",
    "tanh": "torch.nn.modules.activation.Tanh",
    "relu": "torch.nn.modules.activation.ReLU",
    "gelu": "torch.nn.modules.activation.GELU",
    "silu": "torch.nn.modules.activation.SiLU",
    "sigmoid": "torch.nn.modules.activation.Sigmoid",
}
MODULES = "modules.json"
SETTINGS = "sentence_bert_config.json"
SENTENCE_CONFIG = "config_sentence_transformers.json"
STATIC = "StaticEmbedding"  # a token table instead of a transformer
LATENT = "m2dexport.latent.LatentAttentionModule"  # sentence-transformers has none of its own
_SUPPORTED = ("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
_REFUSED = {
    "WeightedLayerPooling": "it mixes the states of all layers, so no layer can be cut",
    "WordEmbeddings": "it has no layers to cut",
    "BoW": "it has no layers to cut",
    "CLIPModel": "it embeds images as well as text",
    "CNN": "it runs over the tokens after the transformer",
    "LSTM": "it runs over the tokens after the transformer",
    "WordWeights": "it weights tokens by a table",
}
# Settings of the Transformer module that change which tokens or states are used.
_LAST_STATE = {"method": "forward", "method_output_name": "last_hidden_state"}
RAW_STATE = {"method": "forward", "method_output_name": ["hidden_states", -1]}
_REFUSED_SETTINGS = (
    *("query_expansion", "query_length", "document_length", "tokenizer_name_or_path"),
    *("tokenizer_args", "processor_kwargs", "config_args", "config_kwargs"),
)


@dataclass(frozen=True)
class Pooling:
    """How token states become one vector."""

    modes: tuple[PoolingMode, ...]  # concatenated in this order
    include_prompt: bool = True  # False: leaves prompts out; only read without prompts


@dataclass(frozen=True)
class LatentAttention:
    """NV-Embed's latent attention, which token states pass before they are pooled."""

    folder: Path  # holds model.safetensors with latents and cross_attend_blocks.*
    heads: int


@dataclass(frozen=True)
class Dense:
    """A linear layer on the pooled vector, with an activation."""

    folder: Path  # holds model.safetensors with linear.weight and perhaps linear.bias
    in_features: int
    out_features: int
    bias: bool
    activation: str  # a key of torch's elementwise activations: "identity", "tanh", ...


@dataclass(frozen=True)
class LayerNormHead:
    """A LayerNorm on the pooled vector."""

    folder: Path  # holds model.safetensors with norm.weight and norm.bias
    features: int


Head = Dense | LayerNormHead


@dataclass(frozen=True)
class SentenceConfig:
    """What config_sentence_transformers.json says."""

    prompts: dict[str, str]
    default_prompt: str | None
    similarity: Similarity


@dataclass(frozen=True)
class Modules:
    """The modules of a sentence-transformers folder."""

    transformer: Path  # the folder of config.json and the weights
    max_length: int | None  # tokens, specials included; None: not stored
    raw_output: bool  # pool hidden_states[-1] rather than last_hidden_state
    latent: LatentAttention | None  # between the transformer and pooling
    pooling: Pooling | None  # None: not stored
    head: tuple[Head, ...]
    normalized: bool
    alignment: Dense | None = None  # behind a Normalize, and before another: an aligned sub-model's
    without_pooler: bool = False  # to be loaded without BERT's pooler, which embeds nothing


def pooling_from_name(name: str) -> Pooling:
    """Return the pooling that a user declares: one mode, or several joined by "+".

    Raises:
        UsageError: when a mode is unknown.
    """
    modes = name.split("+")
    for mode in modes:
        if mode not in get_args(PoolingMode):
            raise UsageError(
                f"--pooling {mode!r} is unknown; choose from {', '.join(get_args(PoolingMode))}."
            )
    return Pooling(cast("tuple[PoolingMode, ...]", tuple(modes)))


def read_modules(folder: Path) -> Modules:
    """Read modules.json and what it names; without one, only the transformer is known.

    Raises:
        CheckpointError: when a module is of a kind that cannot be exported, by name.
    """
    path = folder / MODULES
    if not path.exists():
        return _modules(folder, None, None, (), normalized=False)
    listed = listed_modules(folder)
    kinds = [_kind(type_name, path, i) for i, (type_name, _) in enumerate(listed)]
    latent = None
    if kinds[1:2] == ["LatentAttentionModule"]:
        latent = read_latent_attention(listed[1][1])
        del kinds[1], listed[1]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise CheckpointError(
            f"{path} starts with {' and '.join(kinds[:2]) or 'nothing'}, not with Transformer and "
            "Pooling, so it cannot be exported."
        )
    found = list(zip(kinds[2:], (where for _, where in listed[2:]), strict=True))
    rest = [each for each in found if each[0] != "Dropout"]  # it does nothing when encoding
    alignment = None
    if [kind for kind, _ in rest[-3:]] == ["Normalize", "Dense", "Normalize"]:
        alignment = _read_dense(rest[-2][1])
        if alignment.activation != "identity":
            raise CheckpointError(f"{path} has a Dense after Normalize that is not linear.")
        del rest[-2:]
    while len(rest) > 1 and rest[-1][0] == rest[-2][0] == "Normalize":
        rest.pop()
    normalized = bool(rest) and rest[-1][0] == "Normalize"
    head = _read_head(rest[:-1] if normalized else rest, path)
    modules = _modules(listed[0][1], latent, _read_pooling(listed[1][1]), head, normalized)
    return replace(modules, alignment=alignment)


def _read_head(modules: Sequence[tuple[str, Path]], path: Path) -> tuple[Head, ...]:
    head: list[Head] = []
    before = None
    for kind, folder in modules:
        if before == "Normalize":
            raise CheckpointError(f"{path} has {kind} after Normalize, which is not supported.")
        if kind == "Dense":
            head.append(_read_dense(folder))
        elif kind == "LayerNorm":
            config = read_object(folder / "config.json")
            head.append(LayerNormHead(folder, _integer(config, "dimension", folder)))
        elif kind != "Normalize":
            raise CheckpointError(f"{path} has a second {kind}, which is not supported.")
        before = kind
    return tuple(head)


def listed_modules(folder: Path) -> list[tuple[str, Path]]:
    """Return the type and the folder of each module that modules.json names; none without one.

    Raises:
        CheckpointError: when it is not a list of modules, or names a folder outside.
    """
    path = folder / MODULES
    if not path.exists():
        return []
    entries = read_json(path)
    try:
        return [(str(e["type"]), folder / _inside(str(e["path"]), path)) for e in entries]
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is not a list of modules with a type and a path.") from error


def _inside(name: str, path: Path) -> str:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(f"{path} names {name!r}, which lies outside the checkpoint.")
    return name


def _modules(
    transformer: Path,
    latent: LatentAttention | None,
    pooling: Pooling | None,
    head: tuple[Head, ...],
    normalized: bool,
) -> Modules:
    settings = _settings(transformer)
    output = settings.get("modality_config", {}).get("text", _LAST_STATE)
    return Modules(
        transformer=transformer,
        max_length=settings.get("max_seq_length"),
        raw_output=output == RAW_STATE,
        latent=latent,
        pooling=pooling,
        head=head,
        normalized=normalized,
    )


def settings_path(folder: Path) -> Path:
    """Return where the Transformer module's settings lie; older versions named it by family."""
    return next(iter(sorted(folder.glob("sentence_*_config.json"))), folder / SETTINGS)


def _settings(folder: Path) -> dict[str, Any]:
    path = settings_path(folder)
    settings = read_object(path)
    for key in _REFUSED_SETTINGS:
        if settings.get(key):
            raise CheckpointError(f"{path} sets {key}, which cannot be carried into an export.")
    if {"text", "common"} & set(settings.get("processing_kwargs") or ()):
        raise CheckpointError(f"{path} changes how text is tokenized, by its processing_kwargs.")
    outputs = settings.get("modality_config", {"text": _LAST_STATE})
    if not isinstance(outputs, dict) or outputs.get("text") not in (_LAST_STATE, RAW_STATE):
        raise CheckpointError(
            f"{path} does not pool the last hidden state of plain text, so it cannot be exported: "
            f"its modality_config is {outputs}."
        )
    if "message" in outputs:
        raise CheckpointError(
            f"{path} has text wrapped in a chat template (its modality_config has message), which "
            "an export cannot do; remove that entry to embed plain text."
        )
    if settings.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise CheckpointError(f"{path} is for {settings['transformer_task']}, not for embeddings.")
    return settings


def _kind(type_name: str, path: Path, position: int) -> str:
    package, _, kind = type_name.rpartition(".")
    if kind in ("Router", "Asym"):
        raise CheckpointError(
            f"{path} has a {kind}, which runs different modules for queries and documents; make a "
            f"checkpoint of each route, and export those, by running in Python: "
            f"{_route_by_route(path.parent, position)}"
        )
    if package.startswith("sentence_transformers") and kind in _SUPPORTED:
        return kind
    if type_name == LATENT:
        return kind
    reason = _REFUSED.get(kind, "it is not one of sentence-transformers' own text modules")
    raise CheckpointError(f"{path} has a {type_name} module, which cannot be exported: {reason}.")


def _route_by_route(folder: Path, position: int) -> str:
    """Return a line of Python that saves each route of a Router as a checkpoint of its own."""
    before = f"*list(m)[:{position}], " if position else ""
    return (
        f"from sentence_transformers import SentenceTransformer; "
        f"m = SentenceTransformer({str(folder)!r}); "
        f"[SentenceTransformer(modules=[{before}*route, *list(m)[{position + 1}:]], "
        f"prompts=m.prompts).save(name) for name, route in m[{position}].sub_modules.items()]"
    )


def _read_pooling(folder: Path) -> Pooling:
    config = read_object(folder / "config.json")
    if not config:
        raise CheckpointError(f"{folder / 'config.json'} is missing, so the pooling is unknown.")
    stored = config.get("pooling_mode")
    if stored is None:
        stored = [mode for flag, mode in LEGACY_MODES.items() if config.get(flag)] or ["mean"]
    modes = [stored] if isinstance(stored, str) else list(stored)
    unknown = [mode for mode in modes if mode not in get_args(PoolingMode)]
    if unknown:
        raise CheckpointError(f"{folder} pools by {unknown[0]!r}, which is not supported.")
    return Pooling(
        cast("tuple[PoolingMode, ...]", tuple(modes)), bool(config.get("include_prompt", True))
    )


def read_latent_attention(folder: Path) -> LatentAttention:
    """Return the latent attention that a module's folder describes."""
    return LatentAttention(folder, _integer(read_object(folder / "config.json"), "heads", folder))


def _read_dense(folder: Path) -> Dense:
    config = read_object(folder / "config.json")
    if config.get("use_residual"):
        raise CheckpointError(f"{folder} is a Dense with a residual, which cannot be sliced.")
    for key in ("module_input_name", "module_output_name"):
        if config.get(key, "sentence_embedding") not in (None, "sentence_embedding"):
            raise CheckpointError(
                f"{folder} is a Dense on {config[key]!r}; only one on the pooled vector is "
                "supported."
            )
    name = config.get("activation_function", TORCH_ACTIVATIONS["tanh"])
    activation = str(name).rpartition(".")[2].lower()
    if activation not in TORCH_ACTIVATIONS:
        raise CheckpointError(f"{folder} has the activation {name!r}, which is not supported.")
    return Dense(
        folder,
        _integer(config, "in_features", folder),
        _integer(config, "out_features", folder),
        bool(config.get("bias", True)),
        activation,
    )


def _integer(config: Mapping[str, Any], key: str, folder: Path) -> int:
    if not isinstance(config.get(key), int):
        raise CheckpointError(f"{folder / 'config.json'} has no integer {key}.")
    return int(config[key])


def read_lowercase(transformer: Path) -> bool:
    """Say whether the Transformer module puts a lowercasing step before its tokenizer's own."""
    return bool(_settings(transformer).get("do_lower_case"))


def read_sentence_config(folder: Path, pooling: Pooling) -> SentenceConfig:
    """Return what config_sentence_transformers.json says, or its defaults.

    Args:
        folder: the checkpoint's.
        pooling: the checkpoint's, which may not go together with prompts.

    Raises:
        CheckpointError: when it is damaged, or says what cannot be exported.
    """
    path = folder / SENTENCE_CONFIG
    stored = read_object(path)
    prompts = stored.get("prompts") or {}
    if not isinstance(prompts, dict):
        raise CheckpointError(f"{path} has prompts that are not an object of names and texts.")
    prompts = {str(name): str(text) for name, text in prompts.items() if text is not None}
    default = stored.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise CheckpointError(f"{path} names the default prompt {default!r}, which it lacks.")
    if not pooling.include_prompt and any(prompts.values()):
        raise CheckpointError(
            f"{folder} leaves its prompts out of pooling (include_prompt is false), which a graph "
            "of token ids and mask cannot do; remove the prompts, or set it to true."
        )
    similarity = stored.get("similarity_fn_name") or "cosine"  # sentence-transformers' default
    if similarity not in get_args(Similarity):
        raise CheckpointError(
            f"{path} compares vectors by {similarity!r}, which is none of "
            f"{', '.join(get_args(Similarity))}."
        )
    return SentenceConfig(prompts, default, cast(Similarity, similarity))
