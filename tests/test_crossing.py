"""Which depths are measured, plain and aligned, and queries of each against documents of each."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from command_line import m2d
from tiny import tiny_checkpoint

from m2dexport.align.fit import Fit, Fitting
from m2dexport.build.aligned import build_aligned
from m2dexport.build.recipe import Recipe
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.cli.cell_tables import View, print_cells, print_cross_depth
from m2dexport.data import align_texts_path, calibration_texts, read_texts
from m2dexport.engines import Device
from m2dexport.errors import UsageError
from m2dexport.profile.plan import Plan, require_plan
from m2dexport.profile.schema import Profile
from m2dexport.profile.sweep import profile_checkpoint
from m2dexport.slice.slicing import Cut, slice_checkpoint
from m2dexport.vectors.retrieval import RetrievalTask

CALIBRATION = calibration_texts()[:120]
TEXTS = read_texts(align_texts_path())
DOCUMENTS = TEXTS[1::40]
TASK = RetrievalTask(
    "few",
    tuple(" ".join(text.split()[::2]) for text in DOCUMENTS),
    DOCUMENTS,
    tuple({row: 1.0} for row in range(len(DOCUMENTS))),
    "0" * 64,
)
PLAN = Plan(
    layers=(0, 1, 2),
    dims=(32, 128),
    weights=("fp32", "int8"),
    vectors=("float32",),
    shapes=((1, 8),),
    device=Device(threads=1),
    repeats=3,
    align_texts=TEXTS[::6],
)

pytestmark = pytest.mark.usefixtures("unmeasured_memory")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    return tiny_checkpoint(tmp_path_factory.mktemp("crossing") / "model", config=config)


@pytest.fixture(scope="module")
def profile(model: Path) -> Profile:
    """A profile in which depth 1 cannot be aligned at 128 dims."""
    fit = Fitting.fit

    def refusing(fitting: Fitting, depth: int, dim: int) -> Fit:
        if (depth, dim) == (1, 128):
            raise UsageError("315 texts do not align depth 1 at 128 dims.")
        return fit(fitting, depth, dim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fitting, "fit", refusing)
        return profile_checkpoint(open_checkpoint(model), [TASK], CALIBRATION, PLAN)


def test_a_depth_that_cannot_be_aligned_at_a_dim_fails_there_alone(profile, capsys) -> None:
    names = [f"1x128-aligned-{weights}-float32" for weights in ("fp32", "int8")]
    failures = {cell: failure for failure in profile.failures for cell in failure.cells}
    assert list(failures) == names
    assert {failure.reason for failure in failures.values()} == {
        "315 texts do not align depth 1 at 128 dims."
    }
    expected = [(0, "full"), (1, "none"), (1, "full"), (2, "none")]
    measured = {(cell.layers, cell.align, cell.dim, cell.weights) for cell in profile.cells}
    assert measured == {
        (*kind, dim, weights)
        for kind, dim, weights in product(expected, PLAN.dims, PLAN.weights)
        if (*kind, dim) != (1, "full", 128)
    }
    print_cells(profile, View())
    assert "Failed, 2 cells: 315 texts do not align depth 1" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"1x128-aligned-int8-float32 failed when measured: 315"):
        profile.cell(names[1])


def test_beside_a_failed_dim_a_cell_promises_what_its_artifact_keeps(
    profile: Profile, model: Path, tmp_path: Path
) -> None:
    recipe = Recipe(calibration=CALIBRATION, align_texts=PLAN.align_texts)
    folder = build_aligned(open_checkpoint(model), 1, 32, tmp_path / "a", recipe).path
    deployed = sum((folder / name).stat().st_size for name in ("model.onnx", "tokenizer.json"))
    cell = profile.cell("1x32-aligned-fp32-float32")
    assert cell.size_bytes == pytest.approx(deployed, rel=0.001)


def test_queries_of_every_depth_meet_documents_of_every_depth(profile: Profile) -> None:
    names = {32: ("0-aligned", "1", "1-aligned", "2"), 128: ("0-aligned", "1", "2")}
    found = {(each.dim, each.queries, each.documents): each.quality for each in profile.cross_depth}
    assert len(found) == len(profile.cross_depth)
    assert set(found) == {(d, *pair) for d in PLAN.dims for pair in product(names[d], repeat=2)}


def test_a_depth_against_itself_and_against_the_full_one_is_what_its_cells_say(
    profile: Profile,
) -> None:
    found = {(each.dim, each.queries, each.documents): each.quality for each in profile.cross_depth}
    cells = [cell for cell in profile.cells if cell.weights == "fp32"]
    assert len(cells) == 7
    for cell in cells:
        name = f"{cell.layers}-aligned" if cell.align == "full" else str(cell.layers)
        own = found[cell.dim, name, name]
        assert own == pytest.approx({metric: cell.quality[metric] for metric in own})
        if cell.layers < 2:
            on_index = cell.as_query[f"2x{cell.dim}-fp32-float32"]
            assert found[cell.dim, name, "2"] == pytest.approx(dict(on_index))


def test_the_table_of_queries_has_a_dash_where_a_depth_failed_and_names_the_weights(
    profile: Profile, capsys
) -> None:
    print_cross_depth(profile)
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == (
        "Queries of each depth on an index of depth 2, few/ndcg@10, fp32 weights, float32 vectors:"
    )
    assert next(row.split() for row in rows if row.startswith("1-aligned"))[2] == "-"
    reference = profile.cell("2x128-int8-float32").id
    here = profile.target().model_copy(update={"reference": reference})
    print_cross_depth(profile.model_copy(update={"targets": (here,)}))
    assert "few/ndcg@10, int8 weights, float32 vectors:" in capsys.readouterr().out


def test_a_grid_without_the_full_depth_has_aligned_cells_no_index_and_the_reference(
    model: Path,
) -> None:
    plan = replace(PLAN, layers=(0, 1), dims=(32,), weights=("fp32",))
    found = profile_checkpoint(open_checkpoint(model), [TASK], CALIBRATION, plan)
    assert [cell.id for cell in found.cells] == [
        "2x128-fp32-float32",
        "0x32-aligned-fp32-float32",
        "1x32-fp32-float32",
        "1x32-aligned-fp32-float32",
    ]
    assert "reference" in found.reference_cell().flags
    assert [cell.id for cell in found.cells if "reference" in cell.flags] == [found.cells[0].id]
    assert all(not cell.as_query for cell in found.cells)


@pytest.mark.parametrize(
    ("align", "kinds"),
    [
        (("none", "full"), "0a 1 1a 2 2a 3"),
        (("full", "none"), "0a 1a 1 2a 2 3"),
        (("none",), "1 2 3"),
    ],
)
def test_a_plan_has_plain_and_aligned_depths_as_align_says(align, kinds: str) -> None:
    plan = Plan((0, 1, 2, 3), (32,), align=align)
    found = [(layers, each) for layers in plan.layers for each in plan.alignments(layers, 3)]
    assert " ".join(f"{n}{'a' if each == 'full' else ''}" for n, each in found) == kinds
    assert plan.aligned(3) == ((0, 1, 2) if "full" in align else ())
    assert plan.depths == (1, 2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"align": ("full",)}, 'align must hold "none"'),
        ({"layers": (0,)}, "depth 0 is measured beside others; name a depth of 1 or more"),
        ({"layers": (-1, 1)}, "the checkpoint has 0 to 2 layers, not -1"),
    ],
)
def test_a_plan_that_compares_with_nothing_is_refused(model: Path, changes, message) -> None:
    with pytest.raises(UsageError, match=message):
        require_plan(open_checkpoint(model), replace(PLAN, **changes), [TASK])


@pytest.mark.parametrize("layers", [0, 1])
def test_what_was_made_for_one_depth_is_not_profiled(model: Path, tmp_path, layers: int) -> None:
    cut = Cut(align=PLAN.align_texts)
    sliced = slice_checkpoint(open_checkpoint(model), layers, 32, tmp_path / "one", cut)
    with pytest.raises(UsageError, match="was made for one depth; profile the checkpoint"):
        require_plan(sliced, replace(PLAN, layers=(layers,), dims=(32,)), [TASK])


def test_too_few_texts_to_align_on_are_an_error_of_the_whole_command(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "few.txt").write_text("\n".join(TEXTS[:60]), encoding="utf-8")
    (tmp_path / "pairs.tsv").write_text("1\ta cat\tcats\n2\tdogs\ta dog\n", encoding="utf-8")
    result = m2d(
        *("profile", "--model", model, "--eval", tmp_path / "pairs.tsv"),
        *("--align-texts", tmp_path / "few.txt", "--out", tmp_path / "p"),
    )
    assert (result.exit_code, result.stdout) == (2, "")
    sentences = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(sentences) == 1
    assert "60 different texts are too few to align a depth" in sentences[0]
    assert not (tmp_path / "p").exists()


def test_texts_to_align_on_are_looked_for_before_the_work(model: Path, tmp_path: Path) -> None:
    missing = ("--align-texts", tmp_path / "missing.txt", "--out", tmp_path / "p")
    result = m2d("profile", "--model", model, *missing)
    assert result.exit_code == 2
    assert "missing.txt is not a file" in result.stderr
