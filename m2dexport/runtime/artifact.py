"""The artifact folder: what ``build`` makes, ``bundle`` packs and the runtime reads.

::

    model.onnx      int64 (batch, sequence) input_ids and attention_mask -> sentence_embedding;
                    model.xml and model.bin, the same as an OpenVINO IR, where that is the engine
    engine.toml     of TensorRT: how an engine is made of the graph; model.engine, if one was built
    tokenizer.json  truncates at the model's maximum length, does not pad
    ranges.json     the frozen ranges, of int8 and int4 vectors only
    config.json, tokenizer_config.json
                    the sub-model's, for other programs than ours; depth 0 has none
    artifact.json   the specification below
    LICENSE, ...    the licence files of the checkpoint, where it has any
    files.json      the hashes of all of these (``file_list``)
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from m2dexport.engines import ENGINES, Device
from m2dexport.errors import FormatError, UsageError
from m2dexport.files import MODEL_SETTINGS, SPEC
from m2dexport.precisions import BitOrder, Isa, Similarity, VectorPrecision, WeightPrecision
from m2dexport.runtime.file_list import require_listed
from m2dexport.strict import (
    Matching,
    Name,
    Sha256,
    Share,
    Within,
    parse_json,
    read_value,
    require_format,
    sha256_of_json,
    shown,
)
from m2dexport.vectors.codecs import LEVELS, PER_BYTE, Ranges, ranges_from_json, require_codec

FORMAT = 4
#: The names that a graph's files have, of all engines.
GRAPH_FILES = frozenset(
    name for engine in ENGINES.values() for name in (*engine.files, *engine.may_hold)
)
TOKENIZER = "tokenizer.json"
RANGES = "ranges.json"
#: What an aligned artifact's provenance says of the full model: hashes, its depth, and what may be
#: another one's than the artifact's own.
FULL_MODEL, FULL_TOKENIZER, FULL_LAYERS = "full_model", "full_tokenizer", "full_layers"
FULL_POOLING, FULL_NORM = "full_pooling", "full_final_norm"
#: What its provenance says of the dims that training visited at its depth; left out: unknown.
TRAINED_DIMS, UNTRAINED = "trained_dims", "none"
_FULL = (FULL_MODEL, FULL_TOKENIZER, FULL_LAYERS, FULL_POOLING, FULL_NORM)

SMALL_LIMIT = 1 << 28  # bytes of any file but the graph
GRAPH_LIMIT = 1 << 28  # bytes of a graph that is read at once

SpaceId = Annotated[str, Matching("m2d1-[0-9a-f]{32}", "a space_id")]
Version = Annotated[str, Matching(r"\d{1,4}(\.\d{1,6}){0,3}", "a version")]

_Count = Annotated[int, Within(1, 1 << 20)]


@dataclass(frozen=True)
class Loss:
    """What an encoder gives on an index that another one wrote, in points."""

    points: float  # with its queries
    native: float  # with queries of the encoder that wrote the index


@dataclass(frozen=True)
class Spoken:
    """The space of an index that an encoder's vectors may be put to, beside its own space."""

    space_id: SpaceId
    layers: _Count  # of the encoder that wrote it
    weights: WeightPrecision  # likewise
    measured: dict[Name, Loss]  # "task/metric" -> the loss; empty: not measured

    def name(self) -> str:
        """Return which space it is, as one line."""
        return f"speaks the space of {self.layers} layers in {self.weights}, {self.space_id}"

    def sentence(self) -> str:
        """Return the loss as part of a sentence."""
        if not self.measured:
            return (
                "what its queries lose there was not measured (a profile does, and bundle --cell "
                "carries it)"
            )
        return ", ".join(
            f"{name} {loss.points:.2f} where the native encoder has {loss.native:.2f}"
            for name, loss in sorted(self.measured.items())
        )


