"""Usage: python check_model2vec.py FOLDER."""

import sys

import golden
import model2vec

folder = sys.argv[1]
rows = golden.texts(folder)
model = model2vec.StaticModel.from_pretrained(folder)
vectors = model.encode([row["input"] for row in rows])
golden.judge(f"model2vec {model2vec.__version__}", rows, vectors)
