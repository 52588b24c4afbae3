"""Do the depths of a checkpoint look trained? What can be seen without labelled texts.

Training an embedding spreads the vectors of texts that have nothing in common; the layers of a
backbone that no loss of embeddings looked at keep them in a narrow cone (Ethayarajh 2019,
arXiv 1909.00512). Measured over 118 of the sentences that ship: a 2D Matryoshka checkpoint (the one
that ships) has mean cosines of .08 to .15 at depths 1 to 5 and .04 at depth 6; all-MiniLM-L6-v2, of
which only depth 6 was trained, .53 to .60 and .02. The threshold lies between their differences.
With random weights the cosines are .93 at every depth, the full one too: there is no verdict then.
What neighbours a depth shares with the full one is shown and not judged: depths with random weights
share more of them (.82 to .91) than trained ones do (.55 to .69).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from m2dexport.checkpoint.open import Checkpoint
from m2dexport.progress import OnProgress
from m2dexport.reference.pooler import Reference
from m2dexport.vectors.codecs import normalize
from m2dexport.vectors.ranking import rank

NEIGHBOURS = 10
_CONE = 0.3  # how much larger than the full depth's a mean cosine may be
_SPREAD = 0.5  # a full depth above says nothing of the others
_BATCH = 16


@dataclass(frozen=True)
class DepthLook:
    """What the vectors of one depth look like, at full width."""

    layers: int
    mean_cosine: float  # between different texts
    neighbours: float  # share of the full depth's 10 nearest neighbours among its own, 0 to 1


def look_at_depths(
    checkpoint: Checkpoint, texts: Sequence[str], on_progress: OnProgress = lambda *_: None
) -> tuple[DepthLook, ...]:
    """Return what each depth's vectors of some texts look like, depth 1 first.

    Args:
        checkpoint: a transformer; it is loaded and run by torch.
        texts: more than 10, different from each other.
        on_progress: called as texts are encoded.
    """
    reference = Reference(checkpoint)
    parts = []
    for start in range(0, len(texts), _BATCH):
        parts.append(reference.encode(texts[start : start + _BATCH], batch_size=_BATCH))
        on_progress("texts encoded", min(start + _BATCH, len(texts)), len(texts))
    vectors = {n: normalize(np.concatenate([part[n] for part in parts])) for n in parts[0]}
    itself = np.arange(len(texts))
    found = {n: rank(rows, rows, NEIGHBOURS, itself) for n, rows in vectors.items()}
    full = found[checkpoint.layers]
    looks = []
    for n, rows in vectors.items():
        cosines = (rows @ rows.T)[np.triu_indices(len(rows), 1)]
        shared = [np.isin(own, best).mean() for own, best in zip(found[n], full, strict=True)]
        looks.append(DepthLook(n, float(cosines.mean()), float(np.mean(shared))))
    return tuple(looks)


def no_verdict(looks: Sequence[DepthLook]) -> str | None:
    """Return why it cannot be seen whether depths were trained, None where it can."""
    full = looks[-1]
    if full.mean_cosine <= _SPREAD:
        return None
    return (
        f"Whether depths were trained cannot be seen: different texts have a mean cosine of "
        f"{full.mean_cosine:.2f} already at depth {full.layers}."
    )


def doubt(looks: Sequence[DepthLook]) -> str | None:
    """Return a sentence on the depths that do not look trained, None without any or a verdict."""
    *shallow, full = looks
    narrow = [look for look in shallow if look.mean_cosine - full.mean_cosine > _CONE]
    if not narrow or no_verdict(looks):
        return None
    named = ", ".join(str(look.layers) for look in narrow)
    cosines = [look.mean_cosine for look in narrow]
    return (
        f"depths {named} do not look trained: different texts have mean cosines of "
        f"{min(cosines):.2f} to {max(cosines):.2f} there, and {full.mean_cosine:.2f} at depth "
        f"{full.layers}; profile before you ship one."
    )
