"""The browser example as a visitor uses it, in Chromium, from a server on this machine.

Where npm installed the example's packages (npm ci --prefix examples/browser), they are loaded, and
graphs run in WebAssembly. Elsewhere the tokenizer's place is taken by a table of the tests' texts
with the token ids that Python's tokenizers give them, and tests of graphs are skipped.
"""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from browser_site import (
    DIM,
    EXAMPLE,
    GRAPHS,
    OWN,
    PREPARE,
    QUERY,
    SENTENCES,
    STATIC,
    needs_npm,
    serving,
    settle,
    static_bundle,
    visiting,
    with_files,
)
from chromium import chromium, contrast
from playwright.sync_api import expect
from tiny_artifact import tiny_artifact, tiny_ranges, tiny_spec, unit_vectors
from tokenizers import Tokenizer

from m2dexport.build.recipe import Recipe
from m2dexport.data import align_texts_path, calibration_texts, default_checkpoint, read_texts
from m2dexport.engines import Device
from m2dexport.errors import UsageError
from m2dexport.runtime.archive import open_bundle, write_archive
from m2dexport.runtime.artifact import TOKENIZER
from m2dexport.runtime.bundle import write_bundle
from m2dexport.runtime.loading import load
from m2dexport.vectors.codecs import LEVELS, code_width, decode_vectors, encode_vectors
from m2dexport.vectors.search import Codec

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Static bundles by weights and vectors; read only."""
    folder = tmp_path_factory.mktemp("static")
    made = [static_bundle(folder, *kind) for kind in STATIC]
    return {path.stem: path for path in made}


@pytest.fixture(scope="module")
def serve(
    bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Sequence[Path]], str]]:
    """From bundles to the address of a site with them."""
    with serving(tmp_path_factory.mktemp("sites"), bundles["fp32-int8"]) as served:
        yield served


@pytest.fixture(scope="module")
def site(serve, bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a site with the static bundles and two that are wrong."""
    folder = tmp_path_factory.mktemp("wrong")
    content = bytearray(bundles["fp32-int8"].read_bytes())
    content[content.index(b'"tolerance"')] ^= 1
    (folder / "damaged.m2d").write_bytes(content)

    def other_vector(golden: dict[str, Any]) -> None:
        golden["texts"][2]["vector"] = golden["texts"][3]["vector"]

    drifted = with_files(bundles["fp32-int8"], folder / "drifted.m2d", golden=other_vector)
    address: str = serve([*bundles.values(), folder / "damaged.m2d", drifted])
    return address


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """From a site and a bundle's stem to a page that is done with it."""
    with visiting(browser) as visited:
        yield visited


@pytest.fixture(scope="module")
def blank(browser: Browser, site: str) -> Page:
    """A page of the same origin on which nothing runs, to import the example's modules in."""
    page = browser.new_page()
    page.goto(f"{site}sentences.txt")
    return page


def trouble(page: Page) -> str:
    return page.inner_text("#trouble") if page.is_visible("#trouble") else ""


@pytest.mark.parametrize("kind", STATIC, ids="-".join)
def test_a_static_bundle_of_any_precision_gives_its_golden_vectors(
    kind: tuple[str, ...], visit, site: str
) -> None:
    page = visit(site, "-".join(kind[:2]))
    assert trouble(page) == ""
    agreed = page.inner_text("#golden")
    assert agreed.startswith("✓ Agrees"), agreed
    assert re.search(r" (\d+) of \1 become the same .+ and (\d+) of \2 vectors are", agreed), agreed
    assert "min cosine 1.000000" in agreed


