"""Usage: python check_text_embeddings_inference.py FOLDER URL, of a server that has loaded it."""

import json
import sys
from urllib.request import Request, urlopen

import golden

folder, url = sys.argv[1:3]
rows = golden.texts(folder)
vectors = []
for row in rows:
    body = json.dumps({"inputs": row["input"], "truncate": True}).encode()
    request = Request(f"{url}/embed", body, {"Content-Type": "application/json"})
    with urlopen(request) as answer:
        vectors += json.load(answer)
golden.judge("text-embeddings-inference", rows, vectors)
