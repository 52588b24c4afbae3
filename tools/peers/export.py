"""Export a sub-model as sentence-transformers does, in a peer's own environment.

    python export.py FORMAT SUB-MODEL OUT [--isa avx2] [--texts TEXTS.jsonl]

FORMAT is onnx, onnx-o3, onnx-int8, openvino or openvino-int8.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from sentence_transformers import SentenceTransformer, backend


def main() -> None:
    """Write one format of one sub-model; those of one backend share a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("format")
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--isa", default="avx2", help="of int8 in ONNX: avx2 or avx512_vnni")
    parser.add_argument("--texts", type=Path, help="to calibrate int8 in OpenVINO, a JSONL file")
    options = parser.parse_args()
    name, _, variant = options.format.partition("-")
    with tempfile.TemporaryDirectory() as folder:
        model = _whole(name, options.out) if variant else _exported(name, options.model, folder)
        if not variant:
            model.save_pretrained(options.out)
            return
    if variant == "o3":
        backend.export_optimized_onnx_model(model, "O3", options.out, file_suffix="o3")
    elif name == "onnx":
        backend.export_dynamic_quantized_onnx_model(
            model, options.isa, options.out, file_suffix="int8"
        )
    else:
        from optimum.intel import OVQuantizationConfig

        backend.export_static_quantized_openvino_model(
            model,
            OVQuantizationConfig(),
            options.out,
            dataset_name=str(options.texts.parent),
            dataset_config_name="default",
            dataset_split="train",
            column_name="text",
            file_suffix="int8",
        )


def _exported(backend_name: str, path: str, folder: str) -> SentenceTransformer:
    """Return a model that is exported from a sub-model, by way of a copy in a folder."""
    copy = Path(shutil.copytree(path, Path(folder) / "model"))
    config = copy / "sentence_bert_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings.pop("model_args", None)  # of the torch class, which Optimum's classes refuse
    config.write_text(json.dumps(settings), encoding="utf-8")
    return SentenceTransformer(
        str(copy), device="cpu", backend=backend_name, model_kwargs={"export": True}
    )


def _whole(backend_name: str, path: str) -> SentenceTransformer:
    """Return the model that was exported to a folder, in float32."""
    file = "onnx/model.onnx" if backend_name == "onnx" else "openvino/openvino_model.xml"
    return SentenceTransformer(
        path, device="cpu", backend=backend_name, model_kwargs={"file_name": file}
    )


if __name__ == "__main__":
    main()
