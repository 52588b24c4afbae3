from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from sentence_transformers import SentenceTransformer
from tiny import HIDDEN, LAYERS, TEXTS, tiny_checkpoint

from m2dexport.checkpoint.convert import cache_folder
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.errors import CheckpointError, UsageError
from m2dexport.slice.slicing import slice_checkpoint

RANK = 4
QUERY = "layers.0.self_attn.q_proj"
SQUARE = {QUERY: (HIDDEN, HIDDEN)}


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
from pathlib import Path
from m2dexport.checkpoint.convert import cache_folder
from m2dexport.checkpoint.open import open_checkpoint

import torch, transformers  # before the others wait for it
Path(sys.argv[2]).touch()
while len(list(Path(sys.argv[2]).parent.glob("ready-*"))) < 2:
    pass
print(open_checkpoint(sys.argv[1], allow_pickle=True).path)
"""


def test_two_processes_convert_into_an_empty_cache_at_once(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x")
    to_pickle(folder)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONVERT, str(folder), str(tmp_path / f"ready-{i}")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
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


def lora(
    folder: Path,
    base: Path,
    modules: Mapping[str, tuple[int, int]],
    *,
    config: Mapping[str, Any] | None = None,
    replaced: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Write an adapter as PEFT would and return what it adds per module, before scaling."""
    torch.manual_seed(3)
    tensors, added = {}, {}
    for module, (rows, columns) in modules.items():
        up, down = torch.randn(rows, RANK), torch.randn(RANK, columns)
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
        added[module] = up @ down
    tensors.update({f"base_model.model.{n}": t for n, t in (replaced or {}).items()})
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "lora_alpha": 2,
        "r": RANK,
        **(config or {}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return added


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2 / RANK),
        ({"use_rslora": True}, 2 / RANK**0.5),
        ({"alpha_pattern": {"q_proj": 6}}, 6 / RANK),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_an_adapter_is_merged_before_slicing(
    prefix: str, config: dict[str, Any], scale: float, tmp_path: Path
) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama", pooling="lasttoken", shard_size="20KB")
    name = f"{prefix}layers.1.self_attn.q_proj"
    added = lora(tmp_path / "adapter", base, {name: (HIDDEN, HIDDEN)}, config=config)
    checkpoint = open_checkpoint(tmp_path / "adapter")
    assert "the adapter was merged into" in checkpoint.assumed[0]
    by_torch = tiny_checkpoint(tmp_path / "by_torch", "llama", pooling="lasttoken")
    model = transformers.AutoModel.from_pretrained(by_torch)
    with torch.no_grad():
        model.layers[1].self_attn.q_proj.weight += scale * added[name]
    model.save_pretrained(by_torch)
    sub = slice_checkpoint(checkpoint, 3, 16, tmp_path / "sub")
    vectors = SentenceTransformer(str(sub.path), device="cpu").encode(list(TEXTS))
    expected = by_hand.vectors(by_torch, TEXTS, 3, 16, ["lasttoken"])
    np.testing.assert_allclose(vectors, expected, atol=2e-5)
    plain = by_hand.vectors(base, TEXTS, 3, 16, ["lasttoken"])
    assert np.abs(plain - expected).max() > 0.01


def test_an_adapter_brings_its_own_modules_and_whole_tensors(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama", pooling=None)
    donor = tiny_checkpoint(tmp_path / "donor", "llama", pooling="mean", prompts={"query": "q: "})
    norm = torch.full((HIDDEN,), 2.0)
    lora(
        tmp_path / "adapter",
        base,
        {"layers.0.mlp.up_proj": (48, HIDDEN)},
        replaced={"norm.weight": norm},
    )
    (donor / "1_Pooling").rename(tmp_path / "adapter" / "1_Pooling")
    (donor / "2_Normalize").rename(tmp_path / "adapter" / "2_Normalize")
    for name in ("modules.json", "config_sentence_transformers.json"):
        (donor / name).rename(tmp_path / "adapter" / name)
    checkpoint = open_checkpoint(tmp_path / "adapter")
    assert checkpoint.pooling.modes == ("mean",)
    assert checkpoint.prompts == {"query": "q: "}
    model = transformers.AutoModel.from_pretrained(checkpoint.path)
    assert torch.equal(model.norm.weight, norm)


def test_merging_keeps_the_base_models_type(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama", dtype=torch.bfloat16)
    name = "layers.0.self_attn.q_proj"
    added = lora(tmp_path / "adapter", base, {name: (HIDDEN, HIDDEN)})
    checkpoint = open_checkpoint(tmp_path / "adapter")
    merged = transformers.AutoModel.from_pretrained(checkpoint.path, dtype="auto")
    plain = transformers.AutoModel.from_pretrained(base, dtype="auto")
    weight = plain.get_submodule(name).weight.float() + 0.5 * added[name]
    assert torch.equal(merged.get_submodule(name).weight, weight.to(torch.bfloat16))


def test_a_merged_adapter_is_found_again_until_it_changes(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama")
    adapter = tmp_path / "adapter"
    lora(adapter, base, {"layers.0.self_attn.q_proj": (HIDDEN, HIDDEN)})
    first = open_checkpoint(adapter).path
    assert open_checkpoint(adapter).path == first
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 3}))
    assert open_checkpoint(adapter).path != first
    assert open_checkpoint(base).layers == LAYERS


