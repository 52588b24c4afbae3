"""What flows through a graph on calibration texts: rows of the values that are to be quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from m2dexport.batches import padded
from m2dexport.cores import at_once, side_by_side
from m2dexport.errors import UsageError

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
#: From int64 (batch, sequence) ids and mask to a graph's outputs; what makes a graph ready so.
Run = Callable[[Ids, Ids], Sequence[NDArray[Any]]]
Load = Callable[[ir.Model], Run]

_BATCH = 16
_SEED = 0
#: Rows kept of each value. Their number must not depend on the graph: a depth is quantized alike in
#: the graph of all depths and alone.
_ROWS = 2048
MIN_TOKENS = 256


@dataclass(frozen=True)
class CalibrationTokens:
    """Tokenized texts that weights are fitted to."""

    ids: Sequence[Sequence[int]]  # of each text, specials included
    pad_id: int


def collect_activations(
    model: ir.Model, values: Sequence[ir.Value], calibration: CalibrationTokens, load: Load
) -> Mapping[str, Floats]:
    """Return value name -> float32 (rows, width): one row a token, the same tokens for all values.

    Args:
        model: a float32 graph; it is not changed.
        values: float32 (batch, sequence, width) values of it.
        calibration: the texts; padding leaves no row.
        load: what makes the graph, with these values among its outputs, ready to run.

    Raises:
        UsageError: when the texts have fewer than 256 tokens together, or a value is not finite.
    """
    tokens = sum(max(1, len(text)) for text in calibration.ids)  # as padded makes them
    if tokens < MIN_TOKENS:
        raise UsageError(
            f"the calibration texts have {tokens} tokens; int8 weights need {MIN_TOKENS} or more."
        )
    names = [str(value.name) for value in values]
    run = load(_with_outputs(model, names))
    chosen = np.zeros(tokens, dtype=bool)
    chosen[np.random.default_rng(_SEED).permutation(tokens)[:_ROWS]] = True
    batches = _batches(calibration, chosen)

    def rows_of(batch: _Batch) -> tuple[list[Floats], int]:
        outputs = run(batch.input_ids, batch.mask)[-len(names) :]
        token_bytes = sum(output.nbytes for output in outputs) // batch.mask.size
        return [batch.rows_of(output) for output in outputs], token_bytes

    first, token_bytes = rows_of(batches[0])
    most = token_bytes * batches[-1].mask.size
    others = side_by_side(rows_of, batches[1:], at_once(most))
    by_batch = [first, *(rows for rows, _ in others)]
    found = {name: np.concatenate(rows) for name, *rows in zip(names, *by_batch, strict=True)}
    for name, values_found in found.items():
        if not np.isfinite(values_found).all():
            raise UsageError(f"{name} is not finite on the calibration texts; check the weights.")
    return found


@dataclass(frozen=True)
class _Batch:
    """Texts of similar length."""

    input_ids: Ids
    mask: Ids
    chosen: NDArray[np.bool_]  # (tokens,), those whose rows are kept
    is_first: bool

    def rows_of(self, output: NDArray[Any]) -> Floats:
        """Return the rows of the chosen tokens.

        What is the same for every text, such as a table of relative positions, is taken from the
        first batch.
        """
        if output.shape[:2] == self.mask.shape:
            return output[self.mask.astype(bool)][self.chosen]  # type: ignore[no-any-return]
        rows: Floats = output.reshape(-1, output.shape[-1])
        return rows if self.is_first else rows[:0]


def _batches(calibration: CalibrationTokens, chosen: NDArray[np.bool_]) -> list[_Batch]:
    """Return the texts in batches, the shortest first."""
    order = sorted(calibration.ids, key=len)
    batches, seen = [], 0
    for start in range(0, len(order), _BATCH):
        input_ids, mask = padded(order[start : start + _BATCH], calibration.pad_id)
        tokens = int(mask.sum())
        batches.append(_Batch(input_ids, mask, chosen[seen : seen + tokens], start == 0))
        seen += tokens
    return batches


def _with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    model = model.clone()
    made = {output.name: output for node in model.graph for output in node.outputs}
    for name in names:
        made[name].type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(made[name])
    return model
