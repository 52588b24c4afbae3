"""Write tests/golden/codecs.json with the quantization of sentence-transformers.

Run it again only to follow a deliberate change there; the version is stored beside the codes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers
from sentence_transformers.util.quantization import quantize_embeddings

OUT = Path(__file__).parent.parent / "tests" / "golden" / "codecs.json"


def main() -> None:
    """Write the file."""
    cases: list[dict[str, Any]] = []
    for seed, (texts, dim) in enumerate([(1, 8), (3, 12), (5, 16), (2, 33)]):
        rng = np.random.default_rng(seed)
        vectors = rng.standard_normal((texts, dim)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors[0, :3] = (0.0, -0.0, 1.0)  # a zero is no set bit; 1 lies outside every range
        calibration = rng.standard_normal((200, dim)).astype(np.float32)
        calibration /= np.linalg.norm(calibration, axis=1, keepdims=True)
        ranges = np.vstack([calibration.min(axis=0), calibration.max(axis=0)])
        ranges[:, -1] = 0.25  # an empty range
        cases.append(
            {
                "vectors": vectors.tolist(),
                "ranges": ranges.tolist(),
                "int8": quantize_embeddings(vectors, "int8", ranges=ranges).tolist(),
                "ubinary": quantize_embeddings(vectors, "ubinary").tolist(),
            }
        )
    made_with = f"sentence-transformers {sentence_transformers.__version__}"
    OUT.write_text(json.dumps({"made_with": made_with, "cases": cases}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
