"""Targets and budgets, as files and options give them."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.errors import UsageError
from m2dexport.profile.plan import plan_for
from m2dexport.profile.target import budget_from, load_target

SHIPPED = ("browser", "edge-cpu", "edge-openvino", "server-cpu", "server-gpu")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_target_is_valid_and_limits_something(name: str) -> None:
    target = load_target(name)
    assert target.description
    assert budget_from(name) == target.budget


def test_a_target_is_found_by_name_and_by_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('description = "x"\nengine = "onnx"\nprovider = "CPUExecutionProvider"\n')
    assert load_target(path).threads is None
    with pytest.raises(
        UsageError, match=r"those are: browser, edge-cpu, edge-openvino, rtx, server"
    ):
        load_target("edge")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("threds = 2", r"mine\.toml has an unknown key threds \(did you mean threads\?\); allowed"),
        ("[budget]\nsize = 2", r"unknown key budget\.size \(did you mean size_mb\?\); allowed are"),
        ("threads = 0", r"threads is 0; input should be greater than 0"),
        ('[grid]\nweights = ["int9"]', r"grid\.weights\.0 is 'int9'; input should be 'fp32'"),
        ("[latency]\nshapes = []", r"latency\.shapes is \[\]"),
        ("threads =", r"cannot be read as TOML"),
        ("threads = true", r"threads is True; input should be a valid integer"),
        ("threads = 2.0", r"threads is 2\.0; input should be a valid integer"),
        ("[budget]\np95_ms = true", r"budget\.p95_ms is True; input should be a valid number"),
        ("[budget]\np95_ms = inf", r"budget\.p95_ms is inf; input should be a finite number"),
        ("[budget]\nmin_quality = nan", r"budget\.min_quality is nan; input should be less than"),
        ("[grid]\nlayers = []", r"grid\.layers is \[\]; name at least one, or leave the key out"),
        ("[grid]\nweights = []", r"grid\.weights is \[\]; name at least one"),
        ("[grid]\ndims = [64, 64]", r"grid\.dims is \[64, 64\]; name each only once"),
        ("[grid]\nlayers = [true]", r"grid\.layers\.0 is True; input should be a valid integer"),
        (
            "[grid]\nlayers = [-1]",
            r"grid\.layers\.0 is -1; input should be greater than or equal to 0",
        ),
        ('[grid]\nalign = ["some"]', r"grid\.align\.0 is 'some'; input should be 'none' or 'full'"),
        ('[grid]\nalign = "full"', r"grid\.align is 'full'; input should be a valid tuple"),
        ("[grid]\nalign = []", r"grid\.align is \[\]; name at least one, or leave the key out"),
        ('[grid]\nalign = ["full", "full"]', r"grid\.align is .*; name each only once"),
        ("grid = 5", r"grid is 5; it should be a table"),
        (
            "[latency]\nshapes = [[1000000000, 1000000000]]",
            r"latency\.shapes\.0 is \[1000000000, 1000000000\]; batch times sequence may be 262144",
        ),
    ],
)
def test_a_wrong_target_is_named_by_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    head = 'description = "x"\nengine = "onnx"\nprovider = "CPUExecutionProvider"\n'
    path.write_text(head + text + "\n")
    with pytest.raises(UsageError, match=message):
        load_target(path)


def test_a_grid_may_hold_depth_0_and_say_which_depths_are_aligned(
    tmp_path: Path, bert: Path
) -> None:
    path = tmp_path / "mine.toml"
    head = 'description = "x"\nengine = "onnx"\n'
    path.write_text(head + '[grid]\nlayers = [0, 3]\nalign = ["none"]\n')
    target = load_target(path)
    assert (target.grid.layers, target.grid.align) == ((0, 3), ("none",))
    plan = plan_for(open_checkpoint(bert), target)
    assert (plan.layers, plan.align) == ((0, 3), ("none",))
    path.write_text(head)
    plan = plan_for(open_checkpoint(bert), load_target(path))
    assert (plan.layers, plan.align) == ((0, 1, 2, 3, 4), ("none", "full"))


def test_a_target_for_an_engine_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('description = "x"\nprovider = "y"\nengine = "onxx"\n')
    with pytest.raises(UsageError, match="engine is 'onxx'; choose from onnx, openvino"):
        load_target(path)


def test_a_file_that_is_not_a_target_is_refused_in_few_words(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    head = b'description = "x"\nprovider = "y"\n'
    for content, message in (
        (b"\xff\xfe", "is not UTF-8 text"),
        (head + b'engine = "onnx"\n' + b"k" * 100_000 + b" = 1\n", "has an unknown key kkk"),
        (head + b'engine = "' + b"e" * 100_000 + b'"\n', "engine is 'eee"),
        (b"x = " + b"[" * 100_000, "cannot be read as TOML: it is nested too deeply"),
        (b"threads = " + b"9" * 5_000, "cannot be read as TOML: .* integer string conversion"),
    ):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=message) as caught:
            load_target(path)
        assert len(str(caught.value)) < len(str(path)) + 400
    with pytest.raises(UsageError, match="not a regular file"):
        load_target(_folder(tmp_path / "folder.toml"))


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('description = "x"\nprovider = "y"\n')
    with pytest.raises(UsageError, match="lacks the key engine"):
        load_target(path)


def test_options_replace_the_limits_of_a_target() -> None:
    budget = budget_from("edge-cpu", p95_ms=3.0, size_mb=None)
    assert budget.p95_ms == 3.0
    assert budget.size_mb == load_target("edge-cpu").budget.size_mb


def test_a_budget_without_limits_is_refused() -> None:
    with pytest.raises(UsageError, match="no limit is given"):
        budget_from(None)
    with pytest.raises(UsageError, match="p95_ms is -1"):
        budget_from(None, p95_ms=-1)


def test_a_floor_of_zero_is_a_limit() -> None:
    assert budget_from(None, min_quality=0.0).min_quality == 0
