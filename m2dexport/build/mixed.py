"""Mixed precision: which layers stay in float32, so that what quantizing costs is within a limit.

What is decided about is a unit (``quantize.units``): the weights that share an input, such as those
of Q, K and V. All units are quantized once, each as if it were the only one; any of them can then
be put back.

1. A unit's **sensitivity** is how far texts' vectors turn when it alone is quantized.
2. The units that stay in float32 are the k most sensitive ones.
3. k is the smallest that a binary search finds to be within the limit. Quality need not fall evenly
   as k shrinks, so that a smaller k may do which was not looked at; the one taken was measured.

The limit is a drop of quality that the user allows (``mix_precision``), or else, of int8, how near
vectors must stay to those of fp32 (``close_gap``).

Vectors that decide are computed by sessions of one thread, since the order of a sum depends on how
many there are. So cores are kept busy with several batches, and several graphs, at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from m2dexport.batches import encode_tokens
from m2dexport.cores import at_once, side_by_side, usable_cores
from m2dexport.errors import M2DError
from m2dexport.graph.edit import large_weights, table_users
from m2dexport.progress import OnProgress
from m2dexport.quantize.units import restore, units_of
from m2dexport.runtime.encoder import Encoder
from m2dexport.vectors.codecs import cosines
from m2dexport.vectors.quality import evaluate
from m2dexport.vectors.tasks import Task

Floats = NDArray[np.float32]
Text = TypeVar("Text")
Measured = TypeVar("Measured")
#: From a graph, texts and how many batches to run at once to (texts, width) vectors, normalised.
Encode = Callable[[ir.Model, Sequence[Text], int], Floats]

#: Calibration texts, at most, that fidelity and the sensitivities a user asked for are measured on.
_TEXTS = 256
#: Likewise, of the sensitivities that nobody asked for.
_FEW_TEXTS = 64
#: Texts run together where vectors decide: little padding, and batches enough for many cores.
BATCH = 8
_COPIES = 2  # of its weights, in memory while a graph is loaded


@dataclass(frozen=True)
class QualityLimit:
    """How much quality quantized weights may cost, and what that is measured on."""

    max_drop: float  # points below fp32, of the mean of the tasks' main metrics
    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Drop:
    """What a ``QualityLimit`` came to. Qualities are points, of float32 vectors."""

    max_drop: float
    fp32: float
    quantized: float  # with all units quantized
    mixed: float

    def sentence(self, weights: str) -> str:
        """Return it as one line."""
        return (
            f"quality: {self.fp32:.2f} in fp32, {self.quantized:.2f} in {weights}, "
            f"{self.mixed:.2f} mixed; --max-drop {self.max_drop:g} allows "
            f"{self.fp32 - self.max_drop:.2f}"
        )


@dataclass(frozen=True)
class Fidelity:
    """Cosines of texts' vectors to those in fp32."""

    mean: float
    minimum: float

    def reaches(self, floor: Fidelity) -> bool:
        """Whether neither cosine is below that of the floor."""
        return self.mean >= floor.mean and self.minimum >= floor.minimum

    def __str__(self) -> str:
        return f"{self.mean:.5f} / {self.minimum:.5f}"


#: What int8 keeps of fp32 on ``floor_texts``, at the full width of a depth.
FLOOR = Fidelity(mean=0.999, minimum=0.995)


@dataclass(frozen=True)
class Gap:
    """What closing int8's gap to its floor came to."""

    quantized: Fidelity  # with all units quantized
    mixed: Fidelity

    def sentence(self, weights: str) -> str:
        """Return it as one line."""
        return (
            f"mean / minimum cosine to fp32 of the calibration texts: {self.quantized} in "
            f"{weights}, {self.mixed} mixed; at least {FLOOR} is required"
        )


@dataclass(frozen=True)
class Unit:
    """The weights that share an input, and what quantizing them alone does."""

    name: str  # of the first weight
    weights: tuple[str, ...]
    share: float  # of the bytes of all weights in float32, 0..1
    sensitivity: float  # 1 - mean cosine; the embedding tables are quantized before and after
    kept: bool  # in float32


@dataclass(frozen=True)
class Mixture:
    """What was measured and decided."""

    units: tuple[Unit, ...]  # most sensitive first
    tables_share: float  # of the bytes of all weights in float32, 0..1
    tables_sensitivity: float  # 1 - mean cosine, with nothing else quantized
    result: Drop | Gap

    @property
    def kept(self) -> frozenset[str]:
        """Names of the weights that stay in float32."""
        return frozenset(name for unit in self.units if unit.kept for name in unit.weights)


