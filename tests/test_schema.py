"""profile.json: read back as written, and described by the schema that ships."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
from command_line import m2d
from tiny_profile import cell, profile

import m2dexport
from m2dexport.errors import UsageError
from m2dexport.profile.intervals import interval_of, replicates_of
from m2dexport.profile.manifest import profile_schema, read_profile, write_profile
from m2dexport.vectors.resample import REPLICATES, Score, mean_of

SCHEMA = Path(m2dexport.__file__).parent / "data" / "profile.schema.json"


def test_a_profile_is_read_back_as_written(tmp_path: Path) -> None:
    written = profile(cell(6, p50_ms=1.25), cell(2, flags=("untrained",)))
    write_profile(written, tmp_path / "profile.json")
    assert read_profile(tmp_path / "profile.json") == written


def test_floats_have_six_digits_and_keys_are_sorted(tmp_path: Path) -> None:
    write_profile(profile(cell(p50_ms=1.23456789)), tmp_path / "profile.json")
    text = (tmp_path / "profile.json").read_text()
    assert '"p50_ms": 1.23457' in text
    stored = json.loads(text)
    assert list(stored) == sorted(stored)


def test_the_schema_that_ships_is_that_of_the_code_and_accepts_a_profile(tmp_path: Path) -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert schema == profile_schema(), "run: python tools/make_schema.py > " + str(SCHEMA)
    write_profile(profile(cell(6), cell(2)), tmp_path / "profile.json")
    stored = json.loads((tmp_path / "profile.json").read_text())
    jsonschema.validate(stored, schema)
    stored["cells"][0]["p50_ms"] = "fast"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(stored, schema)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "written by m2dexport 0.1.0, and this one, .*reads format 6: upgrade m2"),
        ({"format": 5}, "has format 5; this version reads format 6: profile again"),
        ({"format": "5"}, "is not a profile; name the profile.json"),
        ({"cells": []}, "holds no cells"),
        ({"targets": [{}]}, r"is not a profile: targets\.0\.name"),
        ({"extra": 1}, "is not a profile: extra"),
    ],
)
def test_a_wrong_profile_is_refused_by_name(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "profile.json"
    write_profile(profile(cell()), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match=message):
        read_profile(path)


def test_what_is_rounded_when_it_is_written_contradicts_nothing(tmp_path: Path) -> None:
    """In six digits, neither means nor replicates nor their intervals are quite what they were."""
    random = np.random.default_rng(0)
    names = ["sts", *(f"task-{n}" for n in range(6))]
    cells = []
    for number in range(20):
        spread = float(10.0 ** random.integers(-5, 2))
        scores = {
            f"{name}/spearman": Score(points, points + random.normal(scale=spread, size=REPLICATES))
            for name, points in zip(names, random.uniform(-30, 100, 7).tolist(), strict=True)
        }
        mean = mean_of(list(scores.values()))
        made = cell(
            *(number, 64),
            mean_quality=mean.points,
            mean_interval=interval_of(mean),
            replicates={name: replicates_of(score) for name, score in scores.items()},
            intervals={name: interval_of(score) for name, score in scores.items()},
        )
        quality = {name: score.points for name, score in scores.items()}
        cells.append(made.model_copy(update={"quality": quality}))
    (task,) = profile(cells[0]).tasks
    tasks = tuple(task.model_copy(update={"name": name}) for name in names)
    write_profile(profile(*cells).model_copy(update={"tasks": tasks}), tmp_path / "profile.json")
    assert len(read_profile(tmp_path / "profile.json").cells) == 20


def changed(value: Any, *path: Any) -> dict[str, Any]:
    """Return a stored profile of two cells with one value replaced; ``path`` leads to it."""
    stored = json.loads(profile(cell(6), cell(2)).model_dump_json())
    *way, last = path
    part = stored
    for step in way:
        part = part[step]
    part[last] = value
    return stored


HUGE = 10**400
CELL = ("cells", 1)
FIRST = (*CELL, "latency", 0)
CODES = (*CELL, "replicates", "sts/spearman", "codes")
SAMPLE = {
    **{"cell": "x", "p50_ms": 2, "shared_p50_ms": 1},
    "ratio_interval": {"low": 0.9, "high": 1.1},
}
TOLD = ("targets", 0, "recommended")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ((*CELL, "p50_ms"), -1, r"cells\.1\.p50_ms: Input should be greater"),
        ((*CELL, "size_bytes"), 0, r"cells\.1\.size_bytes: Input"),
        ((*CELL, "size_bytes"), HUGE, r"cells\.1\.size_bytes: "),
        ((*CELL, "peak_memory_bytes"), HUGE, "peak_memory_bytes: "),
        ((*CELL, "bytes_per_vector"), HUGE, "bytes_per_vector: "),
        ((*CELL, "ratio_interval", "low"), 0, "ratio_interval: should lie within 1e-06"),
        ((*CELL, "loss_interval", "low"), 99, "loss_interval: low should not be above high"),
        ((*CELL, "replicates", "sts/spearman", "scale"), 1e308, "scale: Input"),
        ((*CELL, "latency"), [], "latency: "),
        ((*FIRST, "sequence"), 512, "first timed at 1x512 tokens, and its target local at 1x16"),
        ((*FIRST, "p50_interval", "low"), 0, "p50_interval: should lie within 1e-06"),
        (CODES, "nope!", "codes: should be base64"),
        (CODES, "", "has 0 replicates of sts/spearman, not 256"),
        (CODES, "AAAA", "has 3 replicates of sts/spearman, not 256"),
        ((*CELL, "quality"), {"sts/pearson": 1}, "2x64-fp32-float32 of local has no sts/spearman"),
        ((*CELL, "quality", "\x1b"), 1, r"'\\x1b' is no metric"),
        ((*CELL, "query_replicates", "x"), {"r/m": {"scale": 0, "codes": ""}}, "without the figu"),
        ((*CELL, "target"), "edge", "is of the target edge, which is not there"),
        ((*CELL, "layers"), 6, "the cell 6x64-fp32-float32 has the id '2x64-fp32-float32'"),
        (
            (*CELL, "mean_quality"),
            80.01,
            "has a mean of 80.01 points, where that of its tasks is 80",
        ),
        (
            (*CELL, "quality", "sts/spearman"),
            99,
            "mean of 80 points, where that of its tasks is 99",
        ),
        (
            (*CELL, "mean_interval", "low"),
            70,
            "mean from 70 to 80, where its replicates have 80 to",
        ),
        ((*CELL, "mean_interval", "high"), 79, "mean_interval: low should not be above high"),
        ((*CELL, "mean_interval"), {"low": 1, "high": 2}, "interval of 'mean' without the figure"),
        ((*CELL, "intervals", "sts/x"), {"low": 1, "high": 2}, "interval of 'sts/x' without the"),
        ((*CELL, "ratio"), 0.5, "has an interval of 'ratio' without the figure in it"),
        ((*CELL, "p50_ms"), 0.5, "latency of the cell 2x64-fp32-float32 is not that of its first"),
        ((*CELL, "p95_ms"), 0.5, "latency of the cell 2x64-fp32-float32 is not that of its first"),
        ((*CELL, "bytes_per_vector"), 64, "has 64 bytes per vector, not 256"),
        (("tasks",), [], "tasks: "),
        (("targets", 0, "shapes"), [], "shapes: "),
        (("targets", 0, "name"), "a\x1b[31m", "targets.0.name: should be a name that can be print"),
        (("targets", 0, "name"), "", "targets.0.name: should be"),
        (("tasks", 0, "name"), "a\nb", "tasks.0.name: should be a name"),
        (("targets", 0, "reference"), "9x9", "target local names the cell '9x9', which is not th"),
        ((*TOLD, "smallest"), "9x9", "target local names the cell '9x9', which is not there"),
        ((*TOLD, "within_budget"), "9x9", "target local names the cell '9x9', which is not there"),
        (("targets", 0, "engines"), ["openvino"], "local has no cell of its engine openvino"),
        (("targets", 0, "samples"), [SAMPLE], "sample 'x' has an interval without its ratio, 2"),
        (("targets", 0, "budget"), {"p50_ms": -1}, "budget of the target local is none: "),
        (("shard",), "1/99999999999", "shard: should be a shard such as 1/2"),
        (("shard",), "0/0", "shard: should be a shard such as 1/2"),
        (("shard",), "3/2", "shard: should be a shard such as 1/2"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_read(tmp_path, path, value, message: str) -> None:
    name = tmp_path / "profile.json"
    name.write_text(json.dumps(changed(value, *path)))
    with pytest.raises(
        UsageError, match=r"profile\.json is not a profile: .*" + message
    ) as refused:
        read_profile(name)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("part", ["cells", "tasks", "targets"])
def test_what_is_there_twice_is_refused(tmp_path: Path, part: str) -> None:
    stored = changed(None, "shard")
    stored[part].append(stored[part][0])
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(stored))
    with pytest.raises(UsageError, match=rf"is not a profile: the {part[:-1]} .* twice"):
        read_profile(path)


def test_what_is_no_profile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "text.json").write_text("not json")
    (tmp_path / "artifact.json").write_text('{"format": 4, "engine": "onnx"}')
    for name in ("missing.json", "list.json", "text.json", "artifact.json"):
        with pytest.raises(UsageError, match=name):
            read_profile(tmp_path / name)


@pytest.mark.parametrize("keep", [0, 1, 0.5, 0.99])
def test_a_profile_that_is_cut_short_is_refused_as_that(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "profile.json"
    write_profile(profile(cell()), path)
    text = path.read_text()
    path.write_text(text[: keep if isinstance(keep, int) else int(len(text) * keep)])
    with pytest.raises(UsageError, match=r"profile\.json ends in the middle; copy"):
        read_profile(path)


HOSTILE = "a\x1b[2J\u202eb\nzebra"  # clears the screen, turns what follows around, ends the line


def texts_in(value: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every text of a JSON value, which is no text itself."""
    steps = value.items() if isinstance(value, dict) else enumerate(value)
    for step, each in steps:
        if isinstance(each, str):
            yield *path, step
        elif isinstance(each, dict | list):
            yield from texts_in(each, *path, step)


