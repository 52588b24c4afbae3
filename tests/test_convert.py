"""Pickled weights become safetensors in a cache; nothing in a pickle runs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import HIDDEN, tiny_checkpoint

from m2dexport.checkpoint.convert import cache_folder
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.errors import CheckpointError, UsageError
from m2dexport.slice.slicing import slice_checkpoint


def to_pickle(folder: Path, *, as_zip: bool = True) -> None:
    """Store every safetensors file of a checkpoint as torch would have done; before 1.6 not zip."""
    for path in list(folder.rglob("model.safetensors")):
        torch.save(
            safetensors.torch.load_file(path),
            path.parent / "pytorch_model.bin",
            _use_new_zipfile_serialization=as_zip,
        )
        path.unlink()


@pytest.mark.parametrize(
    ("dtype", "as_zip"), [(torch.float32, True), (torch.bfloat16, True), (torch.float32, False)]
)
def test_pickled_weights_convert_to_the_same_checkpoint(
    dtype: torch.dtype, as_zip: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    head = [torch.nn.Linear(HIDDEN, 8)]
    folder = tiny_checkpoint(tmp_path / "x", head=head, dtype=dtype)
    before = open_checkpoint(folder).weights_sha256
    to_pickle(folder, as_zip=as_zip)
    (folder / "checkpoint-500").mkdir()  # of a training, and no part of the model
    untouched = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle.*--allow-pickle"):
        open_checkpoint(folder)
    checkpoint = open_checkpoint(folder, allow_pickle=True)
    assert checkpoint.weights_sha256 == before
    assert sorted(folder.rglob("*")) == untouched
    assert not (checkpoint.path / "checkpoint-500").exists()
    slice_checkpoint(checkpoint, 2, 4, tmp_path / "sub")


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_that_runs_code_is_not_run(as_zip: bool, tmp_path: Path) -> None:
    class Intruder:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "intruder was here",)

    folder = tiny_checkpoint(tmp_path / "x")
    (folder / "model.safetensors").unlink()
    torch.save(
        {"embeddings": Intruder()},
        folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=as_zip,
    )
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        open_checkpoint(folder, allow_pickle=True)
    assert not (tmp_path / "intruder was here").exists()
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("name", ["README.md", "vocab.txt", "1_Pooling/notes.md"])
def test_a_copy_is_made_again_when_a_file_of_it_changes(name: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x")
    (folder / name).write_text("old")
    to_pickle(folder)
    first = open_checkpoint(folder, allow_pickle=True).path
    assert open_checkpoint(folder, allow_pickle=True).path == first
    (folder / name).write_text("new")
    assert (open_checkpoint(folder, allow_pickle=True).path / name).read_text() == "new"


def test_what_is_not_copied_does_not_make_a_copy_again(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x")
    to_pickle(folder)
    first = open_checkpoint(folder, allow_pickle=True).path
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "config.json").write_text("of another training")
    (folder / "model.onnx").write_bytes(b"in another format")
    assert open_checkpoint(folder, allow_pickle=True).path == first


def test_only_what_modules_json_names_is_looked_at(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x")
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "pytorch_model.bin").write_bytes(b"of another training")
    assert open_checkpoint(folder).path == folder


@pytest.mark.filterwarnings("ignore")  # torch's, of sparse and quantized tensors
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(4).to_sparse(),
        lambda: torch.ones(2, 2, dtype=torch.complex64),
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "complex", "quantized"],
)
def test_a_pickled_tensor_that_safetensors_cannot_hold_is_named(
    make: Callable[[], torch.Tensor], tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "x")
    (folder / "model.safetensors").unlink()
    torch.save({"odd": make()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds 'odd' as a|holds more than tensors"):
        open_checkpoint(folder, allow_pickle=True)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_pickled_float8_keeps_its_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    before = open_checkpoint(folder).weights_sha256
    to_pickle(folder)
    assert open_checkpoint(folder, allow_pickle=True).weights_sha256 == before


CONVERT = """
import sys
from m2dexport.checkpoint.open import open_checkpoint

import torch, transformers  # which take the longest: both then begin at once
print("ready", flush=True)
sys.stdin.readline()
print(open_checkpoint(sys.argv[1], allow_pickle=True).path)
"""


def test_two_processes_convert_into_an_empty_cache_at_once(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x")
    to_pickle(folder)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONVERT, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    printed = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    (path,) = {out.strip() for out, _ in printed}
    assert [made.name for made in (tmp_path / "cache").iterdir()] == [Path(path).name]


def test_the_cache_is_where_the_environment_says_and_somewhere_without_a_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("M2DEXPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "m2dexport"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "m2dexport"


NOBODY = 54_321  # a user that no password file knows


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs another user")
def test_an_unknown_user_without_a_home_has_a_cache_of_its_own() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "M2DEXPORT_CACHE")}
    code = (
        "import os; from m2dexport.checkpoint.convert import cache_folder; "
        f"os.setuid({NOBODY}); print(cache_folder())"
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, "TMPDIR": folder},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.stdout.strip() == f"{folder}/m2dexport-{NOBODY}", result.stderr
        assert (Path(folder) / f"m2dexport-{NOBODY}").stat().st_mode & 0o777 == 0o700


def test_what_the_hub_answers_is_said() -> None:
    with pytest.raises(UsageError, match=r"could not be fetched from the hub \(.*offline"):
        open_checkpoint("nobody/no-such-model")
