"""Fit the maps of a checkpoint's depths: what sub-models make of texts against the full depth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from m2dexport.align.fit import Fit, Fitting
from m2dexport.align.static import TokenTable
from m2dexport.align.texts import chunks_of, prompted, prompts_of
from m2dexport.checkpoint.open import Checkpoint
from m2dexport.cores import one_torch_thread
from m2dexport.progress import OnProgress
from m2dexport.reference.pooler import Reference
from m2dexport.vectors.codecs import normalize

Floats = NDArray[np.float32]
_CHUNK = 512


def fit_depths(
    checkpoint: Checkpoint,
    sub_models: Mapping[int, Checkpoint],
    table: TokenTable | None,
    dims: Sequence[int],
    texts: Iterable[str],
    on_progress: OnProgress = lambda *_: None,
) -> dict[tuple[int, int], Fit]:
    """Return (depth, dim) -> its fit, from one pass over texts.

    Each text is encoded once, behind one of the checkpoint's prompts, which take turns. All is
    computed in one thread: the maps must not depend on how many cores there are.

    Args:
        checkpoint: the full model.
        sub_models: depth -> what was cut out of it, of the whole width.
        table: its token table, to fit depth 0 as well; None leaves that out.
        dims: the dims to fit.
        texts: unlabelled; read once.
        on_progress: called as texts are done; their number is not known before.

    Raises:
        UsageError: when the texts are too few, cannot be read, or do not align a depth.
        CheckpointError: when a model cannot be loaded.
    """
    prompts = prompts_of(checkpoint)
    with one_torch_thread():
        whole = Reference(checkpoint, (checkpoint.layers,))
        references = {depth: Reference(sub, (depth,)) for depth, sub in sub_models.items()}
        widths = {depth: sub.dim for depth, sub in sub_models.items()}
        fitting = Fitting(
            widths if table is None else {**widths, 0: table.width}, dims, without_intercept=(0,)
        )
        depths = list(fitting.depths)
        done = 0
        for chunk in chunks_of(texts, _CHUNK):
            behind = list(prompted(chunk, prompts, done))
            inputs = {
                depth: normalize(_sorted_encode(reference, behind, depth))
                for depth, reference in references.items()
            }
            if table is not None:
                inputs[0] = table.inputs(behind)
            fitting.add(chunk, inputs, _sorted_encode(whole, behind, checkpoint.layers))
            done += len(chunk)
            on_progress("aligning", done, done)
    return {(depth, dim): fitting.fit(depth, dim) for depth in depths for dim in dims}


def _sorted_encode(reference: Reference, texts: Sequence[str], depth: int) -> Floats:
    """Encode texts in batches of similar length; a row per text, in the given order."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = reference.encode([texts[i] for i in order])[depth]
    vectors = np.empty_like(found)
    vectors[order] = found
    return vectors
