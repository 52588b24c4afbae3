"""Compare the vectors that a server of text-embeddings-inference gives with the golden ones."""

import json
from urllib.request import Request, urlopen

import golden

command = golden.command(__doc__)
command.add_argument("url", help="of a server that has loaded the folder")
named = command.parse_args()
rows = golden.texts(named.folder)
vectors = []
for row in rows:
    body = json.dumps({"inputs": row["input"], "truncate": True}).encode()
    request = Request(f"{named.url}/embed", body, {"Content-Type": "application/json"})
    with urlopen(request) as answer:
        vectors += json.load(answer)
golden.judge("text-embeddings-inference", rows, vectors)