@dataclass(frozen=True)
class ArtifactSpec:
    """Everything a runtime must know about an artifact beside its graph and tokenizer."""

    format: int
    engine: Name  # a key of ENGINES
    device: Device  # that it was checked on, and runs on unless another is asked for
    layers: Annotated[int, Within(0, 1 << 20)]  # 0: a static model
    dim: _Count
    weights: WeightPrecision
    isa: Isa  # where its 8-bit products are exact at full speed (``quantize.saturation``)
    vectors: VectorPrecision
    codec: int  # codecs.CODEC_VERSION when it was made
    bit_order: BitOrder  # of packed vectors; "big" for the others
    pooling: list[Name]
    similarity: Similarity  # that the model was trained for; its vectors here have length 1
    final_norm: Literal["none", "applied", "skipped"]
    prompts: dict[str, str]
    default_prompt: str | None  # a name in prompts
    max_length: _Count  # tokens, specials included
    pad_id: Annotated[int, Within(0, (1 << 31) - 1)]
    batch_invariant: bool  # False: run one text at a time
    trained: bool | None  # whether training visited this (layers, dim); None: unknown
    space_id: SpaceId
    speaks: Spoken | None  # the space of another encoder that its vectors are in, too
    parity: dict[Name, float]  # measured against the torch original when it was built
    checked_by: Name  # what ran it then: its engine, or the oracle where there was no GPU
    fitted_to: Sha256 | None  # of the texts that the weights were fitted to; None: to none
    kept_sha256: Sha256 | None  # of the weights that --max-drop kept in float32; None: of none
    clipping_rate: Share | None  # of held-out texts' values outside the ranges; None: none
    coverage: Share  # of the weight bytes that are stored below float32
    left_in_float32: list[Name]  # names of the large weights that are not
    min_engine: Version  # the oldest version of the engine that runs the graph, such as "1.17"
    provenance: dict[Name, Name]  # checkpoint and tool versions

    def to_json(self) -> str:
        """Return the text of artifact.json, keys sorted: the same spec is the same bytes."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def spec_from_json(text: bytes | str, where: object) -> ArtifactSpec:
    """Return the specification stored by ``ArtifactSpec.to_json``.

    Args:
        text: the content of artifact.json.
        where: its path, for messages.

    Raises:
        UsageError: when it is not one, or was written by a later version of the format.
    """
    stored = parse_json(text, where)
    require_format(stored, FORMAT, where)
    spec = read_value(ArtifactSpec, stored, where)
    require_codec(spec.codec, where)
    if spec.engine not in ENGINES:
        known = ", ".join(ENGINES)
        raise FormatError(
            f"{where} is for the engine {shown(spec.engine)}; this version has {known}."
        )
    if spec.default_prompt is not None and spec.default_prompt not in spec.prompts:
        prompt = shown(spec.default_prompt)
        raise UsageError(f"{where} has the default prompt {prompt} without its text.")
    return spec


def read_spec(folder: Path) -> ArtifactSpec:
    """Return the specification of an artifact folder whose files are as they were written.

    Raises:
        UsageError: when the folder is not an artifact.
        BundleError: when a file of it was changed or removed since.
    """
    require_part(folder, SPEC)
    require_listed(folder)
    return spec_from_json(read_file(folder, SPEC), folder / SPEC)


def read_ranges(folder: Path) -> Ranges | None:
    """Return the ranges of an artifact folder, None when its vectors need none."""
    if not (folder / RANGES).exists():
        return None
    return ranges_from_json(read_file(folder, RANGES))


def read_file(folder: Path, name: str) -> bytes:
    """Return the content of a file of an artifact folder.

    Raises:
        UsageError: when there is no regular file of that name, or it is too large to be one.
    """
    require_part(folder, name)
    path = folder / name
    if name not in GRAPH_FILES and path.stat().st_size > SMALL_LIMIT:
        raise UsageError(f"{path} is larger than {SMALL_LIMIT:,} bytes; build the artifact again.")
    return path.read_bytes()


def graph_files(folder: Path, engine: str) -> dict[str, Path | bytes]:
    """Return the files of an artifact folder's graph by name, for ``Encoder``.

    They are read once, so that what runs is what was examined. A graph of over 256 MiB stays in its
    files, which ``Encoder`` maps into memory.

    Args:
        folder: the artifact.
        engine: a key of ``ENGINES``.

    Raises:
        UsageError: when one of them is missing.
    """
    names = graph_names(engine, folder)
    for name in names:
        require_part(folder, name)
    if sum((folder / name).stat().st_size for name in names) > GRAPH_LIMIT:
        return {name: folder / name for name in names}
    return {name: read_file(folder, name) for name in names}


def graph_names(engine: str, folder: Path) -> list[str]:
    """Return the names of the files of an artifact folder's graph."""
    known = ENGINES[engine]
    return [*known.files, *(name for name in known.may_hold if (folder / name).exists())]


