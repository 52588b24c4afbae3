"""Compare the vectors that fastembed gives with the golden ones."""

from importlib.metadata import version

import golden

with golden.needs("fastembed"):
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

folder = golden.command(__doc__).parse_args().folder
rows = golden.texts(folder)
TextEmbedding.add_custom_model(
    model="local/exported",
    pooling=PoolingType.DISABLED,  # the vector is finished
    normalization=False,
    output_name="sentence_embedding",
    sources=ModelSource(url="file://unused"),  # the folder is named below
    dim=len(rows[0]["vector"]),
    model_file="onnx/model.onnx",
)
model = TextEmbedding("local/exported", specific_model_path=str(folder))
vectors = list(model.embed([row["input"] for row in rows]))
golden.judge(f"fastembed {version('fastembed')}", rows, vectors)