def mix_precision(
    original: ir.Model,
    quantized: ir.Model,
    load: Callable[[ir.Model], Encoder],
    texts: Sequence[str],
    limit: QualityLimit,
    on_progress: OnProgress = lambda *_: None,
) -> tuple[ir.Model, Mixture]:
    """Return a quantized graph with the units in float32 that the limit asks for, and the reasons.

    Args:
        original: the float32 graph, of one normalised output.
        quantized: the same graph, quantized.
        load: makes such a graph ready to run, in one thread.
        texts: calibration texts, of which up to 256 measure sensitivities.
        limit: the drop of quality that is allowed, and the tasks that measure it.
        on_progress: called at every step.

    Raises:
        M2DError: when the embedding tables alone cost more quality than the limit allows.
    """
    few = _some(texts, _TEXTS)

    def encode(graph: ir.Model, texts: Sequence[str], workers: int) -> Floats:
        return encoded(load(graph), texts, workers)

    ranked = _rank(original, quantized, encode, few, on_progress)
    fp32 = _quality(load(original), limit.tasks)
    qualities: dict[int, float] = {}
    count = ranked.fewest_kept(
        lambda graph: _quality(load(graph), limit.tasks),
        lambda quality: fp32 - quality <= limit.max_drop,
        qualities,
        on_progress,
    )
    if count is None:
        raise M2DError(
            f"quality drops by {fp32 - qualities[len(ranked.turns)]:.2f} points when nothing but "
            f"the embedding tables is quantized, and --max-drop allows {limit.max_drop:g}; allow "
            "more, or choose other weights, such as fp16."
        )
    drop = Drop(limit.max_drop, fp32, quantized=qualities[0], mixed=qualities[count])
    return ranked.keeping(count), ranked.mixture(count, drop)


def close_gap(
    original: ir.Model,
    quantized: ir.Model,
    encode: Encode[Text],
    texts: Sequence[Text],
    on_progress: OnProgress = lambda *_: None,
) -> tuple[ir.Model, Mixture | None]:
    """Return a quantized graph with as few units in float32 as bring its vectors to ``FLOOR``.

    Args:
        original: the float32 graph.
        quantized: the same graph, quantized.
        encode: runs such a graph, in threads that run a batch each; which texts run together must
            not depend on how many do.
        texts: calibration texts, of which up to 256 measure fidelity and 64 sensitivities.
        on_progress: called at every step.

    Returns:
        The graph, and what was decided: None where all units are quantized.

    Raises:
        M2DError: when the embedding tables alone miss the floor.
    """
    measured, few, cores = floor_texts(texts), _some(texts, _FEW_TEXTS), usable_cores()
    exact = encode(original, measured, cores)
    before = _fidelity(exact, encode(quantized, measured, cores))
    if before.reaches(FLOOR):
        return quantized, None
    ranked = _rank(original, quantized, encode, few, on_progress)
    found = {0: before}
    count = ranked.fewest_kept(
        lambda graph: _fidelity(exact, encode(graph, measured, cores)),
        lambda fidelity: fidelity.reaches(FLOOR),
        found,
        on_progress,
    )
    if count is None:
        raise M2DError(
            f"the mean / minimum cosine to fp32 is {found[len(ranked.turns)]} when nothing but the "
            f"embedding tables is quantized, and int8 keeps {FLOOR}; choose other weights, such as "
            "fp16, or a drop of quality to allow by --max-drop."
        )
    return ranked.keeping(count), ranked.mixture(count, Gap(before, found[count]))


def encoded(
    encoder: Encoder, texts: Sequence[str], workers: int, prompt: str | None = None
) -> Floats:
    """Return the vectors of texts, of which the same run together whatever the number of workers.

    Args:
        encoder: of float32 vectors.
        texts: any number but none.
        workers: batches that run at once.
        prompt: as for ``Encoder.encode``.
    """
    ids, spec = encoder.tokenize(texts, prompt=prompt), encoder.spec
    size = BATCH if spec.batch_invariant else 1
    vectors = encode_tokens(encoder.run, ids, spec.pad_id, size, workers)
    assert vectors is not None
    return vectors


def floor_texts(texts: Sequence[Text]) -> Sequence[Text]:
    """Return the calibration texts, 256 at most, on which int8 must reach its floor."""
    return _some(texts, _TEXTS)


def reaches_floor(exact: Floats, found: Floats) -> bool:
    """Whether int8 keeps what it must of these vectors, (texts, width), normalised."""
    return _fidelity(exact, found).reaches(FLOOR)


def _fidelity(exact: Floats, found: Floats) -> Fidelity:
    kept = cosines(exact, found)
    return Fidelity(float(kept.mean()), float(kept.min()))


