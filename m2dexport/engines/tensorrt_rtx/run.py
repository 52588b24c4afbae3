"""TensorRT-RTX: build an engine for the GPU at hand and run it; what a device needs."""

from __future__ import annotations

from functools import partial

import tensorrt_rtx_bindings  # noqa: F401  a missing package is said where the engine is asked for

from m2dexport.engines.tensorrt.load import (
    describe_session,
    load_session,
    providers,
    require_provider,
    run_session,
)

devices = partial(providers, "tensorrt-rtx")
require_device = partial(require_provider, "tensorrt-rtx")
load = partial(load_session, "tensorrt-rtx")
run = run_session
describe = describe_session
