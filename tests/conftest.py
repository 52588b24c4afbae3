"""Tests run offline, quietly, and write to temporary folders alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before transformers is imported: it reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Before onnxruntime is: it would write to the home folder and look a name up.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# Before numpy is: the suite runs as many processes as there are cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))

from tiny import tiny_checkpoint

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny models: threads cost more than they give


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep converted and merged checkpoints out of the user's cache."""
    monkeypatch.setenv("M2DEXPORT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with mean pooling, normalised, with prompts; read only."""
    folder = tmp_path_factory.mktemp("bert")
    return tiny_checkpoint(folder, prompts={"query": "find: ", "document": ""})


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal decoder with last-token pooling and left padding; read only."""
    return tiny_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3", pooling="lasttoken")
