"""How long work reports that it goes on."""

from __future__ import annotations

from collections.abc import Callable

#: Called with a step's name, how much of it is done, and how much there is.
OnProgress = Callable[[str, int, int], None]
