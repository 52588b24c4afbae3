"""The scripts of examples/consumers/ where something is missing: a sentence, and exit code 2."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "consumers"
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs node")


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    (tmp_path / "golden.json").write_text('{"texts": []}')
    return tmp_path


def refused(*command: object, path: Path | None = None) -> str:
    """Run a command that must exit with 2, and return the sentence that it says."""
    environment = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    ran = subprocess.run(
        [str(each) for each in command],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert (ran.returncode, ran.stdout) == (2, ""), ran.stderr
    assert "Traceback" not in ran.stderr
    return ran.stderr


def without(package: str, script: str, folder: Path) -> str:
    """Run a script where a package cannot be imported."""
    blocked = f"import sys, runpy; sys.modules[{package!r}] = None; sys.argv = sys.argv[1:]; "
    run = f"{blocked}sys.path.insert(0, {str(FOLDER)!r}); runpy.run_path(sys.argv[0])"
    return refused(sys.executable, "-c", run, FOLDER / script, folder)


@pytest.mark.parametrize(
    "program", ["model2vec", "optimum", "sentence_transformers", "text_embeddings_inference"]
)
def test_an_example_without_arguments_says_what_it_takes(program: str) -> None:
    """Of those whose packages are here; all have one parser."""
    script = FOLDER / f"check_{program}.py"
    assert refused(sys.executable, script).startswith(f"usage: check_{program}.py [-h] folder")


@needs_node
@pytest.mark.parametrize("program", ["onnxruntime", "transformers_js"])
def test_a_script_of_node_says_what_it_takes(program: str, tmp_path: Path) -> None:
    script = FOLDER / f"check_{program}.mjs"
    (usage,) = refused("node", script).splitlines()
    assert usage.startswith(f"usage: node check_{program}.mjs FOLDER")
    (sentence,) = refused("node", script, tmp_path / "none").splitlines()
    assert sentence == f"{tmp_path / 'none'} has no golden.json; name an exported folder"


@needs_node
def test_a_package_of_npm_that_is_missing_is_named(exported: Path) -> None:
    script = FOLDER / "check_onnxruntime.mjs"
    (sentence,) = refused("node", script, exported, "no-such-package").splitlines()
    command = f"npm install --prefix {FOLDER} no-such-package"
    assert sentence == f"no-such-package is not installed; run: {command}"


@pytest.mark.parametrize(
    ("script", "package", "install"),
    [
        ("check_fastembed.py", "fastembed", '"fastembed"'),
        ("check_mnn.py", "MNN", '"MNN"'),
        ("check_model2vec.py", "model2vec", '"model2vec"'),
        ("check_triton.py", "tritonclient", '"onnxruntime" "tritonclient[grpc]"'),
        ("check_sentence_transformers.py", "sentence_transformers", '"sentence-transformers"'),
    ],
)
def test_a_package_that_is_missing_is_named(
    script: str, package: str, install: str, exported: Path
) -> None:
    (sentence,) = without(package, script, exported).splitlines()
    assert sentence.endswith(f" is not installed; run: pip install {install}")


@pytest.mark.parametrize(
    ("script", "engine", "install"),
    [
        ("check_sentence_transformers.py", "onnx", "sentence-transformers[onnx]"),
        ("check_sentence_transformers.py", "openvino", "sentence-transformers[openvino]"),
        ("check_optimum.py", "onnx", "optimum-onnx[onnxruntime]"),
        ("check_optimum.py", "openvino", "optimum-intel[openvino]"),
    ],
)
def test_the_engine_is_that_of_the_folder(
    script: str, engine: str, install: str, exported: Path
) -> None:
    (exported / engine).mkdir()
    told = without("optimum", script, exported).splitlines()[-1]
    assert told.endswith(f' is not installed; run: pip install "{install}"')


def test_a_tritonclient_without_grpc_is_known(exported: Path, tmp_path: Path) -> None:
    package = tmp_path / "tritonclient"
    (package / "grpc").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "grpc" / "__init__.py").write_text(
        "try:\n"
        "    import no_such_grpc\n"
        "except ModuleNotFoundError as error:\n"
        "    raise RuntimeError('The installation does not include grpc support.') from error\n"
    )
    script = FOLDER / "check_triton.py"
    (sentence,) = refused(sys.executable, script, exported, path=tmp_path).splitlines()
    install = 'pip install "onnxruntime" "tritonclient[grpc]"'
    assert sentence == f"no_such_grpc is not installed; run: {install}"
