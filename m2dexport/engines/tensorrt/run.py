"""TensorRT: build an engine for the GPU at hand and run it; what a device needs."""

from __future__ import annotations

from functools import partial

import tensorrt  # noqa: F401  a missing package is said where the engine is asked for

from m2dexport.engines.tensorrt.load import (
    describe_session,
    load_session,
    providers,
    require_provider,
    run_session,
)

devices = partial(providers, "tensorrt")
require_device = partial(require_provider, "tensorrt")
load = partial(load_session, "tensorrt")
run = run_session
describe = describe_session
