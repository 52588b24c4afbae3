"""An index that exists: aligned encoders' vectors are put to it, and all others' are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
from command_line import m2d
from numpy.typing import NDArray
from tiny import tiny_checkpoint
from tiny_artifact import relisted

from m2dexport.build.build import make_artifact
from m2dexport.build.recipe import Recipe
from m2dexport.build.source import Original
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.errors import BundleError, UsageError
from m2dexport.runtime import load
from m2dexport.runtime.artifact import (
    FULL_LAYERS,
    RANGES,
    ArtifactSpec,
    Loss,
    Spoken,
    full_layers,
    read_ranges,
    read_spec,
    space_id_of_artifact,
)
from m2dexport.runtime.index import read_index
from m2dexport.vectors.codecs import normalize

DIM = 48
VECTORS = ("float32", "int8", "ubinary")
#: The matrices of a tiny model are narrow, so its norms and map, in float32, weigh too much.
INT8 = ("--weights", "int8", "--min-coverage", 0.5)
Made = Callable[..., Path]


def succeeds(*arguments: object) -> str:
    result = m2d(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object) -> str:
    result = m2d(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert len(line) < 700
    return line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("index")


@pytest.fixture(scope="module")
def model(small: Callable[[str], Path]) -> Path:
    """A BERT of two layers; read only."""
    return small("bert")


@pytest.fixture(scope="module")
def built(folder: Path, model: Path, original: Callable[..., Original]) -> Made:
    """From vectors, layers and dim to an artifact of the checkpoint as it is; read only."""

    @cache
    def made(vectors: str, layers: int = 2, dim: int = DIM, bit_order: str = "big") -> Path:
        out = folder / f"{layers}x{dim}-{vectors}-{bit_order}"
        recipe = Recipe(vectors=vectors, bit_order=bit_order)  # type: ignore[arg-type]
        return make_artifact(original(model, layers, dim), out, recipe).path

    return made


@pytest.fixture(scope="module")
def full(built: Made) -> Made:
    """From vectors, layers and dim to the bundle of the same; read only."""

    @cache
    def made(*cell: Any) -> Path:
        artifact = built(*cell)
        out = artifact.with_suffix(".m2d")
        succeeds("bundle", artifact, "--out", out)
        return out

    return made


@pytest.fixture(scope="module")
def index(folder: Path, full: Made, few_texts: Path) -> Made:
    """From vectors and the end of a file's name to an index that the full depth wrote; read only.

    Other arguments are those of ``full``.
    """

    @cache
    def written(vectors: str, suffix: str, *cell: Any) -> Path:
        bundle = full(vectors, *cell)
        out = folder / f"{bundle.stem}{suffix}"
        succeeds("encode", bundle, "--in", few_texts, "--out", out)
        return out

    return written


@pytest.fixture(scope="module")
def aligned(folder: Path, model: Path, few_texts: Path) -> Path:
    """The aligned sub-model of one layer; read only."""
    arguments = ["--layers", 1, "--dim", DIM, "--align", "--align-texts", few_texts]
    succeeds("slice", "--model", model, *arguments, "--out", folder / "aligned")
    return folder / "aligned"


@pytest.fixture(scope="module")
def query(folder: Path, aligned: Path, full: Made, original: Callable[..., Original]) -> Made:
    """From vectors to the aligned int8 artifact that speaks the full depth's; read only."""

    @cache
    def made(vectors: str) -> Path:
        recipe = Recipe(
            weights="int8",
            vectors=vectors,
            min_coverage=0.5,
            index=read_index(full(vectors)),  # type: ignore[arg-type]
        )
        return make_artifact(original(aligned, 1, DIM), folder / f"query-{vectors}", recipe).path

    return made


@pytest.fixture(scope="module")
def foreign(folder: Path, original: Callable[..., Original]) -> Path:
    """An artifact of another checkpoint, of the same depth and dim; read only."""
    config = {"dim": 64, "hidden_dim": 48, "n_layers": 2}
    other = tiny_checkpoint(folder / "other", "distilbert", config=config)
    return make_artifact(original(other, 2, DIM), folder / "foreign", Recipe()).path


