"""Sites of the browser example on this machine, and the bundles on them."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from runpy import run_path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tiny_artifact import (
    VOCABULARY,
    letter_tokenizer,
    relisted,
    tiny_ranges,
    tiny_spec,
)
from tokenizers import Tokenizer

from m2dexport.engines.numpy.table import Table, table_bytes
from m2dexport.files import SPEC
from m2dexport.runtime.artifact import RANGES, TOKENIZER, space_id_of_artifact
from m2dexport.runtime.bundle import write_bundle
from m2dexport.vectors.codecs import LEVELS

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

EXAMPLE = Path(__file__).parent.parent / "examples" / "browser"
SCRIPT = run_path(str(EXAMPLE / "prepare.py"), run_name="prepare")
PREPARE, MODULES = SCRIPT["prepare"], SCRIPT["MODULES"]
INSTALLED = MODULES.is_dir()
needs_npm = pytest.mark.skipif(not INSTALLED, reason="needs npm ci --prefix examples/browser")

DIM = 64
#: Weights, vectors and bit order of the static bundles: every precision of either, and both orders.
STATIC = (
    ("fp32", "float32", "big"),
    ("fp32", "int8", "big"),
    ("fp16", "int8-symmetric", "big"),
    ("int8", "int4", "little"),
    ("int8", "ubinary", "little"),
    ("int4-weight-only", "binary", "big"),
)
#: By the vectors that a graph puts out: the columns that the page has for them.
GRAPHS = {
    "float32": ["float32", "int8-symmetric", "ubinary"],
    "int8": ["float32", "int8", "ubinary"],
    "ubinary": ["ubinary"],
}
SENTENCES = (EXAMPLE / "page" / "sentences.txt").read_text(encoding="utf-8").splitlines()
QUERY, OWN = "the guitar, find it", ("find", "a guitar", "zzz 9 9")
TYPED = ("a", "Someone is playing music.", QUERY, *OWN, *SENTENCES)


def table(weights: str) -> Table:
    """Return a random table of a row for each token."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((len(VOCABULARY), DIM)).astype(np.float32)
    lead = (len(VOCABULARY), DIM // 32)
    if weights == "int4-weight-only":
        halves = rng.uniform(0.1, 1, (2, *lead, 1)).astype(np.float16)
        packed = rng.integers(0, 256, (*lead, 16)).astype(np.uint8)
        return {"packed": packed, "scale": halves[0] / 8, "offset": -halves[1]}
    if weights == "int8":
        codes = rng.integers(-127, 128, rows.shape).astype(np.int8)
        return {"codes": codes, "scale": np.abs(rows[:, :1]) / 127}
    return {"rows": rows.astype(np.float16 if weights == "fp16" else np.float32)}


def static_bundle(folder: Path, weights: str, vectors: Any, bit_order: Any) -> Path:
    """Write a static bundle whose artifact is not built by torch; return its path."""
    spec = tiny_spec(dim=DIM, weights=weights, vectors=vectors, bit_order=bit_order)
    spec = replace(spec, engine="static", layers=0, min_engine="1.26")
    ranges = tiny_ranges(DIM) if vectors in LEVELS else None
    tokenizer_json = letter_tokenizer(spec.max_length)
    spec = replace(spec, space_id=space_id_of_artifact(spec, ranges, tokenizer_json))
    artifact = folder / f"{weights}-{vectors}"
    artifact.mkdir(parents=True)
    (artifact / "table.safetensors").write_bytes(table_bytes(table(weights)))
    (artifact / TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
    (artifact / SPEC).write_text(spec.to_json(), encoding="utf-8")
    if ranges:
        (artifact / RANGES).write_text(ranges.to_json(), encoding="utf-8")
    write_bundle(relisted(artifact), artifact.with_suffix(".m2d"))
    return artifact.with_suffix(".m2d")


def with_files(bundle: Path, out: Path, **changed: Any) -> Path:
    """Write a bundle of which JSON files have other content, with a manifest that agrees."""
    with zipfile.ZipFile(bundle) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(files["manifest.json"])
    changed.pop("manifest", lambda _: None)(manifest)
    for stem, change in changed.items():
        name, content = f"{stem}.json", json.loads(files[f"{stem}.json"])
        change(content)
        files[name] = json.dumps(content).encode()
        sha256 = hashlib.sha256(files[name]).hexdigest()
        manifest["files"][name] = {"sha256": sha256, "size": len(files[name])}
    files["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return out


def stand_in(folder: Path, bundle: Path) -> Path:
    """Write a folder in the place of npm's, with a tokenizer that knows these tests' texts."""
    tokenizer = Tokenizer.from_str(letter_tokenizer(16))
    tokenizer.no_truncation()
    with zipfile.ZipFile(bundle) as archive:
        golden = [each["text"] for each in json.loads(archive.read("golden.json"))["texts"]]
    texts = [f"{prompt}{text}" for text in (*golden, *TYPED) for prompt in ("", "find: ")]
    ids = {text: tokenizer.encode(text, add_special_tokens=False).ids for text in texts}
    package = folder / "@huggingface" / "tokenizers"
    (package / "dist").mkdir(parents=True)
    (package / "LICENSE").touch()
    (package / "dist" / "tokenizers.min.mjs").write_text(
        f"const IDS = new Map(Object.entries({json.dumps(ids)}));\n"
        "export class Tokenizer {\n"
        "  encode(text, { add_special_tokens: specials }) {\n"
        "    return { ids: specials ? [2, ...IDS.get(text), 3] : IDS.get(text) };\n"
        "  }\n"
        "}\n",
        encoding="utf-8",
    )
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files."""

    def log_message(self, *_: object) -> None:
        """Say nothing: pytest shows what a server prints among the results."""


@contextmanager
def serving(folder: Path, bundle: Path) -> Iterator[Callable[[Sequence[Path]], str]]:
    """Yield what puts bundles on a site of their own, and returns its address.

    Args:
        folder: where the sites go.
        bundle: one whose texts the stand-in for npm's tokenizer knows.
    """
    modules = MODULES if INSTALLED else stand_in(folder / "npm", bundle)
    servers = []

    def served(paths: Sequence[Path]) -> str:
        site = folder / f"site-{len(servers)}"
        PREPARE(paths, site, modules)
        handler = functools.partial(Quiet, directory=str(site))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    yield served
    for server in servers:
        server.shutdown()
        server.server_close()


@contextmanager
def visiting(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Yield what opens a site with the bundle of a stem, and returns the page once it is done.

    The page must ask nobody else, nor say a word on the console.
    """
    said: list[str] = []
    contexts = []

    def visited(site: str, bundle: str = "", **options: Any) -> Page:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith(site) or said.append(asked.url))
        page.goto(f"{site}?bundle={bundle}.m2d" if bundle else site)
        settle(page)
        return page

    yield visited
    for context in contexts:
        context.close()
    assert said == []


def settle(page: Page) -> None:
    """Wait until a page has verified a bundle, or said why it does not."""
    page.wait_for_selector("html[data-state=ready], html[data-state=trouble]", state="attached")
