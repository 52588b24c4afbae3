"""Nested widths: the attention heads and feed-forward channels of each layer, read and cut.

A width is a prefix. Keeping 8 of 12 heads computes what the whole layer would with the other four
adding nothing to the hidden state: their rows go from the query, key and value projections, their
columns from the output projection, and every bias of an output stays. That is how SortedNet
(https://arxiv.org/abs/2309.00255) and MatFormer (https://arxiv.org/abs/2310.07707) train their
sub-models. Heads that share keys and values stay together: whole key-value groups are kept.

Widths are read from the shapes of the stored tensors, so no file can contradict them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from m2dexport.checkpoint.families import FAMILIES, Block, Family, Layout, Part, bare_class
from m2dexport.checkpoint.tensors import NewTensor, copied, selected
from m2dexport.errors import CheckpointError, UsageError

Positions = Mapping[Part, NDArray[np.int64]]  # rows or columns of each part to keep, in new order


@dataclass(frozen=True)
class Widths:
    """How wide the layers of a model are inside: one entry per layer."""

    heads: tuple[int, ...]  # query heads
    kv_heads: tuple[int, ...]  # as many as heads, unless several heads share keys and values
    ffn: tuple[int, ...]  # feed-forward channels
    head_dim: int  # width of one head

    def first(self, layers: int) -> Widths:
        """Return the widths of the first ``layers`` layers."""
        return Widths(self.heads[:layers], self.kv_heads[:layers], self.ffn[:layers], self.head_dim)

    @property
    def group(self) -> int:
        """The query heads that share one key-value head: the unit in which heads are cut."""
        return self.heads[0] // self.kv_heads[0]


@dataclass(frozen=True)
class Importance:
    """How much each unit of each layer matters: the larger the value, the more."""

    heads: tuple[NDArray[np.float64], ...]  # (heads,) per layer
    ffn: tuple[NDArray[np.float64], ...]  # (channels,) per layer
    texts_sha256: str  # of the texts that it was measured on


def read_widths(layout: Layout, config: Any, where: Path) -> Widths | None:
    """Return the widths that the stored tensors have; None for a family that has no block.

    Args:
        layout: the tensors of the checkpoint.
        config: transformers' view of its config.json, which says how wide a head is.
        where: the checkpoint's folder, for messages.

    Raises:
        CheckpointError: when the tensors of a layer do not fit each other.
    """
    block = layout.family.block
    if block is None:
        return None
    heads = int(getattr(config, block.heads_key))
    group = heads // int(getattr(config, block.kv_heads_key)) if block.kv_heads_key else 1
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    found: dict[Part, list[int]] = {"heads": [], "kv_heads": [], "ffn": []}
    for number, layer in enumerate(layout.inside):
        prefix = f"{layout.family.layers[0]}{number}."
        shapes = {name.removeprefix(prefix): tensor.shape for name, tensor in layer.items()}
        try:
            attended = shapes[f"{block.columns['heads']}.weight"][1]
            sizes: dict[Part, int] = {
                "heads": attended,
                "kv_heads": attended // group,
                "ffn": shapes[f"{block.columns['ffn']}.weight"][1],
            }
            fits = all(
                shapes[f"{module}.weight"][0] == sum(sizes[part] for part in parts)
                for module, parts in block.rows.items()
            )
        except (KeyError, IndexError):
            fits = False
        if not fits or attended % (head_dim * group):
            raise CheckpointError(
                f"{where} has tensors in layer {number + 1} that do not fit each other as heads "
                f"of {head_dim} dims and feed-forward channels."
            )
        found["heads"].append(attended // head_dim)
        found["kv_heads"].append(attended // head_dim // group)
        found["ffn"].append(sizes["ffn"])
    return Widths(tuple(found["heads"]), tuple(found["kv_heads"]), tuple(found["ffn"]), head_dim)


def narrowed(
    widths: Widths | None,
    model_type: str,
    heads: Sequence[int] | None,
    ffn: Sequence[int] | None,
) -> Widths | None:
    """Return the widths to cut to, every value checked.

    Args:
        widths: of the layers that are kept.
        model_type: of the checkpoint, for messages.
        heads: query heads to keep, one number for all layers or one per layer; None keeps all.
        ffn: likewise, feed-forward channels.

    Raises:
        UsageError: when a number is out of range, splits a key-value group, or does not say what
            every layer keeps; or when the family's layers cannot be cut.
    """
    if widths is None:
        if heads or ffn:
            raise unknown_widths(model_type)
        return None
    kept = _checked("--heads", "heads", heads, widths.heads)
    split = [count for count in kept if count % widths.group]
    if split:
        raise UsageError(
            f"--heads {split[0]} splits a key-value group of {widths.group} heads; choose a "
            f"multiple of {widths.group}."
        )
    kv_heads = tuple(count // widths.group for count in kept)
    channels = _checked("--ffn", "feed-forward channels", ffn, widths.ffn)
    return Widths(kept, kv_heads, channels, widths.head_dim)


def unknown_widths(model_type: str) -> UsageError:
    """Return the error for a width asked of a family whose layers cannot be cut."""
    known = ", ".join(name for name, family in FAMILIES.items() if family.block)
    return UsageError(
        f"the heads and feed-forward channels of {model_type} can be neither cut nor sorted; those "
        f"of {known} can."
    )


def _checked(
    option: str, what: str, asked: Sequence[int] | None, known: tuple[int, ...]
) -> tuple[int, ...]:
    if asked is None:
        return known
    counts = tuple(asked) * (len(known) if len(asked) == 1 else 1)
    if len(counts) != len(known):
        raise UsageError(
            f"{option} names {len(counts)} widths for {len(known)} layers; give one, or one per "
            "layer."
        )
    for layer, (count, most) in enumerate(zip(counts, known, strict=True), start=1):
        if not 1 <= count <= most:
            raise UsageError(
                f"{option} {count} is not between 1 and {most}, the {what} of layer {layer}."
            )
    return counts


def cut_tensors(
    layout: Layout,
    source: Widths | None,
    target: Widths | None,
    layers: int,
    *,
    importance: Importance | None = None,
    dtype: str | None = None,
) -> list[NewTensor]:
    """Return the tensors of the first layers, each cut to the target widths, in their order.

    Args:
        layout: the tensors of the checkpoint.
        source: its widths; None where its layers cannot be cut.
        target: the widths to keep, no wider than the source's.
        layers: how many layers to keep.
        importance: what to sort units by before the cut; None keeps the order in which they are
            stored.
        dtype: floating type on the way out; None keeps the stored one.
    """
    cuts: dict[str, tuple[NDArray[np.int64], int]] = {}
    if source and target and (importance or target != source.first(layers)):
        for layer in range(layers):
            cuts.update(_cuts(layout.family, source, target, layer, importance))
    return [
        selected(tensor, name, cuts[name][0], axis=cuts[name][1], dtype=dtype)
        if name in cuts
        else copied(tensor, name, dtype=dtype)
        for name, tensor in layout.tensors(layers).items()
    ]


def _cuts(
    family: Family, source: Widths, target: Widths, layer: int, importance: Importance | None
) -> dict[str, tuple[NDArray[np.int64], int]]:
    """Return what is kept of each tensor of a layer, by name: positions along an axis."""
    block = cast(Block, family.block)
    kept = _positions(source, target, layer, importance)
    sizes = _sizes(source, layer)
    cuts: dict[str, tuple[NDArray[np.int64], int]] = {}
    for module, parts in block.rows.items():
        offsets = np.cumsum([0, *(sizes[part] for part in parts)])
        rows = [kept[part] + offset for part, offset in zip(parts, offsets, strict=False)]
        for parameter in ("weight", "bias"):
            name = f"{family.layers[0]}{layer}.{module}.{parameter}"
            cuts[name] = np.concatenate(rows), 0
    for part, module in block.columns.items():
        cuts[f"{family.layers[0]}{layer}.{module}.weight"] = kept[part], 1
    return cuts


def _sizes(widths: Widths, layer: int) -> dict[Part, int]:
    """Return how many rows or columns the parts of one layer take."""
    return {
        "heads": widths.heads[layer] * widths.head_dim,
        "kv_heads": widths.kv_heads[layer] * widths.head_dim,
        "ffn": widths.ffn[layer],
    }


def _positions(
    source: Widths, target: Widths, layer: int, importance: Importance | None
) -> Positions:
    if importance is None:
        sizes = _sizes(target, layer)
        return {part: np.arange(size) for part, size in sizes.items()}
    by_group = importance.heads[layer].reshape(source.kv_heads[layer], source.group)
    groups = _descending(by_group.sum(axis=1))
    within = np.stack([_descending(row) for row in by_group])[groups]
    heads = (groups[:, None] * source.group + within).reshape(-1)
    dims = np.arange(source.head_dim)
    return {
        "heads": (heads[: target.heads[layer], None] * source.head_dim + dims).reshape(-1),
        "kv_heads": (groups[: target.kv_heads[layer], None] * source.head_dim + dims).reshape(-1),
        "ffn": _descending(importance.ffn[layer])[: target.ffn[layer]],
    }


def _descending(values: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.argsort(-values, kind="stable")


def width_config(
    raw: Mapping[str, Any], family: Family, target: Widths | None, tensors: Sequence[NewTensor]
) -> tuple[dict[str, Any], bool]:
    """Return config.json for the target widths, and whether transformers builds them from it.

    It states the widest layer, where transformers has a setting for that: BERT has none for fewer
    heads of the same width, and llama takes no number of heads that does not divide the hidden
    size. Whether that is enough is not guessed: the model is built, without memory for its weights,
    and its shapes are compared with those of ``tensors``.
    """
    from transformers import CONFIG_MAPPING

    block = family.block
    if target is None or block is None:
        return dict(raw), True
    known = CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    stated = {getattr(known, block.heads_key)}, {getattr(known, block.ffn_key)}
    if (set(target.heads), set(target.ffn)) == stated:
        return dict(raw), True
    ffn = {block.ffn_key: max(target.ffn)}
    heads: dict[str, int] = {}
    if block.head_dim_key and getattr(known, block.heads_key) != max(target.heads):
        heads = {block.heads_key: max(target.heads), block.head_dim_key: target.head_dim}
        heads[str(block.kv_heads_key)] = max(target.kv_heads)
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    for keys in ({**ffn, **heads}, ffn):
        new = {**raw, **{k: v for k, v in keys.items() if getattr(known, k, None) != v}}
        built = _built_shapes(new)
        if built is not None:
            return new, all(built.get(name, shape) == shape for name, shape in shapes.items())
    return dict(raw), False


def _built_shapes(raw: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of the weights that transformers builds from a config.json, if it does."""
    import torch
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
        with torch.device("meta"):
            model = bare_class(raw["model_type"])(config)
    except Exception:  # a config class may raise anything about a value it dislikes
        return None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
