from __future__ import annotations

import json
import tempfile
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2dexport.checkpoint.tensors import (
    copied,
    new_tensor,
    read_tensor,
    row_blocks_of,
    selected,
    sha256_of_tensors,
    stored_tensors,
    tensors_in,
    write_tensors,
)
from m2dexport.errors import CheckpointError, UsageError

TORCH_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of a (6, 4) float32 "b" and a scalar int64 "a"."""
    path = tmp_path / "model.safetensors"
    values = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    safetensors.torch.save_file({"b": values, "a": torch.tensor(7)}, path)
    return path


def test_the_bytes_of_a_written_file_are_pinned(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, [new_tensor("w", np.array([[1.0, 2.0]], dtype=np.float32))])
    header = (
        b'{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}} '
    )
    assert path.read_bytes() == (
        len(header).to_bytes(8, "little") + header + b"\x00\x00\x80\x3f\x00\x00\x00\x40"
    )


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_a_copy_is_what_safetensors_reads(dtype: torch.dtype, tmp_path: Path) -> None:
    original = {"x": (torch.randn(5, 3) * 10).to(dtype), "empty": torch.zeros(0, 3, dtype=dtype)}
    safetensors.torch.save_file(original, tmp_path / "in.safetensors")
    found = tensors_in(tmp_path / "in.safetensors")
    write_tensors(tmp_path / "out.safetensors", [copied(t, n) for n, t in found.items()])
    read = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert read.keys() == original.keys()
    for name, values in original.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], values)


def test_leading_rows_are_cut(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    write_tensors(out, [copied(tensors_in(weights)["b"], "cut", rows=2)])
    np.testing.assert_array_equal(read_tensor(tensors_in(out)["cut"]), np.arange(8).reshape(2, 4))


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_any_rows_and_columns_are_selected_in_the_order_asked_for(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(5, 3), (1, 7), (6,), (4, 1)]), "shape")
    axis = data.draw(st.sampled_from(range(len(shape))), "axis")
    places = st.integers(0, shape[axis] - 1)
    index = np.array(data.draw(st.lists(places, min_size=1, max_size=9), "index"), np.int64)
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        write_tensors(path, [new_tensor("x", values)])
        tensor = tensors_in(path)["x"]
        write_tensors(
            Path(folder) / "out.safetensors",
            [
                selected(tensor, "same", index, axis=axis),
                selected(tensor, "half", index, axis=axis, dtype="F16"),
            ],
        )
        stored = tensors_in(Path(folder) / "out.safetensors")
        found = {name: read_tensor(tensor) for name, tensor in stored.items()}
    np.testing.assert_array_equal(found["same"], values.take(index, axis))
    np.testing.assert_array_equal(found["half"], values.take(index, axis).astype(np.float16))


@pytest.mark.parametrize("stored", [torch.float32, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)]
)
def test_conversion_rounds_as_torch_does(
    dtype: str, torch_dtype: torch.dtype, stored: torch.dtype, tmp_path: Path
) -> None:
    values = (torch.randn(1000) * 100).to(stored)
    safetensors.torch.save_file({"x": values}, tmp_path / "in.safetensors")
    found = tensors_in(tmp_path / "in.safetensors")["x"]
    write_tensors(tmp_path / "out.safetensors", [copied(found, "x", dtype=dtype)])
    read = safetensors.torch.load_file(tmp_path / "out.safetensors")["x"]
    assert read.dtype == torch_dtype
    assert torch.equal(read, values.to(torch_dtype))


def test_conversion_leaves_integers_alone(weights: Path, tmp_path: Path) -> None:
    write_tensors(
        tmp_path / "out.safetensors", [copied(tensors_in(weights)["a"], "a", dtype="F16")]
    )
    assert tensors_in(tmp_path / "out.safetensors")["a"].dtype == "I64"


def test_a_value_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    big = new_tensor("big", np.array([1e6], dtype=ml_dtypes.bfloat16))
    write_tensors(tmp_path / "in.safetensors", [big])
    found = tensors_in(tmp_path / "in.safetensors")["big"]
    with pytest.raises(UsageError, match="'big' holds values beyond float16's 65504"):
        write_tensors(tmp_path / "out.safetensors", [copied(found, "big", dtype="F16")])


def test_rows_come_in_whole_blocks(tmp_path: Path) -> None:
    values = np.arange(3 * 1_500_000, dtype=np.float32).reshape(3, -1)
    write_tensors(tmp_path / "x.safetensors", [new_tensor("x", values)])
    blocks = list(row_blocks_of(tensors_in(tmp_path / "x.safetensors")["x"]))
    assert [block.shape[0] for block in blocks] == [2, 1]
    np.testing.assert_array_equal(np.concatenate(blocks), values)


def test_copying_holds_one_block_in_memory(tmp_path: Path) -> None:
    shape = (4, 8 << 20)  # 128 MiB of float32
    write_tensors(tmp_path / "in.safetensors", [new_tensor("x", np.zeros(shape, np.float32))])
    found = tensors_in(tmp_path / "in.safetensors")["x"]
    for dtype, limit in ((None, 40 << 20), ("F16", 64 << 20)):
        tracemalloc.start()
        write_tensors(tmp_path / "out.safetensors", [copied(found, "x", dtype=dtype)])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < limit


def test_selecting_holds_few_blocks_in_memory(tmp_path: Path) -> None:
    shape = (8 << 10, 4 << 10)  # 128 MiB of float32
    write_tensors(tmp_path / "in.safetensors", [new_tensor("x", np.zeros(shape, np.float32))])
    found = tensors_in(tmp_path / "in.safetensors")["x"]
    for axis in (0, 1):
        new = selected(found, "x", np.arange(shape[axis] - 1), axis=axis)
        tracemalloc.start()
        write_tensors(tmp_path / "out.safetensors", [new])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 72 << 20


def test_shards_hash_and_read_like_one_file(tmp_path: Path) -> None:
    values = {name: torch.randn(3, 3) for name in "abc"}
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir()
    many.mkdir()
    safetensors.torch.save_file(values, one / "model.safetensors")
    safetensors.torch.save_file({"a": values["a"]}, many / "model-1.safetensors")
    safetensors.torch.save_file({n: values[n] for n in "bc"}, many / "model-2.safetensors")
    weight_map = {"a": "model-1.safetensors", **dict.fromkeys("bc", "model-2.safetensors")}
    index = many / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert sha256_of_tensors(stored_tensors(one)) == sha256_of_tensors(stored_tensors(many))
    np.testing.assert_array_equal(read_tensor(stored_tensors(many)["c"]), values["c"].numpy())


def test_a_hash_sees_names_shapes_types_and_values(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    base = np.arange(4, dtype=np.float32)
    hashes = set()
    for name, values in (
        ("x", base),
        ("y", base),
        ("x", base.reshape(2, 2)),
        ("x", base.view(np.int32)),
        ("x", base + 1),
    ):
        write_tensors(path, [new_tensor(name, values)])
        hashes.add(sha256_of_tensors(tensors_in(path)))
    assert len(hashes) == 5


def move_onto_its_neighbour(data: bytes) -> bytes:
    """Make two tensors share bytes, by their offsets in the header."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    size = header["a"]["data_offsets"][1] - header["a"]["data_offsets"][0]
    start = header["b"]["data_offsets"][0]
    header["a"]["data_offsets"] = [start, start + size]
    return (
        data[:8]
        + json.dumps(header, separators=(",", ":")).encode().ljust(length)
        + data[8 + length :]
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "truncated or not a safetensors"),
        (lambda data: data[:4], "truncated or not a safetensors"),
        (lambda data: data[:50], "truncated or not a safetensors"),
        (lambda data: data[:-1], "does not fit in the file"),
        (lambda data: b"\xff" * 8 + data[8:], "truncated or not a safetensors"),
        (lambda data: data[:8] + b"x" + data[9:], "its header is not JSON"),
        (lambda data: data.replace(b'"F32"', b'"F99"'), "of an unknown type"),
        (lambda data: data.replace(b"[6,4]", b"[6,5]"), "does not fit in the file"),
        (lambda data: data.replace(b"[6,4]", b"[6,x]"), "its header is not JSON"),
        (lambda data: data.replace(b"[6,4]", b"true "), "the header entry of 'b' is not valid"),
        (lambda data: data.replace(b'"b"', b'"a"'), "its header names 'a' twice"),
        (lambda data: data[:8] + b"[" * (len(data) - 8), "its header is not JSON"),
        (move_onto_its_neighbour, "'a' and 'b' overlap|'b' and 'a' overlap"),
    ],
)
def test_a_damaged_file_gives_one_sentence(weights: Path, damage: object, message: str) -> None:
    assert callable(damage)
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as raised:
        tensors_in(weights)
    assert str(weights) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not a valid index"),
        ("[]", "not a valid index"),
        ('{"weight_map": {"b": "../model.safetensors"}}', "not a file beside it"),
        ('{"weight_map": {"c": "model-1.safetensors"}}', "'c', which no shard holds"),
        ('{"weight_map": {"b": "model-9.safetensors"}}', "model-9.safetensors is missing"),
    ],
)
def test_a_damaged_index_gives_one_sentence(weights: Path, index: str, message: str) -> None:
    weights.rename(weights.parent / "model-1.safetensors")
    (weights.parent / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        stored_tensors(weights.parent)
