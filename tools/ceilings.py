"""What this processor can do at most, and how far above that our graphs run.

    python tools/ceilings.py [--model CHECKPOINT] [--layers 2,6] [--shapes 1x16,32x32]

Ceilings: the fastest of many runs of single matrix products, float32 and 8-bit, as large squares
and at the shapes that the model has, and of a copy of memory. onnxruntime's threads spin meanwhile.

Floor of a graph at a shape: the operations of its products at the highest rate that any product of
their type reached; or, if that is longer, the time to move all that must be read (weights, once,
and the table rows of the tokens) at the rate of a copy of that size. No graph that does the same
work can be faster. "Products alone" is what onnxruntime takes for these products one by one, with
their weights in the cache, and attention as if it had one head. What a graph computes is read from
onnxruntime's profile of a run.

Time by operator: the median of each node over profiled runs, summed. The profiler itself takes some
microseconds per node, so shares are more telling than sums. Writes Markdown.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import page
import torch
from numpy.typing import NDArray
from products import Product, cpu_session, in_numpy, in_onnxruntime, in_torch, least_seconds
from threadpoolctl import threadpool_limits

from m2dexport import Device, Recipe, build_artifact, load, open_checkpoint, quantize_artifact
from m2dexport.build.build import Artifact
from m2dexport.files import require_file, scratch_folder

COPIES = (1, 4, 16, 64, 256)  # MiB that a copy reads and writes together; caches hold the first
RUNS, MOST_SECONDS = 200, 4.0  # of a graph, timed and then profiled
SMALL = 0.1  # products below this share of a graph's largest one are not worth a row
WEIGHTS = ("fp32", "int8")
#: Operators that multiply two matrices; a weight that was packed at load has no shape in a profile.
PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "MatMulInteger", "MatMulIntegerToFloat")
BYTES = {"float": 4, "uint8": 1, "int8": 1}  # of one value

Feeds = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Node:
    """What onnxruntime's profile says of one node of a graph."""

    operator: str
    ms: float
    products: tuple[Product, ...]  # that it computes
    read: int  # bytes of weights, or of table rows


@dataclass(frozen=True)
class Cell:
    """One graph at one shape and number of threads."""

    layers: int
    weights: str
    batch: int
    length: int
    threads: int
    ms: float  # median of a run, without profiling
    nodes: tuple[Node, ...]

    @property
    def name(self) -> str:
        """The cell in words."""
        depth = f"{self.layers} layer{'s' if self.layers > 1 else ''}"
        size = f"{self.batch}x{self.length}"
        return f"{depth}, {self.weights}, {size}, {_threads(self.threads)}"

    @property
    def products(self) -> list[Product]:
        """All products of all nodes."""
        return [each for node in self.nodes for each in node.products]

    def operations(self, kind: str) -> int:
        """Return the operations of the products of one type, fp32 or int8."""
        return sum(each.operations for each in self.products if each.type == kind)

    @property
    def read(self) -> int:
        """Bytes of weights and table rows."""
        return sum(node.read for node in self.nodes)


@dataclass(frozen=True)
class Ceilings:
    """The least seconds that anything took, by number of threads."""

    products: Mapping[tuple[Product, str, int], float]  # and by library
    copies: Mapping[tuple[int, int], float]  # and by MiB, those of ``COPIES``

    def rate(self, kind: str, threads: int) -> float:
        """Return the most operations per second of products of one type, in so many threads."""
        return max(
            each.operations / seconds
            for (each, _, used), seconds in self.products.items()
            if each.type == kind and used <= threads
        )

    def floor(self, cell: Cell) -> float:
        """Return the milliseconds below which no graph with the cell's work can run."""
        kinds = {each.type for each in cell.products}
        computed = sum(cell.operations(kind) / self.rate(kind, cell.threads) for kind in kinds)
        size = min((mib for mib in COPIES if mib << 20 >= cell.read), default=COPIES[-1])
        moved = min(s for (m, used), s in self.copies.items() if m == size and used <= cell.threads)
        return 1e3 * max(computed, moved * cell.read / (size << 20))

    def alone(self, cell: Cell) -> float:
        """Return the milliseconds of the cell's products, each by itself."""
        return 1e3 * sum(self.products[each, "onnxruntime", cell.threads] for each in cell.products)


