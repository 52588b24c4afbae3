"""Export: a folder that another program opens as it is, compared with the artifact beforehand."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from m2dexport.consumers.golden import Agreement, Run, Text, agreement, golden_texts, write_golden
from m2dexport.consumers.hub import write_hub
from m2dexport.consumers.plain_onnx import write_onnx
from m2dexport.consumers.source import Options, Source, open_source
from m2dexport.consumers.table import write_model2vec, write_table
from m2dexport.consumers.triton import write_triton
from m2dexport.engines import ENGINES
from m2dexport.errors import UsageError, one_line
from m2dexport.files import EXPORT, atomic_folder, is_export, require_folder

Writer = Callable[[Source, Path, Options], Run]

_FASTEMBED = """\
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType

TextEmbedding.add_custom_model(
    model="local/NAME",
    pooling=PoolingType.DISABLED,
    normalization=False,
    output_name="sentence_embedding",
    sources=ModelSource(url="file://unused"),
    dim=DIM,
    model_file="onnx/model.onnx",
)
model = TextEmbedding("local/NAME", specific_model_path="FOLDER")"""


@dataclass(frozen=True)
class Way:
    """How a program takes the artifacts of an engine."""

    write: Writer
    opened: str  # what a user then does; FOLDER, NAME (of the folder) and DIM stand for theirs


@dataclass(frozen=True)
class Consumer:
    """A program that runs what was built."""

    ways: Mapping[str, Way]  # by engine
    keeps_codes: bool = False  # takes codes; else it gets the vectors that they are made of
    applies_prompts: bool = False
    restores_end: bool = True  # of texts that it cuts


#: By the names that --for takes.
CONSUMERS: Mapping[str, Consumer] = {
    "sentence-transformers": Consumer(
        {
            "onnx": Way(write_hub, 'SentenceTransformer("FOLDER", backend="onnx")'),
            "openvino": Way(write_hub, 'SentenceTransformer("FOLDER", backend="openvino")'),
            "static": Way(write_table, 'SentenceTransformer("FOLDER")'),
        },
        applies_prompts=True,
    ),
    "optimum": Consumer(
        {
            "onnx": Way(write_hub, 'ORTModelForFeatureExtraction.from_pretrained("FOLDER")'),
            "openvino": Way(
                write_hub,
                'OVModelForFeatureExtraction.from_pretrained("FOLDER", subfolder="openvino")',
            ),
        }
    ),
    "fastembed": Consumer(
        {
            "onnx": Way(
                write_hub,
                _FASTEMBED,
            )
        }
    ),
    "transformers.js": Consumer(
        {
            "onnx": Way(
                write_hub,
                'pipeline("feature-extraction", "FOLDER"), called with { pooling: "cls" }',
            )
        },
        restores_end=False,
    ),
    "text-embeddings-inference": Consumer(
        {"onnx": Way(write_hub, "text-embeddings-router --model-id FOLDER --dtype float32")}
    ),
    "triton": Consumer(
        {"onnx": Way(write_triton, "tritonserver --model-repository FOLDER")}, keeps_codes=True
    ),
    "onnx": Consumer(
        {"onnx": Way(write_onnx, 'InferenceSession("FOLDER/model.onnx")')}, keeps_codes=True
    ),
    "model2vec": Consumer(
        {"static": Way(write_model2vec, 'StaticModel.from_pretrained("FOLDER")')},
    ),
}


@dataclass(frozen=True)
class Export:
    """A finished folder."""

    path: Path
    consumer: str
    size_bytes: int  # of all files together
    space_id: str
    agreement: Agreement  # with the artifact
    opened: str  # how
    notes: tuple[str, ...]  # a sentence on each thing that the program does not do itself


def export_for(
    consumer: str,
    path: str | Path,
    out: str | Path,
    options: Options = Options(),
    *,
    force: bool = False,
) -> Export:
    """Write a folder for another program; it is kept only if it gives the artifact's vectors.

    Args:
        consumer: a key of ``CONSUMERS``.
        path: an artifact folder or a bundle.
        out: the folder to write.
        options: what may be chosen.
        force: whether an export at ``out`` is replaced.

    Raises:
        UsageError: when the program cannot take the artifact, with the reason, or ``out`` may not
            be written.
        BundleError: when the bundle is damaged, or the artifact's files do not belong together.
        DriftError: when the bundle does not give its golden vectors here.
        ParityError: when the folder's graph gives other vectors; ``out`` is not made.
        MissingExtra: when the artifact's engine is not installed.
    """
    path, out = Path(path), Path(out)
    known = _consumer(consumer)
    _require_out(path, out, force=force)
    source = open_source(path, options.cell)
    way = _way(consumer, known, source)
    if options.plain and ENGINES[source.spec.engine].format != "onnx":
        raise UsageError(f"--plain is about ONNX, and {path} has no such graph; leave it out.")
    _require_shapes(source, options)
    with atomic_folder(out, force=force) as folder:
        for name, text in source.licenses.items():  # first: none replaces what was compared
            (folder / name).write_text(text, encoding="utf-8")
        run = way.write(source, folder, options)
        texts = golden_texts(source, run)
        found = agreement(source, texts, run)
        write_golden(folder, consumer, source, texts)
    return Export(
        path=out,
        consumer=consumer,
        size_bytes=sum(each.stat().st_size for each in out.rglob("*") if each.is_file()),
        space_id=source.spec.space_id,
        agreement=found,
        opened=_opened(way, out, source.spec.dim),
        notes=tuple(_notes(consumer, known, source, texts)),
    )


def _require_shapes(source: Source, options: Options) -> None:
    """Refuse shapes that the model cannot run."""
    most = source.spec.max_length
    for texts, tokens in options.shapes or ():
        if tokens > most:
            raise UsageError(
                f"{texts}x{tokens} has more tokens than {source.path} takes, {most} at most; name "
                f"{texts}x{most} or a shorter shape with --shapes."
            )


def _opened(way: Way, out: Path, dim: int) -> str:
    """Return how a program opens a folder."""
    known = {"DIM": str(dim), "NAME": out.resolve().name, "FOLDER": str(out)}
    return re.sub("|".join(known), lambda found: known[found[0]], way.opened)


def _require_out(source: Path, out: Path, *, force: bool) -> None:
    """Refuse a folder that is no export, or whose replacement would take the source with it."""
    if _lies_in(out, source) or _lies_in(source, out):
        raise UsageError(
            f"{out} is {source}, holds it or lies in it, and an export leaves its source as it is; "
            "name another place with --out."
        )
    require_folder(out, force=force)
    if out.exists() and any(out.iterdir()) and not is_export(out):
        raise UsageError(
            f"{out} has no {EXPORT} of an export, and --force replaces only exports; remove it, or "
            "name another place with --out."
        )


def _lies_in(path: Path, folder: Path) -> bool:
    """Say whether a path is a folder or lies in it, by whatever names."""
    path = path.resolve()
    above = [each for each in (path, *path.parents) if each.exists()]
    return folder.exists() and any(each.samefile(folder) for each in above)


def _consumer(name: str) -> Consumer:
    if name not in CONSUMERS:
        raise UsageError(f"--for {name!r} is unknown; choose from {', '.join(CONSUMERS)}.")
    return CONSUMERS[name]


def _way(name: str, consumer: Consumer, source: Source) -> Way:
    """Return how the program takes an artifact.

    Raises:
        UsageError: when the program cannot take the artifact.
    """
    spec = source.spec
    if spec.engine not in consumer.ways:
        taken = " or ".join(consumer.ways)
        depth = " --layers 0" if taken == "static" else ""
        raise UsageError(
            f"{name} cannot take {source.path}, which was built for the engine {spec.engine}; "
            f"build with --engine {taken}{depth}."
        )
    if not spec.batch_invariant:
        raise UsageError(
            f"with weights={spec.weights} a text's vector depends on its batch, and {name} makes "
            "batches of its own; choose other weights, such as int8."
        )
    return consumer.ways[spec.engine]


def _notes(name: str, consumer: Consumer, source: Source, texts: list[Text]) -> list[str]:
    spec, notes = source.spec, []
    prompts = {key: text for key, text in spec.prompts.items() if text}
    if prompts and not consumer.applies_prompts:
        quoted = one_line(", ".join(f"{key} {text!r}" for key, text in sorted(prompts.items())))
        default = f"; without a name, {spec.default_prompt}" if spec.default_prompt else ""
        notes.append(
            f"{name} applies no prompts: put them before texts yourself: {quoted}{default}."
        )
    if spec.vectors != "float32" and not consumer.keeps_codes:
        ranges = " by ranges.json" if source.encoder.ranges else ""
        notes.append(
            f"its vectors are the float32 ones that the {spec.vectors} codes are made of; an index "
            f"of codes needs them coded{ranges}, as docs/quantization.md says."
        )
    cut = [each.text for each in texts if each.truncated and each.prompt is None]
    if cut and not consumer.restores_end:
        shown = one_line(", ".join(repr(f"{text[:24]}...") for text in cut))
        notes.append(
            f"{name} cuts texts at {spec.max_length} tokens without their end token, so that "
            f"vectors of longer texts are others; of the golden texts: {shown}."
        )
    return notes
