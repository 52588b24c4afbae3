"""The recipe of an artifact: engine, device, precisions, and what it must then fulfil."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from m2dexport.build.mixed import QualityLimit
from m2dexport.data import calibration_texts
from m2dexport.engines import (
    DEFAULT_ENGINE,
    ENGINES,
    Compilation,
    Device,
    engine_maker,
    here,
)
from m2dexport.errors import UsageError
from m2dexport.precisions import (
    BIT_ORDERS,
    ISAS,
    VECTOR_PRECISIONS,
    BitOrder,
    Isa,
    VectorPrecision,
    WeightPrecision,
)
from m2dexport.quantize.recipes import require_precision
from m2dexport.runtime.artifact import Loss
from m2dexport.runtime.index import Index
from m2dexport.vectors.codecs import PER_BYTE

#: Share of the weight bytes that a precision must reach unless another is asked for.
MIN_COVERAGE = 0.9


@dataclass(frozen=True)
class Recipe:
    """How an artifact is made from a float32 graph, and what it must then fulfil."""

    engine: str = DEFAULT_ENGINE
    #: What the artifact is checked on, and made for.
    device: Device = Device()
    weights: WeightPrecision = "fp32"
    #: Which processors int8 weights are made for.
    isa: Isa = "portable"
    vectors: VectorPrecision = "float32"
    #: Where the first dim of a packed byte goes, of int4, ubinary and binary vectors.
    bit_order: BitOrder = "big"
    #: Texts that weights and the ranges of vectors are fitted to; None: the shipped ones.
    calibration: Sequence[str] | None = None
    #: Share of the weight bytes, 0..1, that must be stored below float32, if any are.
    min_coverage: float = MIN_COVERAGE
    #: Accept weights with which a text's vector depends on its batch; such an artifact runs one
    #: text at a time.
    allow_batch_dependent: bool = False
    #: How far quantized weights may drop quality; it decides which stay in float32. Without, those
    #: of int8 do that ``mixed.close_gap`` names, usually none.
    limit: QualityLimit | None = None
    #: Texts that an aligned depth's map is fitted on, iterated up to three times; None: the shipped
    #: ones.
    align_texts: Iterable[str] | None = field(default=None, hash=False)
    #: The index that the vectors are to be put to, whose ranges they take; None: none, or, of an
    #: aligned sub-model, one that the full model writes in fp32.
    index: Index | None = field(default=None, hash=False)
    #: Made for another machine's device: where this one lacks it, checked on the engine's oracle.
    elsewhere: bool = False
    #: What an engine for a GPU is compiled for; others have no use for it.
    compilation: Compilation = Compilation()
    #: What queries lose on an index, by the weights of what wrote it, from a profile.
    losses: Mapping[WeightPrecision, dict[str, Loss]] = field(default_factory=dict, hash=False)

    def checked_on(self, threads: int | None = None) -> Device:
        """Return what the artifact is checked on: its device, or the oracle where there is no GPU.

        Args:
            threads: of the sessions; None: those of the device.
        """
        device = replace(self.device, threads=threads) if threads else self.device
        return here(self.engine, device, elsewhere=self.elsewhere).device

    def texts(self) -> Sequence[str]:
        """Return the calibration texts."""
        return calibration_texts() if self.calibration is None else self.calibration


def require_recipe(recipe: Recipe) -> None:
    """Refuse a recipe that makes no sense, or that an engine does not run.

    Raises:
        UsageError: naming the value.
        MissingExtra: when the engine is not installed.
    """
    engine, weights, isa, limit = recipe.engine, recipe.weights, recipe.isa, recipe.limit
    known = engine_maker(engine).PRECISIONS
    require_precision(weights, engine, known)
    recipe.checked_on()
    if ENGINES[engine].on_gpu:
        engine_maker(engine).require_compilation(recipe.compilation)
    elif recipe.compilation != Compilation():
        raise UsageError(f"--gpu, --compatible and --with-engine do not go with {engine}.")
    if isa not in ISAS:
        raise UsageError(f"--isa {isa!r} is unknown; choose from {', '.join(ISAS)}.")
    if isa not in known[weights].isas:
        raise UsageError(f"--isa {isa} does not go with --weights {weights} on {engine}.")
    if not 0 <= recipe.min_coverage <= 1:
        raise UsageError(
            f"--min-coverage {recipe.min_coverage:g} is not a share; give one from 0 to 1."
        )
    if recipe.vectors not in VECTOR_PRECISIONS:
        raise UsageError(
            f"--vectors {recipe.vectors!r} is unknown; choose from {', '.join(VECTOR_PRECISIONS)}."
        )
    if recipe.bit_order not in BIT_ORDERS:
        raise UsageError(
            f"--bit-order {recipe.bit_order!r} is unknown; choose from {', '.join(BIT_ORDERS)}."
        )
    if recipe.bit_order != "big" and recipe.vectors not in PER_BYTE:
        raise UsageError(
            f"--bit-order goes with packed vectors ({', '.join(PER_BYTE)}), not {recipe.vectors}."
        )
    if limit is not None and not 0 <= limit.max_drop < math.inf:
        raise UsageError(
            f"--max-drop {limit.max_drop:g} is not a number of points; give 0 or more, such as 0.5."
        )
    if limit is not None and not known[weights].mixable:
        mixable = ", ".join(name for name, needed in known.items() if needed.mixable)
        if not mixable:
            raise UsageError(
                f"--max-drop has no meaning on {recipe.engine}, which keeps no weights in float32 "
                "beside others; leave it out."
            )
        raise UsageError(f"--max-drop goes with --weights {mixable}, not with {weights}.")
