"""Depth 0: a static model, made of the token table and a map, that runs on numpy alone."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import by_hand
import numpy as np
import pytest
import safetensors.numpy
from command_line import m2d
from hypothesis import given, settings
from hypothesis import strategies as st
from model2vec import StaticModel
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from test_slicing import CLOSE
from tiny import HIDDEN, LAYERS, TEXTS, edit_json, tiny_checkpoint
from tiny_artifact import relisted
from tokenizers import Tokenizer

from m2dexport.align.static import TokenTable
from m2dexport.align.texts import align_texts
from m2dexport.checkpoint.alignment import LinearMap
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.engines import Device
from m2dexport.engines.numpy import run
from m2dexport.engines.numpy.table import Table, read_table, rows_of, table_bytes
from m2dexport.errors import M2DError
from m2dexport.precisions import VECTOR_PRECISIONS
from m2dexport.reference.pooler import Reference
from m2dexport.reference.static import StaticReference
from m2dexport.runtime import load
from m2dexport.runtime.artifact import read_ranges, read_spec
from m2dexport.runtime.bundle import write_bundle
from m2dexport.runtime.encoder import Encoder
from m2dexport.vectors.codecs import encode_vectors, normalize

Floats = NDArray[np.float32]
DIM = 16
#: Beside the usual ones: what no tokenizer knows, and more tokens than are taken.
ALL = (*TEXTS, "☃", "a ☃ sat on the 猫", " ", "the cat sat on a mat and a dog " * 9)


@pytest.fixture(scope="module")
def wide(
    small: Callable[[str], Path], few_texts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A static model of 200 tokens and 64 dims, which are worth quantizing; read only."""
    return static(small("bert"), few_texts, tmp_path_factory.mktemp("wide") / "sub", dim=64)


def static(model: Path, texts: Path, out: Path, *options: object, dim: int = DIM) -> Path:
    arguments = ["--layers", 0, "--dim", dim, "--align-texts", texts, *options]
    succeeds("slice", "--model", model, *arguments, "--out", out)
    return out


def succeeds(*arguments: object, **options: Any) -> str:
    result = m2d(*arguments, **options)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object) -> str:
    result = m2d(*arguments)
    assert result.exit_code in (1, 2), result.output
    (line,) = result.stderr.splitlines()
    return line


def built(model: Path, out: Path, *options: object) -> Encoder:
    succeeds("build", "--model", model, "--out", out, *options)
    return load(out)


def referenced(model: Path, texts: tuple[str, ...] = ALL) -> Floats:
    return normalize(StaticReference(open_checkpoint(model)).encode(texts)[0])


@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta", "t5", "qwen3", "electra"])
def test_every_reader_gives_the_same_vectors(
    model_type: str, few_texts: Path, tmp_path: Path
) -> None:
    parent = tiny_checkpoint(tmp_path / "parent", model_type)
    sub = static(parent, few_texts, tmp_path / "sub")
    checkpoint = open_checkpoint(sub)
    assert (checkpoint.layers, checkpoint.dim, checkpoint.normalized) == (0, DIM, True)
    expected = SentenceTransformer(str(sub), device="cpu").encode(list(ALL))
    theirs = StaticModel.from_pretrained(sub)
    assert theirs.max_length == checkpoint.max_length
    # It also cuts texts at so many characters as that many tokens usually have.
    short = [i for i, text in enumerate(ALL) if len(text) <= checkpoint.max_length]
    found = theirs.encode([ALL[i] for i in short])
    np.testing.assert_allclose(found, expected[short], atol=CLOSE)
    np.testing.assert_allclose(referenced(sub), expected, atol=CLOSE)
    for engine in ("static", "onnx"):
        encoder = built(sub, tmp_path / engine, "--engine", engine)
        np.testing.assert_allclose(encoder.encode(ALL), expected, atol=CLOSE)
    lengths = np.linalg.norm(expected, axis=1)
    assert not lengths[TEXTS.index("")]
    np.testing.assert_allclose(lengths[lengths > 0], 1, atol=1e-6)
    assert lengths[0] > 0


