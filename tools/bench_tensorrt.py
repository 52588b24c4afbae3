"""TensorRT-RTX engines of every depth and precision, built where no GPU has to be.

    python tools/bench_tensorrt.py --layers 1,2,3,4,5,6 --sts test.tsv

Per depth and precision: megabytes of the ONNX graph and of an engine for --gpu, the seconds that
building it takes, and the mean and minimum cosine to float32 of texts' vectors, where onnxruntime
runs the graph. Every precision is quantized once, at all depths together, as a profile does. Writes
Markdown; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import page
from numpy.typing import NDArray

from m2dexport import Checkpoint, Device, load_task, open_checkpoint
from m2dexport.batches import encode_tokens
from m2dexport.build.source import Source, export_source
from m2dexport.data import calibration_texts, default_task_paths
from m2dexport.engines import Compilation, engine_maker, engine_runner
from m2dexport.files import require_file
from m2dexport.quantize.activations import CalibrationTokens
from m2dexport.runtime.tokenizer import load_tokenizer, tokenize
from m2dexport.vectors.codecs import cosines
from m2dexport.vectors.pairs import StsTask

ENGINE = "tensorrt-rtx"
SHAPES = ((1, 16), (32, 128))


@dataclass(frozen=True)
class Row:
    """What was measured of one depth in one precision."""

    layers: int
    weights: str
    graph_mb: float
    engine_mb: float
    seconds: float  # of parsing and building
    mean: float
    minimum: float


def main() -> None:
    """Build every engine and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--model", help="folder or hub id; default: the checkpoint that ships")
    add("--layers", type=page.numbers, help="for example 1,2,6; default: all")
    add("--weights", default="fp32,fp16,bf16,int8,int8-weight-only,int4-weight-only")
    add("--gpu", default="8.9", help="compute capabilities; default: 8.9")
    add("--sts", type=Path, help="sentence pairs; default: the shipped STS-B dev")
    add("--texts", type=int, default=500, help="how many, about; default: 500")
    add("--out", type=Path, help="the Markdown file to write; default: standard output")
    options = parser.parse_args()
    if options.out is not None:
        require_file(options.out, force=True)
    checkpoint, weights = open_checkpoint(options.model), options.weights.split(",")
    if unknown := [name for name in weights if name not in engine_maker(ENGINE).PRECISIONS]:
        parser.error(f"--weights {unknown[0]} is not a precision of {ENGINE}")
    task = load_task(options.sts or default_task_paths()[0])
    if not isinstance(task, StsTask):
        parser.error("--sts takes a file of sentence pairs")
    every = list(dict.fromkeys((*task.sentences1, *task.sentences2)))
    texts = every[:: max(1, len(every) // options.texts)]
    layers = options.layers or tuple(range(1, checkpoint.layers + 1))
    start = time.perf_counter()
    rows = list(_rows(checkpoint, layers, weights, texts, tuple(options.gpu.split(","))))
    page.write(_report(rows, len(texts), time.perf_counter() - start), options.out)


def _rows(
    checkpoint: Checkpoint,
    layers: tuple[int, ...],
    weights: list[str],
    texts: list[str],
    gpus: tuple[str, ...],
) -> Iterator[Row]:
    maker = engine_maker(ENGINE)
    shapes = tuple((n, min(length, checkpoint.max_length)) for n, length in SHAPES)
    compilation = Compilation(gpus, shapes, checkpoint.max_length, keep_engine=True)
    page.say("exporting")
    source = export_source(checkpoint, layers, checkpoint.dim, ENGINE)
    tokenizer = load_tokenizer(source.tokenizer_json)
    ids = [each.ids for each in tokenize(tokenizer, texts, source.prompt)]
    calibration = CalibrationTokens(
        [each.ids for each in tokenize(tokenizer, calibration_texts(), source.prompt)],
        source.pad_id,
    )
    expected: dict[int, NDArray[np.float32]] = {}
    for name in dict.fromkeys(("fp32", *weights)):
        page.say(f"quantizing to {name}")
        graph = maker.quantize(source.graph, name, calibration)
        for depth in layers:
            files = maker.files(source.vectors_at(depth, graph), compilation)
            vectors = _vectors(source, files, ids)
            expected.setdefault(depth, vectors)
            if name not in weights:
                continue
            page.say(f"building {depth} layers")
            start = time.perf_counter()
            built = maker.compiled(files, compilation)
            seconds = time.perf_counter() - start
            found = cosines(expected[depth], vectors)
            yield Row(
                *(depth, name, len(files["model.onnx"]) / 1e6, len(built["model.engine"]) / 1e6),
                *(seconds, float(found.mean()), float(found.min())),
            )


def _vectors(source: Source, files: dict[str, bytes], ids: list[list[int]]) -> NDArray[np.float32]:
    runner = engine_runner(ENGINE)
    session = runner.load(files, Device("CPU"), "portable")
    vectors = encode_tokens(lambda *inputs: runner.run(session, *inputs)[0], ids, source.pad_id, 32)
    assert vectors is not None
    return vectors


def _report(rows: list[Row], texts: int, seconds: float) -> Iterator[str]:
    yield from page.heading(
        "no GPU", ("m2dexport", "tensorrt-rtx-cu13-libs", "onnxruntime", "torch")
    )
    yield f"{len(rows)} engines in {seconds:.0f} s, all steps together; cosines on {texts} texts."
    yield ""
    head = ("layers", "weights", "graph MB", "engine MB", "build s", "cosine mean / min")
    yield from page.table(
        head,
        (
            [
                *(str(row.layers), row.weights, f"{row.graph_mb:.1f}", f"{row.engine_mb:.1f}"),
                *(f"{row.seconds:.1f}", f"{row.mean:.5f} / {row.minimum:.5f}"),
            ]
            for row in sorted(rows, key=lambda row: row.layers)
        ),
    )


if __name__ == "__main__":
    main()
