"""The trained grid: the (layers, dim) pairs that training visited, declared or read.

What is read, in the order of trust: the record of a sub-model; lists of depths and dims in JSON
files that ship with the weights; the model card, which is written by hand or once and then kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2dexport.checkpoint.card import CARD, EVERY_LAYER, PAIRS, Card, Loss
from m2dexport.checkpoint.hf_config import CONFIG
from m2dexport.checkpoint.jsonfile import read_object
from m2dexport.checkpoint.st_modules import SENTENCE_CONFIG
from m2dexport.errors import CheckpointError, UsageError
from m2dexport.files import PROVENANCE

Grid = tuple[tuple[int, int], ...]

EXPORTED = "model_config.json"  # vllm's semantic-router lists there the depths that it ships
#: JSON files that may list what was trained, the first that does being taken.
_FILES = (f"onnx/{EXPORTED}", EXPORTED, CONFIG, SENTENCE_CONFIG)
_DEPTH_KEYS = ("available_layers",)
_DIM_KEYS = ("matryoshka_dims", "matryoshka_dimensions")  # the second is vllm's
_DIMS = "MatryoshkaLoss"
_EXAMPLE = '"2:32,4:64" or "1-6:32,64"'


@dataclass(frozen=True)
class Trained:
    """The trained grid, where it was read, and what that took."""

    grid: Grid | None  # None: unknown
    source: str  # a file's name, or several; "unknown"
    notes: tuple[str, ...] = ()  # sentences: what was assumed, or contradicts something else


@dataclass(frozen=True)
class _Claim:
    """What one source says; depths or dims that it speaks of without listing them are open."""

    source: str
    depths: tuple[int, ...] = ()  # empty: not listed
    dims: tuple[int, ...] = ()
    pairs: Grid = ()  # where they are fewer than depths times dims
    open_depths: bool = False
    open_dims: bool = False


def parse_grid(text: str, layers: int, dim: int) -> Grid:
    """Return the pairs of a declaration, sorted.

    ``"2:32,4:64"`` are two pairs. Depths may be ranges or lists, and dims lists, which stand for
    every pair of the two: ``"1-6:32,64"`` or ``"6,11,22:64,768"``. A number behind a colon's dims
    is one more dim of it; semicolons begin anew: ``"2,4:32;6:32,64"``.

    Args:
        text: the declaration.
        layers: the checkpoint's depth, the largest n allowed.
        dim: the checkpoint's width, the largest d allowed.

    Raises:
        UsageError: when a part cannot be read or lies outside the checkpoint.
    """
    pairs: set[tuple[int, int]] = set()
    for group in text.split(";"):
        if ":" not in group:
            raise _unreadable(group)
        depths: list[int] = []
        named = False  # whether the dims of these depths have begun
        for part in group.split(","):
            first, colon, last = part.strip().partition(":")
            if colon:
                depths = [*([] if named else depths), *_depths(part, first, layers, dim)]
                named = True
            elif not named:
                depths += _depths(part, first, layers, dim)
                continue
            d = _number(part, last if colon else first)
            if not 1 <= d <= dim:
                raise _outside(part, layers, dim)
            pairs.update((n, d) for n in depths)
    return tuple(sorted(pairs))


def grid_text(grid: Grid) -> str:
    """Return a grid as ``parse_grid`` reads it, as short as ranges and lists make it."""
    dims: dict[int, list[int]] = {}
    for n, d in sorted(grid):
        dims.setdefault(n, []).append(d)
    depths: dict[tuple[int, ...], list[int]] = {}
    for n, of_depth in dims.items():
        depths.setdefault(tuple(of_depth), []).append(n)
    groups = [f"{_numbers(at, ',')}:{','.join(map(str, of))}" for of, at in depths.items()]
    return ";".join(groups)


def _depths(part: str, text: str, layers: int, dim: int) -> list[int]:
    """Return the depths of "4" or "1-6"."""
    first, dash, last = text.partition("-")
    low = _number(part, first)
    high = _number(part, last) if dash else low
    if low > high:
        raise _unreadable(part)
    if not 1 <= low <= high <= layers:
        raise _outside(part, layers, dim)
    return list(range(low, high + 1))


def _number(part: str, text: str) -> int:
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*", text):
        raise _unreadable(part)
    return int(text)


def _unreadable(part: str) -> UsageError:
    return UsageError(f"--trained {part.strip()!r} is not depths:dims, as in {_EXAMPLE}.")


def _outside(part: str, layers: int, dim: int) -> UsageError:
    return UsageError(
        f"--trained {part.strip()!r} lies outside the checkpoint's {layers} layers and {dim} dims."
    )


def read_trained(
    folder: Path, transformer: Path, card: Card, limits: tuple[int, int], declared: str | None
) -> Trained:
    """Return the trained grid that is declared, or that a checkpoint's files state.

    Args:
        folder: the checkpoint's.
        transformer: the folder in it of config.json and the weights, often the same.
        card: the checkpoint's.
        limits: its depth and width; what files list beyond them is left out, and said.
        declared: as for ``parse_grid``; None: nothing.

    Raises:
        UsageError: when the declaration cannot be read or lies outside the checkpoint.
        CheckpointError: when the record of a sub-model is damaged.
    """
    if declared is not None:
        return Trained(parse_grid(declared, *limits), "--trained")
    stored = read_object(folder / PROVENANCE).get("trained_grid")
    if stored is not None:
        try:
            return Trained(tuple((int(n), int(d)) for n, d in stored), PROVENANCE)
        except (TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{folder / PROVENANCE} has a trained_grid that is not a list of layers and dims."
            ) from error
    notes: list[str] = []
    claims = [_from_file(folder, transformer, name, limits, notes) for name in _FILES]
    claims.append(_from_card(card, *limits, notes))
    return _joined(claims, *limits, notes)


def _from_file(
    folder: Path, transformer: Path, name: str, limits: tuple[int, int], notes: list[str]
) -> _Claim:
    """Return what a JSON file lists. The full depth and width are trained, listed or not."""
    layers, dim = limits
    stored = read_object((transformer if name == CONFIG else folder) / name)
    total = stored.get("total_layers")
    if isinstance(total, int) and total != layers:
        notes.append(f"{name} says that the model has {total} layers; its weights hold {layers}.")
    depths = _within(stored, _DEPTH_KEYS, layers, f"{name} lists the depths", notes)
    dims = _within(stored, _DIM_KEYS, dim, f"{name} lists the dims", notes)
    return _Claim(
        name,
        tuple(sorted({*depths, layers})) if depths else (),
        tuple(sorted({*dims, dim})) if dims else (),
    )


def _within(
    stored: Mapping[str, Any], keys: Iterable[str], limit: int, lists: str, notes: list[str]
) -> tuple[int, ...]:
    """Return the numbers under the first of the keys that has some, those from 1 to the limit."""
    for key in keys:
        found = stored.get(key)
        numbers = [n for n in found if type(n) is int] if isinstance(found, list) else []
        if not numbers:
            continue
        beyond = [n for n in numbers if not 1 <= n <= limit]
        if beyond:
            notes.append(
                f"{lists} {_numbers(beyond)}, which lie outside the checkpoint's {limit}; they are "
                "left out."
            )
        return tuple(n for n in numbers if 1 <= n <= limit)
    return ()


def _from_card(card: Card, layers: int, dim: int, notes: list[str]) -> _Claim:
    """Return what the losses of a model card say, or its tags where it lists no loss that does."""
    pairs: set[tuple[int, int]] = set()
    for loss in card.losses:
        if PAIRS in loss.names:
            pairs.update(_starbucks(loss, layers, dim, notes))
        elif any(name in (*EVERY_LAYER, _DIMS) for name in loss.names):
            every = any(name in EVERY_LAYER for name in loss.names)
            depths = range(1, layers + 1) if every else (layers,)
            listed = _within(loss.config, _DIM_KEYS, dim, f"{CARD} lists the dims", notes)
            if not listed and _DIMS in loss.names:  # a card has the outer loss's parameters only
                return _Claim(CARD, depths=tuple(depths), open_dims=True)
            pairs.update((n, d) for n in depths for d in listed or (dim,))
    if not pairs:
        return _from_tags(card.tags, layers, dim)
    listed_depths, listed_dims = (tuple(sorted({pair[i] for pair in pairs})) for i in (0, 1))
    return _Claim(CARD, listed_depths, listed_dims, tuple(sorted(pairs)))


def _starbucks(loss: Loss, layers: int, dim: int, notes: list[str]) -> Grid:
    """Return the pairs of Starbucks' loss, which stores depths less one.

    It always trains the full depth at full width (ielab/Starbucks, sts/starbucks_loss.py).
    """
    depths, dims = (loss.config.get(key) for key in ("matryoshka_layers", "matryoshka_dims"))
    if not (isinstance(depths, list) and isinstance(dims, list) and len(depths) == len(dims)):
        return ()
    pairs = [(n + 1, d) for n, d in zip(depths, dims, strict=True) if {type(n), type(d)} == {int}]
    inside = {(n, d) for n, d in pairs if 1 <= n <= layers and 1 <= d <= dim}
    if len(inside) < len(pairs):
        notes.append(
            f"{CARD} lists pairs that lie outside the checkpoint's {layers} layers and {dim} dims; "
            "they are left out."
        )
    return tuple(sorted({*inside, (layers, dim)}))


def _from_tags(tags: Iterable[str], layers: int, dim: int) -> _Claim:
    names = {tag.removeprefix("loss:") for tag in tags}
    pairs = bool(names & {PAIRS, "2d-matryoshka"})
    open_dims = pairs or bool(names & {_DIMS, "Matryoshka2dLoss", "matryoshka"})
    if names & set(EVERY_LAYER):
        every = tuple(range(1, layers + 1))
        return _Claim(CARD, every, () if open_dims else (dim,), open_dims=open_dims)
    full = (layers,) if _DIMS in names and not pairs else ()
    return _Claim(CARD, full, open_depths=pairs, open_dims=open_dims)


def _joined(claims: Sequence[_Claim], layers: int, dim: int, notes: list[str]) -> Trained:
    """Return what several sources say together: the first that lists depths, or dims, is taken."""
    by_depth = _taken({claim.source: claim.depths for claim in claims}, "depths", layers, notes)
    by_dim = _taken({claim.source: claim.dims for claim in claims}, "dims", dim, notes)
    sources = [source for source, listed in (by_depth, by_dim) if listed]
    source = " and ".join(dict.fromkeys(sources)) or "unknown"
    depths, dims = by_depth[1], by_dim[1]
    if depths and dims:
        grid = tuple(sorted((n, d) for n in depths for d in dims))
        pairs = next((claim.pairs for claim in claims if claim.pairs), ())
        if pairs and tuple({pair[i] for pair in pairs} for i in (0, 1)) == (set(depths), set(dims)):
            grid = pairs
        return Trained(grid, source, tuple(notes))
    open_depths = any(claim.open_depths for claim in claims)
    open_dims = any(claim.open_dims for claim in claims)
    if depths and not open_dims:
        notes.append(
            f"{source} lists the depths {_numbers(depths)} and nothing lists dims: only "
            f"the full width of {dim} counts as trained, or what --trained declares."
        )
        return Trained(tuple((n, dim) for n in depths), source, tuple(notes))
    if dims and not open_depths:
        notes.append(
            f"{source} lists the dims {_numbers(dims)} and nothing lists depths: only "
            f"the full depth of {layers} counts as trained, or what --trained declares."
        )
        return Trained(tuple((layers, d) for d in dims), source, tuple(notes))
    if open_depths or open_dims:
        notes.append(_unknown(claims, depths, dims))
    return Trained(None, "unknown", tuple(notes))


def _unknown(claims: Sequence[_Claim], depths: Sequence[int], dims: Sequence[int]) -> str:
    """Return the sentence on a training at depths or dims that nothing lists."""
    source = next(claim.source for claim in claims if claim.open_depths or claim.open_dims)
    known = f"depths {_numbers(depths)}" if depths else f"dims {_numbers(dims)}" if dims else ""
    missing = "dims" if depths else "depths" if dims else "depths and dims"
    declared = f"{_numbers(depths, ',') or 'N,...'}:{','.join(map(str, dims)) or 'D,...'}"
    return (
        f"{source} speaks of training at several {missing}, which nothing lists"
        + (f" beside the {known}" if known else "")
        + f"; the trained grid is unknown until --trained {declared} declares it."
    )


def _taken(
    listed: Mapping[str, tuple[int, ...]], what: str, full: int, notes: list[str]
) -> tuple[str, tuple[int, ...]]:
    """Return the first source that lists something, and what; say which others disagree."""
    found = [(source, numbers) for source, numbers in listed.items() if numbers]
    if not found:
        return "", ()
    taken, numbers = found[0]
    for source, others in found[1:]:
        if {*others, full} != {*numbers, full}:
            notes.append(
                f"{source} says that the {what} {_numbers(others)} were trained, {taken} "
                f"{_numbers(numbers)}; the latter are taken."
            )
    return taken, numbers


def _numbers(numbers: Sequence[int], separator: str = ", ") -> str:
    """Return "1-6" of consecutive numbers, "6, 11, 22" of others."""
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return separator.join(map(str, numbers))