def test_it_is_nearer_to_the_full_depth_than_its_neighbours_are(
    bert: Path, few_texts: Path, tmp_path: Path
) -> None:
    sub = static(bert, few_texts, tmp_path / "sub")
    texts = tuple(align_texts(None))[3::36]
    full = Reference(open_checkpoint(bert), (LAYERS,)).encode(texts)[LAYERS][:, :DIM]
    products = referenced(sub, texts) @ by_hand.normalized(full).T
    assert products.diagonal().mean() > products.mean()


def test_prompts_and_the_maximum_length_are_carried_over(
    bert: Path, few_texts: Path, tmp_path: Path
) -> None:
    sub = static(bert, few_texts, tmp_path / "sub")
    checkpoint, parent = open_checkpoint(sub), open_checkpoint(bert)
    assert checkpoint.prompts == parent.prompts
    assert checkpoint.max_length == parent.max_length
    model, encoder = SentenceTransformer(str(sub), device="cpu"), built(sub, tmp_path / "a")
    expected = model.encode(list(ALL), prompt_name="query")
    np.testing.assert_allclose(encoder.encode(ALL, prompt="query"), expected, atol=CLOSE)
    np.testing.assert_allclose(expected[0], model.encode("find: " + ALL[0]), atol=CLOSE)
    assert encoder.encode_report([ALL[-1], ALL[0]]).truncated == 1


def test_lowercasing_outside_the_tokenizer_moves_into_it(few_texts: Path, tmp_path: Path) -> None:
    parent = tiny_checkpoint(tmp_path / "parent", "roberta")
    edit_json(parent / "sentence_bert_config.json", do_lower_case=True)
    sub = static(parent, few_texts, tmp_path / "sub")
    upper, lower = SentenceTransformer(str(sub), device="cpu").encode(["THE CAT", "the cat"])
    np.testing.assert_array_equal(upper, lower)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "t5", "qwen3"])
def test_folding_a_map_into_the_table_is_exact(
    model_type: str, few_texts: Path, tmp_path: Path
) -> None:
    parent = open_checkpoint(tiny_checkpoint(tmp_path / "parent", model_type))
    table = TokenTable(parent, align_texts(few_texts))
    weight = np.random.default_rng(0).normal(size=(DIM, table.width)).astype(np.float32)
    folded = table.folded(LinearMap(weight, np.zeros(DIM, np.float32)))
    texts = [text for text in ALL if "☃" not in text]
    inputs = table.inputs(texts)
    assert inputs.shape == (len(texts), HIDDEN + 1)
    means = np.stack([folded[ids].sum(axis=0) for ids in table.ids(texts)])
    np.testing.assert_allclose(normalize(means), normalize(inputs @ weight.T), atol=1e-5)
    lengths = np.linalg.norm(inputs[:, :-1], axis=1)
    np.testing.assert_allclose(lengths[lengths > 0], 1, atol=1e-6)


def test_rare_tokens_weigh_more_than_common_ones(bert: Path) -> None:
    texts = ["a", "a b", "a b c", "a"]
    table = TokenTable(open_checkpoint(bert), texts)
    # The last input is the sum of the weights, up to one factor.
    last = np.eye(1, table.width, HIDDEN, dtype=np.float32)
    folded = table.folded(LinearMap(last, np.zeros(1, np.float32)))[:, 0]
    found = folded[[table.ids([text])[0][0] for text in ("a", "b", "c", "z")]]
    expected = np.log(5 / (np.array([4, 2, 1, 0]) + 1)) + 0.1
    np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "t5", "qwen3"])
