"""Options that several commands share, and what their values are read into."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from m2dexport.cores import granted_threads
from m2dexport.engines import COMPATIBLE
from m2dexport.errors import UsageError
from m2dexport.precisions import BIT_ORDERS, ISAS, VECTOR_PRECISIONS, WEIGHT_PRECISIONS

if TYPE_CHECKING:
    from m2dexport.align.texts import TextFile
    from m2dexport.build.mixed import QualityLimit
    from m2dexport.build.recipe import Recipe
    from m2dexport.checkpoint.open import Checkpoint
    from m2dexport.engines import Compilation
    from m2dexport.runtime.index import Index
    from m2dexport.vectors.tasks import Task

F = TypeVar("F", bound=Callable[..., Any])


class _Numbers(click.ParamType):  # type: ignore[type-arg]
    """One whole number or several: "6", "2,4,6" or "1-6"."""

    name = "N[,N...]"

    def __init__(self, *, distinct: bool = True) -> None:
        self.distinct = distinct

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = [number for part in str(value).split(",") for number in _numbers_of(part)]
        except ValueError:
            self.fail(f"{value!r} is not a whole number, a list such as 2,4,6 or 1-6.", param, ctx)
        return tuple(dict.fromkeys(numbers) if self.distinct else numbers)


def _numbers_of(part: str) -> list[int]:
    """Return the numbers of "6" or "1-6".

    Raises:
        ValueError: when it is neither.
    """
    first, dash, last = part.strip().partition("-")
    if not (first and dash):
        return [int(part)]
    if not 0 <= int(last) - int(first) < 10_000:
        raise ValueError
    return list(range(int(first), int(last) + 1))


class _Shapes(click.ParamType):  # type: ignore[type-arg]
    """Texts x tokens, one or several: "1x16,16x32"."""

    name = "TEXTSxTOKENS[,...]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[tuple[int, int], ...]:
        if isinstance(value, tuple):
            return value
        found = []
        for part in str(value).split(","):
            match = re.fullmatch(r"\s*([1-9][0-9]{0,5})x([1-9][0-9]{0,5})\s*", part)
            if match is None:
                self.fail(f"{value!r} is not a list of shapes such as 1x16,16x32.", param, ctx)
            found.append((int(match[1]), int(match[2])))
        return tuple(dict.fromkeys(found))


NUMBERS = _Numbers()
SHAPES = _Shapes()
PER_LAYER = _Numbers(distinct=False)
PATH = click.Path(path_type=Path)


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Return one decorator that adds several options; ``--help`` shows the last of them first."""

    def decorate(command: F) -> F:
        for option in options:
            command = option(command)
        return command

    return decorate


#: The options that say what a checkpoint is trusted with.
trust_options = together(
    click.option("--allow-pickle", is_flag=True, help="Accept pickled weights."),
    click.option("--trust-remote-code", is_flag=True, help="Run code that the checkpoint brings."),
)


#: The options that say which checkpoint a command works on.
model_options = together(
    click.option(
        "--pooling",
        metavar="MODE",
        help="Declare the pooling (mean, cls, lasttoken) of a checkpoint that stores none.",
    ),
    click.option(
        "--trained",
        metavar="N:D,...",
        help='Declare the trained grid, as in "2:32,4:64" or, depths times dims, "1-6:32,64".',
    ),
    trust_options,
    click.option(
        "--model",
        metavar="PATH|HUB-ID",
        help="Checkpoint folder or hub id; without it, the checkpoint that ships.",
    ),
)


#: The options that say what quality is measured on.
evaluation_options = together(
    click.option(
        "--mteb",
        metavar="TASK[:SUBSET],...",
        help="Tasks of the mteb package: STS, retrieval, pair classification, clustering.",
    ),
    click.option(
        "--eval",
        "evaluation",
        multiple=True,
        metavar="[NAME=]PATH",
        help="Scored or labelled pairs, or texts with topics (.tsv, .csv, .jsonl), a folder of "
        "them, or a BEIR folder; several are averaged.  "
        "[default: the shipped STS-B dev and LIMIT-small]",
    ),
)


