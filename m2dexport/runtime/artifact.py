"""The artifact folder: what ``build`` makes, ``bundle`` packs and the runtime reads.

::

    model.onnx      int64 (batch, sequence) input_ids and attention_mask -> sentence_embedding;
                    model.xml and model.bin, the same as an OpenVINO IR, where that is the engine
    tokenizer.json  truncates at the model's maximum length, does not pad
    ranges.json     the frozen ranges, of int8 and int4 vectors alone
    artifact.json   the specification below
    LICENSE, ...    the licence files of the checkpoint, where it has any
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from m2dexport.engines import ENGINES, Device
from m2dexport.errors import UsageError
from m2dexport.precisions import BIT_ORDERS, ISAS, VECTOR_PRECISIONS, BitOrder, Isa, VectorPrecision
from m2dexport.vectors.codecs import LEVELS, PER_BYTE, Ranges, ranges_from_json, require_codec

FORMAT = 1
#: Engine -> the files of its graph, the one that names the others first.
GRAPH_FILES: Mapping[str, tuple[str, ...]] = {n: engine.files for n, engine in ENGINES.items()}
GRAPH = GRAPH_FILES["onnx"][0]
TOKENIZER = "tokenizer.json"
RANGES = "ranges.json"
SPEC = "artifact.json"

#: The fields of a specification that decide what its vectors mean, beside weights and tokenizer.
_DECIDING = (
    "layers",
    "dim",
    "weights",
    "isa",
    "fitted_to",
    "kept_sha256",
    "vectors",
    "codec",
    "bit_order",
    "pooling",
    "final_norm",
    "prompts",
    "default_prompt",
    "max_length",
)


@dataclass(frozen=True)
class ArtifactSpec:
    """Everything a runtime must know about an artifact beside its graph and tokenizer."""

    format: int
    engine: str  # a key of ENGINES
    device: Device  # that it was checked on, and runs on unless another is asked for
    layers: int
    dim: int
    weights: str  # a precision of ``weights``: fp32, int8, int4-weight-only, ...
    isa: Isa  # where its 8-bit products are exact at full speed (``weights.saturation``)
    vectors: VectorPrecision
    codec: int  # codecs.CODEC_VERSION when it was made
    bit_order: BitOrder  # of packed vectors; "big" for the others
    pooling: list[str]
    final_norm: str  # none, applied, skipped
    prompts: dict[str, str]
    default_prompt: str | None  # a name in prompts
    max_length: int  # tokens, specials included
    pad_id: int
    batch_invariant: bool  # False: run one text at a time
    trained: bool | None  # whether training visited this (layers, dim); None: unknown
    space_id: str
    parity: dict[str, float]  # measured against the torch original when it was built
    fitted_to: str | None  # sha256 of the texts that the weights were fitted to; None: to none
    kept_sha256: str | None  # of the weights that --max-drop kept in float32; None: of none
    clipping_rate: float | None  # share of held-out texts' values outside the ranges; None: none
    coverage: float  # share of the weight bytes that are stored below float32
    left_in_float32: list[str]  # names of the large weights that are not
    min_engine: str  # the oldest version of the engine that runs the graph, such as "1.17"
    provenance: dict[str, str]  # checkpoint and tool versions

    def to_json(self) -> str:
        """Return the text of artifact.json, keys sorted: the same spec is the same bytes."""
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def spec_from_json(text: str, where: object) -> ArtifactSpec:
    """Return the specification stored by ``ArtifactSpec.to_json``.

    Args:
        text: the content of artifact.json.
        where: its path, for messages.

    Raises:
        UsageError: when it is not one, or was written by a later version of the format.
    """
    try:
        stored: dict[str, Any] = json.loads(text)
        number = stored["format"]
        if number != FORMAT:
            raise UsageError(f"{where} has format {number}; this version reads format {FORMAT}.")
        values = {field.name: stored[field.name] for field in fields(ArtifactSpec)}
        spec = ArtifactSpec(**{**values, "device": Device(**values["device"])})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{where} is not an artifact specification: {error!r}.") from error
    require_codec(spec.codec, where)
    _check(spec, where)
    return spec


def _check(spec: ArtifactSpec, where: object) -> None:
    """Refuse values that would fail, or mislead, far from where they are stored."""
    known = (
        spec.engine in GRAPH_FILES
        and spec.vectors in VECTOR_PRECISIONS
        and spec.bit_order in BIT_ORDERS
        and spec.isa in ISAS
    )
    sizes = all(type(n) is int and n >= 1 for n in (spec.layers, spec.dim, spec.max_length))
    prompts = isinstance(spec.prompts, dict) and all(
        isinstance(prompt, str) for prompt in spec.prompts.values()
    )
    flags = isinstance(spec.batch_invariant, bool) and type(spec.pad_id) is int
    device = (
        isinstance(spec.device.provider, str | None)
        and isinstance(spec.device.threads, int | None)
        and isinstance(spec.device.spin, bool)
        and spec.device.cache is None
    )
    oldest = re.fullmatch(r"\d+(\.\d+)*", str(spec.min_engine))
    if not (known and sizes and prompts and flags and device and oldest):
        raise UsageError(
            f"{where} holds values that this version does not know: engine {spec.engine!r}, "
            f"isa {spec.isa!r}, vectors {spec.vectors!r}, bit_order {spec.bit_order!r}, layers "
            f"{spec.layers!r}, dim {spec.dim!r}, max_length {spec.max_length!r}, pad_id "
            f"{spec.pad_id!r}, min_engine {spec.min_engine!r}, device {spec.device!r} or a prompt."
        )
    if spec.default_prompt is not None and spec.default_prompt not in spec.prompts:
        raise UsageError(f"{where} has a default prompt {spec.default_prompt!r} without its text.")


def read_spec(folder: Path) -> ArtifactSpec:
    """Return the specification of an artifact folder.

    Raises:
        UsageError: when the folder is no artifact.
    """
    path = folder / SPEC
    if not path.is_file():
        raise UsageError(f"{folder} is not an artifact: it has no {SPEC}; build makes one.")
    return spec_from_json(path.read_text(encoding="utf-8"), path)


def read_ranges(folder: Path) -> Ranges | None:
    """Return the ranges of an artifact folder, None when its vectors need none."""
    path = folder / RANGES
    return ranges_from_json(path.read_text(encoding="utf-8")) if path.exists() else None


def space_id_of(
    *,
    weights_sha256: str,
    layers: int,
    dim: int,
    weights: str,
    isa: Isa,
    fitted_to: str | None,
    kept_sha256: str | None,
    vectors: VectorPrecision,
    codec: int,
    bit_order: BitOrder,
    ranges: Ranges | None,
    pooling: list[str],
    final_norm: str,
    prompts: Mapping[str, str],
    default_prompt: str | None,
    tokenizer_json: str,
    max_length: int,
) -> str:
    """Return the identity of a vector space: vectors of two different ids must not be compared.

    It is a hash of everything that decides a vector's meaning, by content and not by name: a
    renamed checkpoint keeps its id, a changed prompt or range does not.
    """
    decides: dict[str, Any] = {
        "weights_sha256": weights_sha256,
        "layers": layers,
        "dim": dim,
        "weights": weights,
        "vectors": vectors,
        "ranges": ranges.sha256() if ranges else None,
        "pooling": pooling,
        "final_norm": final_norm,
        "prompts": dict(prompts),
        "default_prompt": default_prompt,
        "tokenizer": _sha256(json.loads(tokenizer_json)),
        "max_length": max_length,
    }
    if weights == "int8" and isa != "portable":  # the others' codes do not depend on it
        decides["isa"] = isa
    if fitted_to is not None:
        decides["fitted_to"] = fitted_to
    if kept_sha256 is not None:
        decides["kept_sha256"] = kept_sha256
    if vectors != "float32":
        decides["codec"] = codec
    if vectors in PER_BYTE:
        decides["bit_order"] = bit_order
    return f"m2d1-{_sha256(decides)[:32]}"


def space_id_of_artifact(spec: ArtifactSpec, ranges: Ranges | None, tokenizer_json: str) -> str:
    """Return the space_id that an artifact ought to carry, from what it holds.

    Args:
        spec: its specification, whose own ``space_id`` is not looked at.
        ranges: its ranges, None for a precision without.
        tokenizer_json: the content of its tokenizer.json.

    Raises:
        UsageError: when the specification does not tell the hash of its weights.
    """
    if "sub_model" not in spec.provenance:
        raise UsageError(f"{SPEC} does not tell the hash of its weights (provenance.sub_model).")
    return space_id_of(
        weights_sha256=spec.provenance["sub_model"],
        layers=spec.layers,
        dim=spec.dim,
        weights=spec.weights,
        isa=spec.isa,
        fitted_to=spec.fitted_to,
        kept_sha256=spec.kept_sha256,
        vectors=spec.vectors,
        codec=spec.codec,
        bit_order=spec.bit_order,
        ranges=ranges,
        pooling=spec.pooling,
        final_norm=spec.final_norm,
        prompts=spec.prompts,
        default_prompt=spec.default_prompt,
        tokenizer_json=tokenizer_json,
        max_length=spec.max_length,
    )


def require_same_space(
    first: ArtifactSpec, second: ArtifactSpec, first_name: object, second_name: object
) -> None:
    """Refuse to compare vectors of two spaces, such as an index and the bundle that queries it.

    Args:
        first: the specification of the artifact that made the first vectors.
        second: likewise.
        first_name: what the message calls them, a path for instance.
        second_name: likewise.

    Raises:
        UsageError: when they differ, naming both and the parts that differ.
    """
    if first.space_id == second.space_id:
        return
    pairs = {name: (getattr(first, name), getattr(second, name)) for name in _DECIDING}
    parts = [f"{name} ({a!r}, {b!r})" for name, (a, b) in pairs.items() if a != b]
    # Other layers or dims are other weights, too, and other vectors have other ranges.
    if not parts:
        one_model = first.provenance.get("sub_model") == second.provenance.get("sub_model")
        ranges = " or ranges" if first.vectors in LEVELS else ""
        parts = [f"tokenizer{ranges}" if one_model else "the trained weights"]
    raise UsageError(
        f"{first_name} (space {first.space_id}) and {second_name} (space {second.space_id}) must "
        f"not be compared, since they differ in {', '.join(parts)}; encode both with one bundle."
    )


def _sha256(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
