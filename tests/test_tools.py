"""The tools: each explains itself, and the table of quantization has every row asked for."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from tiny import small_checkpoint

TOOLS = Path(__file__).parent.parent / "tools"


def run(tool: str, *arguments: object) -> None:
    """Run a tool as a user does, but in this process, which has torch loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"tools/{tool}.py", *map(str, arguments)])
        runpy.run_path(str(TOOLS / f"{tool}.py"), run_name="__main__")


@pytest.mark.parametrize("tool", sorted(path.stem for path in TOOLS.glob("*.py")))
def test_every_tool_explains_itself(tool, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(tool, "--help")
    assert not stopped.value.code
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Layers 1 and 2, two dims and two vector precisions; int8-static lacks its package."""
    folder = tmp_path_factory.mktemp("table")
    sts, retrieval, out = folder / "sts.tsv", folder / "retrieval", folder / "table.md"
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "nncf", None)
        run(
            "bench_quantization",
            *("--model", small_checkpoint(folder / "bert", "bert"), "--dims", "32,64"),
            *("--weights", "int8,int8-static", "--vectors", "float32,ubinary"),
            *("--sts", sts, "--retrieval", retrieval, "--rounds", 1, "--out", out),
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
