"""Targets and budgets, as files and options give them."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2dexport.errors import UsageError
from m2dexport.profile.target import budget_from, load_target

SHIPPED = ("browser", "edge-cpu", "server-cpu", "server-gpu")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_target_is_valid_and_limits_something(name: str) -> None:
    target = load_target(name)
    assert target.description
    assert budget_from(name) == target.budget


def test_a_target_is_found_by_name_and_by_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('description = "x"\nengine = "onnx"\nprovider = "CPUExecutionProvider"\n')
    assert load_target(path).threads is None
    with pytest.raises(UsageError, match=r"those are: browser, edge-cpu, edge-openvino, server"):
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
    ],
)
def test_a_wrong_target_is_named_by_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    head = 'description = "x"\nengine = "onnx"\nprovider = "CPUExecutionProvider"\n'
    path.write_text(head + text + "\n")
    with pytest.raises(UsageError, match=message):
        load_target(path)


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
