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


def read_cells(path):  # id -> files (name -> content); a bundle of one cell has the id ""
    with zipfile.ZipFile(path) as archive:
        infos, names = archive.infolist(), archive.namelist()
        plain = all((i.compress_type, i.external_attr >> 16) == (0, 0o100644) for i in infos)
        size = 22 + sum(76 + 2 * len(info.filename) + info.file_size for info in infos)
        require(plain and archive.fp.seek(0, 2) == size, "an archive of another layout")
        require(names == sorted({*names}), "double or unsorted names")
        entries = {info.filename: archive.read(info) for info in infos}  # compares the CRC-32
    manifest = json.loads(entries["manifest.json"])
    others = set(entries) - {*manifest["files"], "manifest.json", "signature.json"}
    require(manifest["format"] == 2 and not others, f"another format, or entries {others}")
    stored, cells = join(entries, manifest["files"]), manifest["cells"]
    return {cell: join(stored, cells[cell]["files"]) for cell in cells} or {"": stored}


def join(entries, files):
    joined, most = {}, sum(map(len, entries.values()))
    for name, said in files.items():  # without spans, those of the manifest: each is an entry
        spans = said.get("spans") or [{"entry": name, "offset": 0, "size": len(entries[name])}]
        sizes = [span["size"] for span in spans]
        require(min(sizes) >= 0 and sum(sizes) == said["size"] <= most, f"the size of {name}")
        joined[name] = b"".join(entries[s["entry"]][s["offset"] :][: s["size"]] for s in spans)
        require(hashlib.sha256(joined[name]).hexdigest() == said["sha256"], f"{name} is damaged")
    return joined


class Encoder:
    def __init__(self, files):
        self.spec, self.golden = (json.loads(files[f"{n}.json"]) for n in ("artifact", "golden"))
        require((self.spec["format"], self.spec["codec"]) == (4, 1), "another format of artifact")
        self.ranges = json.loads(files.get("ranges.json", "null"))
        self.tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        cut, pads = (self.tokenizer.truncation or {}).get("max_length"), self.tokenizer.padding
        require(cut == self.spec["max_length"] and not pads, "a tokenizer that pads or cuts amiss")
        require(b"location" not in files["model.onnx"], "a graph that names other files")
        self.graph = onnxruntime.InferenceSession(files["model.onnx"])

    def ids(self, text, prompt=None):
        name = self.spec["default_prompt"] if prompt is None else prompt
        return self.tokenizer.encode((self.spec["prompts"][name] if name else "") + text).ids

    def encode(self, ids):
        inputs = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), int)}
        return self.graph.run(None, inputs)[0][0]

    def decode(self, code):
        kind, dim, order = (self.spec[key] for key in ("vectors", "dim", "bit_order"))
        if "binary" in kind:
            packed = code.view(np.uint8) ^ (128 if kind == "binary" else 0)
            return np.unpackbits(packed, count=dim, bitorder=order) * 2.0 - 1
        if kind not in ("int8", "int4"):
            return code / (127.0 if kind == "int8-symmetric" else 1.0)
        low, high = (np.array(self.ranges[key]) for key in ("low", "high"))
        halves = np.stack([code >> 4, code & 15][:: 1 if order == "big" else -1], axis=1)
        levels = code + 128.0 if kind == "int8" else halves.reshape(-1)[:dim]
        return low + (levels + 0.5) * (high - low) / (255 if kind == "int8" else 15)

    def check(self):
        found, bits, limit = [], "binary" in self.spec["vectors"], self.golden["tolerance"]["limit"]
        for row in self.golden["texts"]:
            require(self.ids(row["text"], row["prompt"]) == row["ids"], f"tokens of {row['text']}")
            if row["vector"] is not None:
                code = self.encode(row["ids"])
                a, b = (self.decode(v) for v in (code, np.array(row["vector"], code.dtype)))
                cosine = 1 - ((a - b) ** 2).sum() / max((a**2 + b**2).sum(), 1e-30)
                found.append((a == b).mean() if bits else cosine)
        moved = 5 * (1 - min(self.golden["spread"][key] or 1 for key in ("batch", "rounding")))
        least = 1 - max(moved, *((0.05, 1.5 / self.spec["dim"]) if bits else (0.005,)))
        holds = max(least - 1e-9, 0.5 if bits else 0.9) <= limit <= np.min(found)
        require(holds, f"golden vectors within {np.min(found)}, limit {limit}, at least {least}")
        return f"{self.spec['space_id']} golden vectors within {np.min(found):.7f} >= {limit}"


sys.excepthook = lambda kind, error, _: require(False, f"{kind.__name__}: {error}")
for cell, files in read_cells(sys.argv[1] if sys.argv[1:] else sys.exit(__doc__)).items():
    encoder = Encoder(files) if "model.onnx" in files else None
    print(cell, encoder.check() if encoder else "is for another engine: not run")
    for text in sys.argv[2:] if encoder else ():
        print(encoder.encode(encoder.ids(text)).tolist())
