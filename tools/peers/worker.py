"""One candidate of tools/bench_peers.py in a process of its own, in the peer's own environment.

It is given what to load as JSON, loads it, encodes a text, and prints how wide its vector is. Then
it answers requests, one a line, until standard input ends. It imports nothing that its peer does
not, numpy apart.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 32
FIRST = "A man is playing a guitar."
PACKAGES = (
    *("m2dexport", "sentence-transformers", "transformers", "torch", "tokenizers", "fastembed"),
    *("onnxruntime", "optimum-onnx", "openvino", "optimum-intel", "numpy"),
)

Encode = Callable[[Sequence[str]], Any]  # texts -> float32 (texts, dim), normalised


def main() -> None:
    """Load, then answer requests."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the libraries print must not come between the answers
    asked = json.loads(sys.argv[1])
    encode: Encode = LOADERS[asked["loader"]](asked)
    vector = encode([FIRST])[0]
    print(len(vector), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(encode, json.loads(line))), file=answers, flush=True)


def _answer(encode: Encode, request: Mapping[str, Any]) -> Any:
    texts: Sequence[str] = request.get("texts", ())
    if request["work"] == "one":  # seconds of one text by itself, the median
        return float(np.median([_seconds(encode, [text]) for text in texts]))
    if request["work"] == "batches":  # seconds of all texts
        return _seconds(encode, texts)
    if request["work"] == "vectors":  # written to files: of all texts together, and of some alone
        np.save(request["together"], np.asarray(encode(texts), dtype=np.float32))
        alone = [np.asarray(encode([texts[row]]))[0] for row in request["rows"]]
        np.save(request["alone"], np.asarray(alone, dtype=np.float32))
        return None
    return ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name)))


def _seconds(encode: Encode, texts: Sequence[str]) -> float:
    start = time.perf_counter()
    encode(texts)
    return time.perf_counter() - start


def _version(package: str) -> str | None:
    """Return the version of a package that this process has imported."""
    module = {"optimum-onnx": "optimum.onnxruntime", "optimum-intel": "optimum.intel"}
    if module.get(package, package.replace("-", "_")) not in sys.modules:
        return None
    try:
        return version(package)
    except PackageNotFoundError:  # m2dexport in a clone that is not installed
        return str(getattr(sys.modules[package], "__version__", "not installed"))


def m2dexport(asked: Mapping[str, Any]) -> Encode:
    """Load one of our artifacts or bundles by the public interface."""
    from m2dexport import Device, load

    encoder = load(asked["path"], Device(threads=asked["threads"]))
    return lambda texts: encoder.encode(texts, batch_size=BATCH)


def sentence_transformers(asked: Mapping[str, Any]) -> Encode:
    """Load a sentence-transformers folder with the backend and the file that are asked for."""
    import torch
    from sentence_transformers import SentenceTransformer

    threads = asked["threads"]
    torch.set_num_threads(threads)
    settings: dict[str, Any] = {}
    if asked["backend"] == "onnx":
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        settings = {"provider": "CPUExecutionProvider", "session_options": options}
    elif asked["backend"] == "openvino":
        config = {"INFERENCE_NUM_THREADS": str(threads), "PERFORMANCE_HINT": "LATENCY"}
        settings = {"ov_config": config}
    if "file" in asked:
        settings["file_name"] = asked["file"]
    model = SentenceTransformer(
        asked["path"], device="cpu", backend=asked["backend"], model_kwargs=settings
    )
    return lambda texts: model.encode(
        list(texts), batch_size=BATCH, show_progress_bar=False, normalize_embeddings=True
    )


def fastembed(asked: Mapping[str, Any]) -> Encode:
    """Load the float32 ONNX file as a custom model of fastembed."""
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    name = "bench/peer"
    TextEmbedding.add_custom_model(
        name,
        pooling=PoolingType[asked["pooling"].upper()],
        normalization=True,
        sources=ModelSource(hf=name),
        dim=asked["dim"],
        model_file=asked["file"],
    )
    model = TextEmbedding(name, threads=asked["threads"], specific_model_path=asked["path"])
    return lambda texts: np.stack(list(model.embed(list(texts), batch_size=BATCH)))


def ortmodel(asked: Mapping[str, Any]) -> Encode:
    """Load Optimum's ORTModelForFeatureExtraction, and pool in numpy; lengths are sorted."""
    import onnxruntime as ort
    from optimum.onnxruntime import ORTModelForFeatureExtraction
    from transformers import AutoTokenizer

    options = ort.SessionOptions()
    options.intra_op_num_threads = asked["threads"]
    file = Path(asked["file"])
    model = ORTModelForFeatureExtraction.from_pretrained(
        asked["path"], subfolder=str(file.parent), file_name=file.name, session_options=options
    )
    tokenizer = AutoTokenizer.from_pretrained(asked["path"])

    def batch(texts: Sequence[str]) -> Any:
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
        states = model(**inputs).last_hidden_state
        if asked["pooling"] == "cls":
            pooled = states[:, 0]
        else:
            mask = inputs["attention_mask"][..., None].astype(np.float32)
            pooled = (states * mask).sum(axis=1) / mask.sum(axis=1)
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

    def encode(texts: Sequence[str]) -> Any:
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        vectors = np.empty((len(texts), asked["dim"]), dtype=np.float32)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            vectors[rows] = batch([texts[row] for row in rows])
        return vectors

    return encode


LOADERS: Mapping[str, Callable[[Mapping[str, Any]], Encode]] = {
    "m2dexport": m2dexport,
    "sentence-transformers": sentence_transformers,
    "fastembed": fastembed,
    "ortmodel": ortmodel,
}

if __name__ == "__main__":
    main()
