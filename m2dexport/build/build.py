"""Checkpoint -> artifact folder, compared with the torch original before it is handed over."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from m2dexport.build.mixed import Mixture, close_gap, encoded, mix_precision
from m2dexport.build.parity import (
    PROBES,
    Embedded,
    Parity,
    embed_probes,
    measure_parity,
    require_batch_invariance,
    require_parity,
)
from m2dexport.build.recipe import Recipe, require_recipe
from m2dexport.build.source import Original, export_source, original_of
from m2dexport.checkpoint.open import Checkpoint
from m2dexport.data import texts_sha256
from m2dexport.engines import ENGINES, Compilation, engine_maker
from m2dexport.errors import ParityError, UsageError
from m2dexport.files import SPEC, atomic_folder, license_files, require_folder
from m2dexport.graph.last_layer import restore_last_layer
from m2dexport.graph.vector import MAP, coded_graph, full_width
from m2dexport.precisions import Isa
from m2dexport.progress import OnProgress
from m2dexport.quantize.activations import CalibrationTokens
from m2dexport.quantize.coverage import coverage, require_coverage
from m2dexport.quantize.recipes import Requirement
from m2dexport.quantize.saturation import isa_of
from m2dexport.quantize.units import sha256_of_weights
from m2dexport.runtime.artifact import (
    RANGES,
    TOKENIZER,
    ArtifactSpec,
    read_file,
    read_spec,
    settings_in,
    space_id_of_artifact,
)
from m2dexport.runtime.encoder import Encoder
from m2dexport.runtime.file_list import write_file_list
from m2dexport.runtime.index import require_no_ranges, require_ranges_of, spoken_space
from m2dexport.runtime.tokenizer import tokenize
from m2dexport.vectors import codecs
from m2dexport.vectors.codecs import LEVELS, Ranges

_BATCH = 32
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
    out: str | Path,
    recipe: Recipe = Recipe(),
    on_progress: OnProgress = lambda *_: None,
    *,
    force: bool = False,
) -> Artifact:
    """Slice, export, quantize and check; write the folder only if it reproduces the original.

    Args:
        checkpoint: the 2D checkpoint or a sub-model.
        layers: depth to keep, 1 to N.
        dim: leading width to keep.
        out: the folder to write.
        recipe: engine, device and precisions, and what the result must fulfil.
        on_progress: called during the search for the weights that stay in float32.
        force: whether an artifact at ``out`` is replaced.

    Raises:
        UsageError: when a value is out of range or ``out`` may not be written.
        CheckpointError: when the architecture cannot be exported.
        ParityError: when the artifact does not reproduce the torch original, or a text's vector
            depends on its batch; ``out`` is not made.
        M2DError: when too little of the weights could be quantized, or the limit, or int8's floor
            of fidelity, is not kept whatever stays in float32.
        MissingExtra: when the engine is not installed.
    """
    out = Path(out)
    require_folder(out, force=force)
    require_recipe(recipe)
    speaks = checkpoint.speaks and dim == checkpoint.dim
    if speaks and recipe.index is None:  # said again later, but before the work
        require_no_ranges(recipe.vectors)
    source = export_source(checkpoint, (layers,), dim, recipe.engine)
    trained = None if checkpoint.trained is None else (layers, dim) in checkpoint.trained
    original = original_of(source, checkpoint.licenses, trained)
    return make_artifact(original, out, recipe, on_progress, force=force)


def quantize_artifact(
    artifact: str | Path,
    out: str | Path,
    recipe: Recipe,
    on_progress: OnProgress = lambda *_: None,
    *,
    force: bool = False,
) -> Artifact:
    """Write an artifact in other precisions, from one in fp32 weights and float32 vectors.

    Args:
        artifact: an artifact folder of fp32 weights and float32 vectors, as ``build`` makes it.
        out: the folder to write.
        recipe: how to quantize it, and what it must then fulfil.
        on_progress: called during the search for the weights that stay in float32.
        force: whether an artifact at ``out`` is replaced.

    Raises:
        UsageError: when the artifact is already quantized, a value is wrong, or ``out`` may not be
            written.
        ParityError: when the result does not reproduce the artifact, or a text's vector depends
            on its batch; ``out`` is not made.
        M2DError: when too little of the weights could be quantized, or the limit, or int8's floor
            of fidelity, is not kept whatever stays in float32.
    """
    artifact, out = Path(artifact), Path(out)
    require_folder(out, force=force)
    spec = read_spec(artifact)
    recipe = replace(recipe, engine=spec.engine, device=recipe.device.or_else(spec.device))
    require_recipe(recipe)
    if (spec.weights, spec.vectors) != ("fp32", "float32"):
        raise UsageError(
            f"{artifact} is already quantized (weights={spec.weights}, vectors={spec.vectors}); "
            "start from one built with fp32 weights and float32 vectors."
        )
    if ENGINES[spec.engine].format != "onnx" or ENGINES[spec.engine].on_gpu:
        raise UsageError(
            f"{artifact} was built for {spec.engine}, and quantize takes those for onnx; build "
            f"with --engine {spec.engine} --weights {recipe.weights} --vectors {recipe.vectors} "
            "instead."
        )
    tokenizer_json = read_file(artifact, TOKENIZER).decode()
    (graph,) = (artifact / name for name in ENGINES[spec.engine].files)
    encoder = Encoder(spec, tokenizer_json, {graph.name: graph}, recipe.checked_on(threads=1))
    expected = encoder.encode(PROBES)
    model = ir.load(graph)
    restore_last_layer(model)
    settings, licenses = settings_in(artifact), license_files(artifact)
    original = Original(model, spec, tokenizer_json, settings, expected, licenses)
    return make_artifact(original, out, recipe, on_progress, force=force)


@dataclass(frozen=True)
class _Quantized:
    """A graph in its final weights, float32 vectors out, not yet compared with anything."""

    graph: ir.Model
    spec: ArtifactSpec
    mixture: Mixture | None


@dataclass(frozen=True)
class _Checked:
    """The same, compared with the original: it may be handed over."""

    graph: ir.Model
    spec: ArtifactSpec
    encoder: Encoder
    probes: NDArray[np.float32]  # (probes, dim), its vectors of ``PROBES``
    batch_size: int  # of the texts that it may run together


def make_artifact(
    original: Original,
    out: Path,
    recipe: Recipe,
    on_progress: OnProgress = lambda *_: None,
    *,
    force: bool = False,
) -> Artifact:
    """Quantize and check what was exported; write the folder only if it reproduces the original.

    Args:
        original: the float32 artifact, as ``source.original_of`` makes it.
        out: the folder to write.
        recipe: engine, device and precisions, and what the result must fulfil.
        on_progress: called during the search for the weights that stay in float32.
        force: whether an artifact at ``out`` is replaced.

    Raises:
        M2DError: as ``build_artifact`` does, except for what concerns the export.
    """
    _spoken(original.spec, recipe, original.tokenizer_json)  # refused before the work
    texts = recipe.texts()
    quantized = _quantize(original, recipe, texts, out, on_progress)
    checked = _check(original, quantized, recipe, out)
    ranges, spec = _calibrate(checked, recipe, texts, original.tokenizer_json)
    files = _encode(checked, spec, ranges, original, recipe, out)
    contents = {
        **files,
        **original.settings,
        TOKENIZER: original.tokenizer_json.encode(),
        SPEC: spec.to_json().encode(),
        **({RANGES: ranges.to_json().encode()} if ranges else {}),
    }
    with atomic_folder(out, force=force) as folder:
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        for path in original.licenses:
            shutil.copyfile(path, folder / path.name)
        write_file_list(folder)
    size = sum(path.stat().st_size for path in out.iterdir())
    return Artifact(out, spec, size, quantized.mixture)


def _quantize(
    original: Original, recipe: Recipe, texts: Sequence[str], out: Path, on_progress: OnProgress
) -> _Quantized:
    """Quantize the weights, and put back into float32 what has to stay there."""
    weights, exported = recipe.weights, original.graph
    maker = engine_maker(recipe.engine)
    graph = maker.quantize(exported, weights, _tokenized(original, texts), recipe.isa)
    requirement: Requirement = maker.PRECISIONS[weights]
    # The final specification says what was measured; until then, what is known of the precision.
    spec = replace(original.spec, batch_invariant=not requirement.batch_dependent)

    def load(model: ir.Model) -> Encoder:
        width = int(model.graph.outputs[0].shape[1])  # type: ignore[index, arg-type]
        needs = replace(spec, dim=width, isa=_isa(recipe, model))
        return _loaded(needs, original, model, recipe)

    mixture: Mixture | None = None
    if recipe.limit is not None:
        graph, mixture = mix_precision(exported, graph, load, texts, recipe.limit, on_progress)
    elif requirement.faithful:
        graph, mixture = close_gap(
            exported,
            graph,
            lambda model, some, workers: encoded(load(full_width(model)), some, workers),
            texts,
            on_progress,
        )
    kept = mixture.kept if mixture else frozenset()
    covered = coverage(graph, weights, kept | {MAP})
    require_coverage(covered, recipe.min_coverage, str(out))
    spec = replace(
        original.spec,
        device=replace(recipe.device, cache=None),
        weights=weights,
        isa=_isa(recipe, graph),
        fitted_to=texts_sha256(texts) if requirement.calibrated else None,
        kept_sha256=sha256_of_weights(exported.graph, kept),
        coverage=covered.share,
        left_in_float32=list(covered.left),
        min_engine=requirement.oldest,
        provenance={
            **original.spec.provenance,
            **{package: version(package) for package in requirement.made_by},
        },
    )
    return _Quantized(graph, spec, mixture)


def _isa(recipe: Recipe, graph: ir.Model) -> Isa:
    """Return the processors whose 8-bit products are exact; a GPU's are."""
    if ENGINES[recipe.engine].on_gpu:
        return "portable"
    return "vnni" if recipe.isa == "vnni" else isa_of(graph.graph)