calibration_option = click.option(
    "--calibration",
    type=PATH,
    metavar="FILE",
    help="Texts, one per line, that freeze int8 and int4 ranges; without it, the shipped ones.",
)


align_texts_option = click.option(
    "--align-texts",
    type=PATH,
    metavar="FILE|FOLDER",
    help="Texts to fit maps on: one per line, JSONL, or a BEIR folder's corpus; without it, the "
    "shipped ones.",
)


#: The options that align a sub-model with the full depth.
align_options = together(
    align_texts_option,
    click.option(
        "--align",
        is_flag=True,
        help="End in a linear map into the space of the full depth's vectors.",
    ),
)


index_option = click.option(
    "--index",
    type=PATH,
    metavar="BUNDLE|ARTIFACT",
    help="What wrote the index that the vectors are put to: they take its ranges, and state its "
    "space.",
)


bit_order_option = click.option(
    "--bit-order",
    type=click.Choice(BIT_ORDERS),
    default="big",
    show_default=True,
    help="Where the first dim of a packed byte goes: highest or lowest bits.",
)


def recipe_options(weights: str | None, vectors: str = "float32") -> Callable[[F], F]:
    """Return the options that say how an artifact is quantized, with these defaults."""
    return together(
        click.option(
            "--allow-batch-dependent",
            is_flag=True,
            help="Accept weights with which a text's vector depends on its batch; the artifact "
            "then runs one text at a time.",
        ),
        click.option(
            "--min-coverage",
            type=float,
            default=0.9,
            show_default=True,
            help="Share of the weight bytes that must really be quantized.",
        ),
        evaluation_options,
        click.option(
            "--max-drop",
            type=float,
            metavar="POINTS",
            help="Keep the most sensitive layers in float32, so that quality on --eval drops by at "
            "most so many points below fp32.",
        ),
        calibration_option,
        bit_order_option,
        click.option(
            "--vectors",
            type=click.Choice(VECTOR_PRECISIONS),
            default=vectors,
            show_default=True,
            help="Vector precision.",
        ),
        click.option(
            "--isa",
            type=click.Choice(ISAS),
            default="portable",
            show_default=True,
            help="Processors that int8 weights are made for: all, or those with VNNI (finer codes; "
            "elsewhere slower).",
        ),
        click.option(
            "--weights",
            type=click.Choice(WEIGHT_PRECISIONS),
            default=weights,
            show_default=weights is not None,
            help="Weight precision." + ("" if weights else "  [default: fp32; of TensorRT, fp16]"),
        ),
    )


#: The options that choose another device than the one that an artifact was made for.
device_options = together(
    click.option(
        "--threads",
        type=click.IntRange(1),
        callback=lambda _context, _option, value: granted_threads(value),
        help="[default: as it was made for]",
    ),
    click.option(
        "--provider",
        metavar="NAME",
        help="onnxruntime execution provider, OpenVINO device, or, of TensorRT, CUDA:0 or CPU "
        "for onnxruntime.  [default: as it was made for]",
    ),
)


#: The options that say what an engine for a GPU is compiled for.
compilation_options = together(
    click.option(
        "--with-engine",
        is_flag=True,
        help="TensorRT: put the engine itself beside the graph, too, if its licence lets you hand "
        "it on. Else it is built where it runs.",
    ),
    click.option(
        "--compatible",
        type=click.Choice(COMPATIBLE),
        multiple=True,
        help="TensorRT: the engine also runs on other GPUs from Ampere on (hardware), or with "
        "later versions (version).",
    ),
    click.option(
        "--gpu",
        "gpus",
        metavar="X.Y,...",
        help="TensorRT-RTX: compute capabilities to build for, such as 8.9,12.0.  "
        "[default: all that it knows]",
    ),
)


