"""The command line: parse, call the library, print."""

from __future__ import annotations

import json
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from m2dexport import __version__
from m2dexport.errors import M2DError, UsageError

if TYPE_CHECKING:
    from m2dexport.checkpoint import Checkpoint
    from m2dexport.sweep import OnProgress

F = TypeVar("F", bound=Callable[..., Any])


class _Group(click.Group):
    """Turns the library's errors into one sentence and an exit code, in one place."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except M2DError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            click.echo(f"Error: {_sentence(error)}", err=True)
            ctx.exit(1)


def _sentence(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}."


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    click.echo(f"Warning: {message}", err=True)


class _Numbers(click.ParamType):  # type: ignore[type-arg]
    """One whole number or several: "6" or "2,4,6"."""

    name = "N[,N...]"

    def __init__(self, *, distinct: bool = True) -> None:
        self.distinct = distinct

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = [int(part) for part in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a whole number or a list such as 2,4,6.", param, ctx)
        return tuple(dict.fromkeys(numbers) if self.distinct else numbers)


def _count_or_file(value: str) -> int | Path:
    return int(value) if value.isdecimal() else Path(value)


_NUMBERS = _Numbers()
_PER_LAYER = _Numbers(distinct=False)
_SHIPPED = Path()  # an option that takes a file of texts, given without one
_PATH = click.Path(path_type=Path)


def _trust_options(command: F) -> F:
    """Add the options that say what a checkpoint is trusted with."""
    for option in (
        click.option("--allow-pickle", is_flag=True, help="Accept pickled weights."),
        click.option(
            "--trust-remote-code", is_flag=True, help="Run code that the checkpoint brings."
        ),
    ):
        command = option(command)
    return command


def _model_options(command: F) -> F:
    """Add the options that say which checkpoint a command works on."""
    for option in (
        click.option(
            "--pooling",
            metavar="MODE",
            help="Declare the pooling (mean, cls, lasttoken) of a checkpoint that stores none.",
        ),
        click.option(
            "--trained", metavar="N:D,...", help='Declare the trained grid, as in "2:32,4:64".'
        ),
        _trust_options,
        click.option(
            "--model",
            metavar="PATH|HUB-ID",
            help="Checkpoint folder or hub id; without it, the checkpoint that ships.",
        ),
    ):
        command = option(command)
    return command


#: As ``weights.WEIGHT_PRECISIONS``, whose imports a device lacks; a test compares them.
_WEIGHTS = (
    *("fp32", "fp16", "bf16", "int8"),
    *("int8-dynamic", "int8-static", "int8-weight-only", "int4-weight-only"),
)


def _weights_option(default: str | None = "fp32") -> Callable[[F], F]:
    return click.option(
        "--weights",
        type=click.Choice(_WEIGHTS),
        default=default,
        show_default=default is not None,
        help="Weight precision.",
    )


def _vectors_option(default: str | None = "float32") -> Callable[[F], F]:
    return click.option(
        "--vectors",
        type=click.Choice(["float32", "int8", "int8-symmetric", "int4", "ubinary", "binary"]),
        default=default,
        show_default=default is not None,
        help="Vector precision.",
    )


def _refuse_hidden(_context: click.Context, _option: click.Parameter, value: str | None) -> None:
    if value is not None:
        raise UsageError(
            "--hidden cannot be cut: a LayerNorm takes its statistics over the whole hidden state, "
            "so a prefix of it is not what the model computes; cut --dim, --heads or --ffn."
        )


_bit_order_option = click.option(
    "--bit-order",
    type=click.Choice(["big", "little"]),
    default="big",
    show_default=True,
    help="Where the first dim of a packed byte goes: highest or lowest bits.",
)


def _gate_options(command: F) -> F:
    """Add the options that loosen what an artifact must fulfil."""
    for option in (
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
    ):
        command = option(command)
    return command


_calibration_option = click.option(
    "--calibration",
    type=_PATH,
    metavar="FILE",
    help="Texts, one a line, that freeze int8 and int4 ranges; without it, the shipped ones.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _open(model: str | None, options: dict[str, Any]) -> Checkpoint:
    from m2dexport.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model, **options)
    for sentence in checkpoint.assumed:
        click.echo(f"Assumed: {sentence}", err=True)
    return checkpoint


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """Show one bar per step on a terminal, and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    ) as bars:
        tasks: dict[str, Any] = {}

        def update(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield update


@contextmanager
def _busy(what: str) -> Iterator[None]:
    """Show on a terminal that work of an unknown length goes on."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(f"{what} ..."):
        yield


def _count_texts(done: int) -> None:
    """Show on a terminal how far encode is; plain, since a device need not have rich."""
    if sys.stderr.isatty():
        click.echo(f"\r{done:,} texts", nl=False, err=True)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="m2dexport")
def cli() -> None:
    """Slice, quantize, profile and bundle 2D Matryoshka sentence-embedding models.

    \b
    A first session, on the checkpoint that ships:
      m2dexport profile
      m2dexport select profile/profile.json --target edge-cpu
      m2dexport bundle profile/profile.json --cell 4x128-int8-int8 --out edge.m2d
      m2dexport verify edge.m2d
      echo "A man is playing a guitar." | m2dexport encode edge.m2d
    """


@cli.command()
@_model_options
@_json_option
def inspect(model: str | None, as_json: bool, **options: Any) -> None:
    """Describe a checkpoint: family, depth, pooling, prompts, size per depth.

    \b
    Example:
      m2dexport inspect --model sentence-transformers/all-MiniLM-L6-v2
    """
    from m2dexport.checkpoint import depth_sizes
    from m2dexport.report import print_checkpoint

    checkpoint = _open(model, options)
    sizes = depth_sizes(checkpoint)
    if as_json:
        _print_json({**asdict(checkpoint), "depths": [asdict(size) for size in sizes]})
    else:
        print_checkpoint(checkpoint, sizes)


@cli.command(name="slice")
@_model_options
@click.option("--layers", type=_NUMBERS, help="Depth to keep; several give a grid.  [default: all]")
@click.option("--dim", type=_NUMBERS, help="Leading width to keep; likewise.  [default: all]")
@click.option(
    "--heads", type=_PER_LAYER, help="Attention heads to keep; several are one number a layer."
)
@click.option("--ffn", type=_PER_LAYER, help="Feed-forward channels to keep; likewise.")
@click.option(
    "--reorder-by-importance",
    "reorder",
    is_flag=False,
    flag_value=_SHIPPED,
    type=_PATH,
    metavar="[FILE]",
    help="Put the heads and channels first that matter most on these texts, one a line; without "
    "FILE, the shipped ones.",
)
@click.option("--hidden", hidden=True, expose_value=False, callback=_refuse_hidden)
@click.option(
    "--out",
    type=_PATH,
    help="Folder of the sub-model; of a grid, each is a folder in it, as in 6x128.  "
    "[default: sub-model-6x128; sub-models]",
)
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="Type to store.")
@click.option(
    "--final-norm",
    type=click.Choice(["applied", "skipped"]),
    help="Whether pre-LN families apply their final norm to the last kept layer.",
)
@click.option(
    "--prune-vocab",
    type=_count_or_file,
    metavar="CORPUS|N",
    help="Keep the pieces that the texts of a file (one a line) use, or the N most useful pieces.",
)
@_json_option
def slice_command(
    model: str | None,
    layers: tuple[int, ...] | None,
    dim: tuple[int, ...] | None,
    heads: tuple[int, ...] | None,
    ffn: tuple[int, ...] | None,
    reorder: Path | None,
    out: Path | None,
    dtype: str | None,
    final_norm: Any,
    prune_vocab: Path | int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Cut standalone sub-models that load in transformers and sentence-transformers.

    \b
    Examples:
      m2dexport slice --layers 6 --dim 128
      m2dexport slice --layers 2,4,6 --dim 64,128 --out grid
      m2dexport slice --heads 8 --ffn 1024 --reorder-by-importance --out narrow
      m2dexport slice --layers 2 --dim 64 --prune-vocab 4000
    """
    from m2dexport.checkpoint import PROVENANCE
    from m2dexport.data import calibration_texts
    from m2dexport.jsonfile import read_object
    from m2dexport.pruning import plan_pruning
    from m2dexport.slicing import slice_grid

    checkpoint = _open(model, options)
    layers, dim = layers or (checkpoint.layers,), dim or (checkpoint.dim,)
    one = f"sub-model-{layers[0]}x{dim[0]}"
    with _busy("Slicing"):
        pruning = None
        if isinstance(prune_vocab, int):
            pruning = plan_pruning(checkpoint, size=prune_vocab)
        elif prune_vocab:
            pruning = plan_pruning(checkpoint, _texts(prune_vocab))
        sub_models = slice_grid(
            checkpoint,
            layers,
            dim,
            out or Path("sub-models" if len(layers) * len(dim) > 1 else one),
            heads=heads,
            ffn=ffn,
            reorder=calibration_texts() if reorder == _SHIPPED else _texts(reorder),
            dtype=dtype,
            final_norm=final_norm,
            pruning=pruning,
        )
    pruned = [read_object(n.path / PROVENANCE).get("vocabulary") for n in sub_models]
    if as_json:
        facts = [{"layers": n.layers, "dim": n.dim, "path": n.path} for n in sub_models]
        _print_json(
            [fact | ({"vocabulary": v} if v else {}) for fact, v in zip(facts, pruned, strict=True)]
        )
    else:
        for sub_model in sub_models:
            click.echo(
                f"{sub_model.path}: {sub_model.layers} layers, {sub_model.dim} dims, "
                f"{_folder_megabytes(sub_model.path):.1f} MB"
            )
        if pruned[0]:
            click.echo(_vocabulary_sentence(pruned[0]))


@cli.command()
@_model_options
@click.option("--layers", type=int, help="Depth to keep.  [default: all]")
@click.option("--dim", type=int, help="Leading width to keep.  [default: all]")
@_weights_option()
@_vectors_option()
@_bit_order_option
@click.option("--engine", type=click.Choice(["onnx"]), default="onnx", show_default=True)
@_calibration_option
@_gate_options
@click.option("--out", type=_PATH, required=True, help="Artifact folder to write.")
@_json_option
def build(
    model: str | None,
    layers: int | None,
    dim: int | None,
    weights: Any,
    vectors: Any,
    bit_order: Any,
    engine: str,
    calibration: Path | None,
    min_coverage: float,
    allow_batch_dependent: bool,
    out: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Build an artifact: one graph from token ids to the final vector, checked against torch.

    \b
    Example:
      m2dexport build --layers 4 --dim 128 --weights int8 --vectors int8 --out artifact
    """
    from m2dexport.build import build_artifact

    checkpoint = _open(model, options)
    with _busy("Building"):
        artifact = build_artifact(
            checkpoint,
            checkpoint.layers if layers is None else layers,
            checkpoint.dim if dim is None else dim,
            out,
            weights=weights,
            vectors=vectors,
            bit_order=bit_order,
            calibration=_texts(calibration),
            min_coverage=min_coverage,
            allow_batch_dependent=allow_batch_dependent,
        )
    _print_artifact(artifact, "torch", as_json)


@cli.command()
@click.argument("artifact", type=_PATH)
@_weights_option("int8")
@_vectors_option("int8")
@_bit_order_option
@_calibration_option
@_gate_options
@click.option("--out", type=_PATH, required=True, help="Artifact folder to write.")
@_json_option
def quantize(
    artifact: Path,
    weights: Any,
    vectors: Any,
    bit_order: Any,
    calibration: Path | None,
    min_coverage: float,
    allow_batch_dependent: bool,
    out: Path,
    as_json: bool,
) -> None:
    """Quantize an ARTIFACT that was built with fp32 weights and float32 vectors.

    \b
    Example:
      m2dexport quantize artifact --weights int8 --vectors ubinary --out artifact-int8
    """
    from m2dexport.build import quantize_artifact

    with _busy("Quantizing"):
        result = quantize_artifact(
            artifact,
            out,
            weights=weights,
            vectors=vectors,
            bit_order=bit_order,
            calibration=_texts(calibration),
            min_coverage=min_coverage,
            allow_batch_dependent=allow_batch_dependent,
        )
    _print_artifact(result, str(artifact), as_json)


@cli.command()
@_model_options
@click.option(
    "--eval",
    "evaluation",
    type=_PATH,
    multiple=True,
    metavar="PATH",
    help="STS pairs (.tsv, .csv, .jsonl) or a BEIR folder; several are averaged.  "
    "[default: the shipped STS-B dev and LIMIT-small]",
)
@click.option("--target", metavar="NAME|FILE", help="Take grid, threads and shapes from a target.")
@_calibration_option
@click.option("--out", type=_PATH, default=Path("profile"), show_default=True, help="Folder.")
@_json_option
def profile(
    model: str | None,
    evaluation: tuple[Path, ...],
    target: str | None,
    calibration: Path | None,
    out: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure every (layers, dim, weights, vectors) cell: quality, latency, size, memory.

    Writes profile.json, frontier.png and frontier.svg.

    \b
    Examples:
      m2dexport profile
      m2dexport profile --model my-checkpoint --eval sts.tsv --eval beir-folder --out profile
    """
    from m2dexport.budget import load_target
    from m2dexport.data import calibration_texts
    from m2dexport.quality import default_tasks, load_task
    from m2dexport.report import print_profile, require_report_folder, write_report
    from m2dexport.sweep import default_plan, plan_for, profile_checkpoint

    require_report_folder(out)
    tasks = [load_task(path) for path in evaluation] or default_tasks()
    texts = _texts(calibration) or calibration_texts()
    checkpoint = _open(model, options)
    plan = plan_for(checkpoint, load_target(target)) if target else default_plan(checkpoint)
    with _progress() as on_progress:
        result = profile_checkpoint(
            checkpoint,
            tasks,
            texts,
            plan,
            model=model,
            pooling=options["pooling"],
            on_progress=on_progress,
        )
    written = write_report(result, out)
    if as_json:
        _print_json(result.model_dump(mode="json"))
    else:
        print_profile(result)
        click.echo("Wrote " + ", ".join(str(path) for path in written))


@cli.command()
@click.argument("profile", type=_PATH, metavar="PROFILE.JSON")
@click.option("--target", metavar="NAME|FILE", help="Take the budget from a target.")
@click.option("--p50-ms", type=float, help="Median latency at most.")
@click.option("--p95-ms", type=float, help="95th percentile of latency at most.")
@click.option("--size-mb", type=float, help="Size of the files at most, in 10^6 bytes.")
@click.option("--memory-mb", type=float, help="Peak memory at most, in 10^6 bytes.")
@click.option("--vector-bytes", type=int, help="Bytes per stored vector at most.")
@click.option("--min-quality", type=float, help="Quality at least, in points (0-100).")
@click.option("--metric", help='What quality means: "mean", or one such as "stsb-dev/spearman".')
@_json_option
def select(profile: Path, target: str | None, as_json: bool, **limits: Any) -> None:
    """Name the best cell of a profile within a budget, and the limit that binds.

    \b
    Examples:
      m2dexport select profile/profile.json --p95-ms 5 --size-mb 20
      m2dexport select profile/profile.json --target edge-cpu
    """
    from m2dexport.budget import budget_from, select_cell
    from m2dexport.manifest import read_profile
    from m2dexport.report import print_selection

    selection = select_cell(read_profile(profile), budget_from(target, **limits))
    if as_json:
        _print_json({"cell": selection.cell.model_dump(mode="json"), "binding": selection.binding})
    else:
        print_selection(selection, profile)


@cli.command()
@click.argument("source", type=_PATH, metavar="ARTIFACT|PROFILE.JSON")
@click.option("--cell", metavar="ID", help="With a profile: the cell to build, as select names it.")
@click.option(
    "--model",
    metavar="PATH|HUB-ID",
    help="With a profile: where its checkpoint is now.  [default: where it was]",
)
@_trust_options
@_calibration_option
@click.option("--out", type=_PATH, required=True, metavar="FILE.m2d", help="Bundle to write.")
@_json_option
def bundle(
    source: Path,
    cell: str | None,
    model: str | None,
    calibration: Path | None,
    out: Path,
    as_json: bool,
    **trust: bool,
) -> None:
    """Pack an artifact, or build and pack a profile's cell, into one archive for the device.

    \b
    Examples:
      m2dexport bundle artifact --out edge.m2d
      m2dexport bundle profile/profile.json --cell 4x128-int8-int8 --out edge.m2d
    """
    from m2dexport.bundle import write_bundle

    if not source.exists():
        raise UsageError(f"{source} does not exist; name an artifact folder or a profile.json.")
    if source.is_dir() == (cell is not None):
        raise UsageError("--cell goes with a profile.json, and only with that; select names one.")
    if cell is None:
        info = write_bundle(source, out)
    else:
        from m2dexport.deploy import bundle_cell  # needs torch; packing an artifact does not

        with _busy("Building and packing"):
            info = bundle_cell(
                source, cell, out, model=model, calibration=_texts(calibration), **trust
            )
    if as_json:
        _print_json(asdict(info))
    else:
        click.echo(f"{info.path}: {info.size_bytes / 1e6:.2f} MB, space {info.space_id}")


@cli.command()
@click.argument("bundle_path", type=_PATH, metavar="BUNDLE")
@click.option(
    "--vectors",
    type=_PATH,
    metavar="FILE",
    help="Vectors of an index (.npy, .jsonl) that must be of this bundle's space.",
)
@_json_option
def verify(bundle_path: Path, vectors: Path | None, as_json: bool) -> None:
    """Check every byte of a BUNDLE, then run its golden texts on this machine.

    \b
    Examples:
      m2dexport verify edge.m2d
      m2dexport verify edge.m2d --vectors vectors.npy
    """
    from m2dexport.bundle import verify_bundle
    from m2dexport.runtime import load
    from m2dexport.streams import require_vectors_of

    report = verify_bundle(bundle_path)
    if vectors:
        require_vectors_of(vectors, load(bundle_path).spec, bundle_path)
    if as_json:
        _print_json(asdict(report))
    else:
        click.echo(report.sentence())


@cli.command()
@click.argument("bundle_path", type=_PATH, metavar="BUNDLE")
@click.option("--in", "source", type=_PATH, metavar="FILE", help="Texts.  [default: stdin]")
@click.option(
    "--out", type=_PATH, metavar="FILE", help=".npy or .jsonl.  [default: JSONL to stdout]"
)
@click.option("--prompt", metavar="NAME", help="A prompt of the model, such as query.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="[default: all cores of this process]")
def encode(
    bundle_path: Path,
    source: Path | None,
    out: Path | None,
    prompt: str | None,
    batch_size: int,
    threads: int | None,
) -> None:
    """Encode texts, one a line or JSONL with a "text" field, with a BUNDLE.

    \b
    Examples:
      m2dexport encode edge.m2d --in texts.txt --out vectors.npy
      echo "A man is playing a guitar." | m2dexport encode edge.m2d
    """
    from m2dexport.runtime import load
    from m2dexport.streams import encode_stream

    summary = encode_stream(
        load(bundle_path, threads=threads),
        source,
        out,
        prompt=prompt,
        batch_size=batch_size,
        on_progress=_count_texts if out else lambda _: None,  # not among the rows of stdout
    )
    click.echo(("\r" if out and sys.stderr.isatty() else "") + summary.sentence(), err=True)


def _texts(path: Path | None) -> tuple[str, ...] | None:
    from m2dexport.data import read_texts

    return None if path is None else read_texts(path)


def _print_artifact(artifact: Any, original: str, as_json: bool) -> None:
    if as_json:
        _print_json(asdict(artifact))
        return
    spec, parity = artifact.spec, artifact.spec.parity
    clipped = ""
    if spec.clipping_rate is not None:
        clipped = f"\nvalues of held-out texts outside the ranges: {spec.clipping_rate:.2%}"
    click.echo(
        f"{artifact.path}: {spec.layers} layers, {spec.dim} dims, weights={spec.weights}, "
        f"vectors={spec.vectors}, {artifact.size_bytes / 1e6:.2f} MB\n"
        f"parity with {original} on {parity['texts']:.0f} ragged texts: mean cosine "
        f"{parity['mean_cosine']:.6f}, largest difference {parity['max_difference']:.1e}; "
        f"alone against in a batch: {parity['batch_cosine']:.6f}{clipped}"
    )


def _vocabulary_sentence(vocabulary: dict[str, Any]) -> str:
    before, after = vocabulary["pieces"]
    tokens = [
        f"{old:.2f} before and {new:.2f} after on the {name} texts"
        for name, (old, new) in vocabulary["tokens_per_text"].items()
    ]
    return (
        f"vocabulary: {after:,} of {before:,} pieces, {vocabulary['bytes_saved'] / 1e6:.1f} MB "
        f"saved; tokens per text: {', '.join(tokens)}"
    )


def _folder_megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> None:
    """Run the command line; a termination signal cleans up as an error does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    cli()


if __name__ == "__main__":
    main()