def main() -> None:
    """Build the graphs, profile them, measure the ceilings and write the tables."""
    options = _options()
    cells = _cells(options)
    squares = [Product(*[side] * 3, kind) for side in options.squares for kind in WEIGHTS]
    shown = sorted({*squares, *_large(cells)}, key=lambda each: (each.type, each.operations, each))
    ceilings = _ceilings(cells, shown, options.threads, options.rounds)
    page.write(_report(ceilings, cells, shown), options.out)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--model", help="folder or hub id; default: the checkpoint that ships")
    add("--layers", type=page.numbers, default=(2, 6), help="for example 2,6, the default")
    add("--shapes", type=_shapes, default=((1, 16), (32, 32)), help="default: 1x16,32x32")
    add("--threads", type=page.numbers, default=(1, 2), help="default: 1,2")
    add("--squares", type=page.numbers, default=(1024, 2048), help="sides; default: 1024,2048")
    add("--rounds", type=int, default=7, help="of each ceiling; the fastest run counts; default: 7")
    add("--out", type=Path, help="the Markdown file to write; default: standard output")
    options = parser.parse_args()
    if options.out is not None:
        require_file(options.out, force=True)
    return options


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    shapes = [tuple(map(int, each.split("x"))) for each in text.split(",")]
    return tuple((batch, length) for batch, length in shapes)


def _cells(options: argparse.Namespace) -> list[Cell]:
    checkpoint = open_checkpoint(options.model)
    rng = np.random.default_rng(0)
    inputs = [rng.integers(checkpoint.vocab_size, size=shape) for shape in options.shapes]
    found = []
    with scratch_folder() as scratch:
        for layers in options.layers:
            page.say(f"building {layers} layers")
            base = build_artifact(checkpoint, layers, checkpoint.dim, scratch / f"fp32-{layers}")
            recipe = Recipe(weights="int8", vectors="float32", min_coverage=0)
            quantized = quantize_artifact(base.path, scratch / f"int8-{layers}", recipe)
            graphs = zip(WEIGHTS, (base, quantized), strict=True)
            for (weights, built), ids in product(graphs, inputs):
                for threads in options.threads:
                    found.append(_cell(built, weights, ids, threads))
    return found


def _cell(built: Artifact, weights: str, ids: NDArray[np.int64], threads: int) -> Cell:
    """Time an artifact, then profile its graph on the same threads."""
    layers, (batch, length) = built.spec.layers, ids.shape
    page.say(f"{layers} layers, {weights}, {batch}x{length}, {_threads(threads)}")
    encoder = load(built.path, Device(threads=threads))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    taken = _times(partial(encoder.run, *feeds.values()))
    session = partial(cpu_session, str(built.path / "model.onnx"), threads)
    nodes = _profiled(session, feeds, len(taken))
    ms = 1e3 * float(np.median(taken))
    return Cell(layers, weights, batch, length, threads, ms, nodes)