def _check(original: Original, quantized: _Quantized, recipe: Recipe, out: Path) -> _Checked:
    """Compare the quantized graph with the original, and with itself in other batches."""
    spec = quantized.spec
    encoder = _loaded(spec, original, quantized.graph, recipe)
    ids = encoder.tokenize(PROBES)
    embedded: Embedded = embed_probes(encoder.run, ids, spec.pad_id, spec.max_length)
    parity: Parity = measure_parity(original.expected, embedded)
    floor = engine_maker(recipe.engine).PRECISIONS[recipe.weights].floor
    require_parity(parity, floor, str(out))
    if recipe.weights != "fp32" and not recipe.allow_batch_dependent:
        require_batch_invariance(parity, str(out))
    invariant = parity.batch_invariant
    spec = replace(
        spec,
        batch_invariant=invariant,
        checked_by=encoder.describe()["engine"],
        # More digits differ between processors, and say nothing.
        parity={name: float(f"{value:.6g}") for name, value in asdict(parity).items()},
    )
    probes = embedded.batched if invariant else embedded.alone
    return _Checked(quantized.graph, spec, encoder, probes, _BATCH if invariant else 1)


def _calibrate(
    checked: _Checked, recipe: Recipe, texts: Sequence[str], tokenizer_json: str
) -> tuple[Ranges | None, ArtifactSpec]:
    """Freeze the ranges of the vectors; return them and the final specification."""
    spec = _spoken(checked.spec, recipe, tokenizer_json)
    ranges = recipe.index.ranges if recipe.index else None
    if recipe.vectors in LEVELS:
        floats = checked.encoder.encode(texts, batch_size=checked.batch_size)
        if ranges is None:
            ranges = codecs.calibrate_ranges(floats)
            rate = codecs.held_out_clipping_rate(floats)
        else:
            rate = codecs.clipping_rate(floats, ranges)
        spec = replace(spec, clipping_rate=rate)
    return ranges, replace(spec, space_id=space_id_of_artifact(spec, ranges, tokenizer_json))


