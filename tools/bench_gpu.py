"""One graph on a GPU: sentence-transformers, onnxruntime's CUDA provider and TensorRT.

    python tools/bench_gpu.py --layers 6,2 --shapes 1x32,32x128,128x128

What a tokenizer makes goes in and normalised vectors come out: tokenization is timed apart. Every
text of a batch has a length of its own, from a quarter of the shape's to all of it. Candidates run
in turn, in a shuffled order; ratios are medians of the rounds' ratios to sentence-transformers in
float16, with attention that skips padding where a package for it is installed. Those that this
machine cannot run have the reason in their row, and each is compared with sentence-transformers in
float32. On the CPU (--device cpu) it shows that the bench works.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import page
import torch
from numpy.typing import NDArray

from m2dexport import Checkpoint, Device, Recipe, build_artifact, open_checkpoint, slice_checkpoint
from m2dexport.batches import padded
from m2dexport.build.source import export_source
from m2dexport.checkpoint.tokenizer import sealed_tokenizer_json
from m2dexport.data import calibration_texts
from m2dexport.engines import Compilation, engine_maker, engine_runner, engine_version
from m2dexport.errors import M2DError
from m2dexport.files import require_file, scratch_folder
from m2dexport.runtime.loading import load
from m2dexport.runtime.tokenizer import load_tokenizer, tokenize
from m2dexport.vectors.codecs import cosines

Ids = NDArray[np.int64]

WARM_UPS = 5
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: Packages with attention kernels that take texts without their padding.
UNPADDED = ("flash_attn", "kernels")
ANCHOR = "sentence-transformers fp16"
WEIGHTS = ("fp32", "fp16", "bf16", "int8", "int8-weight-only", "int4-weight-only")


@dataclass(frozen=True)
class Batch:
    """Texts, and their int64 (texts, tokens) ids and mask."""

    texts: tuple[str, ...]
    ids: Ids
    mask: Ids


Run = Callable[[Batch], NDArray[np.float32]]


@dataclass(frozen=True)
class Bench:
    """What is measured."""

    checkpoint: Checkpoint
    layers: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]  # (texts, tokens)
    weights: tuple[str, ...]
    device: str  # cuda or cpu
    rounds: int


@dataclass(frozen=True)
class Row:
    """What one candidate gave, or why it could not."""

    seconds: Mapping[tuple[int, int], Sequence[float]]
    cosine: float = 0.0  # smallest to sentence-transformers fp32
    reason: str = ""


def main() -> None:
    """Measure depth by depth and write the tables."""
    bench, out = _options()
    sections = {layers: _measured(bench, layers) for layers in bench.layers}
    page.write(_report(bench, sections), out)


def _options() -> tuple[Bench, Path | None]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--model", help="folder or hub id; default: the checkpoint that ships")
    add("--layers", type=page.numbers, help="for example 6,2; default: all layers")
    add("--shapes", type=_shapes, default=_shapes("1x32,32x128,128x128"), help="texts x tokens")
    add("--weights", default=",".join(WEIGHTS), help="of ours; default: %(default)s")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--rounds", type=int, default=30, help="of timing; default: 30")
    add("--out", type=Path, help="the Markdown file to write; default: standard output")
    options = parser.parse_args()
    if options.out is not None:
        require_file(options.out, force=True)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no GPU that torch can use; --device cpu runs without")
    checkpoint = open_checkpoint(options.model)
    layers = options.layers or (checkpoint.layers,)
    shapes = tuple((n, min(length, checkpoint.max_length)) for n, length in options.shapes)
    weights = tuple(options.weights.split(","))
    if unknown := set(weights) - set(WEIGHTS):
        parser.error(
            f"--weights has {', '.join(sorted(unknown))}; choose from {', '.join(WEIGHTS)}"
        )
    return Bench(checkpoint, layers, shapes, weights, options.device, options.rounds), options.out


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    pairs = [part.split("x") for part in text.split(",")]
    if not all(len(pair) == 2 and all(n.isdecimal() and int(n) for n in pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not shapes such as 1x32,32x128")
    return tuple((int(texts), int(tokens)) for texts, tokens in pairs)


def _measured(bench: Bench, layers: int) -> dict[str, Row]:
    """Return name -> what was measured of a depth."""
    with scratch_folder() as scratch:
        page.say(f"{layers} layers: loading")
        runs, rows = _candidates(bench, layers, scratch)
        inputs = dict(zip(bench.shapes, _ragged(bench.checkpoint, bench.shapes), strict=True))
        expected = _vectors(runs["sentence-transformers fp32"], inputs.values())
        found = {name: _vectors(run, inputs.values()) for name, run in runs.items()}
        seconds: dict[str, dict[tuple[int, int], list[float]]] = {name: {} for name in runs}
        for shape, batch in inputs.items():
            page.say(f"{layers} layers: {shape[0]}x{shape[1]}")
            for name, taken in _in_turns(runs, batch, bench.rounds).items():
                seconds[name][shape] = taken
    for name in runs:
        rows[name] = Row(seconds[name], float(cosines(expected, found[name]).min()))
    return rows


def _candidates(bench: Bench, layers: int, scratch: Path) -> tuple[dict[str, Run], dict[str, Row]]:
    """Return what can run, and a row with the reason for each that cannot."""
    dim = bench.checkpoint.dim
    sub_model = slice_checkpoint(bench.checkpoint, layers, dim, scratch / "sub-model").path
    runs: dict[str, Run] = {}
    rows: dict[str, Row] = {}
    makers: dict[str, Callable[[], Run]] = {
        f"sentence-transformers {name}": partial(_torch, sub_model, dtype, bench.device, None)
        for name, dtype in TYPES.items()
    }
    if any(find_spec(package) for package in UNPADDED):
        makers[f"{ANCHOR}, unpadded"] = partial(
            _torch, sub_model, torch.float16, bench.device, "flash_attention_2"
        )
    device = Device("CUDAExecutionProvider" if bench.device == "cuda" else "CPUExecutionProvider")
    for weights in bench.weights:
        makers[f"onnxruntime {weights}"] = partial(
            _onnxruntime, bench, layers, weights, device, scratch / f"onnx-{weights}"
        )
    makers["onnxruntime fp16, TensorRT's graph"] = partial(_typed_graph, bench, layers, device)
    for engine in ("tensorrt", "tensorrt-rtx"):
        for weights in bench.weights:
            makers[f"{engine} {weights}"] = partial(
                _tensorrt, bench, layers, engine, weights, scratch / f"{engine}-{weights}"
            )
    for name, make in makers.items():
        try:
            runs[name] = make()
        except Exception as error:  # a machine may lack anything; its words are the row
            rows[name] = Row({}, reason=" ".join(str(error).split())[:160])
    return runs, rows


def _torch(folder: Path, dtype: torch.dtype, device: str, attention: str | None) -> Run:
    from sentence_transformers import SentenceTransformer

    options = {"dtype": dtype, **({"attn_implementation": attention} if attention else {})}
    model = SentenceTransformer(str(folder), device=device, model_kwargs=options)

    made: dict[int, Mapping[str, object]] = {}  # what its own tokenizer makes of the texts

    def run(batch: Batch) -> NDArray[np.float32]:
        if id(batch) not in made:
            made[id(batch)] = model.preprocess(list(batch.texts))
        features = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in made[id(batch)].items()
        }
        with torch.inference_mode():
            vectors = model(features)["sentence_embedding"]
        found: NDArray[np.float32] = vectors.float().cpu().numpy()
        return found

    run(Batch(("a text", "another one"), np.zeros((0, 0), int), np.zeros((0, 0), int)))
    return run


def _onnxruntime(bench: Bench, layers: int, weights: str, device: Device, out: Path) -> Run:
    recipe = Recipe("onnx", weights=weights, device=device)  # type: ignore[arg-type]
    built = build_artifact(bench.checkpoint, layers, bench.checkpoint.dim, out, recipe)
    encoder = load(built.path)
    return lambda batch: encoder.run(batch.ids, batch.mask)


def _typed_graph(bench: Bench, layers: int, device: Device) -> Run:
    """Run the float16 graph that TensorRT gets: its types are explicit, and so computed in."""
    maker = engine_maker("tensorrt")
    source = export_source(bench.checkpoint, (layers,), bench.checkpoint.dim, "tensorrt")
    graph = maker.quantize(source.vectors_at(layers), "fp16")
    files = {"model.onnx": maker.files(graph)["model.onnx"]}
    runner = engine_runner("onnx")
    session = runner.load(files, device, "portable")
    return lambda batch: runner.run(session, batch.ids, batch.mask)[0]


def _tensorrt(bench: Bench, layers: int, engine: str, weights: str, out: Path) -> Run:
    if bench.device == "cpu":
        raise M2DError("needs a GPU")
    compilation = Compilation(shapes=bench.shapes)
    recipe = Recipe(engine, weights=weights, compilation=compilation)  # type: ignore[arg-type]
    built = build_artifact(bench.checkpoint, layers, bench.checkpoint.dim, out, recipe)
    encoder = load(built.path, Device("CUDA"))
    return lambda batch: encoder.run(batch.ids, batch.mask)


def _ragged(checkpoint: Checkpoint, shapes: Sequence[tuple[int, int]]) -> list[Batch]:
    """Return texts of between a quarter of each shape's tokens and all of them."""
    tokenizer = load_tokenizer(sealed_tokenizer_json(checkpoint.path, checkpoint.max_length))
    text = " ".join(calibration_texts())
    tokenizer.no_truncation()
    ends = [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]
    specials = tokenizer.num_special_tokens_to_add(False)
    random, batches = np.random.default_rng(0), []
    for count, tokens in shapes:
        lengths = random.integers(max(1, tokens // 4), tokens + 1, count)
        lengths[0] = tokens
        starts = random.integers(0, len(ends) - tokens, count)
        texts = [
            text[ends[start] : ends[start + max(1, length - specials)]].strip()
            for start, length in zip(starts, lengths, strict=True)
        ]
        encoded = [each.ids[:tokens] for each in tokenizer.encode_batch(texts)]
        ids, mask = padded(encoded, 0)
        batches.append(Batch(tuple(texts), ids, mask))
    return batches


def _vectors(run: Run, batches: Iterable[Batch]) -> NDArray[np.float32]:
    return np.concatenate([run(batch) for batch in batches])


def _in_turns(runs: Mapping[str, Run], batch: Batch, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each candidate, in rounds in which all run once."""
    names, order = list(runs), np.random.default_rng(0)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(WARM_UPS + rounds):
        for index in order.permutation(len(names)):
            start = time.perf_counter()
            runs[names[index]](batch)
            if number >= WARM_UPS:
                taken[names[index]].append(time.perf_counter() - start)
    return taken


def _report(bench: Bench, sections: Mapping[int, Mapping[str, Row]]) -> Iterator[str]:
    gpu = torch.cuda.get_device_name() if bench.device == "cuda" else "no GPU"
    yield from page.heading(gpu, ("m2dexport", "torch", "sentence-transformers"))
    yield f"onnxruntime {engine_version('onnx')[1]} on its provider for the {bench.device.upper()}."
    yield from ("", f"Tokenizing takes {_tokenizing(bench):.1f} us a text more, on the CPU.")
    for layers, rows in sections.items():
        anchor = next(name for name in (f"{ANCHOR}, unpadded", ANCHOR) if name in rows)
        shapes = [f"{texts}x{tokens}" for texts, tokens in bench.shapes]
        yield from ("", f"### {layers} layers", "", f"Texts per second, and times {anchor}:", "")
        head = ("candidate", *shapes, "min cosine to fp32")
        yield from page.table(head, (_cells(name, row, rows[anchor]) for name, row in rows.items()))


def _cells(name: str, row: Row, anchor: Row) -> list[str]:
    if row.reason:
        return [name, row.reason]
    cells = [name]
    for shape, taken in row.seconds.items():
        ratio = np.median(np.array(anchor.seconds[shape]) / np.array(taken))
        cells.append(f"{shape[0] / float(np.median(taken)):,.0f}, {ratio:.2f}x")
    return [*cells, f"{row.cosine:.5f}"]


def _tokenizing(bench: Bench) -> float:
    """Return the microseconds of one text."""
    checkpoint, texts = bench.checkpoint, calibration_texts()
    tokenizer = load_tokenizer(sealed_tokenizer_json(checkpoint.path, checkpoint.max_length))
    tokenize(tokenizer, texts, "")
    start = time.perf_counter()
    tokenize(tokenizer, texts, "")
    return 1e6 * (time.perf_counter() - start) / len(texts)


if __name__ == "__main__":
    main()