@pytest.mark.parametrize("suffix", [".npy", ".jsonl"])
@pytest.mark.parametrize("vectors", VECTORS)
def test_an_aligned_bundle_verifies_against_the_index_of_the_full_depth(
    vectors: str, suffix: str, query: Made, full: Made, index: Made, tmp_path: Path
) -> None:
    succeeds("bundle", query(vectors), "--out", tmp_path / "query.m2d")
    whole = load(full(vectors)).spec
    for path in (query(vectors), tmp_path / "query.m2d"):
        spec = load(path).spec
        assert spec.speaks == Spoken(whole.space_id, 2, "fp32", {})
        assert spec.space_id != whole.space_id
        lines = succeeds("verify", path, "--vectors", index(vectors, suffix)).splitlines()
        assert f"315 vectors of space {whole.space_id}, which this encoder speaks" in lines[-1]
        assert "(2 layers in fp32); what its queries lose there was not measured" in lines[-1]


@pytest.mark.parametrize("vectors", VECTORS)
def test_the_codes_are_those_that_the_index_has_for_the_same_floats(
    vectors: str, query: Made, full: Made, built: Made, few_texts: Path
) -> None:
    ranges = read_ranges(query(vectors))
    if vectors == "int8":
        assert ranges is not None
        assert (query(vectors) / RANGES).read_bytes() == (built(vectors) / RANGES).read_bytes()
        assert read_spec(query(vectors)).clipping_rate is not None
    else:
        assert ranges is None
    texts = few_texts.read_text(encoding="utf-8").splitlines()[:100]
    ours, theirs = (load(path).encode(texts) for path in (query(vectors), full(vectors)))
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    near, far = agreement(ours, theirs, vectors), agreement(ours, np.roll(theirs, 1, 0), vectors)
    assert near > far


def agreement(a: NDArray[Any], b: NDArray[Any], vectors: str) -> float:
    if vectors == "ubinary":
        return float((np.unpackbits(a, axis=1) == np.unpackbits(b, axis=1)).mean())
    first, second = (normalize(each.astype(np.float32)) for each in (a, b))
    return float((first * second).sum(axis=1).mean())


def test_build_aligns_a_whole_checkpoint_and_takes_the_ranges_of_the_full_depth(
    model: Path, few_texts: Path, built: Made, index: Made, tmp_path: Path
) -> None:
    arguments = ["--layers", 1, "--dim", DIM, "--align", "--align-texts", few_texts]
    options = ["--vectors", "int8", "--out"]
    succeeds("build", "--model", model, *arguments, *options, tmp_path / "a")
    assert (tmp_path / "a" / RANGES).read_bytes() == (built("int8") / RANGES).read_bytes()
    assert "which this encoder speaks" in succeeds(
        "verify", tmp_path / "a", "--vectors", index("int8", ".npy")
    )


@pytest.mark.parametrize("vectors", ["float32", "ubinary", "int8-symmetric", "binary"])
def test_codes_without_ranges_speak_the_space_of_the_fp32_full_model_by_themselves(
    vectors: str, aligned: Path, built: Made, original: Callable[..., Original], tmp_path: Path
) -> None:
    recipe = Recipe(vectors=vectors)  # type: ignore[arg-type]
    spec = make_artifact(original(aligned, 1, DIM), tmp_path / "a", recipe).spec
    assert spec.speaks == Spoken(read_spec(built(vectors)).space_id, 2, "fp32", {})


def test_codes_with_ranges_need_the_index_that_has_them(
    aligned: Path, original: Callable[..., Original], tmp_path: Path
) -> None:
    arguments = ["--model", aligned, "--vectors", "int8", "--out", tmp_path / "a"]
    told = refused("build", *arguments)
    assert "int8 codes of an aligned encoder need the ranges of the index" in told
    assert "name the bundle that wrote it by --index" in told
    with pytest.raises(UsageError, match="int4 codes of an aligned encoder need the ranges"):
        make_artifact(original(aligned, 1, DIM), tmp_path / "a", Recipe(vectors="int4"))
    assert not (tmp_path / "a").exists()


