"""Ridge regression: the closed form, whatever the order and the chunks that rows come in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from m2dexport.align.fit import STRENGTHS
from m2dexport.align.ridge import Moments
from m2dexport.checkpoint.alignment import LinearMap

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Rows:
    inputs: Floats
    targets: Floats
    seed: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.inputs.shape[1], self.targets.shape[1]


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    """Rows of length about 1 with a mean other than zero, perhaps fewer than they are wide."""
    seed = draw(st.integers(0, 2**32 - 1))
    count, width, outputs = (draw(st.integers(1, most)) for most in (60, 12, 6))
    rng = np.random.default_rng(seed)
    inputs = rng.normal(0.3, 0.5, (count, width)).astype(np.float32)
    noise = rng.normal(0, 0.1, (count, outputs))
    targets = (inputs @ rng.normal(0, 1, (width, outputs)) + noise - 0.5).astype(np.float32)
    return Rows(inputs, targets, seed)


def moments(given: Rows, parts: int = 1, *, intercept: bool = True) -> Moments:
    found = Moments(*given.shape, intercept=intercept)
    pairs = zip(
        np.array_split(given.inputs, parts), np.array_split(given.targets, parts), strict=True
    )
    for inputs, targets in pairs:
        found.add(inputs, targets)
    return found


def map_of(found: Moments, strength: float, outputs: slice = slice(None)) -> LinearMap:
    (linear,) = found.eigen().maps([strength], outputs)
    return linear


def closed_form(given: Rows, strength: float, *, intercept: bool) -> LinearMap:
    x, y = given.inputs.astype(np.float64), given.targets.astype(np.float64)
    x_mean = x.mean(axis=0) if intercept else np.zeros(x.shape[1])
    y_mean = y.mean(axis=0) if intercept else np.zeros(y.shape[1])
    x, y = x - x_mean, y - y_mean
    weight = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ y).T
    return LinearMap(weight.astype(np.float32), (y_mean - weight @ x_mean).astype(np.float32))


def assert_same(found: LinearMap, expected: LinearMap, close: float = 1e-5) -> None:
    assert found.weight.dtype == found.bias.dtype == np.float32
    np.testing.assert_allclose(found.weight, expected.weight, rtol=close, atol=close)
    np.testing.assert_allclose(found.bias, expected.bias, rtol=close, atol=close)


@settings(max_examples=150, deadline=None)
@given(rows(), st.sampled_from(STRENGTHS), st.booleans())
def test_a_map_is_the_closed_form_for_any_strength(
    given: Rows, strength: float, intercept: bool
) -> None:
    found = map_of(moments(given, intercept=intercept), strength)
    assert_same(found, closed_form(given, strength, intercept=intercept), 1e-4)
    if not intercept:
        assert not found.bias.any()


@settings(max_examples=60, deadline=None)
@given(rows(), st.integers(1, 9), st.booleans())
def test_neither_chunks_nor_the_order_of_rows_change_a_map(
    given: Rows, parts: int, intercept: bool
) -> None:
    order = np.random.default_rng(given.seed).permutation(len(given.inputs))
    shuffled = Rows(given.inputs[order], given.targets[order], given.seed)
    expected = map_of(moments(given, intercept=intercept), 0.1)
    assert_same(map_of(moments(shuffled, parts, intercept=intercept), 0.1), expected)


@settings(max_examples=60, deadline=None)
@given(rows(), st.integers(0, 60), st.booleans())
def test_the_moments_of_two_parts_joined_are_those_of_the_whole(
    given: Rows, cut: int, intercept: bool
) -> None:
    parts = [
        Rows(given.inputs[part], given.targets[part], given.seed)
        for part in (slice(cut), slice(cut, None))
    ]
    first, second = (moments(part, intercept=intercept) for part in parts)
    joined = first.joined(second)
    assert joined.rows == len(given.inputs)
    expected = map_of(moments(given, intercept=intercept), 1.0)
    assert_same(map_of(joined, 1.0), expected)
    assert (first.rows, second.rows) == (min(cut, joined.rows), max(0, joined.rows - cut))


@settings(max_examples=60, deadline=None)
@given(rows(), st.data())
def test_the_map_to_some_outputs_is_that_of_these_alone(given: Rows, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, given.shape[1] - 1))
    end = data.draw(st.integers(start + 1, given.shape[1]))
    alone = Rows(given.inputs, given.targets[:, start:end], given.seed)
    found = map_of(moments(given), 0.01, slice(start, end))
    assert_same(found, map_of(moments(alone), 0.01))


def test_several_strengths_at_once_are_each_by_itself() -> None:
    rng = np.random.default_rng(0)
    inputs, targets = (rng.normal(size=(40, n)).astype(np.float32) for n in (5, 3))
    found = moments(Rows(inputs, targets, 0)).eigen()
    many = found.maps(STRENGTHS, slice(None))
    for strength, linear in zip(STRENGTHS, many, strict=True):
        assert_same(linear, found.maps([strength], slice(None))[0], 0)
    sizes = [float(np.linalg.norm(linear.weight)) for linear in many]
    assert sizes == sorted(sizes, reverse=True)


def test_an_intercept_is_found_and_not_penalised() -> None:
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(500, 4)).astype(np.float32)
    targets = np.tile(np.array([3, -2], np.float32), (500, 1))
    for strength in STRENGTHS:
        found = map_of(moments(Rows(inputs, targets, 1)), strength)
        np.testing.assert_allclose(found.bias, [3, -2], atol=1e-6)
        np.testing.assert_allclose(found.weight, 0, atol=1e-6)


@pytest.mark.parametrize("intercept", [True, False])
def test_inputs_that_do_not_vary_give_a_finite_map(intercept: bool) -> None:
    inputs = np.ones((30, 6), np.float32)
    targets = np.full((30, 2), 0.5, np.float32)
    found = map_of(moments(Rows(inputs, targets, 0), intercept=intercept), STRENGTHS[0])
    assert np.isfinite(found.weight).all()
    np.testing.assert_allclose(found(inputs), targets, atol=1e-4)
