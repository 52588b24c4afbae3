"""What is ONNX Runtime's own: providers that are not there or do not load, spinning, memory."""

from __future__ import annotations

import sys
from pathlib import Path

import onnxruntime as ort
import pytest
from click.testing import Result
from command_line import m2d
from tiny import TEXTS
from tiny_artifact import tiny_artifact, tiny_graph

from m2dexport.build.build import build_artifact
from m2dexport.build.recipe import Recipe
from m2dexport.checkpoint.open import open_checkpoint
from m2dexport.engines import SPIN_US, Device
from m2dexport.engines.onnxruntime import run
from m2dexport.errors import M2DError, UsageError
from m2dexport.runtime.loading import load
from m2dexport.vectors.codecs import cosines

CUDA = "CUDAExecutionProvider"
ELSEWHERE = ("CUDA", "CoreML", "QNN", "Tensorrt", "Xnnpack")
GRAPH = {"model.onnx": tiny_graph(12, "float32", None)}


@pytest.fixture
def with_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the provider's library, in an onnxruntime that seems to be built with CUDA."""
    providers = [CUDA, *ort.get_available_providers()]
    monkeypatch.setattr(ort, "get_available_providers", lambda: providers)
    monkeypatch.setattr(run, "_PROVIDERS", tmp_path / "capi")
    (tmp_path / "capi").mkdir()
    return tmp_path / "capi"


def refused(result: Result, code: int) -> str:
    """Return the one sentence with which a command failed."""
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    (sentence,) = result.stderr.splitlines()
    return sentence


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_target_with_a_provider_that_this_onnxruntime_lacks_is_refused_by_name(
    tmp_path: Path, name: str
) -> None:
    target, provider = tmp_path / "t.toml", f"{name}ExecutionProvider"
    target.write_text(f'description = "x"\nengine = "onnx"\nprovider = "{provider}"\n')
    out = tmp_path / "profile"
    sentence = refused(m2d("profile", "--target", target, "--out", out), 2)
    assert f"{provider} is not in this onnxruntime; it has " in sentence
    assert not out.exists()


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_provider_that_is_asked_for_and_lacking_is_refused_by_name(
    tmp_path: Path, name: str
) -> None:
    folder, provider = tiny_artifact(tmp_path / "artifact"), f"{name}ExecutionProvider"
    sentence = refused(m2d("encode", folder, "--provider", provider, stdin="a\n"), 2)
    assert f"{provider} is not in this onnxruntime; it has " in sentence


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_whose_library_does_not_load_is_refused_with_what_the_loader_says(
    tmp_path: Path, with_cuda: Path
) -> None:
    """onnxruntime itself would run on the CPU, and print why where nobody looks."""
    ending = {"win32": "dll", "darwin": "dylib"}.get(sys.platform, "so")
    library = with_cuda / f"libonnxruntime_providers_cuda.{ending}"
    library.write_bytes(b"no library")
    folder = tiny_artifact(tmp_path / "artifact")
    sentence = refused(m2d("encode", folder, "--provider", CUDA, stdin="a\n"), 1)
    assert f"{CUDA} did not load: " in sentence
    assert library.name in sentence


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_is_left_out_for_no_reason_is_refused_all_the_same(with_cuda: Path) -> None:
    with pytest.raises(M2DError, match=r"CUDA.* did not load: onnxruntime does not say why"):
        run.load(GRAPH, Device(CUDA), "portable")


def entries(device: Device) -> tuple[str, str]:
    """Return whether the threads of a session spin, and for how many microseconds."""
    options = run.session_options(device, "portable")
    spins = options.get_session_config_entry("session.intra_op.allow_spinning")
    try:
        return spins, options.get_session_config_entry("session.intra_op.spin_duration_us")
    except RuntimeError:  # there is no such entry
        return spins, ""


def test_threads_spin_as_long_as_the_device_says_and_no_longer(monkeypatch) -> None:
    monkeypatch.setattr(ort, "__version__", "1.26.0")
    assert entries(Device()) == ("1", str(SPIN_US))
    assert entries(Device(spin_us=30)) == ("1", "30")
    assert entries(Device(spin_us=0)) == ("0", "")
    with pytest.raises(UsageError, match="cannot spin for -1 microseconds; ask for 0 or more"):
        run.load(GRAPH, Device(spin_us=-1), "portable")


def test_threads_sleep_where_onnxruntime_knows_no_limit(monkeypatch) -> None:
    monkeypatch.setattr(ort, "__version__", "1.25.1")
    assert entries(Device(spin_us=30)) == ("0", "")


def test_a_session_does_not_keep_the_file_that_it_was_loaded_from() -> None:
    content = tiny_graph(12, "float32", None)
    before = sys.getrefcount(content)
    session = run.load({"model.onnx": content}, Device(), "portable")
    assert sys.getrefcount(content) == before
    assert run.describe(session)["provider"] == "CPUExecutionProvider"


def test_cuda_is_told_to_multiply_float32_in_float32(monkeypatch) -> None:
    monkeypatch.setattr(ort, "__version__", "1.18.0")
    assert run._provider_options(CUDA) == {"use_tf32": "0"}
    assert run._provider_options("CPUExecutionProvider") == {}
    monkeypatch.setattr(ort, "__version__", "1.17.3")
    assert run._provider_options(CUDA) == {}


def test_what_onnxruntime_prints_of_cuda_stays_out_of_the_output(monkeypatch, capsys) -> None:
    found: list[bool] = []

    def preload() -> None:
        found.append(True)
        sys.stdout.write("Failed to load libcublas.so")

    monkeypatch.setattr(ort, "preload_dlls", preload, raising=False)
    run._find_cuda(CUDA)
    run._find_cuda("CPUExecutionProvider")
    assert found == [True] and capsys.readouterr().out == ""


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8-weight-only", "int8"])
def test_cuda_gives_the_vectors_of_the_cpu(small, tmp_path: Path, weights) -> None:
    if CUDA not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no provider for CUDA")
    recipe = Recipe(weights=weights, min_coverage=0.0)  # of this model, most weights are small
    built = build_artifact(open_checkpoint(small("bert")), 2, 32, tmp_path / "a", recipe)
    on_gpu, on_cpu = (load(built.path, device).encode(TEXTS) for device in (Device(CUDA), Device()))
    # Kernels of integer weights differ: the CPU's also round what they multiply with.
    floor = {"int8": 0.99, "int8-weight-only": 0.9999}.get(weights, 0.999999)
    assert cosines(on_gpu, on_cpu).min() >= floor
