"""What a model card says of training: its tags, and the losses that sentence-transformers lists."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CARD = "README.md"

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
#: Losses that train every layer, and one that trains pairs of a layer and a dim.
EVERY_LAYER = ("Matryoshka2dLoss", "AdaptiveLayerLoss")
PAIRS = "StarbucksLoss"


@dataclass(frozen=True)
class Loss:
    """A loss and its parameters; those of a loss inside it are not on a card."""

    name: str  # of the class, without its module
    config: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, str]:
        """The class of the loss and of the one inside it."""
        return self.name, str(self.config.get("loss"))


@dataclass(frozen=True)
class Card:
    """The parts of a model card that speak of training."""

    tags: tuple[str, ...]
    losses: tuple[Loss, ...]

    @property
    def trained_on_raw_states(self) -> bool:
        """Whether a loss is named that trains shallow layers without the final norm."""
        return any(name in (*EVERY_LAYER, PAIRS) for loss in self.losses for name in loss.names)


def read_card(folder: Path) -> Card:
    """Return what the model card of a folder says of training; nothing, where there is no card.

    A card is prose that anybody may edit: what cannot be read of it is left out.
    """
    path = folder / CARD
    if not path.is_file():
        return Card((), ())
    text = path.read_text(encoding="utf-8", errors="replace")
    return Card(_tags(path), _losses(text))


def _tags(path: Path) -> tuple[str, ...]:
    """Return the tags of the YAML that a card begins with."""
    from huggingface_hub import metadata_load

    try:
        front = metadata_load(path)
    except Exception:  # its YAML library has errors of its own
        return ()
    tags = front.get("tags") if front else None
    return tuple(str(tag) for tag in tags) if isinstance(tags, list) else ()


def _losses(text: str) -> tuple[Loss, ...]:
    found = []
    for pattern, parse in ((_LOSS, json.loads), (_OLD_LOSS, ast.literal_eval)):
        for match in pattern.finditer(text):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                config = parse(match.group("config"))
                if isinstance(config, dict):
                    found.append(Loss(match.group("name").rpartition(".")[2], config))
    return tuple(found)