def test_unknown_tokens_and_padding_say_nothing(kind: str, few_texts: Path, tmp_path: Path) -> None:
    parent = tiny_checkpoint(tmp_path / "parent", kind)
    sub = static(parent, few_texts, tmp_path / "sub")
    table = safetensors.numpy.load_file(sub / "model.safetensors")["embedding.weight"]
    tokenizer = Tokenizer.from_file(str(sub / "tokenizer.json"))
    zero = {i for i in range(len(table)) if not table[i].any()}
    names = ("[PAD]", "<pad>", "[UNK]") + (("<unk>",) if kind in ("xlm-roberta", "t5") else ())
    assert zero == {i for i in map(tokenizer.token_to_id, names) if i is not None}
    assert tokenizer.encode("the").ids == tokenizer.encode("the", add_special_tokens=False).ids


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_it_is_stored_in_half_precision(
    dtype: str, bert: Path, few_texts: Path, tmp_path: Path
) -> None:
    sub = static(bert, few_texts, tmp_path / "sub", "--dtype", dtype)
    (tensor,) = open_checkpoint(sub).layout.outside.values()
    assert tensor.dtype == {"fp16": "F16", "bf16": "BF16"}[dtype]
    model = SentenceTransformer(str(sub), device="cpu")
    texts = tuple(text for text in TEXTS if text)  # torch normalises zeros to NaN in float16
    np.testing.assert_allclose(model.encode(list(texts)), referenced(sub, texts), atol=5e-3)
    again = tmp_path / "again"
    succeeds("slice", "--model", sub, "--out", again)
    content = (sub / "model.safetensors").read_bytes()
    assert (again / "model.safetensors").read_bytes() == content


def test_fewer_dims_are_the_leading_ones(wide: Path, tmp_path: Path) -> None:
    succeeds("slice", "--model", wide, "--dim", 20, "--out", tmp_path / "sub")
    expected = normalize(referenced(wide)[:, :20])
    np.testing.assert_allclose(referenced(tmp_path / "sub"), expected, atol=CLOSE)
    np.testing.assert_allclose(
        built(wide, tmp_path / "a", "--dim", 20).encode(ALL), expected, atol=CLOSE
    )


def test_a_pruned_vocabulary_is_a_shorter_table(
    small: Callable[[str], Path], few_texts: Path, tmp_path: Path
) -> None:
    whole = static(small("bert"), few_texts, tmp_path / "whole")
    sub = static(small("bert"), few_texts, tmp_path / "sub", "--prune-vocab", few_texts)
    rows = open_checkpoint(sub).vocab_size
    assert rows < open_checkpoint(whole).vocab_size
    texts = tuple(align_texts(few_texts))[:40]
    np.testing.assert_allclose(referenced(sub, texts), referenced(whole, texts), atol=1e-4)
    model = SentenceTransformer(str(sub), device="cpu")
    np.testing.assert_allclose(model.encode(list(texts)), referenced(sub, texts), atol=CLOSE)
    stored = json.loads((sub / "m2dexport.json").read_text())["vocabulary"]
    assert stored["pieces"] == [open_checkpoint(whole).vocab_size, rows]
    saved = [(folder / "model.safetensors").stat().st_size for folder in (whole, sub)]
    assert abs(stored["bytes_saved"] - (saved[0] - saved[1])) < 100


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--heads", 2], "depth 0 has no heads, channels or norm to cut"),
        (["--ffn", 2], "depth 0 has no heads, channels or norm to cut"),
        (["--reorder-by-importance"], "depth 0 has no heads, channels or norm to cut"),
        (["--dim", 99], "--dim 99 is not between 1 and 64"),
        (["--final-norm", "applied"], "depth 0 has no heads, channels or norm to cut"),
    ],
    ids=str,
)
def test_what_depth_0_does_not_have_is_refused(
    options: list[object], told: str, small: Callable[[str], Path], tmp_path: Path
) -> None:
    arguments = ["--model", small("bert"), "--layers", 0, *options, "--out", tmp_path / "out"]
    assert told in refused("slice", *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--layers", 1], "--layers 1 is not between 0 and 0"),
        (["--align"], "is aligned already; leave --align out"),
        (["--heads", 2], "depth 0 has no heads, channels or norm to cut"),
        (
            ["--prune-vocab", 50],
            "is a static model; prune what it was made of",
        ),
    ],
    ids=str,
)
def test_what_a_static_model_cannot_become_is_refused(
    options: list[object], told: str, wide: Path, tmp_path: Path
) -> None:
    assert told in refused("slice", "--model", wide, *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inspect_shows_its_table(wide: Path) -> None:
    shown = json.loads(succeeds("inspect", "--model", wide, "--json"))
    assert (shown["model_type"], shown["layers"], shown["dim"]) == ("static", 0, 64)
    (depth,) = shown["depths"]
    assert depth["layers"] == 0
    assert depth["parameters"] == depth["embedding_parameters"] == 200 * 64
    assert "static" in succeeds("inspect", "--model", wide)


def test_a_static_model_of_sentence_transformers_is_built_and_sliced(
    bert: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(bert / "tokenizer.json"))
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=24)])
    model.save(str(tmp_path / "theirs"))
    texts = [text for text in ALL if text.strip()]
    expected = normalize(model.encode(texts))
    encoder = built(tmp_path / "theirs", tmp_path / "a", "--engine", "static")
    np.testing.assert_allclose(encoder.encode(texts), expected, atol=CLOSE)
    assert encoder.spec.speaks is None
    succeeds("slice", "--model", tmp_path / "theirs", "--dim", 8, "--out", tmp_path / "sub")
    found = SentenceTransformer(str(tmp_path / "sub"), device="cpu").encode(texts)
    np.testing.assert_allclose(found, normalize(expected[:, :8]), atol=CLOSE)


