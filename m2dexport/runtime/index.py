"""The space of an index that exists: which encoders' vectors may be put to it.

An encoder speaks its own space. One that was aligned with the full model, or that is the full model
in other weights, can also speak the space of an index which the full model wrote: with the index's
own ranges, so that codes are comparable.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from m2dexport.errors import UsageError
from m2dexport.files import SPEC
from m2dexport.precisions import VectorPrecision
from m2dexport.runtime import artifact
from m2dexport.runtime.archive import open_bundle
from m2dexport.runtime.artifact import (
    FULL_MODEL,
    FULL_TOKENIZER,
    RANGES,
    TOKENIZER,
    ArtifactSpec,
    Spoken,
    full_layers,
    full_spec,
    space_id_of_full_model,
    spec_from_json,
)
from m2dexport.strict import parse_json, sha256_of_json
from m2dexport.vectors.codecs import LEVELS, Ranges, ranges_from_json

#: What an encoder and the one that wrote an index have in common besides weights and tokenizer.
_SHARED = ("codec", "pooling", "final_norm", "prompts", "default_prompt", "max_length")


@dataclass(frozen=True)
class Index:
    """What wrote an index: the artifact's specification and ranges."""

    name: str  # what messages call it
    spec: ArtifactSpec
    ranges: Ranges | None
    tokenizer_sha256: str


def read_index(path: str | Path) -> Index:
    """Return what wrote an index, from its bundle or artifact.

    Raises:
        UsageError: when it is neither.
        BundleError: when the bundle is damaged.
    """
    path = Path(path)
    if path.is_dir():
        tokenizer = artifact.read_file(path, TOKENIZER)
        spec, ranges = artifact.read_spec(path), artifact.read_ranges(path)
        return Index(str(path), spec, ranges, sha256_of_json(parse_json(tokenizer, TOKENIZER)))
    if not path.is_file():
        raise UsageError(f"{path} does not exist; name the bundle that wrote the index.")
    files = open_bundle(path)
    ranges = ranges_from_json(files[RANGES]) if RANGES in files else None
    tokenizer_sha256 = sha256_of_json(parse_json(files[TOKENIZER], path))
    return Index(str(path), spec_from_json(files[SPEC], path), ranges, tokenizer_sha256)


def spoken_space(spec: ArtifactSpec, index: Index | None) -> Spoken | None:
    """Return the space that an artifact speaks beside its own, None when there is none.

    Args:
        spec: the artifact's, whose vectors are coded with the index's ranges.
        index: what wrote the index; None takes the full model in fp32, whose ranges nobody knows.

    Raises:
        UsageError: when the index is not of the model that the artifact is aligned with, of
            another dim, or of other codes.
    """
    full = full_layers(spec)
    if index is None:
        if full is None:
            return None
        return Spoken(space_id_of_full_model(spec), full, "fp32", {})
    found = index.spec
    if found.dim != spec.dim:
        raise UsageError(
            f"{index.name} holds vectors of {found.dim} dims, and this encoder gives {spec.dim}; "
            f"pass --dim {found.dim}."
        )
    if (found.vectors, found.bit_order) != (spec.vectors, spec.bit_order):
        raise UsageError(
            f"{index.name} holds vectors={found.vectors} with bit order {found.bit_order}, and "
            f"this encoder gives {spec.vectors} with {spec.bit_order}; pass --vectors "
            f"{found.vectors} --bit-order {found.bit_order}."
        )
    own = spec.provenance.get("sub_model" if full is None else FULL_MODEL)
    if own != found.provenance.get("sub_model"):
        raise UsageError(_other_model(spec, index, full))
    whole = spec if full is None else full_spec(spec)
    others = [name for name in _SHARED if getattr(found, name) != getattr(whole, name)]
    if full is not None and spec.provenance[FULL_TOKENIZER] != index.tokenizer_sha256:
        others.append("tokenizer")
    if others:
        raise UsageError(
            f"{index.name} was written by the same weights with another {' and '.join(others)}; "
            "name a bundle of this checkpoint as it is."
        )
    return Spoken(found.space_id, found.layers, found.weights, {})


def require_ranges_of(spec: ArtifactSpec, index: Index | None) -> None:
    """Refuse to freeze ranges of its own for an artifact that is to speak another space.

    Raises:
        UsageError: when it is aligned, its codes need ranges, and no index has them.
    """
    if index is None and full_layers(spec) is not None:
        require_no_ranges(spec.vectors)


def require_no_ranges(vectors: VectorPrecision) -> None:
    """Refuse codes that need ranges, of an aligned encoder that has no index to take them from.

    Raises:
        UsageError: naming the ways out.
    """
    if vectors in LEVELS:
        raise UsageError(
            f"{vectors} codes of an aligned encoder need the ranges of the index that they are put "
            "to: name the bundle that wrote it by --index, or build from the whole checkpoint with "
            "--align."
        )


def _other_model(spec: ArtifactSpec, index: Index, full: int | None) -> str:
    found = index.spec
    if full is None and found.layers == spec.layers:
        return f"{index.name} was written by other weights than these; name a bundle of these."
    if full is None:
        return (
            f"{index.name} was written at depth {found.layers}, and this encoder of {spec.layers} "
            "layers is not aligned with it; pass --align."
        )
    if found.layers != full:
        return (
            f"{index.name} was written at depth {found.layers}, and this encoder is aligned with "
            f"depth {full}; name a bundle of depth {full}."
        )
    return (
        f"{index.name} was not written by the checkpoint that this encoder's map was fitted to "
        f"(weights {spec.provenance[FULL_MODEL][:12]}, and the index is of "
        f"{found.provenance.get('sub_model', 'unknown')[:12]}); align with that one."
    )
