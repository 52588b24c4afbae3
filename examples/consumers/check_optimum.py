"""Compare the vectors that Optimum's token states pool to with the golden ones."""

from importlib.metadata import version

import golden

folder = golden.command(__doc__).parse_args().folder
on_openvino = golden.engine(folder) == "openvino"
with golden.needs("optimum-intel[openvino]" if on_openvino else "optimum-onnx[onnxruntime]"):
    from transformers import AutoTokenizer

    if on_openvino:
        from optimum.intel import OVModelForFeatureExtraction as Model
    else:
        from optimum.onnxruntime import ORTModelForFeatureExtraction as Model

where = {"subfolder": "openvino"} if on_openvino else {}
model, tokenizer = Model.from_pretrained(folder, **where), AutoTokenizer.from_pretrained(folder)
rows = golden.texts(folder)
batch = tokenizer(
    [row["input"] for row in rows], padding=True, truncation=True, return_tensors="pt"
)
states = model(**batch).last_hidden_state
package = "optimum-intel" if on_openvino else "optimum-onnx"
golden.judge(f"{package} {version(package)}, first token", rows, states[:, 0])
mask = batch["attention_mask"][:, :, None]
golden.judge(f"{package}, mean of tokens", rows, (states * mask).sum(1) / mask.sum(1))