def _spoken(spec: ArtifactSpec, recipe: Recipe, tokenizer_json: str) -> ArtifactSpec:
    """Return the specification with its codes, and with the space that they speak.

    Raises:
        UsageError: when they are not those of the recipe's index, or need one and it has none.
    """
    spec = replace(spec, vectors=recipe.vectors, bit_order=recipe.bit_order)
    require_ranges_of(spec, recipe.index)
    spoken = spoken_space(spec, recipe.index, tokenizer_json)
    if spoken is not None:
        spoken = replace(spoken, measured=recipe.losses.get(spoken.weights, {}))
    return replace(spec, speaks=spoken)


def _encode(
    checked: _Checked,
    spec: ArtifactSpec,
    ranges: Ranges | None,
    original: Original,
    recipe: Recipe,
    out: Path,
) -> dict[str, bytes]:
    """Return the engine's files of the graph that puts out codes, compared with the numpy codec.

    Raises:
        ParityError: when the graph's codes of the probes are others than the codec's.
    """
    maker = engine_maker(spec.engine)
    coded = checked.graph
    if ENGINES[spec.engine].encodes:
        coded = coded_graph(coded, spec.vectors, ranges, spec.bit_order)
    compilation = _compilation(spec, recipe)
    files: dict[str, bytes] = maker.files(coded, compilation)
    if ENGINES[spec.engine].on_gpu:
        files = maker.compiled(files, compilation)
    if spec.vectors == "float32":
        return files
    expected = codecs.encode_vectors(checked.probes, spec.vectors, ranges, spec.bit_order)
    device = recipe.checked_on(threads=1)
    encoder = Encoder(spec, original.tokenizer_json, files, device, ranges)
    found = encoder.encode(PROBES, batch_size=checked.batch_size)
    equal = float(np.mean(found == expected))
    if equal < _MIN_EQUAL_CODES:
        raise ParityError(
            f"{out}: the graph's {spec.vectors} codes agree with the codec in {equal:.2%} of "
            f"values where {_MIN_EQUAL_CODES:.1%} are needed; nothing was written."
        )
    return files


def _loaded(spec: ArtifactSpec, original: Original, model: ir.Model, recipe: Recipe) -> Encoder:
    """Make a graph ready to run on the recipe's device, in one thread.

    The order of sums depends on the number of threads, and what is decided and recorded here must
    not depend on how many cores there are.
    """
    files = engine_maker(recipe.engine).files(model, _compilation(spec, recipe))
    device = recipe.checked_on(threads=1)
    return Encoder(spec, original.tokenizer_json, files, device, tokenizer=original.tokenizer)


def _compilation(spec: ArtifactSpec, recipe: Recipe) -> Compilation:
    return replace(recipe.compilation, max_length=spec.max_length)


def _tokenized(original: Original, texts: Sequence[str]) -> CalibrationTokens:
    prompts, name = original.spec.prompts, original.spec.default_prompt
    prompt = prompts[name] if name else ""
    tokens = tokenize(original.tokenizer, texts, prompt)
    return CalibrationTokens([each.ids for each in tokens], original.spec.pad_id)
