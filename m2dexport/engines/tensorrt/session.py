"""An engine on a GPU: pinned buffers, one stream, and the profile that fits a batch best."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2dexport.engines.tensorrt.cuda import Buffer, Gpu, Stream
from m2dexport.engines.tensorrt.library import import_library
from m2dexport.engines.tensorrt.recipe import EngineRecipe, Profile
from m2dexport.errors import M2DError

_INPUTS = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class _Output:
    name: str
    dtype: np.dtype[Any]
    width: int


class Session:
    """An engine, ready to run. Safe to use from several threads, which take turns.

    Args:
        engine: an ICudaEngine whose profiles are those of the recipe.
        recipe: how it was made.
        gpu: what it runs on.
        compiled: what TensorRT-RTX compiled while it ran before; None: nothing.
    """

    def __init__(
        self, engine: Any, recipe: EngineRecipe, gpu: Gpu, compiled: bytes | None = None
    ) -> None:
        self.recipe = recipe
        self.gpu = gpu
        self._trt = import_library(recipe.library)
        self._engine = engine
        self._stream = Stream(gpu)
        self._lock = threading.Lock()
        self._config, self._compiled = self._runtime_config(compiled)
        self._contexts: dict[int, Any] = {}
        self._outputs = self._output_tensors()
        self._buffers = self._allocate()

    def run(
        self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]
    ) -> list[NDArray[Any]]:
        """Return the graph's outputs for int64 (batch, sequence) inputs, in the graph's order.

        A batch of more texts than the profile takes is run in parts.

        Raises:
            M2DError: when the texts are longer than the engine takes, or the GPU fails.
        """
        texts, tokens = input_ids.shape
        index = choose_profile(self.recipe.profiles, texts, tokens)
        most = self.recipe.profiles[index].most[0]
        parts = []
        with self._lock:
            self._stream.enter()
            for start in range(0, texts, most):
                rows = slice(start, start + most)
                parts.append(self._run(index, input_ids[rows], attention_mask[rows]))
        if len(parts) == 1:
            return parts[0]
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    def compiled(self) -> bytes | None:
        """Return what TensorRT-RTX compiled so far, to be kept; None of TensorRT."""
        return None if self._compiled is None else bytes(self._compiled.serialize())

    def _run(
        self, index: int, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]
    ) -> list[NDArray[Any]]:
        context = self._context(index)
        for name, values in zip(_INPUTS, (input_ids, attention_mask), strict=True):
            buffer = self._buffers[name]
            buffer.host[: values.nbytes] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            self._stream.upload(buffer, values.nbytes)
            if not context.set_input_shape(name, values.shape):
                raise M2DError(f"the engine does not take {values.shape[0]}x{values.shape[1]}.")
        if not context.execute_async_v3(int(self._stream.handle)):
            raise M2DError(f"{self.recipe.library} failed while running on {self.gpu.name}.")
        sizes = [len(input_ids) * each.width * each.dtype.itemsize for each in self._outputs]
        for output, size in zip(self._outputs, sizes, strict=True):
            self._stream.download(self._buffers[output.name], size)
        self._stream.wait()
        return [
            self._buffers[output.name]
            .host[:size]
            .view(output.dtype)
            .reshape(-1, output.width)
            .copy()
            for output, size in zip(self._outputs, sizes, strict=True)
        ]

    def _context(self, index: int) -> Any:
        if index not in self._contexts:
            engine, config = self._engine, self._config
            context = engine.create_execution_context(*(() if config is None else (config,)))
            if context is None:
                raise M2DError(
                    f"{self.gpu.name} has too little memory for batches of "
                    f"{'x'.join(map(str, self.recipe.profiles[index].most))} tokens; name smaller "
                    "shapes when you build."
                )
            taken = context.set_optimization_profile_async(index, int(self._stream.handle))
            for name, buffer in self._buffers.items():
                taken = context.set_tensor_address(name, buffer.device) and taken
            if not taken:
                raise M2DError(f"{self.recipe.library} refuses profile {index} of its own engine.")
            self._stream.wait()
            self._contexts[index] = context
        return self._contexts[index]

    def _runtime_config(self, compiled: bytes | None) -> tuple[Any, Any]:
        """Return TensorRT-RTX's configuration and cache of a context; None and None of TensorRT."""
        if not hasattr(self._trt, "IRuntimeCache"):
            return None, None
        config = self._engine.create_runtime_config()
        cache = config.create_runtime_cache()
        if compiled is not None:
            cache.deserialize(compiled)  # which checks that it fits, and else takes nothing
        config.set_runtime_cache(cache)
        # TensorRT-RTX records a shape's kernels as a CUDA graph by itself, once they are final.
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return config, cache

    def _output_tensors(self) -> tuple[_Output, ...]:
        engine, found = self._engine, []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if engine.get_tensor_mode(name) == self._trt.TensorIOMode.OUTPUT:
                dtype = np.dtype(self._trt.nptype(engine.get_tensor_dtype(name)))
                found.append(_Output(name, dtype, int(engine.get_tensor_shape(name)[1])))
        return tuple(found)

    def _allocate(self) -> dict[str, Buffer]:
        """Return a buffer of each input and output, large enough for every profile."""
        profiles = self.recipe.profiles
        tokens, texts = (
            max(each.tokens for each in profiles),
            max(each.most[0] for each in profiles),
        )
        sizes = dict.fromkeys(_INPUTS, tokens * np.dtype(np.int64).itemsize)
        sizes |= {each.name: texts * each.width * each.dtype.itemsize for each in self._outputs}
        return {name: Buffer(size) for name, size in sizes.items()}


def choose_profile(profiles: Sequence[Profile], texts: int, tokens: int) -> int:
    """Return the number of the profile that a batch runs with.

    That is the smallest that takes the whole batch, else the one that takes the most texts of that
    length.

    Raises:
        M2DError: when none takes texts of that length.
    """
    fits = [index for index, each in enumerate(profiles) if tokens <= each.most[1]]
    if not fits:
        longest = max(each.most[1] for each in profiles)
        raise M2DError(
            f"the engine takes texts of {longest} tokens at most, not {tokens}; build it with "
            "longer shapes."
        )
    whole = [index for index in fits if texts <= profiles[index].most[0]]
    if whole:
        return min(whole, key=lambda index: profiles[index].tokens)
    return max(fits, key=lambda index: profiles[index].most[0])