@pytest.mark.parametrize("precision", ["float32", "int8", "int8-symmetric", "int4", "ubinary"])
@pytest.mark.parametrize("bit_order", ["big", "little"])
def test_codes_what_they_stand_for_and_what_they_find_are_those_of_numpy(
    precision: Any, bit_order: Any, blank: Page
) -> None:
    dim = 13  # which do not fill the bytes of their bits
    ranges = tiny_ranges(dim) if precision in LEVELS else None
    vectors = unit_vectors(3, 40, dim)
    vectors[1] = 0.5 / 127  # a half, which is rounded to the even level
    found = blank.evaluate(
        """async ([precision, dim, order, ranges, vectors]) => {
          const { Codec } = await import(new URL("codecs.js", location.href));
          const codec = new Codec(precision, dim, order, ranges);
          const rows = vectors.map((each) => codec.encode(Float32Array.from(each)));
          const codes = new codec.Values(rows.flatMap((row) => [...row]));
          return [rows.map((row) => [...row]), rows.map((row) => [...codec.decode(row)]),
            codec.search(rows[0], codes, 10), codec.bytes];
        }""",
        [precision, dim, bit_order, ranges and json.loads(ranges.to_json()), vectors.tolist()],
    )
    codes = encode_vectors(vectors, precision, ranges, bit_order)
    np.testing.assert_array_equal(found[0], codes)
    decoded = decode_vectors(codes, precision, dim, ranges, bit_order)
    np.testing.assert_array_equal(np.array(found[1], np.float32), decoded)
    expected = Codec(precision, dim, ranges, bit_order).search(codes[:1], codes, 10)
    assert [each["row"] for each in found[2]] == expected.rows[0].tolist()
    similarity = [each["similarity"] for each in found[2]]
    np.testing.assert_allclose(similarity, expected.similarity[0], atol=2e-7)
    assert found[3] == code_width(dim, precision) * codes.itemsize


def columns(page: Page) -> dict[str, list[str]]:
    """Return the sentences of each column, by its head."""
    found: dict[str, list[str]] = page.evaluate(
        """Object.fromEntries([...document.querySelectorAll("#results section")].map((card) =>
          [card.querySelector("h3").textContent, [...card.querySelectorAll("li span:last-child")]
            .map((each) => each.textContent)]))"""
    )
    return found


def test_a_sentence_typed_finds_in_each_precision_what_python_finds(
    visit, site: str, bundles: dict[str, Path]
) -> None:
    page = visit(site, "fp32-int8")
    assert len(page.input_value("#sentences").splitlines()) == len(SENTENCES) == 200
    page.fill("#query", QUERY)
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("Embedded 12 tokens")
    floats = load(bundles["fp32-float32"], Device(threads=1))
    vectors = floats.encode(SENTENCES, prompt="document")
    query = floats.encode([QUERY], prompt="query")
    found = columns(page)
    assert [*found] == ["float32", "int8", "ubinary"]
    for precision, sentences in found.items():
        ranges = tiny_ranges(DIM) if precision == "int8" else None
        codes, code = (
            encode_vectors(each, precision, ranges)  # type: ignore[arg-type]
            for each in (vectors, query)
        )
        rows = Codec(precision, DIM, ranges).search(code, codes, 8).rows[0]  # type: ignore[arg-type]
        assert sentences == [SENTENCES[row] for row in rows]
    told = page.inner_text("#results")
    for size in ("256 bytes per vector", "64 bytes per vector", "8 bytes per vector"):
        assert size in told


def test_own_sentences_take_the_place_of_those_that_are_there_and_long_ones_are_counted(
    visit, site: str
) -> None:
    page = visit(site, "fp32-int8")
    page.fill("#sentences", "\n".join([*OWN, "", SENTENCES[0]]))
    page.press("#own button", "Enter")
    expect(page.locator("#indexed")).to_contain_text("Embedded 4 sentences")
    settle(page)
    assert ", 1 of them cut at 16 tokens" in page.inner_text("#indexed")
    assert sorted(columns(page)["int8"]) == sorted([*OWN, SENTENCES[0]])
    assert page.evaluate("document.activeElement.textContent") == "Embed them"


def test_a_bundle_that_is_damaged_is_refused_and_the_page_opens_another(
    visit, site: str, bundles: dict[str, Path], tmp_path: Path
) -> None:
    page = visit(site, "damaged")
    assert "is not the file that the manifest lists" in trouble(page)
    assert page.inner_text("#golden") == ""
    page.set_input_files("#file", bundles["int8-ubinary"])
    expect(page.locator("#golden")).to_contain_text("✓")
    settle(page)
    assert trouble(page) == ""
    assert "int8-ubinary.m2d" in page.inner_text("#facts")
    (tmp_path / "text.m2d").write_text("no bundle at all, but long enough to look at its end")
    page.set_input_files("#file", tmp_path / "text.m2d")
    page.wait_for_selector("#trouble", state="visible")
    assert trouble(page) == "This is no bundle, or it is damaged; download it again."
    page.press("#search button", "Enter")
    expect(page.locator("#trouble")).to_contain_text("choose one")