def everything() -> dict[str, Any]:
    """Return a stored profile in which every text that may be null is there."""
    machine = {"governor": "powersave", "virtualisation": "kvm", "gpu": "an H100"}
    noise = {"verdict": "noisy", "reasons": ["It was."], "spread": 1, "drift": 1}
    failed = {"engine": "onnx", "layers": 4, "align": "none", "weights": "int8", "reason": "It is."}
    whole = profile(cell(6), cell(2), failures=[{**failed, "cells": ["4x64-int8-float32"]}])
    stored = json.loads(whole.model_dump_json())
    stored["checkpoint"] |= {"model": "mine", "pooling": "mean"}
    stored["targets"][0]["machine"] |= machine
    stored["targets"][0]["noise"] = {**noise, "stolen": None, "busy": None}
    stored["targets"][0]["budget"] = {"p95_ms": 5.0, "metric": "sts/spearman"}
    return stored


def test_no_text_of_a_profile_from_elsewhere_reaches_the_terminal_as_it_is(tmp_path: Path) -> None:
    plain, name = tmp_path / "plain.json", tmp_path / "hostile.json"
    plain.write_text(json.dumps(everything()))
    read = 0
    for *way, last in texts_in(everything()):
        stored = part = everything()
        for step in way:
            part = part[step]
        part[last] = HOSTILE
        name.write_text(json.dumps(stored))
        for asked in (
            ("profile", "show", name, "--all"),
            ("profile", "show", name, "--json"),
            ("profile", "diff", plain, name),
            ("profile", "merge", name, "--out", tmp_path / "merged.json", "--force"),
            ("select", name, "--p95-ms", 5),
            ("check", name, "--baseline", plain, "--junit", tmp_path / "j.xml", "--github"),
        ):
            result = m2d(*asked)
            assert all(c.isprintable() for c in result.output.replace("\n", "")), (way, last, asked)
            assert "\nzebra" not in result.output, (way, last, asked)
            read += result.exit_code == 0
        if asked[0] == "check" and result.exit_code < 2:
            ElementTree.parse(tmp_path / "j.xml")
    assert read > 100


def test_an_unknown_cell_is_answered_with_what_there_is() -> None:
    with pytest.raises(UsageError, match="no cell '9x9'; it has 2x64-fp32-float32"):
        profile(cell()).cell("9x9")
    grid = product((6, 2), (128, 64), ("fp32", "int8-weight-only"), ("float32", "int8-symmetric"))
    whole = profile(*(cell(n, d, w, vectors=v) for n, d, w, v in grid))
    with pytest.raises(UsageError, match="no cell '6x128-fp32'; name one that it has, such as 6x"):
        whole.cell("6x128-fp32")
    with pytest.raises(UsageError) as far:
        whole.cell("best")
    assert str(far.value) == (
        "the profile has no cell 'best'; ids look like 6x128-fp32-float32, and it has layers 2, 6; "
        "dims 64, 128; weights fp32, int8-weight-only; vectors float32, int8-symmetric."
    )
