"""Settings: which are open on which device, and that the best are taken, recorded and carried."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from m2dexport.engines import SPIN_US, Device
from m2dexport.measure.latency import Candidate
from m2dexport.profile import settings
from m2dexport.profile.settings import choose_settings, settings_of

FOUR = 4


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2dexport.cores.usable_cores", lambda: FOUR)
    monkeypatch.setattr(settings, "usable_cores", lambda: FOUR)


def candidate(device: Device, engine: str = "onnx") -> Candidate:
    return Candidate({"graph": Path("graph")}, "portable", engine, device)


def found(device: Device, optimize: settings.Optimize, engine: str = "onnx") -> list[tuple]:
    settings = settings_of(candidate(device, engine), optimize)
    return [(each.threads, each.spin_us, each.workers) for each in settings]


def test_what_a_device_leaves_open_is_one_thread_or_all_asleep_or_spinning() -> None:
    assert found(Device(), "latency") == [(1, 0, 1), (4, 0, 1), (4, SPIN_US, 1)]
    assert found(Device(spin_us=50), "latency") == [(1, 0, 1), (4, 0, 1), (4, 50, 1)]
    assert found(Device(), "throughput") == [(1, 0, 4), (4, 0, 1), (4, SPIN_US, 1)]


def test_a_guest_never_spins_and_threads_that_are_named_are_fixed() -> None:
    assert found(Device(spin_us=0), "latency") == [(1, 0, 1), (4, 0, 1)]
    assert found(Device(threads=2), "latency") == [(2, 0, 1), (2, SPIN_US, 1)]
    assert found(Device(threads=2, spin_us=0), "throughput") == [(2, 0, 2)]
    assert found(Device(threads=1), "latency") == [(1, 0, 1)]


def test_openvino_does_not_spin_numpy_has_one_thread_and_no_other_provider_is_touched() -> None:
    assert found(Device(), "throughput", "openvino") == [(1, 0, 4), (4, 0, 1)]
    assert found(Device(), "throughput", "static") == [(1, 0, 1)]
    assert found(Device("CUDAExecutionProvider"), "throughput") == [(None, None, None)]


@pytest.mark.parametrize(
    ("milliseconds", "best"),
    [({1: 30, 4: 3}, 4), ({1: 3, 4: 30}, 1), ({1: 30, 4: 30}, 1)],
)
def test_the_fastest_settings_are_taken_or_as_fast_ones_that_free_cores(
    monkeypatch: pytest.MonkeyPatch, milliseconds: dict[int, int], best: int
) -> None:
    """What runs is made up, so that the outcome does not hang on the machine."""

    def loaded(graph: Candidate) -> settings.Run:
        def run(ids: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
            time.sleep(milliseconds[graph.device.threads or 0] / 1000)
            return [ids]

        return run

    monkeypatch.setattr(settings, "loaded", loaded)
    graphs = {"a": candidate(Device(spin_us=0)), "b": candidate(Device(threads=1))}
    chosen = choose_settings(graphs, "latency", (1, 8), 20)
    assert {name: device.threads for name, device in chosen.items()} == {"a": best, "b": 1}


def test_a_graph_that_does_not_load_is_left_to_be_recorded_as_failed(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    broken = Candidate({"model.onnx": tmp_path / "model.onnx"}, "portable", "onnx", Device())
    assert choose_settings({"a": broken}, "latency", (1, 8), 20)["a"].threads == 1
