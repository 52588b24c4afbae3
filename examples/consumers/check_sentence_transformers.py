"""Compare the vectors that sentence-transformers gives with the golden ones."""

import golden
import sentence_transformers

command = golden.command(__doc__)
command.add_argument("backend", nargs="?", default="onnx", choices=["onnx", "openvino", "torch"])
named = command.parse_args()
folder, backend = str(named.folder), named.backend
model = sentence_transformers.SentenceTransformer(folder, backend=backend, device="cpu")
rows = golden.texts(folder)
vectors = [model.encode(row["text"], prompt_name=row["prompt"]) for row in rows]
program = f"sentence-transformers {sentence_transformers.__version__}, backend={backend}"
golden.judge(program, rows, vectors)
plain = [row for row in rows if row["prompt"] is None]
golden.judge(f"{program}, one batch", plain, model.encode([row["text"] for row in plain]))
