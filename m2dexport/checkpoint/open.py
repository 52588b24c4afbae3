"""Open a checkpoint and describe it: family, depth, pooling, head, prompts, trained grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from m2dexport.checkpoint.alignment import FullModel, read_full_model
from m2dexport.checkpoint.card import Card, read_card
from m2dexport.checkpoint.families import Family, Layout, family_of, locate
from m2dexport.checkpoint.fit import require_fit
from m2dexport.checkpoint.folder import checkpoint_folder
from m2dexport.checkpoint.hf_config import CONFIG, RAW_LAST_STATE, has_own_code, read_config
from m2dexport.checkpoint.jsonfile import read_object
from m2dexport.checkpoint.length import DEFAULT_LENGTH, NO_LENGTH, read_max_length
from m2dexport.checkpoint.sources import sources_of, static_sources
from m2dexport.checkpoint.st_modules import (
    Dense,
    Head,
    LatentAttention,
    Modules,
    Pooling,
    SentenceConfig,
    pooling_from_name,
    read_modules,
    read_sentence_config,
)
from m2dexport.checkpoint.static import TABLE, StaticParts, read_static
from m2dexport.checkpoint.tensors import (
    INDEX,
    WEIGHTS,
    StoredTensor,
    sha256_of_tensors,
    stored_tensors,
    tensors_in,
)
from m2dexport.checkpoint.tokenizer import read_tokenizer, token_beyond
from m2dexport.checkpoint.trained import Grid, read_trained
from m2dexport.checkpoint.widths import Widths, read_widths
from m2dexport.errors import CheckpointError, UsageError
from m2dexport.files import PROVENANCE, license_files
from m2dexport.precisions import Similarity

FinalNorm = Literal["none", "applied", "skipped"]


@dataclass(frozen=True)
class Checkpoint:
    """A trained model on disk, and all that its folder says about how to embed with it."""

    path: Path  # local folder with config.json, the weights and the tokenizer
    model_type: str  # of transformers
    own_code: bool  # the model is code that the checkpoint brings, trusted when it was opened
    layers: int  # N
    hidden: int  # width of the hidden states
    dim: int  # width of the final vector, after the head: the largest d
    widths: Widths | None  # inside the layers; None for families whose layers are not in the table
    vocab_size: int
    latent: LatentAttention | None  # NV-Embed's, between the transformer and pooling
    pooling: Pooling
    head: tuple[Head, ...]  # modules after pooling, in order, Normalize apart
    normalized: bool  # the checkpoint itself ends with Normalize
    alignment: Dense | None  # the map from its normalised vector into the full model's space
    similarity: Similarity  # what its vectors are compared by
    final_norm: FinalNorm  # "none" for post-LN families, which have nothing to decide
    prompts: Mapping[str, str]  # by name: {"query": "...", "document": "..."}
    default_prompt: str | None  # a name in prompts
    max_length: int  # tokens, specials included
    trained: Grid | None  # None: unknown
    assumed: tuple[str, ...]  # sentences: what was not stored and therefore assumed
    sliced_from: str | None  # weights_sha256 of the parent, for a sub-model
    speaks: FullModel | None  # whose space an aligned sub-model's vectors are in
    licenses: tuple[Path, ...]  # licence and notice files, which go wherever the weights go
    sources: Mapping[str, str]  # where facts were read: field -> file, option or default
    layout: Layout = field(repr=False)  # where the tensors of the bare model lie, layer by layer

    @property
    def keeps_norms(self) -> bool:
        """Whether the lengths of its vectors mean something: not normalised, nor by cosine."""
        return not self.normalized and self.similarity != "cosine"

    @cached_property
    def weights_sha256(self) -> str:
        """A hash of the weights that decide a vector: the bare model's and the head's.

        It is taken over tensor names, types, shapes and values, so it does not depend on file
        names, sharding, or the task heads that a checkpoint may carry besides. The weights are
        read once, when it is first asked for.
        """
        tensors = self.layout.tensors(self.layers)
        if self.latent:
            for name, tensor in stored_tensors(self.latent.folder).items():
                tensors[f"latent.{name}"] = tensor
        for position, module in enumerate(self.head):
            for name, tensor in stored_tensors(module.folder).items():
                tensors[f"head.{position}.{name}"] = tensor
        if self.alignment:
            for name, tensor in stored_tensors(self.alignment.folder).items():
                tensors[f"alignment.{name}"] = tensor
        return sha256_of_tensors(tensors)

    def moved(self, folder: Path) -> Checkpoint:
        """Return the same description of a checkpoint whose folder was renamed to ``folder``."""

        def there(path: Path) -> Path:
            return folder / path.relative_to(self.path)

        layout = self.layout
        return replace(
            self,
            path=folder,
            latent=self.latent and replace(self.latent, folder=there(self.latent.folder)),
            head=tuple(replace(module, folder=there(module.folder)) for module in self.head),
            alignment=self.alignment
            and replace(self.alignment, folder=there(self.alignment.folder)),
            licenses=tuple(there(path) for path in self.licenses),
            layout=replace(
                layout,
                outside=_moved(layout.outside, there),
                inside=tuple(_moved(layer, there) for layer in layout.inside),
            ),
        )


def open_checkpoint(
    model: str | Path | None = None,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    pooling: str | None = None,
    trained: str | None = None,
) -> Checkpoint:
    """Return a description of a checkpoint; the weights are found and checked, not loaded.

    Args:
        model: a folder, a hub id, or None for the checkpoint that ships with m2dexport.
        allow_pickle: read a checkpoint that has only pickled weights, with torch's restricted
            unpickler; a converted copy is kept in the cache.
        trust_remote_code: let transformers run code that the checkpoint brings.
        pooling: declared pooling, such as "mean", "cls" or "lasttoken", for a checkpoint that does
            not store it.
        trained: declared trained grid, such as "2:32,4:64" or "1-6:32,64"; replaces what is stored.

    Returns:
        The description. Everything that was not stored is listed in ``assumed``.

    Raises:
        UsageError: when the model cannot be found or an option is wrong.
        CheckpointError: when it cannot be read, or is of a kind that cannot be exported.

    Example:
        >>> open_checkpoint("all-MiniLM-L6-v2").layers
        6
    """
    folder, notes = checkpoint_folder(model, allow_pickle=allow_pickle)
    static = read_static(folder)
    if static is not None:
        return _describe_static(folder, static)
    modules = read_modules(folder)
    if not (modules.transformer / CONFIG).is_file():
        raise CheckpointError(
            f"{modules.transformer} has no {CONFIG}, so it is not the folder of a checkpoint."
        )
    chosen = _choose_pooling(folder, modules, pooling)
    if modules.pooling is None:
        notes.append(f"pooling is {pooling}, as declared; the checkpoint does not store it.")
    config = read_config(modules.transformer, trust_remote_code=trust_remote_code)
    own_code = trust_remote_code and has_own_code(modules.transformer)
    modules = replace(modules, pooling=chosen)
    return _describe(folder, modules, config, own_code, notes, trained)


def _describe(
    folder: Path,
    modules: Modules,
    config: Any,
    own_code: bool,
    notes: Sequence[str],
    declared: str | None,
) -> Checkpoint:
    transformer = modules.transformer
    layers, hidden = int(config.num_hidden_layers), int(config.hidden_size)
    layout = _layout(transformer, config.model_type, layers)
    require_fit(transformer, config, layout, own_code=own_code)
    family, pooling = layout.family, cast(Pooling, modules.pooling)
    ending = modules.head + ((modules.alignment,) if modules.alignment else ())
    dim = _width_after(ending, hidden * len(pooling.modes))
    provenance = read_object(folder / PROVENANCE)
    stated = read_sentence_config(folder, pooling)
    card = read_card(folder)
    assumed = [*notes, *_notes(config, family, card, transformer), *_norms(modules, stated)]
    length = read_max_length(modules, config, family)
    trained = read_trained(folder, transformer, card, (layers, dim), declared)
    final_norm = _final_norm(family, config, modules)
    return Checkpoint(
        path=transformer,
        model_type=str(config.model_type),
        own_code=own_code,
        layers=layers,
        hidden=hidden,
        dim=dim,
        widths=read_widths(layout, config, transformer),
        vocab_size=int(config.vocab_size),
        latent=modules.latent,
        pooling=pooling,
        head=modules.head,
        normalized=modules.normalized,
        alignment=modules.alignment,
        similarity=stated.similarity,
        final_norm=final_norm,
        prompts=stated.prompts,
        default_prompt=stated.default_prompt,
        max_length=length.tokens,
        trained=trained.grid,
        assumed=(*assumed, *length.notes, *trained.notes),
        sliced_from=provenance.get("sliced_from"),
        speaks=read_full_model(provenance),
        licenses=license_files(folder),
        sources=sources_of(folder, modules, final_norm, length.source, trained.source),
        layout=layout,
    )


def _describe_static(folder: Path, static: StaticParts) -> Checkpoint:
    rows, dim = static.table.shape
    pooling = Pooling(("mean",))
    stated = read_sentence_config(folder, pooling)
    provenance = read_object(folder / PROVENANCE)
    return Checkpoint(
        path=static.folder,
        model_type="static",
        own_code=False,
        layers=0,
        hidden=dim,
        dim=dim,
        widths=None,
        vocab_size=rows,
        latent=None,
        pooling=pooling,
        head=(),
        normalized=static.normalized,
        alignment=None,
        similarity=stated.similarity,
        final_norm="none",
        prompts=stated.prompts,
        default_prompt=stated.default_prompt,
        max_length=static.max_length or DEFAULT_LENGTH,
        trained=None,
        assumed=() if static.max_length else (NO_LENGTH,),
        sliced_from=provenance.get("sliced_from"),
        speaks=read_full_model(provenance),
        licenses=license_files(folder),
        sources=static_sources(folder, has_length=static.max_length is not None),
        layout=Layout(Family(()), 0, {TABLE: static.table}, ()),
    )


def _moved(
    tensors: Mapping[str, StoredTensor], there: Callable[[Path], Path]
) -> dict[str, StoredTensor]:
    return {name: replace(tensor, path=there(tensor.path)) for name, tensor in tensors.items()}


def _choose_pooling(folder: Path, modules: Modules, declared: str | None) -> Pooling:
    if declared is None and modules.pooling is None:
        raise CheckpointError(
            f"{folder} does not store how it pools (it has no modules.json); say it with "
            "--pooling mean, cls or lasttoken."
        )
    if declared is None:
        return cast(Pooling, modules.pooling)
    chosen = pooling_from_name(declared)
    if modules.pooling is not None and modules.pooling.modes != chosen.modes:
        stored = "+".join(modules.pooling.modes)
        raise UsageError(f"--pooling {declared} contradicts {folder}, which stores {stored}.")
    return modules.pooling or chosen


def _notes(config: Any, family: Family, card: Card, transformer: Path) -> Iterator[str]:
    """Yield what a person should know of how the folder was read."""
    if family.inferred:
        norm = f"at {family.final_norm}" if family.final_norm else "nowhere"
        yield (
            f"model type {config.model_type!r} is not in the table of families: its layers were "
            f"found at {family.layers[0]}*, its final norm {norm}."
        )
    if family.final_norm and card.trained_on_raw_states:
        yield (
            "shallow depths apply the final norm, although their training did not; slice them "
            "with --final-norm skipped to get what was trained."
        )
    if (transformer / WEIGHTS).exists() and (transformer / INDEX).exists():
        yield f"the weights are {WEIGHTS}, which loaders prefer; {INDEX} beside it is not read."
    yield from read_tokenizer(transformer)[1]
    beyond = token_beyond(transformer, int(config.vocab_size))
    if beyond is not None:
        yield (
            f"no text holds {beyond[0]!r}, which the tokenizer numbers {beyond[1]}: the token "
            f"table has {config.vocab_size} rows."
        )


def _norms(modules: Modules, stated: SentenceConfig) -> Iterator[str]:
    if stated.similarity != "cosine" and not modules.normalized:
        yield (
            f"vectors are compared by {stated.similarity} and not normalised: sub-models keep "
            "their norms; build and profile need one that slice --normalize made."
        )


def _layout(folder: Path, model_type: str, layers: int) -> Layout:
    tensors = stored_tensors(folder)
    return locate(family_of(model_type, list(tensors), layers), tensors, layers, folder)


def _width_after(head: tuple[Head, ...], width: int) -> int:
    for module in head:
        needed = module.in_features if isinstance(module, Dense) else module.features
        if needed != width:
            raise CheckpointError(f"{module.folder} takes {needed} values and gets {width}.")
        if isinstance(module, Dense):
            weight = tensors_in(module.folder / WEIGHTS).get("linear.weight")
            if weight is None or weight.shape != (module.out_features, module.in_features):
                raise CheckpointError(
                    f"{module.folder} does not hold the weights that it describes."
                )
            width = module.out_features
    return width


def _final_norm(family: Family, config: Any, modules: Modules) -> FinalNorm:
    if family.final_norm is None:
        return "none"
    raw = modules.raw_output and getattr(config, RAW_LAST_STATE, None) is False
    return "skipped" if raw else "applied"