def settings_in(folder: Path) -> dict[str, bytes]:
    """Return the sub-model's settings that an artifact folder holds, name to content."""
    return {name: read_file(folder, name) for name in MODEL_SETTINGS if (folder / name).exists()}


def require_part(folder: Path, name: str) -> None:
    """Refuse an artifact folder that lacks a file of that name.

    Raises:
        UsageError: when there is none, or it is a pipe, which would wait for a writer.
    """
    if not (folder / name).is_file():
        raise UsageError(f"{folder} is not an artifact: it has no {name}; build makes one.")


def space_id_of_artifact(spec: ArtifactSpec, ranges: Ranges | None, tokenizer_json: str) -> str:
    """Return the identity of an artifact's vector space; vectors of two must not be compared.

    It is a hash of everything that decides a vector's meaning, by content and not by name: a
    renamed checkpoint keeps its id, a changed prompt or range does not.

    Args:
        spec: its specification, whose own ``space_id`` is not looked at.
        ranges: its ranges, None for a precision without.
        tokenizer_json: the content of its tokenizer.json.

    Raises:
        UsageError: when the specification does not give the hash of its weights.
    """
    return space_id_with_tokenizer(
        spec, ranges, sha256_of_json(parse_json(tokenizer_json, TOKENIZER))
    )


def space_id_with_tokenizer(spec: ArtifactSpec, ranges: Ranges | None, tokenizer: str) -> str:
    """Return the same as ``space_id_of_artifact``, from ``sha256_of_json`` of its tokenizer.json.

    Raises:
        UsageError: likewise.
    """
    if "sub_model" not in spec.provenance:
        raise UsageError(f"{SPEC} does not give the hash of its weights (provenance.sub_model).")
    return _space_id(spec, spec.provenance["sub_model"], tokenizer, ranges)


def space_id_of_full_model(spec: ArtifactSpec) -> str:
    """Return the space of the full model in fp32, with an aligned artifact's codes.

    Args:
        spec: the aligned artifact's, whose codes have no ranges.
    """
    whole = full_spec(spec)
    return _space_id(whole, spec.provenance[FULL_MODEL], spec.provenance[FULL_TOKENIZER], None)


def full_spec(spec: ArtifactSpec) -> ArtifactSpec:
    """Return what decides the space of the model in fp32 that an artifact is aligned with.

    Args:
        spec: the aligned artifact's, whose codes it has.
    """
    return replace(
        spec,
        layers=full_layers(spec) or spec.layers,
        weights="fp32",
        isa="portable",
        fitted_to=None,
        kept_sha256=None,
        pooling=spec.provenance[FULL_POOLING].split("+"),
        final_norm=cast(Any, spec.provenance[FULL_NORM]),
    )


def full_layers(spec: ArtifactSpec) -> int | None:
    """Return the depth of the model that an artifact is aligned with, None when it is not aligned.

    Raises:
        UsageError: when its specification says only half of that.
    """
    found = {name: spec.provenance[name] for name in _FULL if name in spec.provenance}
    if not found:
        return None
    if len(found) < len(_FULL) or not re.fullmatch("[0-9]{1,7}", found[FULL_LAYERS]):
        raise UsageError(f"{SPEC} says half of what the encoder was aligned with; build it again.")
    return int(found[FULL_LAYERS])


