"""The trained grid: the (layers, dim) pairs that training visited, declared or read."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from pathlib import Path
from typing import Any

from m2dexport.errors import UsageError

Grid = tuple[tuple[int, int], ...]

# How sentence-transformers' model cards describe the loss of each training set.
_LOSS = re.compile(
    r"\* Loss: [^\n]*<code>(?P<name>[\w.]+)</code>[^\n]* with these parameters:\s*"
    r"```json\s*(?P<config>\{.*?\})\s*```",
    re.DOTALL,
)
# Until version 2 they had no table of training sets, and wrote parameters as Python does.
_OLD_LOSS = re.compile(
    r"`(?P<name>sentence_transformers\.losses\.[\w.]+)` with parameters:\s*"
    r"```\s*(?P<config>\{.*?\})\s*```",
    re.DOTALL,
)
_DEEP = ("Matryoshka2dLoss", "AdaptiveLayerLoss")  # these train every layer, on its raw state


def parse_grid(text: str, layers: int, dim: int) -> Grid:
    """Return the pairs of a declaration such as ``"2:32,4:64,6:128"``, sorted.

    Args:
        text: pairs of layers and dim.
        layers: the checkpoint's depth, the largest n allowed.
        dim: the checkpoint's width, the largest d allowed.

    Raises:
        UsageError: when a pair cannot be read or lies outside the checkpoint.
    """
    pairs = []
    for pair in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", pair)
        if not match:
            raise UsageError(f'--trained {pair!r} is not layers:dim, as in "2:32,4:64".')
        n, d = int(match.group(1)), int(match.group(2))
        if not (1 <= n <= layers and 1 <= d <= dim):
            raise UsageError(
                f"--trained {pair.strip()!r} lies outside the checkpoint's {layers} layers and "
                f"{dim} dims."
            )
        pairs.append((n, d))
    return tuple(sorted(set(pairs)))


def read_grid(folder: Path, layers: int, dim: int) -> Grid | None:
    """Return the grid that the losses on a sentence-transformers model card imply.

    Returns:
        The pairs, or None when there is no card or its losses do not say: cards name the
        parameters of the outer loss only, so AdaptiveLayerLoss around MatryoshkaLoss leaves the
        dims open.
    """
    pairs: set[tuple[int, int]] = set()
    for name, config in _losses(folder):
        inner = str(config.get("loss"))
        if name not in (*_DEEP, "MatryoshkaLoss"):
            continue
        if name == "AdaptiveLayerLoss" and inner == "MatryoshkaLoss":
            return None
        depths = range(1, layers + 1) if name in _DEEP or inner in _DEEP else [layers]
        dims = [d for d in _integers(config.get("matryoshka_dims", [dim])) if 1 <= d <= dim]
        pairs.update((n, d) for n in depths for d in dims)
    return tuple(sorted(pairs)) or None


def _integers(values: Any) -> list[int]:
    return [n for n in values if isinstance(n, int)] if isinstance(values, list) else []


def trained_on_raw_states(folder: Path) -> bool:
    """Say whether the card names a loss that trains shallow layers without the final norm."""
    return any(name in _DEEP or config.get("loss") in _DEEP for name, config in _losses(folder))


def _losses(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    card = folder / "README.md"
    if not card.exists():
        return []
    found = []
    text = card.read_text(encoding="utf-8", errors="replace")
    for pattern, parse in ((_LOSS, json.loads), (_OLD_LOSS, ast.literal_eval)):
        for match in pattern.finditer(text):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                config = parse(match.group("config"))  # a card is prose: it need not be readable
                if isinstance(config, dict):
                    found.append((match.group("name").rpartition(".")[2], config))
    return found
