"""What the sub-models of each depth weigh."""

from __future__ import annotations

from dataclasses import dataclass

from m2dexport.checkpoint.open import Checkpoint


@dataclass(frozen=True)
class DepthSize:
    """What a sub-model of one depth weighs, as stored, without its head."""

    layers: int
    parameters: int
    bytes: int
    embedding_parameters: int  # of these, the token table's
    embedding_bytes: int


def depth_sizes(checkpoint: Checkpoint) -> list[DepthSize]:
    """Return parameters and bytes of the sub-model of each depth, 1 to N; of a static model, 0."""
    layout = checkpoint.layout
    sizes = []
    for depth in range(min(1, checkpoint.layers), checkpoint.layers + 1):
        tensors = layout.tensors(depth).values()
        table = [t for t in tensors if t.shape[:1] == (checkpoint.vocab_size,)]
        sizes.append(
            DepthSize(
                layers=depth,
                parameters=sum(t.parameters for t in tensors),
                bytes=sum(t.size for t in tensors),
                embedding_parameters=sum(t.parameters for t in table),
                embedding_bytes=sum(t.size for t in table),
            )
        )
    return sizes
