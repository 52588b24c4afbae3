"""TensorRT-RTX: graphs made for it; what a build needs."""

from __future__ import annotations

from functools import partial

from m2dexport.engines.tensorrt.graphs import (
    compiled_files,
    graph_files,
    hide_keys_finitely,
    quantized,
    require_compilation_of,
    requirements,
)

PRECISIONS = requirements("1.7")
fuse = hide_keys_finitely
quantize = partial(quantized, "tensorrt-rtx", PRECISIONS)
files = partial(graph_files, "tensorrt-rtx")
require_compilation = partial(require_compilation_of, "tensorrt-rtx")
compiled = compiled_files
