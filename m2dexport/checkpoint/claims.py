"""Names and configs that claim a precision which the bytes do not have."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from m2dexport.checkpoint.hf_config import CONFIG
from m2dexport.checkpoint.jsonfile import read_object
from m2dexport.checkpoint.open import Checkpoint
from m2dexport.checkpoint.tensors import StoredTensor, tensors_in
from m2dexport.errors import CheckpointError

#: Words in names, by the type that they claim.
_WORDS = {
    "fp32": ("fp32", "float32", "f32"),
    "fp16": ("fp16", "float16", "f16", "half"),
    "bf16": ("bf16", "bfloat16"),
    "fp8": ("fp8", "float8"),
    "integers": (
        *("int8", "uint8", "i8", "q8", "8bit", "w8a8", "int4", "uint4", "q4", "4bit", "w4a16"),
        *("quantized", "quant", "gptq", "awq", "qint8", "bnb"),
    ),
}
_CLAIMS = {word: kind for kind, words in _WORDS.items() for word in words}
_STORED = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
#: Types of ONNX tensors, by number; others that hold weights are integers.
_ONNX = {1: "fp32", 10: "fp16", 11: "fp64", 16: "bf16", 17: "fp8", 18: "fp8", 19: "fp8", 20: "fp8"}
_SHARE = 0.1  # of the values at least are of a claimed type: tables often stay in another
_MOST_BYTES = 1 << 30  # of an ONNX file that is looked into; weights beside it are not read


def stored_precision(checkpoint: Checkpoint) -> str:
    """Return the type of most of a checkpoint's values: "fp32", "fp16", "bf16", "fp8", ..."""
    return _most(_weights(checkpoint))


def precision_claims(checkpoint: Checkpoint) -> list[str]:
    """Return a sentence for each name or config that claims a precision which the bytes lack.

    The name of the folder, or of the model on the hub, config.json's dtype, and the names of
    safetensors and ONNX files are compared with the types of the stored weights.
    """
    folder, counted = checkpoint.path, _weights(checkpoint)
    stored, sentences = _most(counted), []
    config = read_object(folder / CONFIG)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "")
    if _lacks(counted, _CLAIMS.get(dtype)):
        effect = "they are widened when loaded" if dtype == "float32" else "loaders may round them"
        sentences.append(
            f"{CONFIG} claims {dtype}, and the weights are stored in {stored}: {effect}."
        )
    name = _hub_name(folder) or folder.resolve().name
    if _lacks(counted, _claimed(name)):
        sentences.append(
            f"the name {name} claims {_claimed(name)}, and the weights are stored in {stored}."
        )
    return [*sentences, *_of_files(folder)]


def _of_files(folder: Path) -> Iterator[str]:
    files = [path for suffix in ("safetensors", "onnx") for path in folder.glob(f"*.{suffix}")]
    for path in (*sorted(files), *sorted(folder.glob("onnx/**/*.onnx"))):
        name = path.relative_to(folder).as_posix()
        claimed = _claimed(name)
        if claimed is None:
            continue
        counted = _in_onnx(path) if path.suffix == ".onnx" else _in_safetensors(path)
        if _lacks(counted, claimed):
            yield f"the name {name} claims {claimed}, and its weights are {_most(counted)}."


def _weights(checkpoint: Checkpoint) -> Counter[str]:
    return _counted(checkpoint.layout.tensors(checkpoint.layers).values())


def _in_safetensors(path: Path) -> Counter[str]:
    try:
        return _counted(tensors_in(path).values())
    except CheckpointError:  # the one that is opened was found to be whole
        return Counter()


def _counted(tensors: Iterable[StoredTensor]) -> Counter[str]:
    """Return how many values are of which type."""
    counted: Counter[str] = Counter()
    for tensor in tensors:
        kind = "fp8" if tensor.dtype.startswith("F8") else _STORED.get(tensor.dtype, "integers")
        counted[kind] += tensor.parameters
    return counted


def _in_onnx(path: Path) -> Counter[str]:
    import onnx

    counted: Counter[str] = Counter()
    if path.stat().st_size > _MOST_BYTES:
        return counted
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception:  # protobuf has errors of its own
        return counted
    for tensor in graph.initializer:
        counted[_ONNX.get(tensor.data_type, "integers")] += math.prod(tensor.dims)
    return counted


def _lacks(counted: Counter[str], claimed: str | None) -> bool:
    """Say whether hardly any of some values are of a claimed type."""
    return claimed is not None and counted[claimed] < _SHARE * counted.total()


def _most(counted: Counter[str]) -> str:
    return max(counted, key=lambda kind: counted[kind], default="no weights")


def _claimed(name: str) -> str | None:
    """Return the precision that a name claims; None of one that claims none, or several."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    found = {_CLAIMS[word] for word in words if word in _CLAIMS}
    return found.pop() if len(found) == 1 else None


def _hub_name(folder: Path) -> str | None:
    """Return the name of a model in the cache of the hub: .../models--ORG--NAME/snapshots/SHA."""
    named = [part for part in folder.parts if part.startswith("models--")]
    return named[-1].rpartition("--")[2] if named else None