#: Weights, and the mean cosine of their vectors to those of float32.
WEIGHTS = {"fp32": 0.999999, "fp16": 0.999999, "int8": 0.9999, "int4-weight-only": 0.99}


@pytest.mark.parametrize(
    ("engine", "weights"),
    [
        *((engine, weights) for engine in ("static", "onnx") for weights in WEIGHTS),
        *(("openvino", weights) for weights in ("fp32", "int8")),
    ],
)
def test_every_precision_of_the_table_gives_its_vectors(
    engine: str, weights: str, wide: Path, tmp_path: Path
) -> None:
    encoder = built(wide, tmp_path / "a", "--engine", engine, "--weights", weights)
    assert (encoder.spec.layers, encoder.spec.engine) == (0, engine)
    assert encoder.spec.coverage > 0.99
    expected, found = referenced(wide), encoder.encode(ALL)
    cosines = (expected * found).sum(axis=1)[np.linalg.norm(expected, axis=1) > 0]
    assert cosines.mean() > WEIGHTS[weights]
    assert not found[TEXTS.index("")].any()
    assert write_bundle(tmp_path / "a", tmp_path / "edge.m2d").space_id == encoder.spec.space_id
    assert "reproduced" in succeeds("verify", tmp_path / "edge.m2d")


def test_narrower_tables_take_fewer_bytes(wide: Path, tmp_path: Path) -> None:
    sizes = []
    for weights in WEIGHTS:
        built(wide, tmp_path / weights, "--weights", weights)
        sizes.append((tmp_path / weights / "table.safetensors").stat().st_size)
    values = 201 * 64
    expected = [values * 4, values * 2, values + 201 * 4, values // 2 + values // 32 * 4]
    np.testing.assert_allclose(sizes, expected, atol=400)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--weights", "int8-weight-only"], "does not run on static; choose from fp32, fp16, int8"),
        (["--weights", "int8", "--isa", "vnni"], "--isa vnni does not go with --weights int8"),
        (["--weights", "int8", "--max-drop", 1], "--max-drop has no meaning on static"),
        (["--provider", "CUDA"], "static models run on CPU, not on CUDA"),
        (["--layers", 1], "--layers 1 is not between 0 and 0"),
    ],
    ids=str,
)
def test_what_the_engine_does_not_do_is_refused(
    options: list[object], told: str, wide: Path, tmp_path: Path
) -> None:
    assert told in refused("build", "--model", wide, *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_engine_runs_no_layers(small: Callable[[str], Path], tmp_path: Path) -> None:
    arguments = ["--layers", 1, "--engine", "static", "--out", tmp_path / "out"]
    told = refused("build", "--model", small("bert"), *arguments)
    assert "the engine static runs depth 0 only; choose another engine" in told


@pytest.mark.parametrize("vectors", VECTOR_PRECISIONS)
def test_every_vector_precision_is_built_bundled_verified_and_encoded(
    vectors: str, wide: Path, tmp_path: Path
) -> None:
    # At 20 dims it speaks no space, so ranges are its own.
    options = ["--dim", 20, "--weights", "int8", "--min-coverage", 0, "--vectors", vectors]
    built(wide, tmp_path / "a", *options)
    succeeds("bundle", tmp_path / "a", "--out", tmp_path / "edge.m2d")
    assert "reproduced" in succeeds("verify", tmp_path / "edge.m2d")
    (tmp_path / "texts.txt").write_text("\n".join(text for text in ALL if text), encoding="utf-8")
    arguments = ["--in", tmp_path / "texts.txt", "--out", tmp_path / "v.npy"]
    succeeds("encode", tmp_path / "edge.m2d", *arguments)
    floats = built(wide, tmp_path / "floats", *options[:-1], "float32")
    lines = [text for text in ALL if text]
    expected = encode_vectors(
        floats.encode(lines),
        vectors,
        read_ranges(tmp_path / "a"),
        "big",  # type: ignore[arg-type]
    )
    found = np.load(tmp_path / "v.npy")
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    assert "vectors of this space" in succeeds(
        "verify", tmp_path / "edge.m2d", "--vectors", tmp_path / "v.npy"
    )


def test_force_replaces_a_static_artifact(wide: Path, tmp_path: Path) -> None:
    for _ in range(2):
        built(wide, tmp_path / "a", "--force")


def test_an_artifact_is_the_same_bytes_every_time(wide: Path, tmp_path: Path) -> None:
    for name in ("1", "2"):
        built(wide, tmp_path / name, "--weights", "int8")
        write_bundle(tmp_path / name, tmp_path / f"{name}.m2d")
    assert (tmp_path / "1.m2d").read_bytes() == (tmp_path / "2.m2d").read_bytes()


def test_a_bundle_runs_on_numpy_and_tokenizers_alone(wide: Path, tmp_path: Path) -> None:
    built(wide, tmp_path / "a", "--weights", "int8", "--vectors", "ubinary")
    succeeds("bundle", tmp_path / "a", "--out", tmp_path / "edge.m2d")
    (tmp_path / "texts.txt").write_text("a cat\n", encoding="utf-8")
    code = RUN_ALONE
    arguments = [tmp_path / name for name in ("edge.m2d", "texts.txt", "v.npy")]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "vectors of this space" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


RUN_ALONE = """
import sys

absent = {"onnxruntime", "torch", "safetensors", "onnx", "onnx_ir", "transformers", "openvino",
          "pydantic", "ml_dtypes", "scipy", "threadpoolctl", "rich", "huggingface_hub"}

class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent)
from m2dexport.cli import cli

bundle, texts, vectors = sys.argv[1:]
for command in (["verify", bundle], ["encode", bundle, "--in", texts, "--out", vectors],
                ["verify", bundle, "--vectors", vectors]):
    cli(command, standalone_mode=False)
print(sorted(absent & {name.partition(".")[0] for name in sys.modules}))
"""


# The table's file, of each precision.

TABLES = {
    "fp32": {"rows": np.arange(12, dtype=np.float32).reshape(4, 3)},
    "fp16": {"rows": np.arange(12, dtype=np.float16).reshape(4, 3)},
    "int8": {
        "codes": np.arange(12, dtype=np.int8).reshape(4, 3),
        "scale": np.full((4, 1), 0.5, np.float32),
    },
    "int4": {
        "packed": np.arange(128, dtype=np.uint8).reshape(4, 2, 16),
        "scale": np.full((4, 2, 1), 0.5, np.float16),
        "offset": np.full((4, 2, 1), -1, np.float16),
    },
}


def dim_of(table: Table) -> int:
    if "packed" in table:
        return int(table["packed"].shape[1]) * 32
    return int(table["rows" if "rows" in table else "codes"].shape[1])


def reading(content: bytes) -> Any:
    return read_table(memoryview(content), "table.safetensors")


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_survives_its_file_and_safetensors_reads_it(kind: str, tmp_path: Path) -> None:
    content = table_bytes(TABLES[kind])
    (tmp_path / "t.safetensors").write_bytes(content)
    for found in (reading(content), safetensors.numpy.load_file(tmp_path / "t.safetensors")):
        assert found.keys() == TABLES[kind].keys()
        for name, array in TABLES[kind].items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype


def test_rows_of_each_precision_are_widened() -> None:
    ids = np.array([3, 0, 3])
    expected = np.arange(12, dtype=np.float32).reshape(4, 3)[ids]
    np.testing.assert_array_equal(rows_of(TABLES["fp32"], ids), expected)
    np.testing.assert_array_equal(rows_of(TABLES["fp16"], ids), expected)
    np.testing.assert_array_equal(rows_of(TABLES["int8"], ids), expected / 2)
    packed = TABLES["int4"]["packed"][0, 1]
    codes = np.concatenate([packed & 15, packed >> 4]).astype(np.float32)
    np.testing.assert_array_equal(rows_of(TABLES["int4"], ids)[1, 32:], codes * 0.5 - 1)
    assert [dim_of(TABLES[kind]) for kind in TABLES] == [3, 3, 3, 64]


@pytest.mark.parametrize("kind", TABLES)
def test_a_batch_gives_what_each_text_gives_alone(kind: str, monkeypatch) -> None:
    monkeypatch.setattr(run, "_TOKENS", 12)  # some texts at a time
    rng = np.random.default_rng(0)
    rows = len(next(iter(TABLES[kind].values())))
    ids, mask = rng.integers(0, rows, (8, 5)), rng.integers(0, 2, (8, 5))
    mask[3] = 0  # has no tokens
    (found,) = run.run(TABLES[kind], ids, mask)
    assert not found[3].any()
    for text in range(len(ids)):
        own = ids[text, mask[text] != 0][None]
        np.testing.assert_array_equal(found[text], run.run(TABLES[kind], own, own * 0 + 1)[0][0])
        expected = normalize(rows_of(TABLES[kind], own[0]).sum(axis=0)[None])[0]
        np.testing.assert_array_equal(found[text], expected)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(TABLES)), st.data())