def test_quantize_takes_an_index(
    aligned: Path, built: Made, original: Callable[..., Original], tmp_path: Path
) -> None:
    source = make_artifact(original(aligned, 1, DIM), tmp_path / "fp32", Recipe()).path
    arguments = [source, *INT8, "--vectors", "int8", "--out", tmp_path / "a"]
    assert "name the bundle that wrote it by --index" in refused("quantize", *arguments)
    succeeds("quantize", *arguments, "--index", built("int8"))
    assert read_spec(tmp_path / "a").speaks == Spoken(
        read_spec(built("int8")).space_id, 2, "fp32", {}
    )


def test_the_full_depth_in_other_weights_speaks_the_space_of_an_fp32_index(
    model: Path, full: Made, index: Made, tmp_path: Path
) -> None:
    arguments = ["--model", model, "--dim", DIM, *INT8, "--vectors", "int8"]
    succeeds("build", *arguments, "--index", full("int8"), "--out", tmp_path / "a")
    spec = read_spec(tmp_path / "a")
    assert spec.speaks == Spoken(load(full("int8")).spec.space_id, 2, "fp32", {})
    assert spec.space_id != spec.speaks.space_id
    assert "which this encoder speaks" in succeeds(
        "verify", tmp_path / "a", "--vectors", index("int8", ".jsonl")
    )


def test_without_index_the_full_depth_in_other_weights_speaks_only_its_own_space(
    model: Path, original: Callable[..., Original], index: Made, tmp_path: Path
) -> None:
    recipe = Recipe(weights="int8", min_coverage=0.5)
    artifact = make_artifact(original(model, 2, DIM), tmp_path / "a", recipe)
    assert artifact.spec.speaks is None
    told = refused("verify", artifact.path, "--vectors", index("float32", ".npy"))
    assert "must not be compared, since they differ in weights ('fp32', 'int8')" in told


def test_the_full_model_s_pooling_and_final_norm_decide_its_space(
    few_texts: Path, original: Callable[..., Original], tmp_path: Path
) -> None:
    """Depth 0 is a mean without a norm, and a sub-model may leave the norm out."""
    parent = tiny_checkpoint(
        tmp_path / "parent", "qwen3", pooling="lasttoken", config={"num_hidden_layers": 2}
    )
    whole = make_artifact(original(parent, 2, 16), tmp_path / "full", Recipe()).spec
    assert (whole.pooling, whole.final_norm) == (["lasttoken"], "applied")
    arguments = ["--model", parent, "--dim", 16, "--align-texts", few_texts]
    succeeds("build", *arguments, "--layers", 0, "--out", tmp_path / "0")
    options = ["--layers", 1, "--align", "--final-norm", "skipped"]
    succeeds("slice", *arguments, *options, "--out", tmp_path / "sub")
    succeeds("slice", *arguments, "--layers", 0, "--out", tmp_path / "static")
    spec = read_spec(tmp_path / "0")
    assert (spec.pooling, spec.final_norm) == (["mean"], "none")
    assert spec.speaks == Spoken(whole.space_id, 2, "fp32", {})
    sub, static = (open_checkpoint(tmp_path / name) for name in ("sub", "static"))
    assert (sub.final_norm, static.final_norm) == ("skipped", "none")
    assert sub.speaks == static.speaks


def test_a_static_bundle_is_put_to_an_index_of_int8_codes(
    model: Path, few_texts: Path, full: Made, index: Made, tmp_path: Path
) -> None:
    arguments = ["--layers", 0, "--dim", DIM, "--align-texts", few_texts, "--weights", "int8"]
    options = ["--vectors", "int8", "--index", full("int8")]
    succeeds("build", "--model", model, *arguments, *options, "--out", tmp_path / "a")
    succeeds("bundle", tmp_path / "a", "--out", tmp_path / "a.m2d")
    for suffix in (".npy", ".jsonl"):
        told = succeeds("verify", tmp_path / "a.m2d", "--vectors", index("int8", suffix))
        assert "which this encoder speaks (2 layers in fp32)" in told


# What is refused, each in one sentence and before anything is written.


