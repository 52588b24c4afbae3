"""Read a bundle without m2dexport: check it, run its golden texts, encode (engine "onnx").

python read_bundle.py edge.m2d "A man is playing a guitar."
"""

import hashlib
import json
import sys
import zipfile

import numpy as np
import onnxruntime
import tokenizers


def require(holds, what):
    if not holds:
        sys.exit(f"refused: {what}")


def require_digest(name, content, said):
    found = (len(content), hashlib.sha256(content).hexdigest())
    require(found == (said["size"], said["sha256"]), f"{name} is damaged")
    return content


def read_cells(path):
    """Return id -> files (name -> content); a bundle of one cell has the id ""."""
    with zipfile.ZipFile(path) as archive:
        for info in (infos := archive.infolist()):
            plain = (info.compress_type, info.compress_size) == (0, info.file_size)
            require(plain and info.external_attr >> 16 == 0o100644, "a compressed entry or a link")
        entries = {info.filename: archive.read(info) for info in infos}  # compares the CRC-32
    require([info.filename for info in infos] == sorted(entries), "double or unsorted names")
    manifest = json.loads(entries["manifest.json"])
    others = set(entries) - {*manifest["files"], "manifest.json", "signature.json"}
    require(manifest["format"] == 2 and not others, f"another format, or entries {others}")
    stored = {n: require_digest(n, entries[n], said) for n, said in manifest["files"].items()}
    cells = manifest["cells"]
    return {cell: join(stored, cells[cell]["files"]) for cell in cells} or {"": stored}


def join(stored, files):
    joined, most = {}, sum(map(len, stored.values()))
    for name, said in files.items():
        size = sum(span["size"] for span in said["spans"])
        require(size == said["size"] <= most, f"{name} of {size} bytes")
        parts = [stored[s["entry"]][s["offset"] :][: s["size"]] for s in said["spans"]]
        joined[name] = require_digest(name, b"".join(parts), said)
    return joined


class Encoder:
    def __init__(self, files):
        self.spec, self.golden = (json.loads(files[f"{n}.json"]) for n in ("artifact", "golden"))
        self.ranges = json.loads(files.get("ranges.json", "null"))
        self.tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        self.graph = onnxruntime.InferenceSession(files["model.onnx"])

    def ids(self, text, prompt=None):
        name = self.spec["default_prompt"] if prompt is None else prompt
        return self.tokenizer.encode((self.spec["prompts"][name] if name else "") + text).ids

    def encode(self, ids):
        inputs = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), int)}
        return self.graph.run(None, inputs)[0][0]

    def decode(self, code):
        kind, dim, order = (self.spec[key] for key in ("vectors", "dim", "bit_order"))
        if kind in ("ubinary", "binary"):
            packed = (code.astype(int) + 128 * (kind == "binary")).astype(np.uint8)
            return np.unpackbits(packed, count=dim, bitorder=order) * 2.0 - 1
        if kind not in ("int8", "int4"):
            return code / (127.0 if kind == "int8-symmetric" else 1.0)
        low, high = (np.array(self.ranges[key]) for key in ("low", "high"))
        halves = np.stack([code >> 4, code & 15][:: 1 if order == "big" else -1], axis=1)
        levels = code + 128.0 if kind == "int8" else halves.reshape(-1)[:dim]
        return low + (levels + 0.5) * (high - low) / (255 if kind == "int8" else 15)

    def worst(self):  # of the golden vectors; at most 1
        found, bits = [], self.golden["tolerance"]["metric"] == "min_equal_bits"
        for row in self.golden["texts"]:
            require(self.ids(row["text"], row["prompt"]) == row["ids"], f"tokens of {row['text']}")
            if row["vector"] is not None:
                code = self.encode(row["ids"])
                a, b = (self.decode(v) for v in (code, np.array(row["vector"], code.dtype)))
                cosine = 1 - ((a - b) ** 2).sum() / max((a**2 + b**2).sum(), 1e-30)
                found.append((a == b).mean() if bits else cosine)
        return min(found)


for cell, files in read_cells(sys.argv[1] if sys.argv[1:] else sys.exit(__doc__)).items():
    if "model.onnx" in files:
        require(b"location" not in files["model.onnx"], "a graph that names other files")
        encoder = Encoder(files)
        worst, limit = encoder.worst(), encoder.golden["tolerance"]["limit"]
        require(worst >= limit, f"golden vectors: {worst} is below {limit}")
        print(cell, encoder.spec["space_id"], f"golden vectors within {worst:.7f} >= {limit}")
        print(*(encoder.encode(encoder.ids(text)).tolist() for text in sys.argv[2:]), sep="\n")
