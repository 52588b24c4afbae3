"""Checkpoint -> artifact folder, compared with the torch original before it is handed over."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx_ir as ir
import tokenizers
from numpy.typing import NDArray

from m2dexport import __version__
from m2dexport.build.mixed import Mixture, close_gap, mix_precision
from m2dexport.build.parity import (
    PROBES,
    Parity,
    embed_probes,
    measure_parity,
    require_batch_invariance,
    require_parity,
)
from m2dexport.build.recipe import Recipe, require_recipe
from m2dexport.checkpoint.open import Checkpoint, weights_sha256
from m2dexport.checkpoint.tokenizer import load_tokenizer
from m2dexport.data import texts_sha256
from m2dexport.engines import engine_module, engine_version
from m2dexport.errors import M2DError, ParityError, UsageError
from m2dexport.files import atomic_folder, license_files, require_new
from m2dexport.graph.vector import (
    coded_graph,
    depth_graph,
    full_width,
    serialize_graph,
    vector_graph,
)
from m2dexport.precisions import VectorPrecision, WeightPrecision
from m2dexport.progress import OnProgress
from m2dexport.quantize import CALIBRATED, ENGINE_PRECISIONS, CalibrationTokens, quantize_weights
from m2dexport.quantize.coverage import Coverage, coverage
from m2dexport.quantize.saturation import isa_of
from m2dexport.quantize.units import sha256_of_weights
from m2dexport.runtime.artifact import (
    FORMAT,
    GRAPH,
    GRAPH_FILES,
    RANGES,
    SPEC,
    TOKENIZER,
    ArtifactSpec,
    read_spec,
    space_id_of_artifact,
)
from m2dexport.runtime.encoder import Encoder
from m2dexport.runtime.encoder import load_tokenizer as read_tokenizer
from m2dexport.slice.slicing import slice_checkpoint
from m2dexport.vectors import codecs
from m2dexport.vectors.codecs import CODEC_VERSION, LEVELS, Ranges

_BATCH = 32
_NAMED = 3  # weights in a message
#: Codes of the graph and of the numpy codec differ where a float32 sum falls on a code's border.
_MIN_EQUAL_CODES = 0.999


@dataclass(frozen=True)
class Artifact:
    """A finished artifact folder."""

    path: Path
    spec: ArtifactSpec
    size_bytes: int  # of all files together
    mixture: Mixture | None  # where some weights had to stay in float32, or a limit was given


def build_artifact(
    checkpoint: Checkpoint,
    layers: int,
    dim: int,
    out: Path,
    recipe: Recipe = Recipe(),
    *,
    engine: str = "onnx",
    on_progress: OnProgress = lambda *_: None,
) -> Artifact:
    """Slice, export, quantize and check; write the folder only if it reproduces the original.

    Args:
        checkpoint: the 2D checkpoint or a sub-model.
        layers: depth to keep, 1 to N.
        dim: leading width to keep.
        out: the folder to write; it must not exist.
        recipe: how to quantize it, and what it must then fulfil.
        engine: "onnx" or "openvino".
        on_progress: told about the search for the weights that stay in float32.

    Raises:
        UsageError: when a value is out of range or ``out`` exists.
        CheckpointError: when the architecture cannot be exported.
        ParityError: when the artifact does not reproduce the torch original, or a text's vector
            depends on its batch; ``out`` is not made.
        M2DError: when too little of the weights could be quantized, or the limit, or int8's floor
            of fidelity, is not kept whatever stays in float32.
        MissingExtra: when the engine is not installed.
    """
    from m2dexport.graph.export import graph_from_checkpoint
    from m2dexport.graph.fuse import fuse_for_engine
    from m2dexport.reference.pooler import Reference

    require_new(out)
    require_recipe(recipe, engine)
    with tempfile.TemporaryDirectory(prefix="m2dexport-") as scratch:
        sub_model = slice_checkpoint(checkpoint, layers, dim, Path(scratch) / "sub-model")
        all_depths = graph_from_checkpoint(sub_model, (layers,))
        fuse_for_engine(all_depths, engine)
        graph = vector_graph(depth_graph(all_depths, layers), dim)
        prompt = default_prompt(sub_model)
        reference = Reference(sub_model, (layers,)).encode(PROBES, prompt=prompt)[layers]
        tokenizer_json = tokenizer_of(sub_model)
        spec = _first_spec(checkpoint, sub_model, engine, tokenizer_json)
    expected = codecs.truncate(reference, dim)
    source = _Source(graph, spec, tokenizer_json, expected, checkpoint.licenses)
    return _finish(source, out, recipe, on_progress)


def quantize_artifact(
    artifact: Path,
    out: Path,
    recipe: Recipe,
    *,
    on_progress: OnProgress = lambda *_: None,
) -> Artifact:
    """Write an artifact in other precisions, from one in fp32 weights and float32 vectors.

    Args:
        artifact: an artifact folder of fp32 weights and float32 vectors, as ``build`` makes it.
        out: the folder to write; it must not exist.
        recipe: how to quantize it, and what it must then fulfil.
        on_progress: told about the search for the weights that stay in float32.

    Raises:
        UsageError: when the artifact is already quantized, a value is wrong, or ``out`` exists.
        ParityError: when the result does not reproduce the artifact, or a text's vector depends
            on its batch; ``out`` is not made.
        M2DError: when too little of the weights could be quantized, or the limit, or int8's floor
            of fidelity, is not kept whatever stays in float32.
    """
    require_new(out)
    spec = read_spec(artifact)
    require_recipe(recipe, spec.engine)
    if (spec.weights, spec.vectors) != ("fp32", "float32"):
        raise UsageError(
            f"{artifact} is already quantized (weights={spec.weights}, vectors={spec.vectors}); "
            "start from one built with fp32 weights and float32 vectors."
        )
    if spec.engine != "onnx":
        raise UsageError(
            f"{artifact} was built for {spec.engine}, and quantize takes ONNX artifacts; build "
            f"with --engine {spec.engine} --weights {recipe.weights} --vectors {recipe.vectors} "
            "instead."
        )
    tokenizer_json = (artifact / TOKENIZER).read_text(encoding="utf-8")
    expected = Encoder(spec, tokenizer_json, artifact / GRAPH).encode(PROBES)
    graph = ir.load(artifact / GRAPH)
    source = _Source(graph, spec, tokenizer_json, expected, license_files(artifact))
    return _finish(source, out, recipe, on_progress)


def tokenizer_of(checkpoint: Checkpoint) -> str:
    """Return tokenizer.json of a sub-model, set to cut at its maximum length and never to pad."""
    path = checkpoint.path / TOKENIZER
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(checkpoint.max_length)
    tokenizer.no_padding()
    return str(tokenizer.to_str())


@dataclass(frozen=True)
class _Source:
    """A float graph, and what its artifact is to be judged by."""

    graph: ir.Model  # float32, one normalised output
    spec: ArtifactSpec
    tokenizer_json: str
    expected: NDArray[np.float32]  # (probes, dim) vectors of the original, normalised
    licenses: tuple[Path, ...]


def _finish(source: _Source, out: Path, recipe: Recipe, on_progress: OnProgress) -> Artifact:
    engine, weights, vectors = source.spec.engine, recipe.weights, recipe.vectors
    texts = recipe.texts()
    graph, mixture = _quantize(source, recipe, texts, on_progress)
    kept = mixture.kept if mixture else frozenset()
    _require_coverage(coverage(graph, weights, without=kept), recipe.min_coverage, out)
    measured = replace(
        source.spec,
        isa="vnni" if recipe.isa == "vnni" else isa_of(graph.graph),
        fitted_to=texts_sha256(texts) if weights in CALIBRATED[engine] else None,
        kept_sha256=sha256_of_weights(source.graph.graph, kept),
    )
    encoder = Encoder(measured, source.tokenizer_json, *graph_files(graph, engine))
    probes = encoder.tokenize(PROBES)
    embedded = embed_probes(encoder.run, probes, measured.pad_id, measured.max_length)
    parity = measure_parity(source.expected, embedded)
    require_parity(parity, weights, str(out))
    if weights != "fp32" and not recipe.allow_batch_dependent:
        require_batch_invariance(parity, str(out))
    batch = _BATCH if parity.batch_invariant else 1
    ranges = clipping_rate = None
    if vectors in LEVELS:
        floats = encoder.encode(texts, batch_size=batch)
        ranges = codecs.calibrate_ranges(floats)
        clipping_rate = codecs.held_out_clipping_rate(floats)
    coded = replace(measured, bit_order=recipe.bit_order, clipping_rate=clipping_rate)
    covered = coverage(graph, weights)
    spec = _final_spec(replace(source, spec=coded), weights, vectors, ranges, parity, covered)
    finished = graph_files(coded_graph(graph, vectors, ranges, recipe.bit_order), engine)
    expected = encoder.encode(PROBES, batch_size=batch)
    _require_equal_codes(expected, Encoder(spec, source.tokenizer_json, *finished), ranges, out)
    with atomic_folder(out) as folder:
        for name, content in zip(GRAPH_FILES[engine], finished, strict=True):
            (folder / name).write_bytes(content)
        (folder / TOKENIZER).write_text(source.tokenizer_json, encoding="utf-8")
        (folder / SPEC).write_text(spec.to_json(), encoding="utf-8")
        if ranges:
            (folder / RANGES).write_text(ranges.to_json(), encoding="utf-8")
        for path in source.licenses:
            shutil.copyfile(path, folder / path.name)
    return Artifact(out, spec, sum(path.stat().st_size for path in out.iterdir()), mixture)


def _quantize(
    source: _Source, recipe: Recipe, texts: Sequence[str], on_progress: OnProgress
) -> tuple[ir.Model, Mixture | None]:
    """Return the quantized graph, and what was decided where some weights stay in float32."""
    engine, weights = source.spec.engine, recipe.weights
    tokens = _tokenized(source, texts)
    graph = quantize_weights(source.graph, weights, tokens, engine=engine, isa=recipe.isa)
    # The final specification says what was measured; until then, what is known of the precision.
    spec = replace(source.spec, batch_invariant=weights != "int8-dynamic")

    def load(model: ir.Model) -> Encoder:
        needs = replace(spec, isa=isa_of(model.graph))
        return Encoder(needs, source.tokenizer_json, *graph_files(model, engine))

    if recipe.limit is not None:
        return mix_precision(source.graph, graph, load, texts, recipe.limit, on_progress)
    if weights != "int8":
        return graph, None

    def encode(model: ir.Model, texts: Sequence[str]) -> NDArray[np.float32]:
        return load(full_width(model)).encode(texts)

    return close_gap(source.graph, graph, encode, texts, on_progress)


def graph_files(graph: ir.Model, engine: str) -> tuple[bytes, ...]:
    """Return the content of the engine's files of a graph, in the order of ``GRAPH_FILES``."""
    files: tuple[bytes, ...] = engine_module(engine).files_from_onnx(serialize_graph(graph))
    return files


