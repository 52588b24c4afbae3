"""How well one colour is told from another."""

from __future__ import annotations

from collections.abc import Sequence


def contrast_of(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the contrast of two colours, red, green and blue of 0 to 1, as WCAG 2.2 defines it."""
    dark, bright = sorted((_luminance(first), _luminance(second)))
    return (bright + 0.05) / (dark + 0.05)


def _luminance(colour: Sequence[float]) -> float:
    linear = [c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
