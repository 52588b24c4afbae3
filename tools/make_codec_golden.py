"""Write tests/golden/codecs.json: int8, uint8, binary and ubinary codes of sentence-transformers.

int4 and int8-symmetric, which it does not have, are computed here one value at a time. Run this
again only after a deliberate change of the codec. The versions are stored beside the codes.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers
from numpy.typing import NDArray
from sentence_transformers.util.quantization import quantize_embeddings

from m2dexport.vectors.codecs import CODEC_VERSION

OUT = Path(__file__).parent.parent / "tests" / "golden" / "codecs.json"


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="the file to write")
    out = parser.parse_args().out
    cases: list[dict[str, Any]] = []
    for seed, (texts, dim) in enumerate([(1, 8), (3, 12), (5, 16), (2, 33), (2, 5)]):
        rng = np.random.default_rng(seed)
        vectors = rng.standard_normal((texts, dim)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors[0, :3] = (0.0, -0.0, 1.0)  # zeros do not set a bit; 1 lies outside every range
        calibration = rng.standard_normal((200, dim)).astype(np.float32)
        calibration /= np.linalg.norm(calibration, axis=1, keepdims=True)
        ranges = np.vstack([calibration.min(axis=0), calibration.max(axis=0)])
        ranges[:, -1] = 0.25  # an empty range
        cases.append(
            {
                "vectors": vectors.tolist(),
                "ranges": ranges.tolist(),
                **{
                    precision: quantize_embeddings(vectors, precision, ranges=ranges).tolist()
                    for precision in ("int8", "uint8", "ubinary", "binary")
                },
                "ubinary/little": np.packbits(vectors > 0, axis=1, bitorder="little").tolist(),
                "int8-symmetric": [[round(np.float32(127) * x) for x in row] for row in vectors],
                "int4": [int4(row, ranges) for row in vectors],
            }
        )
    stored = {
        "made_with": f"sentence-transformers {sentence_transformers.__version__}",
        "codec": CODEC_VERSION,
        "cases": cases,
    }
    out.write_text(json.dumps(stored) + "\n", encoding="utf-8")


def int4(vector: NDArray[np.float32], ranges: NDArray[np.float32]) -> list[int]:
    """Return the bytes of one vector, two dims in each, the first in the high half."""
    levels = []
    for value, low, high in zip(vector, *ranges, strict=True):
        step = (high - low) / np.float32(15) or np.float32(1)
        levels.append(min(15, max(0, math.floor((value - low) / step))))
    levels += [0] * (len(levels) % 2)
    return [16 * first + second for first, second in zip(levels[::2], levels[1::2], strict=True)]


if __name__ == "__main__":
    main()