def trained_dims(spec: ArtifactSpec) -> tuple[int, ...] | None:
    """Return the dims that training visited at an artifact's depth, None when unknown."""
    stated = spec.provenance.get(TRAINED_DIMS)
    return None if stated is None else tuple(map(int, re.findall("[0-9]{1,7}", stated)))


def _space_id(
    spec: ArtifactSpec, weights_sha256: str, tokenizer_sha256: str, ranges: Ranges | None
) -> str:
    decides: dict[str, Any] = {
        "weights_sha256": weights_sha256,
        "ranges": ranges.sha256() if ranges else None,
        "tokenizer": tokenizer_sha256,
        **{name: getattr(spec, name) for name in _deciding_fields(spec)},
    }
    return f"m2d1-{sha256_of_json(decides)[:32]}"


def _deciding_fields(spec: ArtifactSpec) -> list[str]:
    """Return the fields that decide what an artifact's vectors mean, beside those of its files."""
    decides = {
        "layers": True,
        "dim": True,
        "weights": True,
        "isa": spec.weights == "int8" and spec.isa != "portable",  # other codes do not depend on it
        "fitted_to": spec.fitted_to is not None,
        "kept_sha256": spec.kept_sha256 is not None,
        "vectors": True,
        "codec": spec.vectors != "float32",
        "bit_order": spec.vectors in PER_BYTE,
        "pooling": True,
        "final_norm": True,
        "prompts": True,
        "default_prompt": True,
        "max_length": True,
    }
    return [name for name, does in decides.items() if does]


def spaces_of(spec: ArtifactSpec) -> tuple[str, ...]:
    """Return the spaces that an artifact's vectors are in: its own first."""
    return (spec.space_id, *([spec.speaks.space_id] if spec.speaks else []))


def require_same_space(
    first: ArtifactSpec, second: ArtifactSpec, first_name: object, second_name: object
) -> str:
    """Refuse to compare an index with queries of an encoder that does not speak its space.

    Args:
        first: the specification of the artifact that made the index.
        second: that of the encoder.
        first_name: what the message calls them, a path for instance.
        second_name: likewise.

    Returns:
        The index's space. What else its encoder speaks does not count: what is measured is small
        encoders' queries on the full model's documents, not the other way around.

    Raises:
        UsageError: when the encoder does not speak it, naming both and the parts that differ.
    """
    codes = [(each.dim, each.vectors, each.bit_order) for each in (first, second)]
    if first.space_id in spaces_of(second) and codes[0] == codes[1]:
        return first.space_id
    if second.speaks and codes[0] == codes[1]:
        raise UsageError(
            f"{first_name} (space {first.space_id}) and {second_name} must not be compared, since "
            f"that speaks {second.speaks.space_id} ({second.speaks.layers} layers in "
            f"{second.speaks.weights}) beside its own; build it with --index of the bundle that "
            f"wrote {first_name}."
        )
    names = dict.fromkeys([*_deciding_fields(first), *_deciding_fields(second)])
    pairs = {name: (getattr(first, name), getattr(second, name)) for name in names}
    parts = [f"{name} ({shown(a)}, {shown(b)})" for name, (a, b) in pairs.items() if a != b]
    # Other layers or dims are other weights, too, and other vectors have other ranges.
    if not parts:
        one_model = first.provenance.get("sub_model") == second.provenance.get("sub_model")
        ranges = " or ranges" if first.vectors in LEVELS else ""
        parts = [f"tokenizer{ranges}" if one_model else "the trained weights"]
    raise UsageError(
        f"{first_name} (space {first.space_id}) and {second_name} (space {second.space_id}) must "
        f"not be compared, since they differ in {', '.join(parts)}; encode both with one bundle."
    )
