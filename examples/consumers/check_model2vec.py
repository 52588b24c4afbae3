"""Compare the vectors that model2vec gives with the golden ones."""

import golden

with golden.needs("model2vec"):
    import model2vec

folder = golden.command(__doc__).parse_args().folder
rows = golden.texts(folder)
model = model2vec.StaticModel.from_pretrained(folder)
vectors = model.encode([row["input"] for row in rows])
golden.judge(f"model2vec {model2vec.__version__}", rows, vectors)
