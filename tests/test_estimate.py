"""The estimate that ``profile`` prints: what has no text and no round in it counts, too."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from m2dexport.engines import Device
from m2dexport.profile import estimate
from m2dexport.profile.grid import passes_of
from m2dexport.profile.plan import Plan

#: Of the checkpoint that ships on two cores of an AMD EPYC: 1,107 texts in 3 s.
SPEED = estimate._Speed(text=0.0027, token=0.00018, single=0.004)


def minutes(monkeypatch: pytest.MonkeyPatch, speed: estimate._Speed, plan: Plan) -> list[float]:
    """Return the least and the most minutes that are said for 1,107 texts."""
    monkeypatch.setattr(estimate, "_speed", lambda *_: speed)
    basis: Any = SimpleNamespace(corpus=SimpleNamespace(ids=((1, 2),) * 1107))
    said = estimate.estimate(basis, passes_of([plan]), [plan])
    assert "1,107 texts in " in said
    return [float(each) for each in re.findall(r"[0-9.]+(?= to | minutes)", said)]


@pytest.mark.parametrize(("weights", "seconds"), [("fp32", 25.8), ("int8", 47.9)])
def test_a_sweep_of_one_cell_takes_as_long_as_was_said(monkeypatch, weights, seconds) -> None:
    """Measured from the estimate to the end: --layers 6 --dim 128 --weights W --vectors float32."""
    reference = (6, 384, "fp32", "float32")
    plan = Plan((6,), (128,), (weights,), ("float32",), device=Device(), reference=reference)
    least, most = minutes(monkeypatch, SPEED, plan)
    assert least <= seconds / 60 <= most


def test_a_model_that_takes_no_time_still_takes_a_report_and_a_process(monkeypatch) -> None:
    plan = Plan((6,), (128,), ("fp32",), ("float32",), device=Device())
    _, most = minutes(monkeypatch, estimate._Speed(0.0, 0.0, 0.0), plan)
    assert most > 0.1  # the least that is said


def test_a_pass_counts_the_layers_up_to_the_deepest_that_it_measures(monkeypatch) -> None:
    """In fp32 that is the reference's depth; int8 stops at the deepest that is asked for."""
    reference = (6, 384, "fp32", "float32")
    slow = estimate._Speed(text=1.0, token=0.0, single=0.0)
    said = {}
    for layers in (1, 6):
        for weights in ("fp32", "int8"):
            cell = (layers,), (64,), (weights,), ("float32",)
            plan = Plan(*cell, device=Device(), reference=reference)
            said[layers, weights] = minutes(monkeypatch, slow, plan)[1]
    assert said[1, "fp32"] == pytest.approx(said[6, "fp32"], rel=0.01)
    # 1,107 texts once more at the reference's depth, and the int8 pass at a sixth of it.
    quantized = {layers: said[layers, "int8"] - said[6, "fp32"] for layers in (1, 6)}
    assert quantized[6] / quantized[1] == pytest.approx(6, rel=0.02)
