"""The modules that sentence-transformers runs after the transformer, written into a folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from m2dexport.checkpoint.alignment import LinearMap
from m2dexport.checkpoint.jsonfile import write_json
from m2dexport.checkpoint.st_modules import (
    LATENT,
    LEGACY_MODES,
    MODULES,
    RAW_STATE,
    SETTINGS,
    TORCH_ACTIVATIONS,
    Dense,
    Head,
    Modules,
    Pooling,
)
from m2dexport.checkpoint.tensors import (
    WEIGHTS,
    NewTensor,
    copied,
    new_tensor,
    stored_tensors,
    write_tensors,
)

_TOKENS = "token_embeddings"
_MODULE = "sentence_transformers.models."  # read by every version of sentence-transformers
# Where modules live since 6.0. Older versions ignore the requirement of a transformers version that
# raw states bring along, and would pool something else; these names they cannot load at all.
_NEW_POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
_NEW_NORMALIZE = "sentence_transformers.base.modules.normalize.Normalize"


def write_latent_attention(folder: Path, heads: int, tensors: Sequence[NewTensor]) -> None:
    """Write what ``read_latent_attention`` reads into a new folder."""
    folder.mkdir()
    write_json(folder / "config.json", {"heads": heads})
    write_tensors(folder / WEIGHTS, tensors)


def write_latent_modules(out: Path, hidden: int, heads: int, tensors: Sequence[NewTensor]) -> None:
    """Write the modules of NV-Embed into a checkpoint folder: latent attention, mean, Normalize."""
    types = [_MODULE + "Transformer", LATENT, _MODULE + "Pooling", _MODULE + "Normalize"]
    folders = [out, *(_folder(out, types[: i + 1]) for i in range(1, len(types)))]
    for folder in folders[1:]:
        shutil.rmtree(folder, ignore_errors=True)  # of the modules that it came with
    write_latent_attention(folders[1], heads, tensors)
    folders[2].mkdir()
    write_json(folders[2] / "config.json", _pooling_config(Pooling(("mean",), False), hidden))
    folders[3].mkdir()
    write_json(folders[3] / "config.json", {})
    _write_list(out, folders, types)


def write_modules(
    modules: Modules,
    hidden: int,
    *,
    dim: int,
    dtype: str | None,
    new_map: LinearMap | None = None,
) -> None:
    """Write modules.json and what it names into ``modules.transformer``.

    The last head is cut to its first ``dim`` outputs. Where there is no head that can be cut, a
    Dense with the identity's first ``dim`` rows is added: exact, and read by every version of
    sentence-transformers, which has no module that truncates. The map of an aligned sub-model
    stands between two Normalize; its outputs are cut, and the head before it is whole.

    Args:
        modules: what to write; ``transformer`` is the sub-model's folder.
        hidden: width of the token states.
        dim: outputs to keep.
        dtype: floating type of the heads, "F32", "F16" or "BF16"; None keeps the stored one.
        new_map: the map to align with, of ``dim`` outputs; None takes that of ``modules``, if any.
    """
    out = modules.transformer
    write_json(out / SETTINGS, _settings(modules))
    listed = _Listed(out)
    if modules.latent:
        tensors = _copies(modules.latent.folder, dtype, rows=None)
        write_latent_attention(listed.named(LATENT), modules.latent.heads, tensors)
    unguarded = modules.raw_output and not modules.normalized
    pooling = cast(Pooling, modules.pooling)
    folder = listed.added(_NEW_POOLING if unguarded else _MODULE + "Pooling")
    write_json(folder / "config.json", _pooling_config(pooling, hidden))
    normalize = _NEW_NORMALIZE if modules.raw_output else _MODULE + "Normalize"
    if new_map is not None or modules.alignment is not None:
        _write_head(listed, modules.head, None, dtype)
        write_json(listed.added(normalize) / "config.json", {})
        folder = listed.added(_MODULE + "Dense")
        if new_map is not None:
            _write_map(folder, new_map, dtype or "F32")
        elif modules.alignment is not None:
            _write_dense(folder, modules.alignment, dim, dtype)
    else:
        width = _write_head(listed, modules.head, dim, dtype) or hidden * len(pooling.modes)
        if dim < width:
            _write_identity(listed.added(_MODULE + "Dense"), dim, width, dtype or "F32")
    if modules.normalized:
        write_json(listed.added(normalize) / "config.json", {})
    _write_list(out, listed.folders, listed.types)


class _Listed:
    """The modules written so far: their types, and the folders that hold them."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.types, self.folders = [_MODULE + "Transformer"], [out]

    def named(self, type_name: str) -> Path:
        """Return the folder of one more module, which is still to be made."""
        self.types.append(type_name)
        self.folders.append(_folder(self._out, self.types))
        return self.folders[-1]

    def added(self, type_name: str) -> Path:
        """Return the new folder of one more module."""
        folder = self.named(type_name)
        folder.mkdir()
        return folder