def _times(run: Callable[[], object]) -> list[float]:
    """Return the seconds of many runs, after some that warm up."""
    start = time.perf_counter()
    taken: list[float] = []
    while len(taken) < RUNS and time.perf_counter() - start < MOST_SECONDS:
        before = time.perf_counter()
        run()
        taken.append(time.perf_counter() - before)
    return taken[len(taken) // 10 :]


def _profiled(
    session_of: Callable[[str], ort.InferenceSession], feeds: Feeds, runs: int
) -> tuple[Node, ...]:
    """Return the nodes of a graph as they ran, from a session that profiles to a path."""
    with tempfile.TemporaryDirectory() as folder:
        session = session_of(str(Path(folder) / "profile"))
        for _ in range(runs):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    of_node: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            of_node.setdefault(event["args"]["node_index"], []).append(event)
    return tuple(_node(runs) for runs in of_node.values())


def _node(events: Sequence[Mapping[str, Any]]) -> Node:
    """Return a node from its events, one per run."""
    facts = events[0]["args"]
    operator = facts["op_name"]
    ms = float(np.median([event["dur"] for event in events])) / 1e3
    inputs, outputs = (
        [_typed(each) for each in facts[f"{side}_type_shape"]] for side in ("input", "output")
    )
    products: tuple[Product, ...] = ()
    read = 0
    if operator in PRODUCTS:
        (type_, given), (_, result) = inputs[0], outputs[0]
        kind = "fp32" if type_ == "float" else "int8"
        products = (Product(int(np.prod(result[:-1])), given[-1], result[-1], kind),)
        read = products[0].inner * products[0].columns * BYTES[type_]
    elif operator == "MultiHeadAttention":
        (_, (texts, queries, width)), (_, (_, keys, _)) = inputs[:2]
        rows = texts * queries  # each attends to the tokens of its own text, all heads together
        products = (Product(rows, width, keys, "fp32"), Product(rows, keys, width, "fp32"))
    elif operator == "Gather" and outputs[0][0] in BYTES:
        read = int(np.prod(outputs[0][1])) * BYTES[outputs[0][0]]
    return Node(operator, ms, products, read)


def _typed(described: Mapping[str, list[int]]) -> tuple[str, list[int]]:
    """Return type and shape of a value, which a profile has as {type: shape}."""
    ((type_, shape),) = described.items()
    return type_, shape


def _ceilings(
    cells: Sequence[Cell], shown: Sequence[Product], threads: Sequence[int], rounds: int
) -> Ceilings:
    """Measure the products of all cells, and by all libraries those that are shown."""
    shapes = {*shown, *(each for cell in cells for each in cell.products)}
    least = partial(least_seconds, rounds=rounds)
    found: dict[tuple[Product, str, int], float] = {}
    copies = {}
    for count in threads:
        torch.set_num_threads(count)
        for each in sorted(shapes):
            page.say(f"{each.shape}, {each.type}, {_threads(count)}")
            found[each, "onnxruntime", count] = least(in_onnxruntime(each, count))
            if each.type == "fp32" and each in shown:
                found[each, "torch", count] = least(in_torch(each))
                with threadpool_limits(count):
                    found[each, "numpy", count] = least(in_numpy(each))
        for size in COPIES:
            source = torch.zeros((size << 20) // 8)  # half of the bytes are read, half written
            copies[size, count] = least(partial(torch.empty_like(source).copy_, source))
    return Ceilings(found, copies)


def _large(cells: Sequence[Cell]) -> set[Product]:
    """Return the products that a graph spends its time on, without slivers such as outliers'."""
    found: set[Product] = set()
    for cell in cells:
        most = max(each.operations for each in cell.products)
        found |= {each for each in cell.products if each.operations >= SMALL * most}
    return found


def _report(ceilings: Ceilings, cells: Sequence[Cell], shown: Sequence[Product]) -> Iterator[str]:
    threads = sorted({cell.threads for cell in cells})
    packages = ("m2dexport", "onnxruntime", "torch", "numpy")
    yield from page.heading(f"{', '.join(map(str, threads))} threads", packages)
    yield from ("", "### Ceilings", "", *_ceilings_table(ceilings, shown, threads))
    yield from ("", "### Time over the floor", "", *_floors_table(ceilings, cells))
    yield from ("", "### Time by operator")
    for cell in cells:
        if cell.threads == threads[-1]:
            yield from ("", f"{cell.name}: {cell.ms:.2f} ms", "", *_operators_table(cell))


def _ceilings_table(
    ceilings: Ceilings, shown: Sequence[Product], threads: Sequence[int]
) -> Iterator[str]:
    rows = []
    for each, library in product(shown, ("onnxruntime", "torch", "numpy")):
        if (each, library, threads[0]) in ceilings.products:
            taken = [ceilings.products[each, library, count] for count in threads]
            rates = [f"{each.operations / seconds / 1e9:.0f} Gop/s" for seconds in taken]
            rows.append((each.type, each.shape, library, *rates))
    for size in COPIES:
        taken = [ceilings.copies[size, count] for count in threads]
        rates = [f"{(size << 20) / seconds / 1e9:.1f} GB/s" for seconds in taken]
        rows.append(("copy", f"{size} MiB read and written", "torch", *rates))
    yield from page.table(("product", "size", "by", *map(_threads, threads)), rows)


def _floors_table(ceilings: Ceilings, cells: Sequence[Cell]) -> Iterator[str]:
    head = ("cell", "fp32 Mop", "int8 Mop", "MB read", "floor ms", "products alone ms")
    rows = []
    for cell in cells:
        floor = ceilings.floor(cell)
        work = [f"{cell.operations(kind) / 1e6:.2f}" for kind in WEIGHTS]
        times = [f"{ms:.2f}" for ms in (floor, ceilings.alone(cell), cell.ms)]
        over = f"{cell.ms / floor:.1f}x"
        rows.append((cell.name, *work, f"{cell.read / 1e6:.1f}", *times, over))
    yield from page.table((*head, "measured ms", "over the floor"), rows)


def _operators_table(cell: Cell) -> Iterator[str]:
    total = sum(node.ms for node in cell.nodes)
    of_type: dict[str, list[float]] = {}
    for node in cell.nodes:
        of_type.setdefault(node.operator, []).append(node.ms)
    rows = [
        (name, str(len(taken)), f"{sum(taken):.3f}", f"{sum(taken) / total:.1%}")
        for name, taken in sorted(of_type.items(), key=lambda each: -sum(each[1]))
    ]
    yield from page.table(("operator", "nodes", "ms", "share"), rows)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


if __name__ == "__main__":
    main()
