"""What an exported folder must give: its golden.json, and how a program's vectors are judged."""

import argparse
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

MIN_COSINE = 0.999


@contextmanager
def needs(*packages):
    """Exit with 2 where what this block imports is missing, naming the packages to install."""
    try:
        yield
    except (ModuleNotFoundError, RuntimeError) as error:
        # tritonclient raises RuntimeError where it was installed without grpc.
        missing = error.__cause__ if isinstance(error, RuntimeError) else error
        if not isinstance(missing, ModuleNotFoundError):
            raise
        named = " ".join(f'"{each}"' for each in packages)
        print(f"{missing.name} is not installed; run: pip install {named}", file=sys.stderr)
        sys.exit(2)


def engine(folder):
    """Return what runs an exported folder in the hub's layout; at depth 0, a table, it is torch."""
    return next((name for name in ("onnx", "openvino") if (folder / name).is_dir()), "torch")


def command(description):
    """Return the parser of a command line that names an exported folder first."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=_exported, help="what m2dexport export wrote")
    return parser


def _exported(path):
    if not (Path(path) / "golden.json").is_file():
        raise argparse.ArgumentTypeError(f"{path} has no golden.json; name an exported folder")
    return Path(path)


def texts(folder):
    """Return the golden texts of an exported folder."""
    return json.loads((Path(folder) / "golden.json").read_text(encoding="utf-8"))["texts"]


def judge(program, rows, vectors):
    """Print how near vectors are to the golden ones; exit with 1 where they are others."""
    expected = np.array([row["vector"] for row in rows], dtype=np.float64)
    found = np.asarray(vectors, dtype=np.float64)
    if found.shape != expected.shape:
        sys.exit(f"{program}: vectors of shape {found.shape} where {expected.shape} are expected")
    lengths = np.linalg.norm(found, axis=1), np.linalg.norm(expected, axis=1)
    products, both = (found * expected).sum(axis=1), lengths[0] * lengths[1]
    empty = (lengths[0] == 0) & (lengths[1] == 0)  # of a text without tokens, at depth 0
    cosine = np.where(empty, 1, products / np.where(both > 0, both, np.inf)).min()
    print(f"{program}: {len(rows)} golden texts, smallest cosine {cosine:.6f}")
    if not cosine >= MIN_COSINE:
        sys.exit(f"{program}: {MIN_COSINE} is needed")
