"""How long work reports that it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Called with a step's name, how much of it is done, and how much there is.
OnProgress = Callable[[str, int, int], None]


@contextmanager
def one_step(on_progress: OnProgress, name: str) -> Iterator[None]:
    """Report a step of unknown length when it begins, and when it is done."""
    on_progress(name, 0, 1)
    yield
    on_progress(name, 1, 1)
