"""What users do, as they do it: through the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from command_line import m2d
from sentence_transformers import SentenceTransformer
from tiny_artifact import tiny_artifact
from tiny_profile import cell, profile

from m2dexport import __version__
from m2dexport.cli import cli
from m2dexport.data import calibration_texts, default_task_paths, texts_sha256
from m2dexport.precisions import BIT_ORDERS, VECTOR_PRECISIONS
from m2dexport.profile.manifest import write_profile
from m2dexport.runtime.archive import open_bundle

STSB = default_task_paths()[0]
COMMANDS = (
    ("inspect", "slice", "build", "quantize", "profile"),
    ("select", "check", "bundle", "verify", "encode", "doctor"),
)
TEXTS = ["A man is playing a guitar.", "", "naïve café 😀", "a long text " * 60]


def succeeds(*arguments: object, stdin: str | None = None) -> Result:
    result = m2d(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result


def refused(code: int, *arguments: object) -> str:
    """Run a command that must fail; return its one sentence."""
    result = m2d(*arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    sentences = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(sentences) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return sentences[0]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("eval") / "pairs.tsv"
    path.write_text("".join(STSB.read_text(encoding="utf-8").splitlines(keepends=True)[:60]))
    return path


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target") / "small.toml"
    path.write_text(
        'description = "two cells"\nengine = "onnx"\nprovider = "CPUExecutionProvider"\n'
        'threads = 1\n[grid]\nalign = ["none"]\nlayers = [2]\ndims = [64]\nweights = ["fp32"]\n'
        'vectors = ["float32", "ubinary"]\n[latency]\nshapes = [[1, 8]]\n'
    )
    return path


@pytest.mark.parametrize("command", [name for names in COMMANDS for name in names])
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    out = succeeds(command, "--help").output
    assert "Example" in out
    assert f"m2dexport {command}" in out or f"| m2dexport {command}" in out


def test_the_version_is_that_of_the_package() -> None:
    assert succeeds("--version").output.strip().endswith(__version__)


def test_from_checkpoint_to_vectors(tmp_path, monkeypatch, evaluation, target) -> None:
    """profile, select, bundle, verify, encode; and the sub-model gives the same vectors."""
    monkeypatch.chdir(tmp_path)
    measured = succeeds("profile", "--eval", evaluation, "--target", target, "--out", "p")
    assert "Next: m2dexport bundle" in measured.stdout
    assert "report.html" in measured.stdout
    assert "\x1b" not in measured.stderr  # a pipe gets lines, and no bars
    assert "texts in " in measured.stderr  # the estimate
    chosen = json.loads(succeeds("select", "p/profile.json", "--size-mb", 90, "--json").output)
    cheaper = "2x64-fp32-ubinary"  # as good, within the noise of 60 pairs
    assert chosen["cell"]["id"] == cheaper
    assert "Next: m2dexport bundle" in succeeds("select", "p/profile.json", "--size-mb", 90).output
    name = ["--cell", "2x64-fp32-float32"]
    assert "space " in succeeds("bundle", "p/profile.json", *name, "--out", "edge.m2d").output
    assert succeeds("verify", "edge.m2d").output
    Path("texts.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    succeeds("encode", "edge.m2d", "--in", "texts.txt", "--out", "vectors.npy")
    assert succeeds("verify", "edge.m2d", "--vectors", "vectors.npy").output
    succeeds("slice", "--layers", 2, "--dim", 64)
    model = SentenceTransformer("sub-model-2x64", device="cpu")
    np.testing.assert_allclose(np.load("vectors.npy"), model.encode(TEXTS), atol=1e-4)
    lines = succeeds("encode", "edge.m2d", stdin="A man is playing a guitar.\n").stdout
    first = json.loads(lines.splitlines()[0])
    assert len(first.get("vector") or first.get("embedding")) == 64


def test_several_values_slice_a_grid(tmp_path: Path, bert: Path) -> None:
    out = tmp_path / "grid"
    arguments = ["--model", bert, "--layers", "1,3", "--dim", "8,32", "--out", out]
    found = json.loads(succeeds("slice", *arguments, "--json").stdout)
    assert [(item["layers"], item["dim"]) for item in found] == [(1, 8), (1, 32), (3, 8), (3, 32)]
    assert sorted(path.name for path in out.iterdir()) == ["1x32", "1x8", "3x32", "3x8"]


def test_slice_cuts_and_sorts_the_inside_of_layers_and_inspect_shows_it(
    tmp_path: Path, bert: Path
) -> None:
    texts, out = tmp_path / "texts.txt", tmp_path / "out"
    texts.write_text("a cat\ntwo dogs\n", encoding="utf-8")
    arguments = ["--model", bert, "--reorder-by-importance", texts, "--out", out]
    result = succeeds("slice", "--heads", "4,2,4,2", "--ffn", 20, *arguments)
    assert "4 layers, 32 dims" in result.stdout
    assert "Warning: no config.json of bert can state these widths" in result.stderr
    shown = succeeds("inspect", "--model", out).output
    assert "4,2,4,2, of 8 dims" in shown
    assert re.search(r"feed-forward +20 ", shown)
    shipped = ["--model", bert, "--reorder-by-importance", "--out", tmp_path / "sorted"]
    succeeds("slice", *shipped)
    record = json.loads((tmp_path / "sorted" / "m2dexport.json").read_text())
    assert record["reordered_by"] == texts_sha256(calibration_texts())


def test_a_hidden_width_is_refused_with_the_reason(bert: Path) -> None:
    sentence = refused(2, "slice", "--model", bert, "--hidden", 16)
    assert "LayerNorm takes its statistics over the whole hidden state" in sentence


def test_a_pruned_vocabulary_is_reported_and_recorded(tmp_path: Path) -> None:
    pruned = ["slice", "--layers", 2, "--dim", 64, "--prune-vocab"]
    out = succeeds(*pruned, 4000, "--out", tmp_path / "counted").output
    assert "4,000 of 8,500 pieces, 3.5 MB saved" in out
    (tmp_path / "corpus").write_text("\n".join(TEXTS[:3]), encoding="utf-8")
    line = [*pruned, tmp_path / "corpus", "--out", tmp_path / "used", "--json"]
    (found,) = json.loads(succeeds(*line).stdout)
    tokens = found["vocabulary"]["tokens_per_text"]
    assert tokens["corpus"][0] == tokens["corpus"][1]
    assert tokens["calibration"][0] < tokens["calibration"][1]
    stored = json.loads((tmp_path / "used" / "m2dexport.json").read_text())
    assert stored["vocabulary"] == found["vocabulary"]
    # What is built from it is what it gives.
    built = ["build", "--model", tmp_path / "used", "--out", tmp_path / "artifact"]
    assert "parity with torch" in succeeds(*built).output
    succeeds("bundle", tmp_path / "artifact", "--out", tmp_path / "edge.m2d")
    succeeds("verify", tmp_path / "edge.m2d")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("100", "--prune-vocab 100 is below the "),
        ("empty.txt", "holds no text"),
        ("missing.txt", "does not exist"),
    ],
)
def test_a_vocabulary_that_cannot_be_pruned_so_is_refused(
    value: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n\n")
    error = refused(2, "slice", "--layers", 2, "--dim", 64, "--prune-vocab", value)
    assert sentence in error
    assert not Path("sub-model-2x64").exists()


def test_build_then_quantize(tmp_path: Path, bert: Path) -> None:
    out = succeeds("build", "--model", bert, "--layers", 2, "--out", tmp_path / "a").output
    assert "parity with torch" in out
    small = ("--min-coverage", 0)  # almost all of its matrices are too small to be quantized
    out = succeeds("quantize", tmp_path / "a", "--out", tmp_path / "int8", *small).output
    assert f"parity with {tmp_path / 'a'}" in out
    found = json.loads(
        succeeds(
            *("quantize", tmp_path / "a", "--vectors", "ubinary", "--weights", "fp16"),
            *("--out", tmp_path / "b", "--json", *small),
        ).stdout
    )
    assert (found["spec"]["weights"], found["spec"]["vectors"]) == ("fp16", "ubinary")


def test_every_vector_precision_and_bit_order_can_be_asked_for() -> None:
    for command in ("build", "quantize"):
        options = {option.name: option.type for option in cli.commands[command].params}
        assert tuple(options["vectors"].choices) == VECTOR_PRECISIONS
        assert tuple(options["bit_order"].choices) == BIT_ORDERS


def test_build_prints_the_clipping_rate_of_its_ranges(tmp_path: Path, bert: Path) -> None:
    arguments = ("--model", bert, "--layers", 1, "--vectors", "int4", "--bit-order", "little")
    out = succeeds("build", *arguments, "--out", tmp_path / "a").output
    assert re.search(r"held-out texts outside the ranges: \d\.\d\d%", out)


def test_inspect_says_what_a_checkpoint_is(bert: Path) -> None:
    out = succeeds("inspect").output
    for fact in ("bert", "trained grid", "pooling", "mean", "384"):
        assert fact in out
    found = json.loads(succeeds("inspect", "--model", bert, "--json").stdout)
    assert [depth["layers"] for depth in found["depths"]] == [1, 2, 3, 4]
    assert found["prompts"] == {"query": "find: ", "document": ""}


def test_a_path_that_is_no_model(tmp_path: Path) -> None:
    for arguments in (["slice", "--layers", 1, "--dim", 8], ["profile"], ["inspect"]):
        sentence = refused(1, *arguments, "--model", tmp_path)
        assert f"{tmp_path} has no config.json" in sentence
    refused(2, "inspect", "--model", tmp_path / "missing")


def test_a_model_without_its_option() -> None:
    assert "name a checkpoint with --model" in refused(2, "inspect", "tiny")
    assert "--model" not in refused(2, "verify", "one.m2d", "two.m2d")


def test_a_pickled_checkpoint(tmp_path: Path, bert: Path) -> None:
    import torch
    from safetensors.torch import load_file

    shutil.copytree(bert, tmp_path / "pickled")
    weights = tmp_path / "pickled" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pickled" / "pytorch_model.bin")
    weights.unlink()
    assert "--allow-pickle" in refused(1, "inspect", "--model", tmp_path / "pickled")
    succeeds("inspect", "--model", tmp_path / "pickled", "--allow-pickle")


@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, 0.999])
def test_a_truncated_or_corrupt_safetensors_file(tmp_path: Path, bert: Path, keep) -> None:
    shutil.copytree(bert, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: keep if keep > 1 else int(len(content) * keep)])
    out = tmp_path / "out"
    sentence = refused(
        1, "slice", "--model", tmp_path / "model", "--layers", 1, "--dim", 8, "--out", out
    )
    assert "model.safetensors" in sentence
    assert not out.exists() or not any(out.iterdir())


OUT_OF_RANGE = [(-1, 8, "layers"), (9, 8, "layers"), (1, 0, "dim"), (1, 33, "dim")]


@pytest.mark.parametrize(
    ("command", "layers", "dim", "message"),
    [
        *[(command, *values) for command in ("slice", "build") for values in OUT_OF_RANGE],
        ("slice", "1,9", 8, "layers"),
    ],
)
def test_layers_and_dims_out_of_range(tmp_path, bert, command, layers, dim, message) -> None:
    arguments = ["--model", bert, "--layers", layers, "--dim", dim, "--out", tmp_path / "out"]
    assert message in refused(2, command, *arguments)
    assert not (tmp_path / "out").exists()


def test_an_unknown_key_in_a_target(tmp_path: Path) -> None:
    target = tmp_path / "mine.toml"
    target.write_text('description = "x"\nengine = "onnx"\nprovider = "p"\nthreds = 1\n')
    sentence = refused(2, "profile", "--target", target, "--out", tmp_path / "p")
    assert "threds" in sentence
    assert "threads" in sentence
    write_profile(profile(cell()), tmp_path / "profile.json")
    refused(2, "select", tmp_path / "profile.json", "--target", target)


def test_evaluation_data_that_is_empty_or_no_number(tmp_path: Path) -> None:
    (tmp_path / "empty.tsv").write_text("")
    (tmp_path / "words.tsv").write_text("five\ta\tb\n")
    for name in ("empty.tsv", "words.tsv"):
        assert name in refused(2, "profile", "--eval", tmp_path / name, "--out", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_budget_that_nothing_fits_names_the_nearest_cell(tmp_path: Path) -> None:
    write_profile(profile(cell(p95_ms=9.0)), tmp_path / "profile.json")
    assert cell().id in refused(1, "select", tmp_path / "profile.json", "--p95-ms", 1)
    refused(2, "select", tmp_path / "profile.json")


def test_a_bundle_with_one_byte_flipped(tmp_path: Path) -> None:
    succeeds("bundle", tiny_artifact(tmp_path / "artifact"), "--out", tmp_path / "a.m2d")
    content = bytearray((tmp_path / "a.m2d").read_bytes())
    for place in (10, len(content) // 2, len(content) - 600):
        content[place] ^= 1
        (tmp_path / "b.m2d").write_bytes(content)
        content[place] ^= 1
        refused(4, "verify", tmp_path / "b.m2d")
        refused(4, "encode", tmp_path / "b.m2d", "--in", __file__, "--out", tmp_path / "v.npy")
    assert not (tmp_path / "v.npy").exists()


def test_a_cell_of_a_checkpoint_that_has_changed(tmp_path: Path) -> None:
    write_profile(profile(cell()), tmp_path / "profile.json")
    arguments = ["bundle", tmp_path / "profile.json", "--cell", cell().id]
    assert "profile again" in refused(2, *arguments, "--out", tmp_path / "x.m2d")
    assert not (tmp_path / "x.m2d").exists()


def test_a_bundle_of_nothing(tmp_path: Path) -> None:
    sentence = refused(2, "bundle", tmp_path / "missing", "--out", tmp_path / "x.m2d")
    assert "missing does not exist" in sentence


def test_a_profile_that_could_not_be_written_is_not_measured(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("m2dexport.profile.sweep.profile_checkpoint", None)
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(2, "profile", "--out", tmp_path / "file")
    (tmp_path / "p" / "frontier.png").mkdir(parents=True)
    assert "is a folder" in refused(2, "profile", "--out", tmp_path / "p")


def test_a_profiled_checkpoint_that_moved_is_named_again(
    tmp_path, bert, evaluation, target
) -> None:
    """Nor does a profile grant what its checkpoint is trusted with."""
    import torch
    from safetensors.torch import load_file

    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(bert, old)
    torch.save(load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    grid = target.read_text().replace("dims = [64]", "dims = [32]")
    (tmp_path / "small.toml").write_text(grid)
    measured = ["--eval", evaluation, "--target", tmp_path / "small.toml", "--trained", "2:32"]
    profiled = ["profile", "--model", old, "--allow-pickle", *measured, "--out", tmp_path / "p"]
    assert len(json.loads(succeeds(*profiled, "--json").stdout)["cells"]) == 3  # the reference, too
    old.rename(new)
    bundled = ["bundle", tmp_path / "p" / "profile.json", "--cell", "2x32-fp32-float32"]
    out = ["--out", tmp_path / "x.m2d"]
    assert f"the profile measured {old}, which is not there" in refused(2, *bundled, *out)
    assert "--allow-pickle" in refused(1, *bundled, *out, "--model", new)
    succeeds(*bundled, *out, "--model", new, "--allow-pickle")
    files = open_bundle(tmp_path / "x.m2d")
    assert json.loads(files["artifact.json"])["trained"] is True


def test_an_output_is_replaced_with_force_only(tmp_path, bert, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("find a guitar\n")
    write_profile(profile(cell()), Path("p/profile.json"))
    tiny_artifact(tmp_path / "artifact")
    small = ("--min-coverage", 0)
    built = ("build", "--model", bert, "--layers", 1, "--out", "a")
    for command in (
        built,
        ("quantize", "a", *small, "--out", "q"),
        ("bundle", "artifact", "--out", "a.m2d"),
        ("encode", "a.m2d", "--in", "texts.txt", "--out", "v.npy"),
    ):
        succeeds(*command)
        out = Path(str(command[-1]))
        before = out.stat().st_ino
        assert "already exists" in refused(2, *command)
        assert out.stat().st_ino == before
        succeeds(*command, "--force")
        assert out.stat().st_ino != before
    assert "already exists" in refused(2, "profile", "--out", "p")
    assert "already exists" in refused(2, "slice", "--model", bert, "--layers", 1, "--out", "a")
    assert "not an output of m2dexport" in refused(2, *built[:-1], tmp_path, "--force")


@pytest.mark.skipif(sys.platform == "win32", reason="limits on file sizes are POSIX's")
def test_a_full_disk_leaves_nothing(tmp_path: Path, bert: Path) -> None:
    """A limit on the size of written files fails as a full disk does, in the middle of a write."""
    limit = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000));"
        "from m2dexport.cli import main; main()"
    )
    cut = ["--layers", "4", "--dim", "32"]
    command = ["slice", "--model", bert, *cut, "--out", tmp_path / "out"]
    ran = subprocess.run(
        [sys.executable, "-c", limit, *command], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 1, ran.stderr
    assert "Traceback" not in ran.stderr
    assert "could not be written" in ran.stderr
    assert list(tmp_path.iterdir()) == []  # nor a hidden folder beside it


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_kill_during_work_leaves_nothing(tmp_path: Path, by: signal.Signals) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    # A shell's background jobs ignore SIGINT, and their children do, too.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from m2dexport.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "build", "--out", tmp_path / "out"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # The scratch folder appears once work has begun.
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((tmp_path / "tmp").glob("m2dexport-*")):
        time.sleep(0.05)
    process.send_signal(by)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]
    assert not list((tmp_path / "tmp").glob("m2dexport-*"))


def test_slicing_the_shipped_checkpoint_as_typed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    succeeds("slice", "--layers", 6, "--dim", 128)
    config = json.loads(Path("sub-model-6x128/config.json").read_text())
    assert config["num_hidden_layers"] == 6
    succeeds("slice", "--layers", "2,4-6", "--dim", "64,128")
    assert len(list(Path("sub-models").iterdir())) == 8
