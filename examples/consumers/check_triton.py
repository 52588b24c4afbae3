"""Compare the vectors that Triton's backend would give with the golden ones.

Reads config.pbtxt by Triton's own schema (pip install "tritonclient[grpc]"), and runs the model
that it describes as Triton's backend does, by onnxruntime, batch by batch. No server is started.
"""

import golden
import numpy as np

with golden.needs("onnxruntime", "tritonclient[grpc]"):
    import onnxruntime
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

TYPES = {"tensor(int64)": "INT64", "tensor(float)": "FP32"}
TYPES |= {f"tensor({sign}int8)": f"{sign.upper()}INT8" for sign in ("", "u")}

folder = golden.command(__doc__).parse_args().folder
(path,) = folder.glob("*/config.pbtxt")
config = text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
assert config.name == path.parent.name
assert config.backend == "onnxruntime"
session = onnxruntime.InferenceSession(path.parent / "1" / "model.onnx")
for listed, found in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
    wanted = [(each.name, DataType.Name(each.data_type), list(each.dims)) for each in listed]
    sizes = [[n if isinstance(n, int) else -1 for n in each.shape[1:]] for each in found]
    there = [(e.name, f"TYPE_{TYPES[e.type]}", n) for e, n in zip(found, sizes, strict=True)]
    assert wanted == there, f"{wanted} where the model has {there}"

rows = golden.texts(folder)
for warmup in config.model_warmup:  # as a server does before it takes requests
    shape = (warmup.batch_size, *warmup.inputs["input_ids"].dims)
    assert warmup.batch_size <= config.max_batch_size
    session.run(None, dict.fromkeys(warmup.inputs, np.zeros(shape, dtype=np.int64)))
vectors = []
for row in rows:
    ids = np.array([row["ids"]])
    (vector,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    vectors.append(vector[0])
golden.judge(f"config.pbtxt, run by onnxruntime {onnxruntime.__version__}", rows, vectors)