@pytest.mark.parametrize(
    ("module", "config", "message"),
    [
        ("layers.9.self_attn.q_proj", {}, "'layers.9.self_attn.q_proj.weight', which its base"),
        ("layers.0.mlp.up_proj", {}, "does not fit its base model"),
        ("layers.0.self_attn.q_proj", {"peft_type": "IA3"}, "is a IA3 adapter"),
        ("layers.0.self_attn.q_proj", {"use_dora": True}, "use_dora is set"),
        (
            "layers.0.self_attn.q_proj",
            {"base_model_name_or_path": "./gone"},
            r"adapter_config\.json names a base model that is not at hand: \./gone does not exist",
        ),
        (QUERY, {"base_model_name_or_path": "."}, "leads back to the same adapter"),
        (QUERY, {"lora_alpha": float("nan")}, "has a lora_alpha of nan"),
        (QUERY, {"lora_alpha": "much"}, "has no lora_alpha that is a number"),
        (QUERY, {"alpha_pattern": {"(": 1}}, "has no lora_alpha that is a number"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(
    module: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama")
    lora(tmp_path / "adapter", base, {module: (HIDDEN, HIDDEN)}, config=config)
    with pytest.raises(Exception, match=message):
        open_checkpoint(tmp_path / "adapter")
    cache = tmp_path / "cache"
    assert not cache.exists() or not list(cache.iterdir())


def test_adapters_that_name_each_other_are_refused(tmp_path: Path) -> None:
    lora(tmp_path / "one", tmp_path / "two", SQUARE)
    lora(tmp_path / "two", tmp_path / "one", SQUARE)
    with pytest.raises(CheckpointError, match="leads back to the same adapter"):
        open_checkpoint(tmp_path / "one")


def test_matrices_of_different_ranks_are_refused(tmp_path: Path) -> None:
    lora(tmp_path / "adapter", tiny_checkpoint(tmp_path / "base", "llama"), SQUARE)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = f"base_model.model.{QUERY}.lora_A.weight"
    safetensors.torch.save_file({**tensors, name: tensors[name][:3].clone()}, path)
    with pytest.raises(CheckpointError, match=r"\(32, 4\) and \(3, 32\), have no rank in common"):
        open_checkpoint(tmp_path / "adapter")


@pytest.mark.parametrize("place", ["adapter/models/base", "models/base"])
def test_a_relative_base_is_found_from_the_adapters_folder(place: str, tmp_path: Path) -> None:
    """Training ran in the adapter's own folder, or in one that holds both."""
    lora(tmp_path / "adapter", Path("models/base"), SQUARE)
    tiny_checkpoint(tmp_path / place, "llama")
    assert f"merged into {tmp_path / place}" in open_checkpoint(tmp_path / "adapter").assumed[0]


def test_a_pickled_adapter_is_read_where_pickles_are_allowed(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama")
    adapter = tmp_path / "adapter"
    lora(adapter, base, SQUARE)
    expected = open_checkpoint(adapter).weights_sha256
    tensors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle.*--allow-pickle"):
        open_checkpoint(adapter)
    assert open_checkpoint(adapter, allow_pickle=True).weights_sha256 == expected


def test_a_whole_model_under_the_names_of_peft_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "x", "llama")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors[f"{QUERY}.base_layer.weight"] = tensors.pop(f"{QUERY}.weight")
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"under peft's names, .* what merge_and_unload"):
        open_checkpoint(folder)


def test_what_the_hub_answers_is_said() -> None:
    with pytest.raises(UsageError, match=r"could not be fetched from the hub \(.*offline"):
        open_checkpoint("nobody/no-such-model")
