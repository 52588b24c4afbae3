"""Weights rounded to codes: how far they err, and when products of them saturate."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2dexport.quantize.codes import BLOCK, pack_nibbles, quantize_blocks, symmetric_int8
from m2dexport.quantize.rounding import round_weights
from m2dexport.quantize.saturation import isa_of


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(1, 12))
def test_no_input_can_saturate_the_kernels_of_a_cpu_without_vnni(
    seed: int, rows: int, columns: int
) -> None:
    """These add the products of two neighbouring bytes, one of them unsigned, in 16 bits."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(2, (rows, columns)).astype(np.float32)
    inputs = rng.standard_normal((64, rows)).astype(np.float32)
    codes = round_weights(weight, inputs, "portable")[0].astype(int)
    pairs = np.pad(codes, ((0, rows % 2), (0, 0))).reshape(-1, 2, columns)
    worst = 255 * np.maximum(np.maximum(pairs, 0).sum(axis=1), np.maximum(-pairs, 0).sum(axis=1))
    assert worst.max() < 2**15


@pytest.mark.parametrize(
    ("rows", "isa"),
    [
        ([[64], [64]], "portable"),
        ([[-100], [-28]], "portable"),
        ([[127], [-127]], "portable"),
        ([[1], [127], [1], [2]], "portable"),  # 127 + 1: neighbours are rows 0 and 1, 2 and 3
        ([[1], [127], [2], [2], [100]], "portable"),  # the last has no neighbour
        ([[64], [65]], "vnni"),
        ([[0], [0], [-100], [-29]], "vnni"),
    ],
)
def test_saturation_is_read_off_neighbouring_codes(rows, isa) -> None:
    codes = ir.tensor(np.array(rows, dtype=np.int8), name="codes")
    value = ir.Value(name="codes", shape=ir.Shape(codes.shape), const_value=codes)
    assert isa_of(ir.Graph([], [], nodes=[], initializers=[value])) == isa


def test_rounding_that_looks_at_the_inputs_beats_rounding_to_nearest() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((48, 48)).astype(np.float32)
    inputs = rng.standard_normal((512, 48)).astype(np.float32) @ mixing
    weight = rng.standard_normal((48, 32)).astype(np.float32)
    codes, scale = round_weights(weight, inputs, "portable")
    step = np.abs(weight).max(axis=0) / 63  # 7 bits, the usual way to be exact without VNNI
    nearest = np.round(weight / step) * step / scale
    error, nearest_error = (
        np.square(inputs @ (values * scale - weight)).mean() for values in (codes, nearest)
    )
    assert error < 0.7 * nearest_error


floats = st.floats(-100, 100, width=32)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3).flatmap(
        lambda n: st.integers(1, 70).flatmap(
            lambda k: st.lists(floats, min_size=n * k, max_size=n * k).map(
                lambda values: np.array(values, dtype=np.float32).reshape(n, k)
            )
        )
    ),
    st.sampled_from([4, 8]),
)
def test_a_block_errs_by_less_than_its_range_allows(rows, bits) -> None:
    blocks = quantize_blocks(rows, bits)
    width = rows.shape[1]
    padded = np.pad(rows, ((0, 0), (0, -width % BLOCK))).reshape(len(rows), -1, BLOCK)
    values = (blocks.codes.astype(np.float32) - blocks.zero) * blocks.scale
    largest = np.abs(padded).max(axis=-1)
    mean_square = np.sqrt(np.square(values - padded).mean(axis=-1))
    assert (mean_square <= largest * (0.005 if bits == 8 else 0.15) + 1e-6).all()


@given(st.lists(st.integers(0, 15), min_size=2, max_size=40).filter(lambda c: len(c) % 2 == 0))
def test_packed_nibbles_hold_the_first_of_a_pair_below(codes) -> None:
    packed = pack_nibbles(np.array(codes, dtype=np.uint8))
    assert [n for byte in packed.tolist() for n in (byte & 15, byte >> 4)] == codes


def test_a_channel_of_zeros_stays_zero() -> None:
    codes, scale = symmetric_int8(np.zeros((3, 4), dtype=np.float32), axis=0)
    assert not codes.any()
    assert (scale > 0).all()
