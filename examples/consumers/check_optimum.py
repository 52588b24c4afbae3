"""Compare the vectors that Optimum's token states pool to with the golden ones."""

from importlib.metadata import version

import golden
from transformers import AutoTokenizer

command = golden.command(__doc__)
command.add_argument("engine", nargs="?", default="onnx", choices=["onnx", "openvino"])
named = command.parse_args()
folder, engine = str(named.folder), named.engine
if engine == "onnx":
    from optimum.onnxruntime import ORTModelForFeatureExtraction as Model
else:
    from optimum.intel import OVModelForFeatureExtraction as Model

where = {} if engine == "onnx" else {"subfolder": "openvino"}
model, tokenizer = Model.from_pretrained(folder, **where), AutoTokenizer.from_pretrained(folder)
rows = golden.texts(folder)
batch = tokenizer(
    [row["input"] for row in rows], padding=True, truncation=True, return_tensors="pt"
)
states = model(**batch).last_hidden_state
package = "optimum-onnx" if engine == "onnx" else "optimum-intel"
golden.judge(f"{package} {version(package)}, first token", rows, states[:, 0])
mask = batch["attention_mask"][:, :, None]
golden.judge(f"{package}, mean of tokens", rows, (states * mask).sum(1) / mask.sum(1))