def of_format_3(content: dict[str, Any]) -> None:
    content["format"] = 3


def cut_nowhere(tokenizer: dict[str, Any]) -> None:
    tokenizer["truncation"] = None


def loosely(golden: dict[str, Any]) -> None:
    golden["tolerance"]["limit"] = 0.95


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"manifest": of_format_3}, "This page reads bundles of format 2, not 3."),
        ({"artifact": of_format_3}, "This page reads artifact.json of format 4, not 3."),
        ({"tokenizer": cut_nowhere}, "tokenizer.json does not cut at 16 tokens, or pads"),
        ({"golden": loosely}, "golden.json has a limit that its spread does not explain"),
    ],
)
def test_a_bundle_whose_manifest_agrees_is_refused_for_what_its_files_say(
    changed: dict[str, Any], told: str, visit, site: str, bundles: dict[str, Path], tmp_path: Path
) -> None:
    page = visit(site, "fp32-int8")
    page.set_input_files("#file", with_files(bundles["fp32-int8"], tmp_path / "x.m2d", **changed))
    expect(page.locator("#trouble")).to_contain_text(told)
    page.press("#search button", "Enter")
    expect(page.locator("#trouble")).to_contain_text("No bundle is open")


def test_a_graph_that_names_other_files_is_not_given_to_onnxruntime(
    visit, site: str, tmp_path: Path
) -> None:
    folder = tiny_artifact(tmp_path / "a")
    files = open_bundle(write_bundle(folder, tmp_path / "a.m2d").path)
    graph = onnx.load_from_string(files["model.onnx"])
    graph.graph.initializer[0].external_data.add(key="location", value="/etc/hostname")
    graph.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    files["model.onnx"] = graph.SerializeToString()
    stored = json.loads(files["manifest.json"])
    sha256 = hashlib.sha256(files["model.onnx"]).hexdigest()
    stored["files"]["model.onnx"] = {"sha256": sha256, "size": len(files["model.onnx"])}
    write_archive(tmp_path / "x.m2d", files | {"manifest.json": json.dumps(stored).encode()})
    page = visit(site, "fp32-int8")
    page.set_input_files("#file", tmp_path / "x.m2d")
    expect(page.locator("#trouble")).to_contain_text("The graph names other files")


def test_a_bundle_that_the_site_does_not_have_is_named_and_another_can_be_opened(
    visit, site: str
) -> None:
    page = visit(site, "none")
    assert trouble(page) == "This site has no bundle none.m2d; choose one below."
    page.select_option("#bundle", "fp32-float32.m2d")
    expect(page.locator("#golden")).to_contain_text("✓")


def test_vectors_other_than_the_golden_ones_are_told(visit, site: str) -> None:
    page = visit(site, "drifted")
    told = page.inner_text("#golden")
    assert told.startswith("✗ Does not agree"), told
    found = re.search(r" (\d+) of \1 become the same .+ and (\d+) of (\d+) vectors are", told)
    assert found and int(found[2]) == int(found[3]) - 1, told


def test_no_changed_byte_of_a_file_is_taken(blank: Page, bundles: dict[str, Path]) -> None:
    """The manifest itself, and times and modes that a browser has no use for, may differ."""
    content = bundles["int8-ubinary"].read_bytes()
    places = np.random.default_rng(0).integers(0, len(content), 300).tolist()
    ends = [len(content) - i for i in range(1, 600)]
    wrong, refused = blank.evaluate(
        """async ([content, places]) => {
          const { openBundle, BundleError } = await import(new URL("bundle.js", location.href));
          const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
          const seen = (files) => JSON.stringify([...files]
            .filter(([name]) => name !== "manifest.json").map(([name, file]) => [name, [...file]]));
          const whole = seen(await openBundle(bytes.buffer));
          const wrong = [];
          let refused = 0;
          for (const place of places) {
            const changed = bytes.slice();
            changed[place] ^= 16;
            try {
              if (seen(await openBundle(changed.buffer)) !== whole) wrong.push(place);
            } catch (error) {
              if (!(error instanceof BundleError)) wrong.push([place, String(error)]);
              refused += 1;
            }
          }
          return [wrong, refused];
        }""",
        [b64encode(content).decode(), [*places, *ends]],
    )
    assert wrong == []
    assert refused > len(places) / 2


