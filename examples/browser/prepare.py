"""Put the page, what it loads and bundles into a folder that any static web server can serve.

Example:
    npm ci --prefix examples/browser
    python examples/browser/prepare.py edge.m2d --out site
    python -m http.server --directory site
"""

from __future__ import annotations

import argparse
import gzip
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from shutil import copyfile, copytree

from m2dexport import M2DError
from m2dexport.errors import UsageError
from m2dexport.files import atomic_folder
from m2dexport.runtime import artifact, manifest

HERE = Path(__file__).parent
MODULES = HERE / "node_modules"
#: What the page imports of npm's packages, under names that every server knows the type of.
TOKENIZERS = {
    "tokenizers.js": "@huggingface/tokenizers/dist/tokenizers.min.mjs",
    "tokenizers.LICENSE.txt": "@huggingface/tokenizers/LICENSE",
}
ONNXRUNTIME = {
    "onnxruntime.js": "onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
    "onnxruntime.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
}
ENGINES = {"static": TOKENIZERS, "onnx": {**TOKENIZERS, **ONNXRUNTIME}}


#: The formats that the page reads: those of this repository's m2dexport.
FORMATS = {"manifest.json": manifest.FORMAT, "artifact.json": artifact.FORMAT}


def engine_of(bundle: Path) -> str:
    """Return the engine that a bundle is for; the page checks the rest of it.

    Raises:
        UsageError: when it is no bundle, of another format, or no browser can run it.
    """
    try:
        with zipfile.ZipFile(bundle) as archive:
            stored = {name: json.loads(archive.read(name)) for name in FORMATS}
        formats = {name: content["format"] for name, content in stored.items()}
        engine = str(stored["artifact.json"]["engine"])
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{bundle} is not a bundle; name a .m2d file.") from error
    if formats != FORMATS:
        raise UsageError(
            f"{bundle} has {formats} for formats where the page reads {FORMATS}; make it again."
        )
    if engine not in ENGINES:
        raise UsageError(
            f"{bundle} is for {engine}, which no browser runs; build it with --engine onnx."
        )
    return engine


def prepare(bundles: Sequence[Path], out: Path, modules: Path = MODULES) -> None:
    """Write the folder; onnxruntime-web is left out where no bundle needs it.

    Args:
        bundles: the page opens the first, and offers the others.
        out: a folder that does not exist yet.
        modules: where npm put its packages.

    Raises:
        UsageError: when ``out`` exists, npm's packages are missing, or no browser runs a bundle.
    """
    if out.exists():
        raise UsageError(f"{out} exists; remove it, or name another folder by --out.")
    names = [bundle.name for bundle in bundles]
    if len(set(names)) < len(names):
        raise UsageError("two bundles have one name; rename one of them.")
    needed = {name: part for each in bundles for name, part in ENGINES[engine_of(each)].items()}
    missing = [modules / part for part in needed.values() if not (modules / part).is_file()]
    if missing:
        raise UsageError(f"{missing[0]} is missing; run: npm ci --prefix {HERE}")
    with atomic_folder(out) as site:
        copytree(HERE / "page", site, dirs_exist_ok=True)
        (site / "vendor").mkdir()
        (site / "bundles").mkdir()
        for name, part in needed.items():
            copyfile(modules / part, site / "vendor" / name)
        for bundle in bundles:
            copyfile(bundle, site / "bundles" / bundle.name)
        (site / "bundles.json").write_text(json.dumps(names) + "\n", encoding="utf-8")


def downloads(site: Path, bundle: str) -> dict[str, tuple[int, int]]:
    """Return what a visitor loads for a bundle: part -> bytes as they are, and by gzip."""
    path = site / "bundles" / bundle
    vendor = [site / "vendor" / name for name in ENGINES[engine_of(path)]]
    parts = {
        "page": [file for file in site.iterdir() if file.is_file()],
        "JavaScript of npm": [file for file in vendor if file.suffix == ".js"],
        "WebAssembly": [file for file in vendor if file.suffix == ".wasm"],
        "bundle": [path],
    }
    return {
        part: (
            sum(file.stat().st_size for file in files),
            sum(len(gzip.compress(file.read_bytes())) for file in files),
        )
        for part, files in parts.items()
    }


def main() -> None:
    """Prepare what the command line names, and print what a visitor loads."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--out", type=Path, default=Path("site"), help="default: site")
    options = parser.parse_args()
    try:
        prepare(options.bundles, options.out)
    except M2DError as error:
        raise SystemExit(f"Error: {error}") from error
    for bundle in options.bundles:
        sizes = downloads(options.out, bundle.name)
        total = [sum(size) for size in zip(*sizes.values(), strict=True)]
        print(f"{bundle.name}: a visitor loads")
        for part, (plain, zipped) in {**sizes, "together": tuple(total)}.items():
            print(f"  {part:<18} {plain / 1e6:6.2f} MB, {zipped / 1e6:6.2f} MB by gzip")
    print(f"Wrote {options.out}; next: python -m http.server --directory {options.out}")


if __name__ == "__main__":
    main()
