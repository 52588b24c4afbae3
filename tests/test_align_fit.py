"""Fitting: texts are held out by content, strength is chosen on them, and memory does not grow."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_artifact import unit_vectors

from m2dexport.align import fit
from m2dexport.align.fit import MIN_TEXTS, STRENGTHS, Fitting
from m2dexport.errors import UsageError
from m2dexport.vectors.codecs import cosines, normalize, truncate

Floats = NDArray[np.float32]


def texts(count: int) -> list[str]:
    return [f"text {number}" for number in range(count)]


def rotation(seed: int, width: int) -> Floats:
    rng = np.random.default_rng(seed)
    return np.linalg.qr(rng.normal(size=(width, width)))[0].astype(np.float32)


def fitted(
    names: Sequence[str],
    inputs: Floats,
    targets: Floats,
    dims: Sequence[int],
    chunk: int = 64,
) -> Fitting:
    fitting = Fitting({2: inputs.shape[1]}, dims)
    for start in range(0, len(names), chunk):
        part = slice(start, start + chunk)
        fitting.add(names[part], {2: inputs[part]}, targets[part])
    return fitting


def test_a_known_linear_map_is_recovered() -> None:
    inputs, known = unit_vectors(0, 800, 12), rotation(1, 12)
    found = fitted(texts(800), inputs, inputs @ known.T, [12]).fit(2, 12)
    np.testing.assert_allclose(found.map.weight, known, atol=1e-4)
    np.testing.assert_allclose(found.map.bias, 0, atol=1e-4)
    assert found.strength == STRENGTHS[0]
    assert found.texts == 800
    assert found.cosine_before < 0.5
    assert found.cosine_after > 0.9999


def test_each_dim_is_fitted_to_the_target_cut_and_normalised_again() -> None:
    inputs = unit_vectors(0, 2000, 16)
    targets = normalize(inputs @ rotation(1, 16).T + np.float32(0.2))
    both = fitted(texts(2000), inputs, targets, [4, 16])
    for dim in (4, 16):
        alone = fitted(texts(2000), inputs, targets, [dim]).fit(2, dim)
        found = both.fit(2, dim)
        np.testing.assert_allclose(found.map.weight, alone.map.weight, atol=1e-6)
        np.testing.assert_allclose(found.map.bias, alone.map.bias, atol=1e-6)
        cosine = cosines(found.map(inputs), truncate(targets, dim)).mean()
        assert found.cosine_after == pytest.approx(cosine, abs=0.01)
        assert cosine > 0.9


def test_more_noise_takes_more_strength() -> None:
    rng = np.random.default_rng(0)
    inputs, known = unit_vectors(0, 300, 24), rotation(1, 24)
    clean = inputs @ known.T
    noisy = normalize(clean + rng.normal(0, 0.4, clean.shape).astype(np.float32))
    strengths = [fitted(texts(300), inputs, t, [24]).fit(2, 24).strength for t in (clean, noisy)]
    assert strengths[1] > 10 * strengths[0]


def test_the_final_map_is_fitted_to_all_texts() -> None:
    inputs = unit_vectors(0, 200, 8)
    targets = normalize(inputs @ rotation(1, 8).T + np.float32(0.1))
    found = fitted(texts(200), inputs, targets, [8]).fit(2, 8)
    x, y = inputs - inputs.mean(axis=0), targets - targets.mean(axis=0)
    expected = np.linalg.solve(x.T @ x + found.strength * np.eye(8), x.T @ y).T
    np.testing.assert_allclose(found.map.weight, expected, atol=1e-4)


def test_a_text_that_occurs_again_is_on_the_same_side_of_the_split() -> None:
    """Rows as wide as they are many can be learned by heart, and show if they are held out."""
    names, inputs = texts(300), unit_vectors(0, 300, 400)
    noise = np.random.default_rng(1).normal(0, 0.3, (300, 8))
    targets = normalize((1 + noise).astype(np.float32))
    once = fitted(names, inputs, targets, [8]).fit(2, 8)
    seven = fitted(names * 7, np.tile(inputs, (7, 1)), np.tile(targets, (7, 1)), [8]).fit(2, 8)
    assert once.cosine_after < 0.97
    assert seven.cosine_after < 0.97
    learned = fitted(texts(2100), np.tile(inputs, (7, 1)), np.tile(targets, (7, 1)), [8]).fit(2, 8)
    assert learned.cosine_after > 0.99


def test_what_is_held_out_depends_neither_on_order_nor_on_chunks() -> None:
    inputs = unit_vectors(0, 300, 8)
    targets = normalize(inputs @ rotation(1, 8).T + np.float32(0.3))
    order = np.random.default_rng(2).permutation(300)
    first = fitted(texts(300), inputs, targets, [8]).fit(2, 8)
    shuffled = [texts(300)[i] for i in order]
    second = fitted(shuffled, inputs[order], targets[order], [8], chunk=7).fit(2, 8)
    assert first.strength == second.strength
    assert first.cosine_after == pytest.approx(second.cosine_after, abs=1e-9)
    np.testing.assert_allclose(first.map.weight, second.map.weight, atol=1e-6)


@pytest.mark.parametrize(("different", "repeated"), [(1, 1000), (MIN_TEXTS - 1, 20), (0, 1)])
def test_too_few_different_texts_are_refused(different: int, repeated: int) -> None:
    count = different * repeated
    rows = unit_vectors(0, count, 8)
    fitting = fitted(texts(different) * repeated, rows, rows, [8])
    for refused in (fitting.require_texts, lambda: fitting.fit(2, 8)):
        with pytest.raises(UsageError, match=f"^{different} different texts are too few") as told:
            refused()
        assert f"at least {MIN_TEXTS}" in str(told.value)
        assert "\n" not in str(told.value)


def test_a_map_that_brings_nothing_nearer_is_refused_with_both_cosines() -> None:
    rows = unit_vectors(0, 400, 8)
    with pytest.raises(UsageError, match="400 texts do not align depth 2 at 8 dims") as told:
        fitted(texts(400), rows, rows, [8]).fit(2, 8)
    assert "mean cosine of 1.0000 to the full model without a map" in str(told.value)
    assert "\n" not in str(told.value)


def test_rows_narrower_than_the_targets_have_no_cosine_without_a_map() -> None:
    inputs = unit_vectors(0, 400, 4)
    targets = normalize(inputs @ rotation(1, 8)[:4])
    assert fitted(texts(400), inputs, targets, [8]).fit(2, 8).cosine_before == 0


def test_a_depth_without_intercept_has_no_bias() -> None:
    inputs = unit_vectors(0, 400, 8)
    targets = normalize(inputs @ rotation(1, 8).T + np.float32(0.3))
    fitting = Fitting({0: 8, 1: 8}, [8], without_intercept=(0,))
    fitting.add(texts(400), {0: inputs, 1: inputs}, targets)
    assert not fitting.fit(0, 8).map.bias.any()
    assert fitting.fit(1, 8).map.bias.any()
    assert fitting.depths == (0, 1)


def test_memory_does_not_grow_with_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "_MOST_HELD", 50)
    inputs = unit_vectors(0, 8000, 8)
    targets = inputs @ rotation(1, 8).T
    sizes = []
    for count in (1000, 8000):
        fitting = fitted(texts(count), inputs[:count], targets[:count], [4, 8], chunk=40)
        assert fitting.fit(2, 8).texts == count
        sizes.append(len(pickle.dumps(fitting)))
    assert sizes[1] < sizes[0] + 100