def _tokenized(source: _Source, texts: Sequence[str]) -> CalibrationTokens:
    prompts, name = source.spec.prompts, source.spec.default_prompt
    prompt = prompts[name] if name else ""
    encodings = read_tokenizer(source.tokenizer_json).encode_batch([prompt + t for t in texts])
    return CalibrationTokens([encoding.ids for encoding in encodings], source.spec.pad_id)


def _require_coverage(covered: Coverage, least: float, out: Path) -> None:
    if covered.share >= least:
        return
    named = ", ".join(covered.left[:_NAMED]) or "weights of fewer than 4096 values"
    more = f" and {len(covered.left) - _NAMED} more" if len(covered.left) > _NAMED else ""
    raise M2DError(
        f"{out}: {covered.share:.1%} of the weight bytes were quantized where {least:.0%} are "
        f"needed; left in float32: {named}{more}; a lower --min-coverage accepts that."
    )


def _require_equal_codes(
    floats: NDArray[np.float32], coded: Encoder, ranges: Ranges | None, out: Path
) -> None:
    """Refuse a graph whose codes are not those of the numpy codec on the probes' vectors."""
    spec = coded.spec
    expected = codecs.encode_vectors(floats, spec.vectors, ranges, spec.bit_order)
    equal = float(np.mean(coded.encode(PROBES) == expected))
    if equal < _MIN_EQUAL_CODES:
        raise ParityError(
            f"{out}: the graph's {spec.vectors} codes agree with the codec in {equal:.2%} of "
            f"values where {_MIN_EQUAL_CODES:.1%} are needed; nothing was written."
        )


