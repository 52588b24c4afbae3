"""The part of CUDA's runtime that is needed, by NVIDIA's own bindings (``cuda-bindings``)."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.errors import M2DError, MissingDevice, MissingExtra, one_line

_NON_BLOCKING = 1  # cudaStreamNonBlocking


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine."""

    index: int
    name: str
    capability: str  # compute capability, such as "8.9"
    driver: int  # version of CUDA that the driver brings, such as 13000


def gpu_count() -> int:
    """Return how many GPUs this machine has that work; 0 where cuda-bindings is not installed."""
    try:
        status, count = _cudart("tensorrt").cudaGetDeviceCount()
    except MissingExtra:
        return 0
    return int(count) if int(status) == 0 else 0


def require_gpu(index: int, engine: str) -> Gpu:
    """Return a GPU of this machine and make it the current one.

    Args:
        index: its number, from 0.
        engine: the engine that needs it, for messages.

    Raises:
        MissingDevice: when there is no such GPU, or no driver for it.
        MissingExtra: when cuda-bindings is not installed.
    """
    cudart = _cudart(engine)
    status, count = cudart.cudaGetDeviceCount()
    if status != cudart.cudaError_t.cudaSuccess:
        raise MissingDevice(
            f"{engine} needs an NVIDIA GPU and its driver, and CUDA finds none here "
            f"({_reason(cudart, status)}); "
            "build and bundle do without, and verify and encode run the same graph by onnxruntime "
            "with --provider CPU."
        )
    if not 0 <= index < count:
        raise MissingDevice(f"there is no GPU {index}; this machine has {count}, counted from 0.")
    call(cudart.cudaSetDevice(index))
    attribute = cudart.cudaDeviceAttr
    major, minor = (
        call(cudart.cudaDeviceGetAttribute(each, index))
        for each in (
            attribute.cudaDevAttrComputeCapabilityMajor,
            attribute.cudaDevAttrComputeCapabilityMinor,
        )
    )
    name = bytes(call(cudart.cudaGetDeviceProperties(index)).name).split(b"\0")[0].decode()
    driver = call(cudart.cudaDriverGetVersion())
    return Gpu(index, name, f"{major}.{minor}", int(driver))


def call(answer: tuple[Any, ...]) -> Any:
    """Return what a function of CUDA's runtime returned beside its status.

    Raises:
        M2DError: when it failed.
    """
    status, *values = answer
    if int(status) != 0:
        from cuda.bindings import runtime

        raise M2DError(f"the GPU failed: {_reason(runtime, status)}.")
    return values[0] if values else None


class Stream:
    """A stream of work on a GPU, and the copies that are part of it.

    Args:
        gpu: whose stream it is.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._cudart = _cudart("tensorrt")
        self.enter()
        self.handle = call(self._cudart.cudaStreamCreateWithFlags(_NON_BLOCKING))

    def enter(self) -> None:
        """Make its GPU the current one of the calling thread."""
        call(self._cudart.cudaSetDevice(self._gpu.index))

    def upload(self, buffer: Buffer, size: int) -> None:
        """Copy ``size`` bytes of a buffer to the GPU."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        call(self._copy(buffer.device, buffer.host.ctypes.data, size, kind))

    def download(self, buffer: Buffer, size: int) -> None:
        """Copy ``size`` bytes of a buffer from the GPU."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        call(self._copy(buffer.host.ctypes.data, buffer.device, size, kind))

    def wait(self) -> None:
        """Return when all work has been done."""
        call(self._cudart.cudaStreamSynchronize(self.handle))

    def _copy(self, target: Any, source: Any, size: int, kind: Any) -> tuple[Any, ...]:
        answer: tuple[Any, ...] = self._cudart.cudaMemcpyAsync(
            target, source, size, kind, self.handle
        )
        return answer


class Buffer:
    """Memory of the GPU and, in pinned memory of the host, its counterpart; freed with it.

    Args:
        size: bytes.
    """

    def __init__(self, size: int) -> None:
        cudart = _cudart("tensorrt")
        self.device = int(call(cudart.cudaMalloc(size)))
        self._pinned = int(call(cudart.cudaMallocHost(size)))
        view = (ctypes.c_uint8 * size).from_address(self._pinned)
        self.host: NDArray[np.uint8] = np.ctypeslib.as_array(view)
        weakref.finalize(self, _free, cudart, self.device, self._pinned)


def _free(cudart: Any, device: int, pinned: int) -> None:
    cudart.cudaFree(device)
    cudart.cudaFreeHost(pinned)


def _reason(cudart: Any, status: Any) -> str:
    return one_line(cudart.cudaGetErrorString(status)[1].decode())


def _cudart(engine: str) -> Any:
    try:
        from cuda.bindings import runtime
    except ModuleNotFoundError as error:
        raise MissingExtra(f"The engine {engine}", "cuda-bindings", engine) from error
    return runtime