def test_a_damaged_table_is_read_or_refused_in_one_sentence(kind: str, data: st.DataObject) -> None:
    content = bytearray(table_bytes(TABLES[kind]))
    positions = st.integers(0, len(content) - 1)
    for position in data.draw(st.lists(positions, max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    end = data.draw(st.one_of(st.just(len(content)), positions))
    try:
        table = run.load({"table.safetensors": bytes(content[:end])}, Device(), "portable")
    except M2DError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 300
    else:
        ids, mask = np.array([[0, 0]]), np.array([[1, 1]])
        with np.errstate(all="ignore"):
            assert run.run(table, ids, mask)[0].shape == (1, dim_of(table))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_what_is_no_table_is_refused(content: bytes) -> None:
    with pytest.raises(M2DError, match=r"table\.safetensors is no table of token vectors"):
        reading(content)


def with_header(header: Any, data: bytes = bytes(48)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: Any = (4, 3), offsets: Any = (0, 48), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


CODES = {"codes": entry((4, 3), (0, 12), "I8"), "scale": entry((4, 1), (12, 28))}
WRONG: dict[str, bytes] = {
    "a length beyond the file": (2**63).to_bytes(8, "little") + b"{}",
    "a list": with_header([]),
    "no arrays": with_header({}),
    "an unknown array": with_header({"lines": entry()}),
    "two kinds": with_header(
        {"rows": entry((2, 3), (0, 24)), "codes": entry((4, 6), (24, 48), "I8")}
    ),
    "no scale": with_header({"codes": entry((4, 12), (0, 48), "I8")}),
    "an unknown type": with_header({"rows": entry(dtype="F64")}),
    "a type that is a list": with_header({"rows": entry(dtype=["F32"])}),
    "another type": with_header({"rows": entry((4, 12), dtype="I8")}),
    "one axis": with_header({"rows": entry((12,))}),
    "three axes": with_header({"rows": entry((4, 3, 1))}),
    "no axis": with_header({"rows": entry((), (0, 4))}, bytes(4)),
    "no rows": with_header({"rows": entry((0, 3), (0, 0))}, b""),
    "a size of 10^18": with_header({"rows": entry((10**9, 10**9), (0, 48))}),
    "a size that wraps around": with_header({"rows": entry((2**32, 2**32), (0, 48))}),
    "a negative size": with_header({"rows": entry((-4, -3))}),
    "a size that is true": with_header({"rows": entry((True, 12))}),
    "a size that is 4.0": with_header({"rows": entry((4.0, 3))}),
    "a size that is text": with_header({"rows": entry("43")}),
    "offsets beyond the file": with_header({"rows": entry(offsets=(0, 4800), shape=(400, 3))}),
    "offsets in the wrong order": with_header({"rows": entry(offsets=(48, 0))}),
    "three offsets": with_header({"rows": entry(offsets=(0, 24, 48))}),
    "surplus data": with_header({"rows": entry()}, bytes(52)),
    "metadata": with_header({"__metadata__": {"format": "pt"}, "rows": entry()}),
    "scales of other rows": with_header(
        {**CODES, "scale": entry((3, 1), (12, 24))}, bytes(24)
    ),
    "two scales a row": with_header({**CODES, "scale": entry((4, 2), (12, 44))}, bytes(44)),
    "half scales": with_header({**CODES, "scale": entry((4, 1), (12, 20), "F16")}, bytes(20)),
    "other blocks": with_header(
        {
            "packed": entry((1, 1, 8), (0, 8), "U8"),
            "scale": entry((1, 1, 1), (8, 10), "F16"),
            "offset": entry((1, 1, 1), (10, 12), "F16"),
        },
        bytes(12),
    ),
    "a name twice": with_header(b'{"rows": 1, "rows": 2}'),
    "NaN": with_header(b'{"rows": NaN}'),
    "deep nesting": with_header(b"[" * 200_000),
    "a million axes": with_header({"rows": entry([3] * 1_000_000)}),
    "long numbers": with_header(b'{"rows": {"dtype": "F32", "shape": [' + b"9" * 5000 + b", 3]}}"),
    "not UTF-8": with_header(b'{"\xff": 1}'),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_hostile_table_is_refused_and_takes_no_memory(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(M2DError, match="is no table of token vectors") as caught:
            reading(WRONG[name])
        assert tracemalloc.get_traced_memory()[1] < 200_000_000
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 200


def test_a_table_that_is_not_the_one_of_the_artifact_does_not_run(
    wide: Path, tmp_path: Path
) -> None:
    built(wide, tmp_path / "a", "--dim", 20)
    other = built(wide, tmp_path / "b", "--dim", 24).spec
    folder = copytree(tmp_path / "a", tmp_path / "c")
    (folder / "artifact.json").write_text(replace(read_spec(folder), dim=other.dim).to_json())
    with pytest.raises(M2DError, match=r"is of space .* by its artifact.json"):
        load(relisted(folder)).encode(["a"])
    (folder / "table.safetensors").write_bytes(b"{}")
    with pytest.raises(M2DError, match="is no table of token vectors"):
        load(relisted(folder))


def test_a_token_beyond_the_table_has_no_vector(wide: Path, tmp_path: Path) -> None:
    encoder = built(wide, tmp_path / "a")
    table = reading((tmp_path / "a" / "table.safetensors").read_bytes())
    short = {"rows": np.ascontiguousarray(table["rows"][:50])}
    (tmp_path / "a" / "table.safetensors").write_bytes(table_bytes(short))
    report = load(relisted(tmp_path / "a")).encode_report(["!", "the"])
    assert list(report.failed) == [1]
    np.testing.assert_array_equal(report.vectors[0], encoder.encode(["!"])[0])
    with pytest.raises(M2DError, match="a token id lies beyond the 4 rows of the table"):
        run.run(TABLES["fp32"], np.array([[0, 4]]), np.array([[1, 1]]))
