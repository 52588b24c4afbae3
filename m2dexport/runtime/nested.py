"""A nested bundle on a device: opened once, and its cells in turn."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import tokenizers

from m2dexport.engines import Device
from m2dexport.errors import UsageError
from m2dexport.runtime.cells import open_cells, spaces_of_cells
from m2dexport.runtime.encoder import Encoder
from m2dexport.runtime.loading import load_cell

_LOG = logging.getLogger(__name__)
_WARM, _TIMED = 3, 15  # runs
_MOST_TOKENS = 1 << 20  # of a run


class Nested:
    """The cells of a bundle. Safe to use from several threads.

    The file is read once and stays in memory, what cells share once; a cell is loaded when it is
    first asked for, and stays loaded. Cells with the same tokenizer.json have one tokenizer.

    Args:
        path: the bundle, nested or of one cell.
        device: what to run cells on; what it leaves open is as each artifact says.

    Raises:
        UsageError: when there is no such file.
        BundleError: when it is damaged.

    Example:
        >>> nested = Nested("nested.m2d")
        >>> documents = nested.cell("6x128-int8-int8").encode(["A man is playing a guitar."])
        >>> queries = nested.within(2.0).encode(["music"])
    """

    def __init__(self, path: str | Path, device: Device = Device()) -> None:
        self._opened = open_cells(Path(path))
        self._device = device
        self._encoders: dict[str, Encoder] = {}
        self._tokenizers: dict[bytes, tokenizers.Tokenizer] = {}
        self._lock = threading.RLock()
        _OPEN.add(self)

    @property
    def cells(self) -> tuple[str, ...]:
        """The ids of its cells, the deepest first; of one depth, the default first."""
        return self._opened.cells

    @property
    def spaces(self) -> tuple[tuple[str, ...], ...]:
        """The ids of the cells that may query one index, together, space by space.

        Raises:
            BundleError: when the files of a cell are damaged.
        """
        return spaces_of_cells({cell: self._opened.spec(cell) for cell in self.cells})

    def cell(self, cell: str | None = None) -> Encoder:
        """Return the encoder of a cell; without an id, of the default one.

        Raises:
            UsageError: when there is no such cell, naming those there are.
            BundleError: when its files are damaged.
        """
        cell = self._opened.require_cell(cell)
        with self._lock:
            if cell not in self._encoders:
                self._encoders[cell] = load_cell(self._opened, cell, self._device, self._tokenizers)
            return self._encoders[cell]

    def release(self, cell: str) -> None:
        """Forget the encoder of a cell, whose memory is free once nobody else holds it."""
        with self._lock:
            self._encoders.pop(cell, None)

    def within(self, limit_ms: float, shape: tuple[int, int] = (1, 16)) -> Encoder:
        """Return the encoder of the first of ``cells`` that runs within a time limit here.

        So no deeper one does. Cells are timed now; those that are too slow are released.

        Args:
            limit_ms: milliseconds at most of the median of 15 runs, tokenization not included.
            shape: texts and tokens of each that are run, cut to the maximum length; 1,048,576
                tokens at most.

        Raises:
            UsageError: when none does, or the limit or the shape is none.
        """
        if not limit_ms > 0:
            raise UsageError(f"{limit_ms:g} ms is no time limit; name more than 0 milliseconds.")
        for cell in self.cells:
            taken = milliseconds(self.cell(cell), shape)
            said = f"{cell} takes {taken:.2f} ms for {shape[0]}x{shape[1]} tokens"
            if taken <= limit_ms:
                _LOG.info("%s: chose %s, within %g ms", self._opened.path, said, limit_ms)
                return self.cell(cell)
            _LOG.info("%s: %s, over %g ms", self._opened.path, said, limit_ms)
            self.release(cell)
        raise UsageError(
            f"no cell of {self._opened.path} runs within {limit_ms:g} ms here; {said}; allow more, "
            "or bundle a shallower cell."
        )


_OPEN: weakref.WeakSet[Nested] = weakref.WeakSet()


def _fresh_locks() -> None:
    """Free what a thread held that a forked process does not have."""
    for nested in list(_OPEN):
        nested._lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_fresh_locks)


def milliseconds(encoder: Encoder, shape: tuple[int, int]) -> float:
    """Return the median time of an encoder's graph at a shape, measured now.

    Args:
        encoder: what is timed.
        shape: texts and tokens of each, cut to the maximum length.

    Raises:
        UsageError: when the shape is none, or of more than 1,048,576 tokens.
    """
    batch, sequence = shape
    if batch < 1 or sequence < 1:
        raise UsageError(f"{batch}x{sequence} cannot be timed; name 1 or more texts and tokens.")
    size = (batch, min(sequence, encoder.spec.max_length))
    if size[0] * size[1] > _MOST_TOKENS:
        raise UsageError(
            f"{size[0]}x{size[1]} cannot be timed; name {_MOST_TOKENS:,} tokens or fewer in all."
        )
    ids = np.random.default_rng(0).integers(encoder.vocab_size, size=size, dtype=np.int64)
    rows = [ids] if encoder.spec.batch_invariant else np.split(ids, batch)
    taken = []
    for _ in range(_WARM + _TIMED):
        start = time.perf_counter()
        for row in rows:
            encoder.run(row, np.ones_like(row))
        taken.append((time.perf_counter() - start) * 1e3)
    return float(np.median(taken[_WARM:]))