def test_on_a_dark_phone_nothing_runs_off_the_screen_and_text_is_bright(visit, site: str) -> None:
    phone = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"}
    page = visit(site, "fp32-int8", **phone)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for text in ("body", "#golden", "#results p", ".similarity"):
        assert contrast(page, text) > 4.5, text


def test_prepare_refuses_what_no_browser_runs_and_leaves_nothing_half_written(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    def for_openvino(spec: dict[str, Any]) -> None:
        spec["engine"] = "openvino"

    foreign = with_files(bundles["fp32-int8"], tmp_path / "foreign.m2d", artifact=for_openvino)
    with pytest.raises(UsageError, match="is for openvino, which no browser runs"):
        PREPARE([foreign], tmp_path / "site")
    with pytest.raises(UsageError, match="is missing; run: npm ci --prefix"):
        PREPARE([bundles["fp32-int8"]], tmp_path / "site", tmp_path / "nowhere")
    with pytest.raises(UsageError, match="two bundles have one name"):
        PREPARE([foreign, foreign], tmp_path / "site")
    with pytest.raises(UsageError, match=r"is not a bundle; name a \.m2d file"):
        PREPARE([EXAMPLE / "README.md"], tmp_path / "site")
    for name in ("artifact", "manifest"):
        other = with_files(bundles["fp32-int8"], tmp_path / "foreign.m2d", **{name: of_format_3})
        with pytest.raises(UsageError, match=f"'{name}.json': 3.*where the page reads"):
            PREPARE([other], tmp_path / "site")
    assert [path.name for path in tmp_path.iterdir()] == ["foreign.m2d"]


@needs_npm
def test_the_token_ids_of_the_texts_that_ship_are_those_of_python(blank: Page) -> None:
    tokenizer = Tokenizer.from_file(str(default_checkpoint() / TOKENIZER))
    tokenizer.enable_truncation(32)  # which some of the texts exceed
    texts = [*read_texts(align_texts_path()), *calibration_texts(), *SENTENCES]
    found = blank.evaluate(
        """async ([stored, texts]) => {
          const { tokenizerOf } = await import(new URL("tokens.js", location.href));
          const tokenize = tokenizerOf(JSON.parse(stored), 32);
          return texts.map((text) => tokenize(text).ids);
        }""",
        [tokenizer.to_str(), texts],
    )
    assert found == [tokenizer.encode(text).ids for text in texts]
    assert max(map(len, found)) == 32


@needs_npm
def test_graphs_in_webassembly_give_their_golden_vectors(visit, serve, tmp_path: Path) -> None:
    for vectors in GRAPHS:
        write_bundle(
            tiny_artifact(tmp_path / vectors, tiny_spec(vectors=vectors)),  # type: ignore[arg-type]
            tmp_path / f"{vectors}.m2d",
        )
    page = visit(serve([tmp_path / f"{vectors}.m2d" for vectors in GRAPHS]))
    for vectors, heads in GRAPHS.items():
        page.select_option("#bundle", f"{vectors}.m2d")
        expect(page.locator("#facts")).to_contain_text(f"{vectors} vectors")
        settle(page)
        agreed = page.inner_text("#golden")
        assert agreed.startswith("✓ Agrees"), agreed
        assert "onnxruntime-web" in page.inner_text("#facts")
        assert [*columns(page)] == heads


@needs_npm
def test_a_quantized_transformer_in_webassembly_gives_its_golden_vectors(
    visit, serve, small: Callable[[str], Path], artifact, tmp_path: Path
) -> None:
    made = artifact(small("bert"), 2, 64, Recipe(weights="int8", vectors="int8", min_coverage=0.8))
    write_bundle(made.path, tmp_path / "transformer.m2d")
    page = visit(serve([tmp_path / "transformer.m2d"]))
    agreed = page.inner_text("#golden")
    assert agreed.startswith("✓ Agrees"), agreed
