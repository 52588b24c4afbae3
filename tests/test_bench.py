"""bench: what a bundle costs where it runs, for people and for profile merge."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import m2d
from tiny_artifact import tiny_artifact, tiny_spec

from m2dexport.errors import UsageError
from m2dexport.files import sha256_of
from m2dexport.measure.bench import bench
from m2dexport.profile import schema
from m2dexport.runtime.bundle import write_bundle
from m2dexport.runtime.encoder import Encoder

#: What a device does not have.
TOOLCHAIN = ("torch", "pydantic", "rich", "scipy", "psutil", "transformers", "onnx", "onnx_ir")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_bundle(tiny_artifact(folder / "a", tiny_spec(vectors="int8")), folder / "a.m2d")
    return folder / "a.m2d"


def test_a_device_measures_a_bundle_without_the_toolchain(packed: Path) -> None:
    """In a process of its own, in which the toolchain cannot be imported."""
    code = (
        f"import sys\nfor name in {TOOLCHAIN}: sys.modules[name] = None\n"
        "from m2dexport.cli import main\n"
        f"sys.argv[1:] = ['bench', {str(packed)!r}, '--shapes', '1x8,2x99', '--name', 'board', "
        "'--threads', '1', '--json']\nmain()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert (found["format"], found["kind"], found["name"]) == (1, "bench", "board")
    assert found["bundle"]["sha256"] == sha256_of(packed)
    assert found["bundle"]["size_bytes"] == packed.stat().st_size
    assert found["asked"][1] == {"batch": 2, "sequence": 99}
    assert found["shapes"][1] == {"batch": 2, "sequence": 16}  # the maximum length
    assert found["used_memory_bytes"] >= found["peak_memory_bytes"] > 1e7
    assert min(found["text_p50_ms"], found["load_ms"], found["first_ms"]) > 0
    assert {"m2dexport", "numpy", "onnxruntime", "tokenizers"} == set(found["versions"])
    # What a profile has too is in its words.
    for point in found["latency"]:
        assert schema.Latency.model_validate(point).runs >= 30
    assert [schema.Tokenization.model_validate(each).batch for each in found["tokenization"]] == [
        1,
        2,
    ]
    assert schema.Machine.model_validate(found["machine"]).cores >= 1
    assert schema.Noise.model_validate(found["noise"]).reasons
    cell = found["cell"]
    assert schema.MeasuredOn.model_validate(cell["device"]).threads == 1
    parts = schema.SizeParts.model_validate(cell["size_parts"])
    assert sum(vars(parts).values()) == cell["size_bytes"]
    of_cell = set(cell) & set(schema.Cell.model_fields)
    assert {"layers", "dim", "align", "weights", "vectors", "engine", "isa"} < of_cell


def test_an_artifact_folder_is_measured_and_printed_in_a_few_lines(packed: Path) -> None:
    ran = m2d("bench", packed.parent / "a", "--shapes", "1x8", "--name", "board")
    assert ran.exit_code == 0, ran.output
    lines = ran.stdout.splitlines()
    assert lines[0].endswith("1 layers, 12 dims, weights=fp32, vectors=int8, onnx")
    assert lines[1].startswith("board: ")
    assert lines[3].startswith("1x8 ")
    assert lines[-1].startswith("The machine was ")


def test_weights_that_depend_on_the_batch_run_one_text_at_a_time(
    tmp_path: Path, monkeypatch
) -> None:
    folder = tiny_artifact(tmp_path / "a", tiny_spec(batch_invariant=False))
    run, rows = Encoder.run, set()

    def counting(self, ids, mask):
        rows.add(len(ids))
        return run(self, ids, mask)

    monkeypatch.setattr(Encoder, "run", counting)
    found = bench(folder, shapes=[(3, 8)], repeats=3)
    assert rows == {1}
    assert found.latency[0].batch == 3
    assert found.as_json()["bundle"]["sha256"] is None


@pytest.mark.parametrize("shape", [(0, 8), (1, 1 << 19)])
def test_a_shape_that_cannot_be_timed_is_refused(packed: Path, shape) -> None:
    with pytest.raises(UsageError, match=f"{shape[0]}x{shape[1]} cannot be timed; a shape is"):
        bench(packed, shapes=[shape])
    assert "is not a list of shapes such as 1x16" in m2d("bench", packed, "--shapes", "x").stderr


@pytest.mark.parametrize("name", ["", " ", "a\n", "\x1b[31m"])
def test_a_name_that_cannot_be_printed_is_refused(packed: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"this machine is named '.*'; give it a name of 1 to 300"):
        bench(packed, name=name)
