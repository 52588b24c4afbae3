"""One exported original: what a checkpoint gives, made once, for build, sweep and bundle alike."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from tokenizers import Tokenizer

from m2dexport import __version__
from m2dexport.build.parity import PROBES
from m2dexport.checkpoint.alignment import LinearMap, read_map
from m2dexport.checkpoint.open import Checkpoint
from m2dexport.checkpoint.static import TABLE, read_table
from m2dexport.checkpoint.tokenizer import open_tokenizer, sealed_tokenizer_json
from m2dexport.cores import one_torch_thread
from m2dexport.engines import DEFAULT_ENGINE, ENGINES, Device, engine_maker, engine_version
from m2dexport.errors import UsageError
from m2dexport.files import MODEL_SETTINGS, scratch_folder
from m2dexport.graph.vector import aligned_graph, depth_graph, vector_graph
from m2dexport.runtime.artifact import (
    FORMAT,
    FULL_LAYERS,
    FULL_MODEL,
    FULL_NORM,
    FULL_POOLING,
    FULL_TOKENIZER,
    TRAINED_DIMS,
    UNTRAINED,
    ArtifactSpec,
)
from m2dexport.runtime.tokenizer import load_tokenizer
from m2dexport.slice.slicing import slice_checkpoint
from m2dexport.strict import is_name
from m2dexport.vectors import codecs

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Source:
    """A checkpoint's exported graph, and what everything that is made of it is compared with."""

    checkpoint: Checkpoint  # the sub-model that was exported; its folder is gone
    sha256: str  # of the weights that it was cut from
    sub_model_sha256: str  # of its own
    engine: str  # whose operators the graph has
    graph: ir.Model  # float32, one output per depth, neither cut nor normalised
    tokenizer_json: str
    settings: Mapping[str, bytes]  # the sub-model's, name to content; of depth 0, none
    pad_id: int
    alignment: LinearMap | None  # of an aligned sub-model, which has one depth
    probes: Mapping[int, Floats]  # depth -> the torch original's vectors of ``PROBES``, likewise

    @property
    def prompt(self) -> str:
        """The text that goes before every text when no prompt is named."""
        name = self.checkpoint.default_prompt
        return self.checkpoint.prompts[name] if name else ""

    def at_depths(self, depths: Collection[int]) -> Source:
        """Return the source of some of its depths, whose graph computes nothing above them."""
        probes = {depth: vectors for depth, vectors in self.probes.items() if depth in depths}
        return replace(self, graph=depth_graph(self.graph, *depths), probes=probes)

    def vectors_at(self, depth: int, graph: ir.Model | None = None) -> ir.Model:
        """Return a copy of a graph that puts out the normalised vectors of one depth.

        Args:
            depth: one of the depths that were exported.
            graph: the exported graph in other weights; None takes the float32 one.
        """
        model = depth_graph(graph or self.graph, depth)
        if self.alignment is not None:
            model = aligned_graph(model, self.alignment)
        return vector_graph(model, self.checkpoint.dim)


