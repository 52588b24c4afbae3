"""What a profile is of, and what decides its figures: the same by content, another otherwise."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import TEXTS, edit_json

from m2dexport.checkpoint.open import Checkpoint, open_checkpoint
from m2dexport.engines import Device
from m2dexport.profile import basis
from m2dexport.profile.basis import Sweep
from m2dexport.profile.grid import dealt, passes_of
from m2dexport.profile.identity import model_sha256
from m2dexport.profile.plan import Plan, settled
from m2dexport.vectors.pairs import StsTask

TASK = StsTask("sts", TEXTS, TEXTS, tuple(range(len(TEXTS))), "a" * 64)
PLAN = Plan((0, 1, 2), (16, 32), device=Device(threads=1), align_texts=TEXTS)


@pytest.fixture
def folder(small: Callable[[str], Path]) -> Path:
    return small("bert")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The same checkpoint under another name."""
    return Path(shutil.copytree(folder, tmp_path / "another"))


def test_a_checkpoint_is_the_same_under_another_name_and_beside_other_files(folder, copy) -> None:
    edit_json(copy / "config.json", _name_or_path="x", transformers_version="9")
    cut = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    edit_json(copy / "tokenizer.json", padding=None, truncation=cut)
    (copy / "profile.json").write_text("{}")
    assert model_sha256(open_checkpoint(copy)) == model_sha256(open_checkpoint(folder))


def test_whatever_decides_a_vector_makes_another_checkpoint(folder: Path, copy: Path) -> None:
    found = open_checkpoint(folder)
    changed = [
        replace(found, prompts={"query": "q: "}),
        replace(found, max_length=found.max_length - 1),
        replace(found, pooling=replace(found.pooling, modes=("cls",))),
        replace(found, normalized=not found.normalized),
    ]
    hashes = [model_sha256(each) for each in (found, *changed)]
    edit_json(copy / "tokenizer.json", normalizer=None)
    hashes.append(model_sha256(open_checkpoint(copy)))
    edit_json(copy / "config.json", layer_norm_eps=1e-3)
    hashes.append(model_sha256(open_checkpoint(copy)))
    assert len(set(hashes)) == len(hashes)


def sweep(checkpoint: Checkpoint, plan: Plan, shard: tuple[int, int] | None = None) -> Sweep:
    plans = (settled(plan, checkpoint),)
    passes = passes_of(plans)
    kept = passes if shard is None else dealt(passes, shard)
    wanted = frozenset(name for each in passes for name in each.wanted)
    return Sweep(checkpoint, (TASK,), TEXTS, TEXTS, plans, kept, wanted, lambda *_: None)


def test_all_shards_of_a_sweep_are_decided_alike_wherever_they_run(folder, copy, tmp_path) -> None:
    (copy / "profile-1").mkdir()
    (copy / "profile-1" / "profile.json").write_text("{}")
    cached = replace(PLAN, device=replace(PLAN.device, cache=tmp_path))
    here = sweep(open_checkpoint(folder), PLAN, (1, 3))
    assert sweep(open_checkpoint(copy), cached, (2, 3)).decided_by() == here.decided_by()


def test_another_grid_thread_pooling_text_or_onnxruntime_decides_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = open_checkpoint(folder)
    whole = sweep(found, PLAN)
    pooled = replace(found, pooling=replace(found.pooling, modes=("cls",)))
    others = [
        sweep(found, replace(PLAN, layers=(1, 2))),
        sweep(found, replace(PLAN, dims=(32,))),
        sweep(found, replace(PLAN, device=Device(threads=2))),
        sweep(found, replace(PLAN, shapes=((1, 8),))),
        sweep(found, replace(PLAN, repeats=3)),
        sweep(pooled, PLAN),
        replace(whole, calibration=TEXTS[1:]),
        replace(whole, align_texts=TEXTS[1:]),
        replace(whole, tasks=(replace(TASK, sha256="b" * 64),)),
    ]
    hashes = [each.decided_by() for each in (whole, *others)]
    monkeypatch.setattr(basis, "tool_versions", lambda _: {"onnxruntime": "9"})
    hashes.append(sweep(found, PLAN).decided_by())
    assert len(set(hashes)) == len(hashes)
