"""How fast a single matrix product runs: in onnxruntime, numpy and torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

ROUND_SECONDS = 0.05  # how long a round repeats it, at least


@dataclass(frozen=True, order=True)
class Product:
    """One matrix product: (rows, inner) times (inner, columns)."""

    rows: int
    inner: int
    columns: int
    type: str  # fp32 or int8: uint8 by int8

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.inner * self.columns

    @property
    def shape(self) -> str:
        """The three sizes."""
        return f"{self.rows} x {self.inner} x {self.columns}"


def least_seconds(run: Callable[[], object], rounds: int) -> float:
    """Return the seconds of the fastest run."""
    least = float("inf")
    for _ in range(rounds):
        until = time.perf_counter() + ROUND_SECONDS
        while (start := time.perf_counter()) < until:
            run()
            least = min(least, time.perf_counter() - start)
    return least


def cpu_session(model: str | bytes, threads: int, profile: str = "") -> ort.InferenceSession:
    """Return a session on the CPU.

    Args:
        model: an ONNX file, by path or content.
        threads: of one operator.
        profile: path prefix of the profile that it writes; "" for none.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def in_onnxruntime(each: Product, threads: int) -> Callable[[], object]:
    """Return one run of a graph that is this product, its second factor a constant."""
    rng = np.random.default_rng(0)
    weight: NDArray[Any] = rng.standard_normal((each.inner, each.columns)).astype(np.float32)
    given: NDArray[Any] = rng.standard_normal((each.rows, each.inner)).astype(np.float32)
    constants = {"w": weight}
    type_, operator, inputs, domain = TensorProto.FLOAT, "MatMul", ["x", "w"], ""
    if each.type == "int8":
        given = rng.integers(0, 256, given.shape, dtype=np.uint8)
        constants = {
            "w": rng.integers(-64, 64, weight.shape, dtype=np.int8),
            "scale": np.float32(0.01),
            "scales": np.full(each.columns, 0.01, dtype=np.float32),
            "zero": np.uint8(128),
        }
        type_, operator, domain = TensorProto.UINT8, "MatMulIntegerToFloat", "com.microsoft"
        inputs = ["x", "w", "scale", "scales", "zero"]
    graph = helper.make_graph(
        [helper.make_node(operator, inputs, ["y"], domain=domain)],
        "product",
        [helper.make_tensor_value_info("x", type_, given.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [each.rows, each.columns])],
        [_constant(name, value) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = cpu_session(model.SerializeToString(), threads)
    return partial(session.run, None, {"x": given})


def _constant(name: str, value: Any) -> TensorProto:
    array = np.asarray(value)
    type_ = helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor(name, type_, array.shape, array.tobytes(), raw=True)


def in_numpy(each: Product) -> Callable[[], object]:
    """Return one run of a float32 product in numpy."""
    a, b = (
        np.ones(s, dtype=np.float32) for s in ((each.rows, each.inner), (each.inner, each.columns))
    )
    return partial(np.matmul, a, b, out=np.empty((each.rows, each.columns), dtype=np.float32))


def in_torch(each: Product) -> Callable[[], object]:
    """Return one run of a float32 product in torch."""
    a, b = torch.ones(each.rows, each.inner), torch.ones(each.inner, each.columns)
    return partial(torch.mm, a, b, out=torch.empty(each.rows, each.columns))