@dataclass(frozen=True)
class Original:
    """A float32 artifact that is still to be quantized, and what the result is judged by."""

    graph: ir.Model  # float32, one normalised output
    spec: ArtifactSpec  # of the fp32, float32 artifact; its parity is still to be measured
    tokenizer_json: str
    settings: Mapping[str, bytes]  # the sub-model's, name to content
    expected: Floats  # (probes, dim) vectors of the original, normalised
    licenses: tuple[Path, ...]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What tokenizer.json holds; a large one takes a second to load."""
        return load_tokenizer(self.tokenizer_json)


def export_source(
    checkpoint: Checkpoint, depths: Sequence[int], dim: int, engine: str = DEFAULT_ENGINE
) -> Source:
    """Slice a checkpoint, export the slice and run the probes on it in torch.

    Args:
        checkpoint: the 2D checkpoint or a sub-model.
        depths: those to export; the slice is as deep as the deepest.
        dim: leading width to keep.
        engine: the engine that will run the graph.

    Raises:
        UsageError: when a value is out of range, the engine runs depth 0 only, or the vectors'
            norms have a meaning.
        CheckpointError: when the architecture cannot be exported.
        MissingExtra: when the engine is not installed.
    """
    return export_sources(checkpoint, depths, dim, (engine,))[engine]


def export_sources(
    checkpoint: Checkpoint, depths: Sequence[int], dim: int, engines: Sequence[str]
) -> dict[str, Source]:
    """Export a checkpoint once, for several engines; see ``export_source``.

    Returns:
        Engine -> the source with the graph that suits it.
    """
    if checkpoint.keeps_norms:
        raise UsageError(
            f"the vectors of {checkpoint.path} are compared by {checkpoint.similarity} and keep "
            "their norms, which an artifact's do not; make a sub-model of unit vectors by slice "
            "--normalize, and take that."
        )
    makers = {engine: engine_maker(engine) for engine in engines}
    for engine in engines:
        if ENGINES[engine].format == "table" and max(depths) > 0:  # refused before the export
            raise UsageError(f"the engine {engine} runs depth 0 only; choose another engine.")
    with scratch_folder() as scratch:
        sub_model = slice_checkpoint(checkpoint, max(depths), dim, scratch / "sub-model")
        plain = _graph(sub_model, depths)
        graphs = {engine: plain.clone() for engine in engines[1:]}
        graphs[engines[0]] = plain
        for engine, maker in makers.items():
            maker.fuse(graphs[engine])
        source = Source(
            checkpoint=sub_model,
            # An aligned sub-model was cut from the checkpoint that its neighbours are cut from.
            sha256=(checkpoint.speaks and checkpoint.sliced_from) or checkpoint.weights_sha256,
            sub_model_sha256=sub_model.weights_sha256,
            engine=engines[0],
            graph=plain,
            tokenizer_json=sealed_tokenizer_json(sub_model.path, sub_model.max_length),
            settings=_settings(sub_model),
            pad_id=_pad_id(sub_model),
            alignment=read_map(sub_model.alignment) if sub_model.alignment else None,
            probes={},
        )
        with one_torch_thread():
            probes = _probes(sub_model, depths, source.prompt)
    return {
        engine: replace(source, engine=engine, graph=graph, probes=probes)
        for engine, graph in graphs.items()
    }


def _graph(sub_model: Checkpoint, depths: Sequence[int]) -> ir.Model:
    from m2dexport.graph.export import graph_from_checkpoint
    from m2dexport.graph.static import static_graph

    if sub_model.layers == 0:
        return static_graph(read_table(sub_model.layout.outside[TABLE]))
    return graph_from_checkpoint(sub_model, depths)


def _settings(sub_model: Checkpoint) -> dict[str, bytes]:
    names = MODEL_SETTINGS if sub_model.layers > 0 else ()
    return {name: (sub_model.path / name).read_bytes() for name in names}


def _pad_id(sub_model: Checkpoint) -> int:
    if sub_model.layers == 0:
        return sub_model.vocab_size  # the row of zeros that ``static_graph`` adds
    return int(open_tokenizer(sub_model.path).pad_token_id or 0)  # masked: any id serves


def _probes(sub_model: Checkpoint, depths: Sequence[int], prompt: str) -> dict[int, Floats]:
    from m2dexport.reference.pooler import Reference
    from m2dexport.reference.static import StaticReference

    if sub_model.layers == 0:
        return StaticReference(sub_model).encode(PROBES, prompt=prompt)
    return Reference(sub_model, depths).encode(PROBES, prompt=prompt)


def original_of(source: Source, licenses: tuple[Path, ...], trained: bool | None) -> Original:
    """Return the float32 artifact of a source that was exported at one depth.

    Args:
        source: the exported sub-model.
        licenses: the licence files that go with its weights.
        trained: whether training visited this depth and dim; None: unknown.
    """
    sub_model = source.checkpoint
    spec = ArtifactSpec(
        format=FORMAT,
        engine=source.engine,
        device=Device(),
        layers=sub_model.layers,
        dim=sub_model.dim,
        weights="fp32",
        isa="portable",
        vectors="float32",
        codec=codecs.CODEC_VERSION,
        bit_order="big",
        pooling=list(sub_model.pooling.modes),
        similarity=sub_model.similarity,
        final_norm=sub_model.final_norm,
        prompts=dict(sub_model.prompts),
        default_prompt=sub_model.default_prompt,
        max_length=sub_model.max_length,
        pad_id=source.pad_id,
        batch_invariant=True,
        trained=trained,
        space_id="",
        speaks=None,
        parity={},
        checked_by=source.engine,
        fitted_to=None,
        kept_sha256=None,
        clipping_rate=None,
        coverage=1.0,
        left_in_float32=[],
        min_engine=engine_maker(source.engine).PRECISIONS["fp32"].oldest,
        provenance={
            "checkpoint": source.sha256,
            "sub_model": source.sub_model_sha256,
            **_full_model(sub_model),
            **_trained_dims(sub_model),
            **tool_versions(source.engine),
        },
    )
    expected = codecs.truncate(source.probes[sub_model.layers], sub_model.dim)
    graph = source.vectors_at(sub_model.layers)
    return Original(graph, spec, source.tokenizer_json, source.settings, expected, licenses)


def _full_model(sub_model: Checkpoint) -> dict[str, str]:
    """Return what an aligned artifact's provenance says of the model that it is aligned with."""
    full = sub_model.speaks
    if full is None:
        return {}
    return {
        FULL_MODEL: full.weights_sha256,
        FULL_TOKENIZER: full.tokenizer_sha256,
        FULL_LAYERS: str(full.layers),
        FULL_POOLING: full.pooling,
        FULL_NORM: full.final_norm,
    }


def _trained_dims(sub_model: Checkpoint) -> dict[str, str]:
    """Return what an artifact's provenance says of the dims that its vectors may be cut to."""
    if sub_model.trained is None or sub_model.speaks:  # aligned: another depth's dims count
        return {}
    dims = sorted(dim for layers, dim in sub_model.trained if layers == sub_model.layers)
    stated = ",".join(map(str, dims)) or UNTRAINED
    return {TRAINED_DIMS: stated} if is_name(stated) else {}  # too many to forbid any


def tool_versions(engine: str) -> dict[str, str]:
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