def _first_spec(
    checkpoint: Checkpoint, sub_model: Checkpoint, engine: str, tokenizer_json: str
) -> ArtifactSpec:
    """Return the specification of the fp32 float32 artifact, with parity still to be measured."""
    trained = checkpoint.trained
    return ArtifactSpec(
        format=FORMAT,
        engine=engine,
        layers=sub_model.layers,
        dim=sub_model.dim,
        weights="fp32",
        isa="portable",
        vectors="float32",
        codec=CODEC_VERSION,
        bit_order="big",
        pooling=list(sub_model.pooling.modes),
        final_norm=sub_model.final_norm,
        prompts=dict(sub_model.prompts),
        default_prompt=sub_model.default_prompt,
        max_length=sub_model.max_length,
        pad_id=pad_id(sub_model),
        batch_invariant=True,
        trained=None if trained is None else (sub_model.layers, sub_model.dim) in trained,
        space_id="",
        parity={},
        fitted_to=None,
        kept_sha256=None,
        clipping_rate=None,
        coverage=1.0,
        left_in_float32=[],
        min_engine=ENGINE_PRECISIONS[engine]["fp32"],
        provenance={
            "checkpoint": weights_sha256(checkpoint),
            "sub_model": weights_sha256(sub_model),
            **tool_versions(engine),
        },
    )


