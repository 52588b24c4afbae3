"""engine.toml: how an engine is made of the graph beside it.

::

    format = 1
    library = "tensorrt-rtx"
    computes = "float16"
    gpus = ["8.9", "12.0"]            # compute capabilities; none: that of the GPU at hand
    compatible = []                   # of TensorRT: "hardware", "version"

    [[profiles]]                      # (texts, tokens) that the engine takes, and is fast at
    least = [1, 1]
    best = [1, 16]
    most = [1, 256]

    [built]                           # only beside an engine that was built already
    version = "1.7.1.116"
    graph_sha256 = "..."
    engine_sha256 = "..."
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, starmap
from typing import Annotated, Any, Literal

from m2dexport.engines import COMPATIBLE, Compatible
from m2dexport.errors import M2DError, UsageError
from m2dexport.strict import Matching, Name, Sha256, Within, read_value, require_format

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMAT = 1
#: What a graph computes in, wherever that costs no accuracy.
Computes = Literal["float32", "float16", "bfloat16"]
#: The profile of a model that no shapes are named for: texts, tokens.
DEFAULT_SHAPES = ((1, 32), (32, 128))

_MOST_TOKENS = 1 << 22  # of a batch, padding included
_Gpu = Annotated[str, Matching(r"\d{1,2}\.\d", "a compute capability")]
_Count = Annotated[int, Within(1, 1 << 20)]


@dataclass(frozen=True)
class Profile:
    """The shapes that one profile of an engine takes, each (texts, tokens)."""

    least: list[_Count]
    best: list[_Count]  # that it is made fastest for
    most: list[_Count]

    @property
    def tokens(self) -> int:
        """Tokens of the largest shape, padding included."""
        return self.most[0] * self.most[1]


@dataclass(frozen=True)
class Built:
    """What an engine file beside the graph was made by and of."""

    version: Name  # of the library
    graph_sha256: Sha256
    engine_sha256: Sha256


@dataclass(frozen=True)
class EngineRecipe:
    """The content of engine.toml."""

    format: int
    library: Name  # a key of ENGINES
    computes: Computes
    gpus: list[_Gpu]
    compatible: list[Compatible]
    profiles: Annotated[list[Profile], Within(1, 16)]
    built: Built | None = None

    def to_toml(self) -> bytes:
        """Return the content of engine.toml: the same recipe is the same bytes."""
        lines = [f"# How {self.library} makes an engine of model.onnx; m2dexport wrote it."]
        lines += starmap(_line, (("format", self.format), ("library", self.library)))
        lines += starmap(_line, (("computes", self.computes), ("gpus", self.gpus)))
        lines.append(_line("compatible", self.compatible))
        for profile in self.profiles:
            lines += ["", "[[profiles]]", *starmap(_line, vars(profile).items())]
        if self.built is not None:
            lines += ["", "[built]", *starmap(_line, vars(self.built).items())]
        return ("\n".join(lines) + "\n").encode()


def recipe_from_toml(content: bytes, where: object) -> EngineRecipe:
    """Return what ``EngineRecipe.to_toml`` wrote.

    Raises:
        M2DError: when it is not that, or of a later format.
    """
    try:
        stored = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise M2DError(f"{where} cannot be read as TOML; build it again.") from error
    require_format(stored, FORMAT, where, M2DError)
    recipe = read_value(EngineRecipe, {"built": None, **stored}, where, M2DError)
    for profile in recipe.profiles:
        shapes = [profile.least, profile.best, profile.most]
        ordered = all(a <= b for pair in pairwise(shapes) for a, b in zip(*pair, strict=False))
        if any(len(shape) != 2 for shape in shapes) or not ordered or profile.least != [1, 1]:
            raise M2DError(
                f"{where} has a profile whose least, best and most are not two sizes each that "
                f"follow one another from 1: {', '.join(map(str, shapes))}; build it again."
            )
        if profile.tokens > _MOST_TOKENS:
            raise M2DError(
                f"{where} has a profile of {profile.tokens:,} tokens; {_MOST_TOKENS:,} are allowed."
            )
    if recipe.compatible and recipe.gpus:
        raise M2DError(
            f"{where} names GPUs and asks for more compatibility, which is one too many."
        )
    return recipe


def profiles_for(shapes: Sequence[tuple[int, int]], max_length: int) -> list[Profile]:
    """Return the profiles that an engine is made with.

    One is for texts by themselves, where a shape has one text; one for the largest shape of
    several; and one for longer texts, with as many tokens together, where that one ends before
    the model does.

    Args:
        shapes: (texts, tokens) that must be fast; none: ``DEFAULT_SHAPES``.
        max_length: tokens of a text at most.

    Raises:
        UsageError: when a shape is longer than the model's texts.
    """
    for texts, tokens in shapes:
        if texts < 1 or not 1 <= tokens <= max_length:
            raise UsageError(
                f"the shape {texts}x{tokens} is beyond the model, which takes 1 to {max_length} "
                "tokens a text; name another."
            )
    named = shapes or [(texts, min(tokens, max_length)) for texts, tokens in DEFAULT_SHAPES]
    alone = [shape for shape in named if shape[0] == 1]
    several = max((shape for shape in named if shape[0] > 1), key=_tokens, default=None)
    profiles = []
    if alone:
        profiles.append(Profile([1, 1], list(alone[0]), [1, max_length]))
    if several is not None:
        profiles.append(Profile([1, 1], list(several), list(several)))
        long = [max(1, _tokens(several) // max_length), max_length]
        if several[1] < max_length and (long[0] > 1 or not alone):
            profiles.append(Profile([1, 1], long, long))
    return profiles


def compatible_of(names: Sequence[str]) -> list[Compatible]:
    """Return what else than its own GPU and version a TensorRT engine is to run on.

    Raises:
        UsageError: when a name is unknown.
    """
    for name in names:
        if name not in COMPATIBLE:
            raise UsageError(f"an engine is compatible with {', '.join(COMPATIBLE)}, not {name!r}.")
    return [name for name in COMPATIBLE if name in names]


def _tokens(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _line(key: str, value: Any) -> str:
    if isinstance(value, list):
        value = f"[{', '.join(_literal(each) for each in value)}]"
        return f"{key} = {value}"
    return f"{key} = {_literal(value)}"


def _literal(value: str | int) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