def fewest(fits: Callable[[int], bool], most: int) -> int | None:
    """Return the smallest number of 0 to ``most`` that a binary search finds to fit, if any does.

    The number returned was asked about. Where more numbers fit, it is never larger.
    """
    if fits(0):
        return 0
    if not fits(most):
        return None
    return 1 + bisect_left(range(1, most), True, key=fits)


@dataclass(frozen=True)
class _Ranked:
    """A graph's units, most sensitive first, any number of which can be put back."""

    original: ir.Model
    quantized: ir.Model
    weights: Mapping[str, tuple[str, ...]]  # unit -> its weights
    turns: Mapping[str, float]  # unit -> sensitivity, falling
    tables_turn: float

    def keeping(self, count: int) -> ir.Model:
        """Return the quantized graph with so many units in float32."""
        kept = [name for unit in list(self.turns)[:count] for name in self.weights[unit]]
        return restore(self.quantized, self.original, kept)

    def fewest_kept(
        self,
        measure: Callable[[ir.Model], Measured],
        enough: Callable[[Measured], bool],
        found: dict[int, Measured],
        on_progress: OnProgress,
    ) -> int | None:
        """Return how many units must stay in float32, as ``fewest`` finds it.

        Args:
            measure: what to find out about a graph.
            enough: whether that is within the limit.
            found: what was measured, by how many units stay in float32; it is added to.
            on_progress: called at every step.
        """
        steps = 2 + len(self.turns).bit_length()  # that ``fewest`` takes at most

        def fits(count: int) -> bool:
            if count not in found:
                on_progress("choosing", len(found), steps)
                found[count] = measure(self.keeping(count))
            return enough(found[count])

        return fewest(fits, len(self.turns))

    def mixture(self, count: int, result: Drop | Gap) -> Mixture:
        share = _shares(self.original.graph)
        units = tuple(
            Unit(unit, self.weights[unit], share(self.weights[unit]), turn, kept=index < count)
            for index, (unit, turn) in enumerate(self.turns.items())
        )
        return Mixture(units, share(_tables(self.original.graph)), self.tables_turn, result)


def _rank(
    original: ir.Model,
    quantized: ir.Model,
    encode: Encode[Text],
    texts: Sequence[Text],
    on_progress: OnProgress,
) -> _Ranked:
    weights = units_of(original.graph)
    every = frozenset(name for names in weights.values() for name in names)
    sizes = _float_sizes(original.graph)
    cores, tries = usable_cores(), at_once(_COPIES * sum(sizes[name] for name in every))

    def quantizing(names: Sequence[str]) -> Floats:
        graph = restore(quantized, original, every.difference(names))
        return encode(graph, texts, cores // tries)

    on_progress("measuring sensitivities", 0, len(weights))
    found = side_by_side(quantizing, [(), *weights.values()], tries)
    tables_only = next(found)
    turns: dict[str, float] = {}
    for unit, vectors in zip(weights, found, strict=True):
        turns[unit] = _turn(tables_only, vectors)
        on_progress("measuring sensitivities", len(turns), len(weights))
    falling = dict(sorted(turns.items(), key=lambda item: -item[1]))
    tables_turn = _turn(encode(original, texts, cores), tables_only)
    return _Ranked(original, quantized, weights, falling, tables_turn)


def _some(texts: Sequence[Text], most: int) -> Sequence[Text]:
    return texts[:: -(-len(texts) // most)]


def _turn(one: Floats, other: Floats) -> float:
    """Return 1 - mean cosine."""
    return float(1 - cosines(one, other).mean())


def _quality(encoder: Encoder, tasks: Sequence[Task]) -> float:
    """Return the mean of the tasks' main metrics, in points."""
    prompts, cores = encoder.spec.prompts, usable_cores()
    points = []
    for task in tasks:
        vectors = [
            encoded(encoder, part.texts, cores, part.role if part.role in prompts else None)
            for part in task.texts()
        ]
        points.append(evaluate(task, vectors, encoder.spec.dim, "float32")[task.main_metric])
    return float(np.mean(points))


def _shares(graph: ir.Graph) -> Callable[[Sequence[str]], float]:
    """Return a function from names to their weights' share of the bytes of all in float32."""
    sizes = _float_sizes(graph)
    return lambda names: sum(sizes[name] for name in names) / sum(sizes.values())


def _float_sizes(graph: ir.Graph) -> dict[str, int]:
    """Return the bytes of every constant in float32, by name."""
    tensors = {name: value.const_value for name, value in graph.initializers.items()}
    return {
        name: tensor.nbytes
        for name, tensor in tensors.items()
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT
    }


def _tables(graph: ir.Graph) -> list[str]:
    return [str(value.name) for value in large_weights(graph) if table_users(value)]
