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
from m2dexport.precisions import BitOrder, VectorPrecision
from m2dexport.runtime import artifact
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
from m2dexport.runtime.cells import open_cells
from m2dexport.runtime.vector_files import VECTOR_FILES
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
    """Return what wrote an index, from its bundle or artifact; a nested bundle's default cell did.

    Raises:
        UsageError: when it is neither.
        BundleError: when the bundle is damaged.
    """
    path, name = Path(path), str(path)
    if path.suffix in VECTOR_FILES:
        raise UsageError(f"{path} holds vectors; name the bundle that wrote them.")
    if path.is_dir():
        spec, ranges = artifact.read_spec(path), artifact.read_ranges(path)
        tokenizer = artifact.read_file(path, TOKENIZER).decode(errors="replace")
    elif path.is_file():
        opened = open_cells(path)
        name = f"{path} ({opened.default})" if opened.nested else name
        files = opened.files()
        spec = spec_from_json(files[SPEC], path)
        ranges = ranges_from_json(files[RANGES]) if RANGES in files else None
        tokenizer = files[TOKENIZER].decode(errors="replace")
    else:
        raise UsageError(f"{path} does not exist; name the bundle that wrote the index.")
    if spec.space_id != artifact.space_id_of_artifact(spec, ranges, tokenizer):
        raise UsageError(
            f"{path} was changed since it was built; name the one that wrote the index."
        )
    return Index(name, spec, ranges, sha256_of_json(parse_json(tokenizer, path)))


@dataclass(frozen=True)
class Wanted:
    """What an encoder's vectors are, whatever its weights."""

    dim: int
    vectors: VectorPrecision
    bit_order: BitOrder
    layers: int
    full: int  # the depth that its vectors are like: its own, or what it is aligned with


def require_index(index: Index, wanted: Wanted) -> None:
    """Refuse an index that an encoder cannot query.

    Raises:
        UsageError: when the index is of another dim, of other codes, or of another depth.
    """
    found, full = index.spec, wanted.full
    if found.dim != wanted.dim:
        raise UsageError(
            f"{index.name} holds vectors of {found.dim} dims, and this encoder gives "
            f"{wanted.dim}; make one of {found.dim} dims."
        )
    if (found.vectors, found.bit_order) != (wanted.vectors, wanted.bit_order):
        raise UsageError(
            f"{index.name} holds vectors={found.vectors} with bit order {found.bit_order}, and "
            f"this encoder gives {wanted.vectors} with {wanted.bit_order}; make one that gives "
            f"{found.vectors} with {found.bit_order}."
        )
    if full_layers(found) is not None:
        raise UsageError(
            f"{index.name} is an aligned encoder itself; name what the index was written by, of "
            f"depth {full}."
        )
    if found.layers != full and full == wanted.layers:
        raise UsageError(
            f"{index.name} was written at depth {found.layers}, and this encoder of {full} layers "
            "is not aligned with it: build it with --align, or take an aligned cell of the profile."
        )
    if found.layers != full:
        raise UsageError(
            f"{index.name} was written at depth {found.layers}, and this encoder is aligned with "
            f"depth {full}; name a bundle of depth {full}."
        )


def spoken_space(spec: ArtifactSpec, index: Index | None, tokenizer_json: str) -> Spoken | None:
    """Return the space that an artifact speaks beside its own, None when there is none.

    Args:
        spec: the artifact's, whose vectors are coded with the index's ranges.
        index: what wrote the index; None takes the full model in fp32, whose ranges nobody knows.
        tokenizer_json: the artifact's.

    Raises:
        UsageError: when the index is not of the model that the artifact is aligned with, of
            another dim, or of other codes.
    """
    full = full_layers(spec)
    if index is None:
        if full is None:
            return None
        return Spoken(space_id_of_full_model(spec), full, "fp32", {})
    like = spec.layers if full is None else full
    require_index(index, Wanted(spec.dim, spec.vectors, spec.bit_order, spec.layers, like))
    found = index.spec
    own = spec.provenance.get("sub_model" if full is None else FULL_MODEL)
    if own != found.provenance.get("sub_model"):
        raise UsageError(
            f"{index.name} was written by other weights (of {_short(found)}) than "
            + ("these" if full is None else "this encoder's map was fitted to")
            + f" ({str(own)[:12]}); name a bundle of the same checkpoint."
        )
    whole = spec if full is None else full_spec(spec)
    others = [name for name in _SHARED if getattr(found, name) != getattr(whole, name)]
    if full is None:
        tokenizer = sha256_of_json(parse_json(tokenizer_json, TOKENIZER))
    else:
        tokenizer = spec.provenance[FULL_TOKENIZER]
    if tokenizer != index.tokenizer_sha256:
        others.append("tokenizer")
    if others:
        raise UsageError(
            f"{index.name} was written by the same weights and differs in {' and '.join(others)}; "
            "name a bundle of this checkpoint as it is."
        )
    return Spoken(found.space_id, found.layers, found.weights, {})


def _short(spec: ArtifactSpec) -> str:
    return str(spec.provenance.get("sub_model"))[:12]


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
