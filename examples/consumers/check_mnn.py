"""Compare the vectors that MNN gives of `export --for onnx --plain` with the golden ones.

The command mnnconvert would install a logging package by pip, unasked, and report that it ran; so
the library beneath it is called here.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path

import golden
import numpy as np

with golden.needs("MNN"):
    import _tools
    import MNN.expr
    import MNN.nn

folder = golden.command(__doc__).parse_args().folder
rows = golden.texts(folder)
with tempfile.TemporaryDirectory() as scratch:
    converted = Path(scratch) / "model.mnn"
    files = "--modelFile", str(folder / "model.onnx"), "--MNNModel", str(converted)
    _tools.mnnconvert(["mnnconvert", "-f", "ONNX", *files, "--bizCode", "golden"])
    names = ["input_ids", "attention_mask"], ["sentence_embedding"]
    model = MNN.nn.load_module_from_file(str(converted), *names)
    vectors = []
    for row in rows:
        ids = np.array([row["ids"]], dtype=np.int32)
        inputs = [
            MNN.expr.const(each.flatten().tolist(), each.shape, MNN.expr.NCHW, MNN.expr.int)
            for each in (ids, np.ones_like(ids))
        ]
        (vector,) = model.forward(inputs)
        vectors.append(np.array(MNN.expr.convert(vector, MNN.expr.NCHW).read()).reshape(-1))
golden.judge(f"MNN {version('MNN')}", rows, vectors)
