"""Names that all packages share: precisions of weights and vectors, processors, similarities."""

from __future__ import annotations

from typing import Literal, get_args

#: What weights are stored in, and what is computed with; ``quantize`` describes each.
WeightPrecision = Literal[
    "fp32",
    "fp16",
    "bf16",
    "int8",
    "int8-dynamic",
    "int8-static",
    "int8-weight-only",
    "int4-weight-only",
]
WEIGHT_PRECISIONS: tuple[WeightPrecision, ...] = get_args(WeightPrecision)

#: What vectors are stored in; ``vectors.codecs`` describes each.
VectorPrecision = Literal["float32", "int8", "int8-symmetric", "int4", "ubinary", "binary"]
VECTOR_PRECISIONS: tuple[VectorPrecision, ...] = get_args(VectorPrecision)

#: Whether a depth ends in a map into the full depth's space.
Align = Literal["none", "full"]

#: Where the first dim of a packed byte goes. "big": the highest bits, as numpy.packbits,
#: sentence-transformers and usearch have it; "little": the lowest, as faiss packs.
BitOrder = Literal["big", "little"]
BIT_ORDERS: tuple[BitOrder, ...] = get_args(BitOrder)

#: The processors on which a graph's 8-bit products are exact at full speed. "portable": all;
#: "vnni": those with VNNI, and those that are no x86; the others need slower kernels.
Isa = Literal["portable", "vnni"]
ISAS: tuple[Isa, ...] = get_args(Isa)

#: What vectors are compared by, in sentence-transformers' words. Of vectors of length 1, dot and
#: cosine are the same.
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]  # sentence-transformers'