class Finite(click.FloatRange):
    """A range of floats without nan and infinity, which every range of click's lets pass."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the float, or fail with a sentence."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


cell_option = click.option(
    "--cell",
    metavar="ID",
    help="Of a nested bundle: its cell.  [default: the bundle's default]",
)


force_option = click.option("--force", is_flag=True, help="Replace what is there.")


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def open_model(model: str | None, options: dict[str, Any]) -> Checkpoint:
    """Open the checkpoint that ``model_options`` name; say what had to be assumed about it."""
    from m2dexport.checkpoint.open import open_checkpoint

    checkpoint = open_checkpoint(model, **options)
    for sentence in checkpoint.assumed:
        click.echo(f"Assumed: {sentence}", err=True)
    return checkpoint


def texts_of(path: Path | None) -> tuple[str, ...] | None:
    """Return the texts of a file, one per line; None without a file."""
    from m2dexport.data import read_texts

    return None if path is None else read_texts(path)


def texts_to_align(align: bool, path: Path | None) -> TextFile | None:
    """Return the texts that ``align_options`` name; None when nothing is to be aligned."""
    from m2dexport.align.texts import align_texts

    if not align and path is not None:
        raise UsageError("--align-texts goes with --align.")
    return align_texts(path) if align else None


def tasks_of(evaluation: tuple[str, ...], mteb: str | None = None) -> tuple[Task, ...]:
    """Return what ``evaluation_options`` name; without any, what ships."""
    from m2dexport.vectors.tasks import default_tasks, load_tasks, require_distinct

    tasks = [task for source in evaluation for task in load_tasks(source)]
    if mteb is not None:
        from m2dexport.vectors.mteb_tasks import load_mteb

        tasks += load_mteb(mteb.split(","))
    require_distinct(tasks)
    return tuple(tasks) or default_tasks()


def recipe_of(options: dict[str, Any]) -> Recipe:
    """Take the values of ``recipe_options`` out of all options; return what they say."""
    from m2dexport.build.recipe import Recipe
    from m2dexport.engines import Device

    limit = _limit_of(*(options.pop(name) for name in ("max_drop", "evaluation", "mteb")))
    calibration = texts_of(options.pop("calibration"))
    device = Device(options.pop("provider", None), options.pop("threads", None))
    names = ("weights", "isa", "vectors", "bit_order", "min_coverage", "allow_batch_dependent")
    values = {name: options.pop(name) for name in names}
    index = index_of(options.pop("index"))
    compilation = _compilation_of(options)
    return Recipe(
        **values,
        device=device,
        calibration=calibration,
        limit=limit,
        index=index,
        compilation=compilation,
    )


def _compilation_of(options: dict[str, Any]) -> Compilation:
    """Take the values of ``compilation_options`` out of all options; return what they say."""
    from m2dexport.engines import Compilation

    gpus = options.pop("gpus", None)
    return Compilation(
        gpus=() if gpus is None else tuple(dict.fromkeys(gpu.strip() for gpu in gpus.split(","))),
        compatible=options.pop("compatible", ()),
        keep_engine=options.pop("with_engine", False),
    )


def index_of(path: Path | None) -> Index | None:
    """Return what wrote the index that ``--index`` names."""
    from m2dexport.runtime.index import read_index

    return None if path is None else read_index(path)


def _limit_of(
    max_drop: float | None, evaluation: tuple[str, ...], mteb: str | None
) -> QualityLimit | None:
    from m2dexport.build.mixed import QualityLimit

    if max_drop is None and (evaluation or mteb is not None):
        option = "--eval" if evaluation else "--mteb"
        raise UsageError(f"{option} goes with --max-drop, which says how far quality may drop.")
    return None if max_drop is None else QualityLimit(max_drop, tasks_of(evaluation, mteb))
