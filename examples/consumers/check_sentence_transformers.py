"""Compare the vectors that sentence-transformers gives with the golden ones."""

from importlib import import_module

import golden

#: By what the folder holds: what to install, and what sentence-transformers needs of it.
PACKAGES = {
    "onnx": ("sentence-transformers[onnx]", "optimum.onnxruntime"),
    "openvino": ("sentence-transformers[openvino]", "optimum.intel"),
    "torch": ("sentence-transformers", "torch"),
}

folder = golden.command(__doc__).parse_args().folder
backend = golden.engine(folder)
packages, needed = PACKAGES[backend]
with golden.needs(packages):
    import sentence_transformers

    import_module(needed)
model = sentence_transformers.SentenceTransformer(str(folder), backend=backend, device="cpu")
rows = golden.texts(folder)
vectors = [model.encode(row["text"], prompt_name=row["prompt"]) for row in rows]
program = f"sentence-transformers {sentence_transformers.__version__}, backend={backend}"
golden.judge(program, rows, vectors)
plain = [row for row in rows if row["prompt"] is None]
golden.judge(f"{program}, one batch", plain, model.encode([row["text"] for row in plain]))