def refused_with(
    aligned: Path, original: Callable[..., Original], out: Path, index: Path, recipe: Recipe
) -> str:
    with pytest.raises(UsageError) as caught:
        make_artifact(original(aligned, 1, DIM), out, replace(recipe, index=read_index(index)))
    assert not out.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("cell", "recipe", "told"),
    [
        (("int8", 2, 32), Recipe(vectors="int8"), "holds vectors of 32 dims, and this encoder "
         "gives 48; make one of 32 dims"),
        (("ubinary",), Recipe(vectors="int8"), "make one that gives ubinary with big"),
        (("int8",), Recipe(), "holds vectors=int8 with bit order big, and this encoder gives "
         "float32 with big; make one that gives int8"),
        (("ubinary", 2, DIM, "little"), Recipe(vectors="ubinary"), "make one that gives ubinary "
         "with little"),
        (("float32", 1), Recipe(), "was written at depth 1, and this encoder is aligned with "
         "depth 2; name a bundle of depth 2"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_an_index_of_another_dim_codec_or_depth_is_refused(
    cell: tuple[Any, ...],
    recipe: Recipe,
    told: str,
    aligned: Path,
    built: Made,
    original: Callable[..., Original],
    tmp_path: Path,
) -> None:
    path = built(*cell)
    sentence = refused_with(aligned, original, tmp_path / "a", path, recipe)
    assert sentence.startswith(str(path))
    assert told in sentence


def test_an_index_of_another_checkpoint_is_refused(
    aligned: Path, foreign: Path, original: Callable[..., Original], tmp_path: Path
) -> None:
    told = refused_with(aligned, original, tmp_path / "a", foreign, Recipe())
    assert "than this encoder's map was fitted to" in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pooling": ["cls"]}, "pooling"),
        ({"prompts": {"query": "find: "}}, "prompts"),
        ({"max_length": 12}, "max_length"),
        ({"prompts": {"q": "a"}, "default_prompt": "q"}, "prompts and default_prompt"),
        ({"final_norm": "applied"}, "final_norm"),
    ],
    ids=str,
)
def test_an_index_of_the_same_weights_used_otherwise_is_refused(
    change: dict[str, Any],
    told: str,
    model: Path,
    aligned: Path,
    built: Made,
    original: Callable[..., Original],
    tmp_path: Path,
) -> None:
    path = copytree(built("float32"), tmp_path / "index")
    changed = replace(read_spec(path), **change)
    write_as_built(path, changed)
    for source in (original(aligned, 1, DIM), original(model, 2, DIM)):
        with pytest.raises(UsageError, match=f"the same weights and differs in {told}; name a"):
            make_artifact(source, tmp_path / "a", Recipe(index=read_index(path)))


def test_an_index_of_another_tokenizer_is_refused(
    model: Path, aligned: Path, built: Made, original: Callable[..., Original], tmp_path: Path
) -> None:
    path = copytree(built("float32"), tmp_path / "index")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="was changed since it was built"):
        read_index(relisted(path))
    write_as_built(path, read_spec(path))
    for source in (original(aligned, 1, DIM), original(model, 2, DIM)):
        with pytest.raises(UsageError, match="the same weights and differs in tokenizer"):
            make_artifact(source, tmp_path / "a", Recipe(index=read_index(path)))


def write_as_built(path: Path, spec: ArtifactSpec) -> None:
    """Write a specification whose space is that of the files beside it."""
    tokenizer = (path / "tokenizer.json").read_text()
    space = space_id_of_artifact(spec, read_ranges(path), tokenizer)
    (path / "artifact.json").write_text(replace(spec, space_id=space).to_json())
    relisted(path)


def test_an_index_whose_ranges_were_changed_is_refused(built: Made, tmp_path: Path) -> None:
    path = copytree(built("int8"), tmp_path / "index")
    ranges = json.loads((path / "ranges.json").read_text())
    ranges["high"] = [value + 1 for value in ranges["high"]]
    (path / "ranges.json").write_text(json.dumps(ranges))
    with pytest.raises(UsageError, match="was changed since it was built"):
        read_index(relisted(path))