def _write_head(
    listed: _Listed, head: Sequence[Head], dim: int | None, dtype: str | None
) -> int | None:
    """Write the modules after pooling, a last Dense cut to ``dim``; return their width, if any."""
    width = None
    for module in head:
        folder = listed.added(_MODULE + ("Dense" if isinstance(module, Dense) else "LayerNorm"))
        if isinstance(module, Dense):
            width = module.out_features
            if dim is not None and module is head[-1]:
                width = min(dim, width)
            _write_dense(folder, module, width, dtype)
        else:
            width = module.features
            write_json(folder / "config.json", {"dimension": module.features})
            _copy_tensors(module.folder, folder, dtype, rows=None)
    return width


def _settings(modules: Modules) -> dict[str, Any]:
    settings: dict[str, Any] = {"max_seq_length": modules.max_length, "do_lower_case": False}
    if modules.without_pooler:  # transformers would report one as newly initialized
        settings["model_args"] = {"add_pooling_layer": False}
    if modules.raw_output:
        settings |= {"modality_config": {"text": RAW_STATE}, "module_output_name": _TOKENS}
    return settings


def _write_list(out: Path, folders: Sequence[Path], types: Sequence[str]) -> None:
    listed = [
        {"idx": i, "name": str(i), "path": path.name if i else "", "type": type_name}
        for i, (type_name, path) in enumerate(zip(types, folders, strict=True))
    ]
    write_json(out / MODULES, listed)


def _folder(out: Path, types: Sequence[str]) -> Path:
    return out / f"{len(types) - 1}_{types[-1].rpartition('.')[2]}"


def _pooling_config(pooling: Pooling, hidden: int) -> dict[str, Any]:
    kept = {"include_prompt": pooling.include_prompt}
    flags = {flag: mode in pooling.modes for flag, mode in LEGACY_MODES.items()}
    if pooling.modes == tuple(mode for flag, mode in LEGACY_MODES.items() if flags[flag]):
        return {"word_embedding_dimension": hidden, **flags, **kept}
    # The flags cannot say the order, which sentence-transformers 5.4 and later can.
    modes = list(pooling.modes)
    return {"embedding_dimension": hidden, "pooling_mode": modes, **kept}


def _dense_config(in_features: int, out_features: int, bias: bool, act: str) -> dict[str, Any]:
    return {
        "in_features": in_features,
        "out_features": out_features,
        "bias": bias,
        "activation_function": TORCH_ACTIVATIONS[act],
    }


def _write_dense(folder: Path, dense: Dense, rows: int, dtype: str | None) -> None:
    config = _dense_config(dense.in_features, rows, dense.bias, dense.activation)
    write_json(folder / "config.json", config)
    _copy_tensors(dense.folder, folder, dtype, rows=rows)


def _write_identity(folder: Path, rows: int, columns: int, dtype: str) -> None:
    write_json(folder / "config.json", _dense_config(columns, rows, False, "identity"))
    weight = new_tensor("linear.weight", np.eye(rows, columns, dtype=np.float32), dtype)
    write_tensors(folder / WEIGHTS, [weight])


def _write_map(folder: Path, new: LinearMap, dtype: str) -> None:
    rows, columns = new.weight.shape
    write_json(folder / "config.json", _dense_config(columns, rows, True, "identity"))
    write_tensors(folder / WEIGHTS, new.tensors(dtype))


def _copy_tensors(source: Path, folder: Path, dtype: str | None, rows: int | None) -> None:
    write_tensors(folder / WEIGHTS, _copies(source, dtype, rows))


def _copies(source: Path, dtype: str | None, rows: int | None) -> list[NewTensor]:
    return [
        copied(tensor, name, dtype=dtype, rows=rows)
        for name, tensor in stored_tensors(source).items()
    ]