def _final_spec(
    source: _Source,
    weights: WeightPrecision,
    vectors: VectorPrecision,
    ranges: Ranges | None,
    parity: Parity,
    covered: Coverage,
) -> ArtifactSpec:
    spec = source.spec
    made_by = {"nncf": version("nncf")} if weights == "int8-static" else {}
    final = replace(
        spec,
        weights=weights,
        vectors=vectors,
        batch_invariant=parity.batch_invariant,
        parity={name: float(value) for name, value in asdict(parity).items()},
        coverage=covered.share,
        left_in_float32=list(covered.left),
        min_engine=ENGINE_PRECISIONS[spec.engine][weights],
        provenance={**spec.provenance, **made_by},
    )
    return replace(final, space_id=space_id_of_artifact(final, ranges, source.tokenizer_json))


def tool_versions(engine: str = "onnx") -> dict[str, str]:
    """Return the versions of what decides an artifact's content."""
    import torch
    import transformers

    package, installed = engine_version(engine)
    return {
        "m2dexport": __version__,
        package: installed,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def default_prompt(checkpoint: Checkpoint) -> str:
    """Return the text that goes before every text when no prompt is named."""
    return checkpoint.prompts[checkpoint.default_prompt] if checkpoint.default_prompt else ""


def pad_id(checkpoint: Checkpoint) -> int:
    """Return the id that fills a batch; masked, so that 0 serves a tokenizer that has none."""
    return int(load_tokenizer(checkpoint.path).pad_token_id or 0)