def test_an_encoder_that_is_not_aligned_is_put_to_no_index_of_the_full_depth(
    model: Path, built: Made, original: Callable[..., Original], tmp_path: Path
) -> None:
    recipe = Recipe(index=read_index(built("float32")))
    with pytest.raises(UsageError, match="encoder of 1 layers is not aligned with it: build it"):
        make_artifact(original(model, 1, DIM), tmp_path / "a", recipe)


def test_what_is_no_index_is_one_sentence(
    aligned: Path, few_texts: Path, full: Made, tmp_path: Path
) -> None:
    arguments = ["--model", aligned, "--out", tmp_path / "a", "--index"]
    assert "does not exist; name the bundle" in refused("build", *arguments, tmp_path / "none.m2d")
    assert "is not an artifact" in refused("build", *arguments, aligned)
    for content in (few_texts.read_bytes(), full("float32").read_bytes()[:-100]):
        (tmp_path / "broken.m2d").write_bytes(content)
        result = m2d("build", *arguments, tmp_path / "broken.m2d")
        assert result.exit_code == BundleError.exit_code
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "a").exists()


def test_other_indexes_do_not_verify(
    query: Made, index: Made, foreign: Path, few_texts: Path, tmp_path: Path
) -> None:
    succeeds("bundle", foreign, "--out", tmp_path / "o.m2d")
    for suffix in (".npy", ".jsonl"):
        other = tmp_path / f"other{suffix}"
        succeeds("encode", tmp_path / "o.m2d", "--in", few_texts, "--out", other)
        wrong = [other, index("int8", suffix), index("float32", suffix, 2, 32)]
        for path in (*wrong, index("float32", suffix, 1)):
            told = refused("verify", query("float32"), "--vectors", path)
            assert "must not be compared" in told


def test_rows_of_two_spaces_do_not_verify(
    query: Made, index: Made, few_texts: Path, tmp_path: Path
) -> None:
    succeeds("bundle", query("float32"), "--out", tmp_path / "q.m2d")
    own = tmp_path / "own.jsonl"
    succeeds("encode", tmp_path / "q.m2d", "--in", few_texts, "--out", own)
    assert "vectors of this space" in succeeds("verify", query("float32"), "--vectors", own)
    rows = [path.read_text().splitlines()[0] for path in (index("float32", ".jsonl"), own)]
    for mixed in (rows, rows[::-1]):
        (tmp_path / "mixed.jsonl").write_text("\n".join(mixed))
        told = refused("verify", query("float32"), "--vectors", tmp_path / "mixed.jsonl")
        assert "mixed.jsonl:2" in told


def test_a_measured_loss_is_said_instead(query: Made, index: Made, tmp_path: Path) -> None:
    folder = copytree(query("float32"), tmp_path / "a")
    spec = read_spec(folder)
    assert spec.speaks is not None
    measured = {"limit/ndcg@10": Loss(40.5, 42.25), "b/recall@10": Loss(70, 71)}
    spec = replace(spec, speaks=replace(spec.speaks, measured=measured))
    (folder / "artifact.json").write_text(spec.to_json())
    relisted(folder)
    told = succeeds("verify", folder, "--vectors", index("float32", ".npy"))
    assert "b/recall@10 70.00 where the native encoder has 71.00, limit/ndcg@10 40.50" in told
    assert "not measured" not in told


def test_half_of_what_an_encoder_was_aligned_with_is_refused(query: Made) -> None:
    spec: ArtifactSpec = read_spec(query("float32"))
    assert full_layers(spec) == 2
    names = [name for name in spec.provenance if name.startswith("full_")]
    assert len(names) == 5
    for name in names:
        rest = {key: value for key, value in spec.provenance.items() if key != name}
        with pytest.raises(UsageError, match="says half of what the encoder was aligned with"):
            full_layers(replace(spec, provenance=rest))
    for wrong in ("", "-1", "two", "9" * 100, "²"):
        provenance = {**spec.provenance, FULL_LAYERS: wrong}
        with pytest.raises(UsageError, match="says half of what the encoder was aligned with"):
            full_layers(replace(spec, provenance=provenance))
