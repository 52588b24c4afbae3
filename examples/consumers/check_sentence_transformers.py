"""Usage: python check_sentence_transformers.py FOLDER [onnx|openvino|torch]."""

import sys

import golden
import sentence_transformers

folder, backend = sys.argv[1], (sys.argv[2:] or ["onnx"])[0]
model = sentence_transformers.SentenceTransformer(folder, backend=backend, device="cpu")
rows = golden.texts(folder)
vectors = [model.encode(row["text"], prompt_name=row["prompt"]) for row in rows]
program = f"sentence-transformers {sentence_transformers.__version__}, backend={backend}"
golden.judge(program, rows, vectors)
plain = [row for row in rows if row["prompt"] is None]
golden.judge(f"{program}, one batch", plain, model.encode([row["text"] for row in plain]))
