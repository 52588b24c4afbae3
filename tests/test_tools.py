"""The tools: each explains itself, and does the smallest piece of its work.

Left out is tools/bench_slicing.py, whose checkpoint of 7B parameters takes minutes to hash.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from tiny_artifact import tiny_artifact, tiny_spec
from tiny_profile import cell, profile, target

from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.data import calibration_texts
from m2dexport.profile.manifest import write_profile

TOOLS = Path(__file__).parent.parent / "tools"
ROOT = TOOLS.parent
GOLDEN = Path(__file__).parent / "golden"


def run(tool: str, *arguments: object) -> None:
    """Run a tool as a user does, but in this process, which has torch loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"tools/{tool}.py", *map(str, arguments)])
        patch.syspath_prepend(TOOLS)  # as Python does with the folder of a script
        runpy.run_path(str(TOOLS / f"{tool}.py"), run_name="__main__")


def scripts() -> list[str]:
    """Return the names of the tools, without the modules that they share."""
    return sorted(path.stem for path in TOOLS.glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("tool", scripts())
def test_every_tool_explains_itself(tool, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(tool, "--help")
    assert not stopped.value.code
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Six pairs of sentences with scores, and a corpus of 12 texts with one query."""
    folder = tmp_path_factory.mktemp("tasks")
    sts, retrieval = folder / "sts.tsv", folder / "retrieval"
    words = ("a cat", "two dogs ran", "?", "42 houses", "mat", "sat on the big red house")
    sts.write_text("".join(f"{i}\t{w}\t{words[i - 3]}\n" for i, w in enumerate(words)))
    retrieval.mkdir()
    lines = {
        "corpus": [f'{{"_id": "d{i}", "text": "the {"cat " * i} sat"}}' for i in range(12)],
        "queries": ['{"_id": "q", "text": "a cat"}'],
        "qrels": ['{"query-id": "q", "corpus-id": "d1", "score": 1}'],
    }
    for name, items in lines.items():
        (retrieval / f"{name}.jsonl").write_text("\n".join(items))
    return sts, retrieval


@pytest.fixture(scope="module")
def table(small, tasks, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Layers 1 and 2, two dims and two vector precisions; int8-static lacks its package."""
    out = tmp_path_factory.mktemp("table") / "table.md"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "nncf", None)
        run(
            "bench_quantization",
            *("--model", small("bert"), "--dims", "32,64"),
            *("--weights", "int8,int8-static", "--vectors", "float32,ubinary"),
            *("--sts", tasks[0], "--retrieval", tasks[1], "--rounds", 1, "--out", out),
        )
    return out.read_text(encoding="utf-8")


def rows(section: str) -> list[list[str]]:
    """Return the cells of a Markdown table, without its head and the line below it."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines][2:]


def sections(text: str) -> dict[str, str]:
    """Return heading -> what stands below it."""
    parts = re.split(r"^#+ (.*)\n", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_table_begins_with_its_command_and_machine(table) -> None:
    command, machine = table.split("```\n\n")[:2]
    assert re.search(r"```sh\npython \S*tools/bench_quantization\.py --model ", command)
    assert re.match(r".*, 2 threads \(.*\);\nm2dexport .*, onnxruntime .*, torch ", machine)


def test_every_depth_and_precision_has_a_row_or_a_reason(table) -> None:
    weights = rows(sections(table)["By layers and weights"])
    expected = [[n, w] for n in "12" for w in ("fp32", "int8", "int8-static")]
    assert [row[:2] for row in weights] == expected
    for row in weights:
        assert len(row) == 11
        if row[1] == "fp32":
            assert row[2:4] == ["1.0000 / 1.0000", "100.0%"]
        if row[1] == "int8-static":
            assert 'pip install "m2dexport[nncf]"' in row[2]
        else:
            assert re.fullmatch(r"[\d.]+x", row[8])


def test_the_surface_has_every_vector_precision_at_every_depth(table) -> None:
    for depth in ("1 layer", "2 layers"):
        surface = rows(sections(table)[depth])
        built = [[w, v] for w in ("fp32", "int8") for v in ("float32", "ubinary")]
        assert [row[:2] for row in surface] == [*built, ["int8-static", "all"]]
        assert all(
            re.fullmatch(r"-?[\d.]+ / [\d.]+", cell) for row in surface[:4] for cell in row[2:]
        )


def test_bytes_and_the_floor_are_told(table) -> None:
    below = sections(table)
    assert rows(below["Bytes per vector"]) == [["float32", "128", "256"], ["ubinary", "4", "8"]]
    told = re.findall(r"- (\d layers?): (pass|miss); STS ", below["The floor of int8"])
    assert [depth for depth, _ in told] == ["1 layer", "2 layers"]


def test_an_unknown_precision_is_refused_before_any_work(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("bench_quantization", "--vectors", "int3")
    assert stopped.value.code == 2
    assert "--vectors int3 is not among float32, int8" in capsys.readouterr().err


def test_the_schema_that_ships_is_what_its_tool_writes(capsys) -> None:
    run("make_schema")
    shipped = ROOT / "m2dexport" / "data" / "profile.schema.json"
    assert capsys.readouterr().out == shipped.read_text(encoding="utf-8")


def test_the_calibration_texts_that_ship_are_what_their_tool_writes(capsys) -> None:
    run("make_calibration")
    assert tuple(capsys.readouterr().out.splitlines()) == calibration_texts()


def test_the_golden_codes_are_what_their_tool_writes(tmp_path: Path) -> None:
    run("make_codec_golden", "--out", tmp_path / "codecs.json")
    written, golden = (
        json.loads(path.read_text(encoding="utf-8"))
        for path in (tmp_path / "codecs.json", GOLDEN / "codecs.json")
    )
    assert written["cases"] == golden["cases"]


def test_the_readme_gets_the_reference_the_choice_and_the_best_int8_cells(tmp_path: Path) -> None:
    cells = [
        cell(6, 384),
        cell(6, 128, "int8", vectors="int8", quality=79.0, bytes_per_vector=128),
        cell(6, 64, "int8", vectors="int8", quality=70.0),
        cell(2, 64, "int8", vectors="ubinary", quality=60.0),
        cell(2, 64, "fp16", vectors="int8", quality=75.0),
    ]
    write_profile(profile(*cells), tmp_path / "profile.json")
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- profile -->\nold\n<!-- end of profile -->\nbelow\n")
    run("readme_profile", tmp_path / "profile.json", "--readme", readme)
    text = readme.read_text(encoding="utf-8")
    assert [row[0] for row in rows(text)] == [cells[i].id for i in (0, 1, 3)]
    assert "old" not in text
    assert text.startswith("above\n<!-- profile -->\n")
    assert text.endswith("\n<!-- end of profile -->\nbelow\n")


def test_the_readme_tells_the_threads_of_the_transformers_and_the_best_of_aligned_cells(
    tmp_path: Path,
) -> None:
    many = {"provider": "CPU", "threads": 64, "spin_us": 0, "workers": 1}
    values = {"vectors": "int8", "align": "full", "bytes_per_vector": 64}
    cells = [
        cell(0, 64, "int8", quality=50.0, engine="static", device=many, **values),
        cell(6, 384, quality=90.0),
        cell(2, 64, "int8", vectors="int8", quality=60.0),
        cell(2, 64, "int8", quality=70.0, **values),
    ]
    measured = profile(*cells, targets=[target(cells[1], "local")])
    write_profile(measured, tmp_path / "profile.json")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- profile -->\n")
    run("readme_profile", tmp_path / "profile.json", "--readme", readme)
    text = readme.read_text(encoding="utf-8")
    assert [row[0] for row in rows(text)] == [cells[i].id for i in (1, 3, 0)]
    assert "a processor, up to 2 threads" in text


def test_vectors_are_compared_in_three_tables(small, tasks, tmp_path, capsys) -> None:
    texts = tmp_path / "texts.txt"  # product quantization is trained on 256 or more
    texts.write_text("\n".join(calibration_texts()[:260]), encoding="utf-8")
    evaluated = [part for task in tasks for part in ("--eval", task)]
    cut = ("--layers", 1, "--dims", 32, "--calibration", texts)
    run("bench_vectors", "--model", small("bert"), *cut, *evaluated)
    tables = capsys.readouterr().out.split("\n\n")
    ways = [row[1] for row in rows(tables[0])]
    assert ways[:5] == ["float32", "int8", "int8-symmetric", "int4", "ubinary"]
    assert [row[1] for row in rows(tables[1])] == ["ubinary", "int4", "int8", "float32"]
    assert rows(tables[2])[0][1] == "nothing"
    assert "260 calibration texts" in tables[3]


def test_search_finds_all_with_exact_vectors_and_most_with_rescored_ones(capsys) -> None:
    run("bench_search", "--sizes", 3000, "--dim", 32, "--rounds", 1)
    found = {row[0]: (int(row[1]), float(row[2])) for row in rows(capsys.readouterr().out)}
    assert found["float32, exact"] == (128, 1.0)
    assert found["ubinary"][0] == 4
    assert found["ubinary"][1] < found["ubinary, x10 rescored by float32"][1] <= 1


def test_the_cost_of_a_surface_is_a_ratio_to_encoding_the_texts_once(small, capsys) -> None:
    run("bench_sweep", "--model", small("bert"), "--texts", 40, "--weights", "fp32", "--threads", 1)
    page = capsys.readouterr().out
    assert "texts, " in page
    assert [row[:2] for row in rows(page)] == [["fp32", "onnx"], ["fp32", "openvino"]]
    assert all(float(row[8]) > 0 and int(row[10]) > 0 for row in rows(page))


def test_a_pruned_vocabulary_is_measured_beside_the_whole_one(small, tasks, capsys) -> None:
    cut = ("--eval", tasks[0], "--sizes", 150, "--cells", "1x32")
    run("bench_vocabulary", "--model", small("bert"), *cut)
    found = rows(capsys.readouterr().out)
    whole = open_checkpoint(small("bert")).vocab_size
    assert [row[0] for row in found] == [str(whole), "150"]
    assert [row[1] for row in found] == ["(1, 32)"] * 2


def test_a_checkpoint_to_ship_is_pruned_measured_and_described(small, tasks, tmp_path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a cat sat on the mat\n", encoding="utf-8")
    given = ("--source", small("bert"), "--calibration", texts, "--sts-test", tasks[0])
    run("make_default_checkpoint", *given, "--size", 150, "--out", tmp_path / "out")
    made = open_checkpoint(tmp_path / "out")
    assert (made.layers, made.dim, made.vocab_size) == (2, 64, 150)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "pruned from 200 to 150 pieces" in card
    assert {"LICENSE", "NOTICE"} <= {path.name for path in made.licenses}


def test_ceilings_count_the_operations_of_a_graph_and_the_time_of_its_operators(
    small, capsys
) -> None:
    batch, length = 2, 5
    asked = ("--layers", 1, "--shapes", f"{batch}x{length}", "--threads", 1, "--squares", 64)
    run("ceilings", "--model", small("bert"), *asked, "--rounds", 1)
    below = sections(capsys.readouterr().out)
    config = json.loads((small("bert") / "config.json").read_text(encoding="utf-8"))
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    tokens = batch * length
    weights = 2 * tokens * (4 * hidden * hidden + 2 * hidden * ffn)
    attention = 4 * tokens * length * hidden
    floors = rows(below["Time over the floor"])
    assert [row[0] for row in floors] == [f"1 layer, {w}, 2x5, 1 thread" for w in ("fp32", "int8")]
    assert floors[0][1:3] == [f"{(weights + attention) / 1e6:.2f}", "0.00"]
    assert floors[1][2] == f"{weights / 1e6:.2f}"
    ceilings = rows(below["Ceilings"])
    assert {row[0] for row in ceilings} == {"fp32", "int8", "copy"}
    assert {row[2] for row in ceilings} == {"onnxruntime", "torch", "numpy"}
    operators = rows(below["Time by operator"].split("int8, 2x5")[1])
    assert dict(row[:2] for row in operators)["MatMulIntegerToFloat"] == "6"
    assert sum(float(row[3].rstrip("%")) for row in operators) == pytest.approx(100, abs=2)


def test_peers_are_timed_beside_torch_and_one_that_cannot_run_says_why(
    small, tasks, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.syspath_prepend(TOOLS)
    from peers.processes import ENVIRONMENTS

    broken = tmp_path / "env" / "onnx"  # an environment that is there, and lacks everything
    (broken / "bin").mkdir(parents=True)
    made_of = (f"torch=={version('torch').partition('+')[0]}", *ENVIRONMENTS["onnx"])
    (broken / "made-of.txt").write_text("\n".join(made_of), encoding="utf-8")
    python = broken / "bin" / "python"
    python.write_text("#!/bin/sh\necho 'No module named fastembed' >&2\nexit 1\n")
    python.chmod(0o755)
    asked = ("--layers", 1, "--sts", tasks[0], "--peers", "fastembed", "--env", tmp_path / "env")
    run("bench_peers", "--model", small("bert"), *asked, "--rounds", 1)
    below = sections(capsys.readouterr().out)
    torch, int8, fp32, fastembed = rows(below["1 layer"])
    assert torch[0] == "sentence-transformers torch"
    assert {*torch[2:7:2]} == {"1.00x"}
    assert torch[7] == fp32[7] == "1.0000 / 1.0000"
    assert int8[0] == "m2dexport int8"
    assert int8[8] == fp32[8] == "1.000000"
    assert fastembed[:2] == ["fastembed fp32", "No module named fastembed"]
    assert "m2dexport int8 against the best peer: one text " in below["1 layer"]
    versions = dict(row[:2] for row in rows(below["Versions"]))
    assert f"sentence-transformers {version('sentence-transformers')}" in versions[torch[0]]
    assert "torch" not in versions[int8[0]]  # a device does without it


def test_the_gpu_bench_compares_every_candidate_and_says_what_this_machine_lacks(
    small, tmp_path: Path
) -> None:
    out = tmp_path / "gpu.md"
    run(
        "bench_gpu",
        *("--model", small("bert"), "--device", "cpu"),
        *("--weights", "fp32,int8", "--shapes", "2x8", "--rounds", 1),
        "--out",
        out,
    )
    found = {name: cells for name, *cells in rows(sections(out.read_text())["2 layers"])}
    assert found["sentence-transformers fp16"][0].endswith(", 1.00x")
    typed = "onnxruntime fp16, TensorRT's graph"
    for name in ("sentence-transformers bf16", "onnxruntime fp32", typed):
        assert float(found[name][-1]) > 0.99
    assert "needs a GPU" in found["tensorrt-rtx int8"][0]


def test_tensorrt_engines_are_built_of_every_depth_and_compared_with_float32(
    small, tasks, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    out = tmp_path / "tensorrt.md"
    run(
        *("bench_tensorrt", "--model", small("bert"), "--weights", "fp16,int8-weight-only"),
        *("--layers", "1,2", "--sts", tasks[0], "--out", out),
    )
    found = rows(out.read_text())
    assert [row[:2] for row in found] == [
        [n, w] for n in "12" for w in ("fp16", "int8-weight-only")
    ]
    assert all(float(row[3]) > 0 and float(row[5].split(" / ")[1]) > 0.99 for row in found)


def test_nested_bundles_are_compared_with_separate_ones(tmp_path: Path) -> None:
    artifacts = [
        tiny_artifact(tmp_path / str(layers), replace(tiny_spec(), layers=layers))
        for layers in (1, 2)
    ]
    run("bench_nested", *artifacts, "--rounds", 1, "--out", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    for named in ("| load 2x12-fp32-float32 |", "| switch to a cell", "| and 1x12-fp32-float32 |"):
        assert named in page


def test_a_server_is_loaded_by_every_number_of_clients_and_stopped_without_a_loss(
    tmp_path, capsys
) -> None:
    artifact = tiny_artifact(tmp_path / "artifact")
    quick = ("--seconds", 0.1, "--rounds", 1, "--threads", 1)
    run("bench_serve", artifact, "--clients", "1,4", *quick)
    text = capsys.readouterr().out
    found = rows(text)
    assert [row[0] for row in found] == ["none, encode", "1", "4"]
    assert found[1][2] == "1.00x"
    assert all(float(cell) > 0 for row in found for cell in (row[1], *row[3:]))
    assert re.search(r"with 4 clients at work: \d+ requests answered, 0 lost, exit status 0", text)
